"""Tensors to a .safetensors file and its checksum, straight from where they lie.

safetensors' own `save` copies everything twice while it holds Python's lock, and training stands still meanwhile.
Hashing and writing a view of memory do neither. The file is the library's, byte for byte.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

NAMES = {  # of the format, in the library's order: the widest first, so that every tensor is aligned
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
RANKS = {dtype: rank for rank, dtype in enumerate(NAMES)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes contiguous host tensors by name; the sha256 of the file. The library writes types that are not in NAMES.

    Raises:
        OSError: for example when the disk is full.
    """
    sha256 = hashlib.sha256()
    with path.open("wb") as file:
        known = all(tensor.dtype in NAMES for tensor in tensors.values())
        for part in parts_of(tensors) if known else [save(dict(tensors))]:
            sha256.update(part)
            file.write(part)
    return sha256.hexdigest()


def parts_of(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The file in order: the header's length and JSON, then each tensor's memory."""
    ordered = sorted(tensors.items(), key=lambda item: (RANKS[item[1].dtype], item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
