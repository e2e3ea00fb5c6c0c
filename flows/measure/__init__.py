"""Measuring anybody's model, outside a run."""
