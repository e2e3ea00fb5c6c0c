"""Stage folders, stores and files that appear whole or not at all."""

from proxyrob.storage.place import DataPlace
from proxyrob.storage.stage import FileEntry, Report, Stage, StageRecord
from proxyrob.storage.store import ObjectInfo, Store, open_store

__all__ = ["DataPlace", "FileEntry", "ObjectInfo", "Report", "Stage", "StageRecord", "Store", "open_store"]
