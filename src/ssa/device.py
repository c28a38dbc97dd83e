"""Devices and precisions, by the names that a user gives them."""

from __future__ import annotations

import os

import torch

from ssa.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def resolve_device(device: str) -> torch.device:
    """The device that `device` names, else a `UserError`; "auto" never picks mps."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r} is unknown; use auto, cpu, cuda, cuda:N or mps") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {device!r} does not exist: PyTorch sees {torch.cuda.device_count()} CUDA devices; use auto or cpu"
        )
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device {device!r} does not exist on this machine; use auto or cpu")
    if found.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {device!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return found


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The precision that `dtype` names on `device`."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return getattr(torch, dtype)


def local_device(device: str) -> str:
    """The device of this process where `device` leaves it open: under torchrun, the GPU of its number on this machine."""
    local = os.environ.get("LOCAL_RANK", "")
    if device not in ("auto", "cuda") or not local.isdecimal() or not torch.cuda.is_available():
        return device
    return f"cuda:{local}"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
