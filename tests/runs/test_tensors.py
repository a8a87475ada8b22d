"""Files of tensors: the library's own bytes, and their checksum."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load, save

from fastssl.runs.tensors import NAMES, write_tensors


def test_the_file_is_the_librarys_byte_for_byte(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"z": (3, 5), "a": (), "none": (0, 2), 'quoted "ä"': (7,)}
    tensors = {
        f"{number}.{name}": (torch.rand(shape, generator=generator) * 100).to(dtype)
        for number, dtype in enumerate(reversed(NAMES))
        for name, shape in shapes.items()
    }
    tensors["columns"] = torch.rand(4, 3, generator=generator).T.contiguous()
    rare = {"rare": torch.zeros(3, dtype=torch.float8_e4m3fnuz)}
    for some in (tensors, {"one": torch.ones(2)}, {}, tensors | rare):
        checksum = write_tensors(tmp_path / "file", some)
        written = (tmp_path / "file").read_bytes()
        assert written == save(some)
        assert checksum == hashlib.sha256(written).hexdigest()
    write_tensors(tmp_path / "file", tensors)
    back = load((tmp_path / "file").read_bytes())
    assert back.keys() == tensors.keys()
    assert all(back[name].view(torch.uint8).equal(t.view(torch.uint8)) for name, t in tensors.items() if t.ndim)
