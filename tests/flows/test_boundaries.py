"""The library stands alone."""

import subprocess
import sys
from pathlib import Path

ALONE = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("prefect", "mlflow", "flows", "typer", "rich", "pydantic_settings"):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Missing())
from pathlib import Path
import pkgutil, importlib
import proxyrob
for module in pkgutil.walk_packages(proxyrob.__path__, "proxyrob."):
    importlib.import_module(module.name)

from proxyrob.config import CnnModel, DigitsSource, RobustTrainConfig
from proxyrob.source import prepare_digits
from proxyrob.storage import Stage
from proxyrob.threat import parse_threat
from proxyrob.train import train_classifier

def stage(name):
    return Stage(name, name.ljust(64, "0"), Path(sys.argv[1]) / name, {})

prepare_digits(DigitsSource(), seed=0, stage=stage("source"))
config = RobustTrainConfig(steps=3, synthetic_fraction=0.0, gamma=1.0)
threat = parse_threat("linf:0.1")
report = train_classifier(
    CnnModel(widths=(4,)), config, source=stage("source"), synthetic=(), threat=threat, seed=0, stage=stage("train")
)
print(report.steps, (stage("train").folder / "model.safetensors").stat().st_size > 0)
"""


def test_library_trains_without_prefect_and_mlflow(tmp_path: Path) -> None:
    """Every module of the library imports, and a classifier trains, where Prefect, MLflow and the flows cannot be imported."""
    done = subprocess.run([sys.executable, "-c", ALONE, tmp_path], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "True"]


def test_command_line_starts_without_heavy_imports() -> None:
    """Help and refusals come at once: the command line imports neither torch, Prefect nor MLflow before they are needed."""
    script = "import sys, flows.cli; print([name for name in ('torch', 'prefect', 'mlflow', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
