"""Training classifiers on real and synthetic images."""

from proxyrob.train.loop import TrainReport, read_history, train_classifier
from proxyrob.train.objectives import compute_losses

__all__ = ["TrainReport", "compute_losses", "read_history", "train_classifier"]
