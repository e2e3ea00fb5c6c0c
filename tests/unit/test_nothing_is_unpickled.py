"""No line of the program reads a file by a function that runs code in it, or that believes what its header promises."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flows
import proxyrob

ROOTS = [Path(package.__path__[0]) for package in (proxyrob, flows)]

WITH = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "onnx.load": ("load_external_data", False),
    "flow": ("persist_result", False),  # Prefect's files of results say themselves how they are read
    "task": ("persist_result", False),
}
"""Calls that have to say so."""

NEVER = {
    "eval",
    "exec",
    "np.lib.format.read_array",
    "yaml.full_load",
    "yaml.load",
    "yaml.unsafe_load",
    "torch.jit",
    "torch.hub",
}
NEVER_OF_ANYTHING = {"extract", "extractall", "from_pretrained", "pyfunc", "read_pickle", "unpack_archive"}
"""Names that no line has, alone or of whatever object."""

MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "tarfile"}

ONLY_IN = {
    "pickle.dumps": {"proxyrob/errors.py"},
    "pickle.loads": {"proxyrob/errors.py"},  # of what was pickled on the same line
    "pickle.UnpicklingError": {"flows/running/workers.py", "proxyrob/train/launch.py", "proxyrob/storage/tensors.py"},
    "torch.load": {"proxyrob/storage/tensors.py"},
    "np.load": {"proxyrob/storage/files.py"},
    "onnx.load": {"proxyrob/models/onnx_files.py"},
    "onnxruntime.InferenceSession": {"proxyrob/models/given.py", "proxyrob/export/parity.py"},  # the second reads our own
    "pq.ParquetFile": {"proxyrob/storage/bounded.py", "proxyrob/source/encoded.py"},
    "pq.read_table": {"proxyrob/evaluate/adversarial.py"},  # what was written on the line before
    "pq.read_schema": set[str](),
    "pd.read_parquet": set[str](),
    "Image.open": {"proxyrob/source/encoded.py", "flows/records/tracking.py"},  # the second reads our own figures
    "zipfile.ZipFile": {"proxyrob/source/arrays.py", "proxyrob/storage/tensors.py"},
    "torchvision.datasets": {"proxyrob/source/cifar.py"},  # unpickles what has the MD5 sum of the published file
    # what the user names: module:function, and a file of deployments
    "importlib.import_module": {"proxyrob/models/given.py", "flows/stack/deployments.py"},
}
"""Where such a name may stand: what it reads was checked there."""


def find_faults(source: str, name: str) -> Iterator[str]:
    """What a file of the program does that it must not."""
    for node in ast.walk(ast.parse(source)):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        match node:
            case ast.Import(names=names):
                found = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names):
                found = [f"{module}.{alias.name}" for alias in names]
            case ast.Attribute() | ast.Name():
                found = [ast.unparse(node)]
            case ast.Call(func=function, keywords=keywords):
                called = ast.unparse(function)
                key, value = WITH.get(called, ("", None))
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in keywords}
                if key and given.get(key) != str(value):
                    yield f"{where}: {called} without {key}={value}"
                continue
            case _:
                continue
        for used in found:
            if used in NEVER or used.rpartition(".")[2] in NEVER_OF_ANYTHING:
                yield f"{where}: {used}"
            if used.partition(".")[0] in MODULES and "." in used and used not in ONLY_IN:
                yield f"{where}: {used}"
            if name not in ONLY_IN.get(used, {name}):
                yield f"{where}: {used}, which only {', '.join(sorted(ONLY_IN[used])) or 'storage/bounded.py'} may have"


def test_no_file_of_the_program_unpickles() -> None:
    """Nor reads a table, a network or an archive in another way than the one that looks first."""
    files = [(path, path.relative_to(root.parent).as_posix()) for root in ROOTS for path in sorted(root.rglob("*.py"))]
    assert len(files) > 150
    assert [fault for path, name in files for fault in find_faults(path.read_text(), name)] == []
    said = {name for names in ONLY_IN.values() for name in names}
    assert said <= {name for _, name in files}, "a file that may is gone"


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "pickle.loads(content)",
        "pickle.Unpickler(file)",
        "from pickle import loads",
        "import joblib; joblib.load(path)",
        "yaml.load(text, yaml.Loader)",
        "archive.extractall(folder)",
        "tarfile.open(path)",
        "onnx.load(path)",
        "onnxruntime.InferenceSession(path)",
        "pd.read_parquet(path)",
        "pq.ParquetFile(path)",
        "Image.open(path)",
        "mlflow.pyfunc.load_model(uri)",
        "@task(retries=2)\ndef work(): ...",
        "@flow(persist_result=True)\ndef work(): ...",
        "eval(text)",
    ],
)
def test_what_is_looked_for_is_found(line: str) -> None:
    """Each in a line of its own, in a file that may not."""
    assert list(find_faults(line, "flows/plan.py"))


def test_a_line_that_looks_first_is_left_alone() -> None:
    """As the program has it."""
    assert not list(find_faults("torch.load(path, weights_only=True)", "proxyrob/storage/tensors.py"))
    assert not list(find_faults("model.eval(); yaml.safe_load(text)", "flows/plan.py"))
