"""The files below a folder, whatever lies there."""

import os
from pathlib import Path

from proxyrob.errors import DataIntegrityError


def walk_files(folder: Path) -> list[Path]:
    """All files below a folder, folder by folder in the order of their paths, in each in the order of their names.

    Links are followed. Raises ``DataIntegrityError`` for one that leads to a folder that is read already, for such can be
    followed without end, and for what is no file: a pipe, which would never end, or a link to nothing.
    """
    found: list[tuple[str, list[str]]] = []
    waiting, seen = [str(folder)], set[tuple[int, int]]()
    while waiting:
        root = waiting.pop()
        status = os.stat(root)  # noqa: PTH116  (of every folder, as scandir gives it)
        if (status.st_dev, status.st_ino) in seen:
            raise DataIntegrityError(f"{root} is a link to a folder that is read already; remove it")
        seen.add((status.st_dev, status.st_ino))
        names = []
        with os.scandir(root) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append(entry.path)
                elif entry.is_file():
                    names.append(entry.name)
                elif not entry.name.startswith("."):
                    raise DataIntegrityError(f"{entry.path} is no file, but a pipe, a device or a link to nothing; remove it")
        found.append((root, sorted(names)))
    return [Path(root) / name for root, names in sorted(found) for name in names]
