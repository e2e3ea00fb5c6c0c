"""Attacks as plain functions."""

from proxyrob.attacks.pgd import attack_pgd
from proxyrob.attacks.projection import project, random_start

__all__ = ["attack_pgd", "project", "random_start"]
