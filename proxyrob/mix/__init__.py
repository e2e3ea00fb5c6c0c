"""Real and synthetic images together, in an order that is a pure function of seed and position."""

from proxyrob.mix.batches import Mix, MixedBatch, read_synthetic, shift_images
from proxyrob.mix.order import EpochOrder

__all__ = ["EpochOrder", "Mix", "MixedBatch", "read_synthetic", "shift_images"]
