"""Stage folders and files that appear whole or not at all."""

from proxyrob.storage.stage import FileEntry, Report, Stage, StageRecord

__all__ = ["FileEntry", "Report", "Stage", "StageRecord"]
