"""Training classifiers on real and synthetic images."""

from proxyrob.train.awp import awp_gamma, perturbed_weights
from proxyrob.train.curves import read_curve, read_history
from proxyrob.train.launch import train_in_processes
from proxyrob.train.loop import TrainReport, train_classifier
from proxyrob.train.objectives import LossParts, PerturbedBatch, losses_on, perturb_images
from proxyrob.train.optimizer import build_average, build_optimizer, clip_gradients

__all__ = [
    "LossParts",
    "PerturbedBatch",
    "TrainReport",
    "awp_gamma",
    "build_average",
    "build_optimizer",
    "clip_gradients",
    "losses_on",
    "perturb_images",
    "perturbed_weights",
    "read_curve",
    "read_history",
    "train_classifier",
    "train_in_processes",
]
