"""Files of torch's: tensors and plain values are read, and nothing else is."""

import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from pickle import UnpicklingError
from struct import error as StructError
from typing import IO, Any, cast

import torch
from torch import Tensor

from proxyrob.errors import DataIntegrityError
from proxyrob.storage.bounded import require_small

UNFIT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    StructError,
    TypeError,
    UnpicklingError,
    ValueError,
    zipfile.BadZipFile,
)
"""What reading a file of something else, or putting its states into parts that they do not fit, can end with."""

NEEDED = {
    "_codecs encode",  # how bytes are written
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
}
"""The functions that tensors and plain values are made with, beside their types. torch allows more, some of which make as
much as they are told: ``bytearray(10**11)`` takes twenty bytes."""

LEGACY_PICKLES = 5
"""In a file of torch's before version 1.6: a number, a version, the machine, the values, and the names of what follows."""

FOREIGN = "it holds more than tensors and plain values"


def read_tensors(path: Path, device: torch.device | str = "cpu") -> Any:
    """What ``torch.save`` has written: tensors, plain values, and lists, tuples and dicts of them.

    Raises ``DataIntegrityError`` with the reason, and without the file's name, when the file holds anything else, or promises
    more than it holds; no code in it is run.
    """
    try:
        _check(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file that is no checkpoint torch asks to have its unpickler extended
            content = torch.load(path, map_location=device, weights_only=True)
    except (torch.OutOfMemoryError, torch.AcceleratorError, DataIntegrityError):
        raise  # the first two are the device's own trouble, which torch derives from RuntimeError
    except UNFIT as error:
        # torch's own text on foreign objects advises to run them
        raise DataIntegrityError(FOREIGN if isinstance(error, UnpicklingError) else f"{error}") from error
    for tensor in _tensors_in(content):
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes() and not tensor.is_meta:
            raise DataIntegrityError(f"a tensor of shape {tuple(tensor.shape)} has fewer values in the file than it promises")
    return content


def _check(path: Path) -> None:
    """Look at a file's table of contents and at the functions that it names, without calling one."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            for _ in range(LEGACY_PICKLES):
                _check_pickle(file)
            return
    size_bytes = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise DataIntegrityError("its parts are compressed, which torch.save never does")
        if (promised := sum(entry.file_size for entry in entries)) > size_bytes:
            raise DataIntegrityError(f"it promises {promised} bytes in a file of {size_bytes}")
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):
                require_small(f"{path}: {entry.filename}", entry.file_size)
                with archive.open(entry) as file:
                    _check_pickle(cast(BufferedIOBase, file))  # typed more widely than it is


def _check_pickle(file: BufferedIOBase) -> None:
    for operation, argument, _ in pickletools.genops(cast("IO[bytes]", file)):
        if operation.name == "GLOBAL" and argument not in NEEDED and not _is_type(str(argument)):
            raise DataIntegrityError(FOREIGN)


def _is_type(name: str) -> bool:
    """Whether a name is that of a kind of storage or of numbers: ``torch FloatStorage``, ``torch float32``."""
    module, _, attribute = name.partition(" ")
    return module == "torch" and (attribute.endswith("Storage") or isinstance(getattr(torch, attribute, None), torch.dtype))


def _tensors_in(content: Any) -> Iterator[Tensor]:
    waiting, seen = [content], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        match value:
            case Tensor():
                yield value
            case dict():
                waiting += [*value.keys(), *value.values()]
            case list() | tuple() | set():
                waiting += value
