"""What results were computed with: the versions of the libraries and the commit of this program."""

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import proxyrob

VERSIONED = ("torch", "diffusers", "pyautoattack", "onnx", "onnxruntime", "prefect", "mlflow")


def library_versions() -> dict[str, str]:
    """What the figures were computed with."""
    return {
        "proxyrob": proxyrob.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in VERSIONED},
    }


def git_commit() -> str | None:
    """The commit of the checkout this code runs from, or ``None`` outside one or without git."""
    if shutil.which("git") is None:
        return None
    found = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None
