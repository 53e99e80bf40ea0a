"""Where the tensors live and how precisely they are computed."""

import contextlib
import ctypes
import os
import platform
from typing import Literal

import torch

from common.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
Precision = Literal["auto", "float32", "bfloat16"]


def pick_device(name: str = "auto") -> torch.device:
    """cuda where there is one, else mps, else cpu; or the one that is asked for."""
    if name == "auto":
        found = torch.cuda.is_available(), torch.backends.mps.is_available()
        name = "cuda" if found[0] else "mps" if found[1] else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("cpu, cuda and mps are known")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}): try --device cpu") from None
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let the C library keep what one step frees for the next one. By itself it returns large
    tensors' memory, and the system clears every page that it gives out again, step after step. For
    glibc; elsewhere nothing is done."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def autocast(
    device: torch.device, precision: Precision = "auto"
) -> contextlib.AbstractContextManager:
    """Inside it, convolutions and matrix products run in bfloat16 where the hardware has it."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise UserError(f"precision {precision!r} is not known: take auto, float32 or bfloat16")
    lower = precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=lower)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware itself multiplies bfloat16 (without, it is slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        return torch.cpu._is_avx512_bf16_supported()
    return False


def hardware(device: torch.device) -> str:
    """The device in words, for logs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo") as lines:
            models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()}"
