"""ONNX files from anywhere: one file is the whole model."""

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, TensorProto

from proxyrob.errors import DataIntegrityError
from proxyrob.storage.bounded import require_small

LARGEST_BYTES = (2 << 30) - 1
"""Of a message in protobuf's format, in which ONNX files are written."""


def read_onnx(path: Path) -> ModelProto:
    """The model in a file. Nothing but this file is opened.

    A tensor may be said to lie in another file, anywhere on this machine. Raises ``DataIntegrityError`` where one is, and when
    the file cannot be read.
    """
    require_small(str(path), path.stat().st_size, LARGEST_BYTES)
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise DataIntegrityError(f"{path} cannot be read as an ONNX model: {error}; copy or export it again") from error
    for tensor in _tensors_in(model):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "?")
            raise DataIntegrityError(
                f"{path} keeps the tensor {tensor.name!r} in another file ({location}), and no other file is opened; make one "
                f"file of it where it comes from: onnx.save(onnx.load({path.name!r}), 'one.onnx')"
            )
    return model


def require_whole_onnx(path: Path) -> None:
    """Raise ``DataIntegrityError`` when a file is no ONNX model, or keeps a part of it in another file."""
    read_onnx(path)


def _tensors_in(message: Message) -> Iterator[TensorProto]:
    """Every tensor, in whatever part of a model; the parser refuses what is nested more than a hundred levels deep."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else (value,):
                if isinstance(part, TensorProto):
                    yield part
                else:
                    yield from _tensors_in(part)
