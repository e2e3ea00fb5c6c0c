"""Pictures of a run and of its data."""

from proxyrob.figures.run import CERTIFIED, CURVES, DROPPED, REAL_AND_SYNTHETIC, PicturesReport, draw_run
from proxyrob.figures.sets import draw_set

__all__ = ["CERTIFIED", "CURVES", "DROPPED", "REAL_AND_SYNTHETIC", "PicturesReport", "draw_run", "draw_set"]
