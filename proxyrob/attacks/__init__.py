"""Attacks as plain functions."""

from proxyrob.attacks.apgd import attack_apgd, attack_apgd_targeted, targeted_dlr, targeted_margin
from proxyrob.attacks.fab import attack_fab
from proxyrob.attacks.margin import margins
from proxyrob.attacks.pgd import attack_pgd
from proxyrob.attacks.projection import project, random_start
from proxyrob.attacks.square import attack_square
from proxyrob.attacks.standing import Attacked, Confirm

__all__ = [
    "Attacked",
    "Confirm",
    "attack_apgd",
    "attack_apgd_targeted",
    "attack_fab",
    "attack_pgd",
    "attack_square",
    "margins",
    "project",
    "random_start",
    "targeted_dlr",
    "targeted_margin",
]
