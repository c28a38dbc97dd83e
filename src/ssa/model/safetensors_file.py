"""Writing a safetensors file in one pass: hashed while it is written, and without holding Python's lock.

The format is a length, a JSON header and the bytes of the tensors. The library's own writer copies every tensor and keeps the lock until
the file is there, which would stop training in the meantime.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

PIECE = 1 << 24
"""Bytes written and hashed at a time."""


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[int, str]:
    """Write CPU `tensors` to `path`, synced to the disk; returns (bytes, SHA-256) of the file."""
    # the widest first, as the library does: every tensor then starts at a multiple of its element size
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name in names:
        x = tensors[name]
        end = offset + x.numel() * x.element_size()
        header[name] = {"dtype": _dtype_name(x.dtype), "shape": list(x.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            file.write(piece)
            digest.update(piece)
        for name in names:
            content = tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(content), PIECE):
                file.write(content[start : start + PIECE])
                digest.update(content[start : start + PIECE])
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + offset, digest.hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
        torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
    }  # fmt: skip
    return names[dtype]
