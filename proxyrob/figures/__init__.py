"""Pictures of a run."""

from proxyrob.figures.run import CERTIFIED, CURVES, DROPPED, REAL_AND_SYNTHETIC, PicturesReport, draw_run

__all__ = ["CERTIFIED", "CURVES", "DROPPED", "REAL_AND_SYNTHETIC", "PicturesReport", "draw_run"]
