"""Python imports this as it starts on a node of a test's cluster: units of shared work are noted there as they are done.

``PROXYROB_TEST_UNITS`` is the file, ``PROXYROB_TEST_UNIT_S`` how long each takes at least, so that there is time for a kill.
"""

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any


class Counting(MetaPathFinder):
    """Waits until the module is imported whose units are to be counted: most processes of a node never do."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "proxyrob.storage.shared":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_count(module: ModuleType) -> None:
            execute(module)
            from tests.counting import count_units

            count_units(Path(os.environ["PROXYROB_TEST_UNITS"]), seconds=float(os.environ["PROXYROB_TEST_UNIT_S"]))

        spec.loader.exec_module = execute_and_count  # pyright: ignore[reportAttributeAccessIssue]  (that of this one loader)
        return spec


sys.meta_path.insert(0, Counting())
