"""Labels for synthetic images, and the filters that drop doubtful ones and copies of test images."""

from proxyrob.label.labeling import LabelReport, adopt_labels, label_shards, suspicious_shards
from proxyrob.label.leaks import LeakFinder, LeakReport, find_leaks
from proxyrob.label.rule import apply_rule

__all__ = [
    "LabelReport",
    "LeakFinder",
    "LeakReport",
    "adopt_labels",
    "apply_rule",
    "find_leaks",
    "label_shards",
    "suspicious_shards",
]
