"""Labels for synthetic images, and the filter that drops doubtful ones."""

from proxyrob.label.labeling import LabelReport, label_shards, read_labels
from proxyrob.label.rule import apply_rule

__all__ = ["LabelReport", "apply_rule", "label_shards", "read_labels"]
