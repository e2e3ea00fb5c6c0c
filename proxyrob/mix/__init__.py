"""Real and synthetic images together, in an order that is a pure function of seed and position."""

from proxyrob.mix.augment import cut_and_paste, shift_and_mirror
from proxyrob.mix.batches import Augmentation, Mix, MixedBatch, require_equal_shares
from proxyrob.mix.order import EpochOrder, WindowOrder
from proxyrob.mix.view import SyntheticSet, SyntheticView, split_count

__all__ = [
    "Augmentation",
    "EpochOrder",
    "Mix",
    "MixedBatch",
    "SyntheticSet",
    "SyntheticView",
    "WindowOrder",
    "cut_and_paste",
    "require_equal_shares",
    "shift_and_mirror",
    "split_count",
]
