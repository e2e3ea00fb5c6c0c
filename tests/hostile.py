"""Files that were made to do harm: to run code, to reach other files, to fill memory."""

import base64
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from onnx import TensorProto, helper

from proxyrob.storage import Stage
from proxyrob.storage.files import sha256_of, write_bytes

MARKER = "somebody-elses-code-ran"
MANY = 10**12
BIG = 8 << 30
"""More than any reader may take for a file of a few kilobytes."""


class Trap:
    """Makes a folder called ``MARKER`` below ``folder`` when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder / MARKER),)


class _Sized:
    """Becomes so many bytes when it is unpickled; torch allows that where it reads «weights only»."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (self.size_bytes,)


def pickled(folder: Path) -> bytes:
    """A bare pickle with a trap, as deep as a checkpoint would have it."""
    return pickle.dumps({"parts": {"model": Trap(folder)}, "history": []}, protocol=2)


def torch_file(content: Any, *, compressed: bool = False) -> bytes:
    """What ``torch.save`` writes, or the same with its parts compressed, which torch reads as well."""
    saved = io.BytesIO()
    torch.save(content, saved)
    if not compressed:
        return saved.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return packed.getvalue()


def torch_trap(folder: Path) -> bytes:
    """A checkpoint of torch's that holds a trap."""
    return torch_file({"parts": {"model": Trap(folder)}, "history": []})


def torch_bomb() -> bytes:
    """A few hundred bytes that become eight gigabytes where they are read."""
    return torch_file({"parts": {"model": _Sized(BIG)}, "history": []})


def torch_view() -> bytes:
    """One number that calls itself a tensor of 10¹² of them."""
    return torch_file({"parts": {"model": {"weight": torch.zeros(1).expand(MANY)}}, "history": []})


def prefect_result(folder: Path, how: str) -> bytes:
    """A result in Prefect's format: it names its own serializer, and in JSON the function that makes its value."""
    if how == "pickle":
        serializer, result = {"type": "pickle"}, base64.b64encode(pickle.dumps(Trap(folder))).decode()
    else:
        called = {"__class__": "subprocess.getoutput", "data": [f"mkdir {folder / MARKER}"]}
        serializer, result = {"type": "json"}, json.dumps(called)
    return json.dumps({"metadata": {"serializer": serializer, "prefect_version": "3.8.8"}, "result": result}).encode()


def npy(shape: tuple[int, ...], kind: str = "|u1", *, content: bytes = b"", header_bytes: int | None = None) -> bytes:
    """An array of whatever its header says."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    if header_bytes is not None:
        return b"\x93NUMPY\x02\x00" + struct.pack("<I", header_bytes) + header
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def objects(folder: Path) -> bytes:
    """An array of objects, one of which is a trap."""
    file = io.BytesIO()
    np.save(file, np.array([Trap(folder)], object), allow_pickle=True)
    return file.getvalue()


def long_npz(path: Path) -> Path:
    """A hundred kilobytes whose one array has a header of a hundred megabytes."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("image.npy", "w", force_zip64=True) as member,
    ):
        member.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", 100 << 20))
        for _ in range(100):
            member.write(b" " * (1 << 20))
    return path


def empty_npz(path: Path, size_bytes: int) -> Path:
    """Black images of 32×32, a thousandth of their size on disk."""
    images = size_bytes // 3072
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("image.npy", "w", force_zip64=True) as member,
    ):
        member.write(npy((images, 32, 32, 3)))
        for _ in range(images // 1000):
            member.write(bytes(3072 * 1000))
        member.write(bytes(3072 * (images % 1000)))
    return path


def png_of(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and holds nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n(x) print\n"


def many_rows(path: Path, columns: dict[str, Any], rows: int) -> Path:
    """A table of kilobytes with the same row again and again; a text stands in it once."""
    arrays = {}
    for name, value in columns.items():
        values = pa.array([value])
        indices = pa.array(np.zeros(rows, np.int8))
        arrays[name] = pa.DictionaryArray.from_arrays(indices, values)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays), path, compression="zstd", row_group_size=rows, store_schema=False)
    return path


def outside(location: str) -> bytes:
    """An ONNX model of which one tensor is said to lie in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[10], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])
    nodes = [helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("Gemm", ["flat", "z", "w"], ["logits"])]
    zeros = helper.make_tensor("z", TensorProto.FLOAT, [64, 10], np.zeros(640, np.float32))
    graph = helper.make_graph(nodes, "theirs", [images], [logits], [zeros, tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", onnx.defs.onnx_opset_version())]).SerializeToString()


def replace_file(stage: Stage, name: str, content: bytes) -> Path:
    """Put another file in the place of one of a stage's, as somebody does who can write to the store: with its record."""
    record = stage.record()
    assert record is not None
    path = stage.folder / name
    path.unlink(missing_ok=True)
    write_bytes(path, content)
    entry = {"name": name, "size_bytes": len(content), "sha256": sha256_of(path)}
    others = [known.model_dump() for known in record.files if known.name != name]
    content_of_record = type(record).model_validate({**record.model_dump(), "files": [*others, entry]})
    write_bytes(stage.record_path, content_of_record.model_dump_json().encode())
    return path


def zipped(path: Path, member: str) -> Path:
    """A zip file of images under a name that leads elsewhere."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, npy((1, 4, 4, 3), content=bytes(48)))
    return path


def with_metadata(path: Path, metadata: bytes) -> Path:
    """A table of images whose class names lie in such metadata."""
    table = pa.table({"image": [b"image"], "label": [0]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, path)
    return path


def call() -> None:
    """What must not be called."""
    (Path(os.environ[MARKER]) / MARKER).mkdir()


def unpickle(content: bytes) -> None:
    """What nobody else here does."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        torch.load(io.BytesIO(content), weights_only=False)
    else:
        pickle.loads(content)  # noqa: S301  (a trap of our own)
