"""The device, its precision, and its random number generators."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from typing import Literal

from common.errors import UserError

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
Precision = Literal["auto", "float32", "bfloat16"]


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; for auto cuda if available, else mps, else cpu."""
    if name == "auto":
        found = torch.cuda.is_available(), torch.backends.mps.is_available()
        name = "cuda" if found[0] else "mps" if found[1] else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("only cpu, cuda and mps are supported")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}): try --device cpu") from None
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, for bits/dim above all
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step. By default it returns large blocks to the
    system, which clears their pages again at every step. No effect with other C libraries."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def autocast(
    device: torch.device, precision: Precision = "auto"
) -> contextlib.AbstractContextManager:
    """A context with convolutions and matrix products in bfloat16 if the hardware supports it."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise UserError(f"precision {precision!r} is not known: choose auto, float32 or bfloat16")
    lower = precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=lower)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16. Emulated, it would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        return torch.cpu._is_avx512_bf16_supported()
    return False


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the random generators that code for this device uses, by type of device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":  # torch.cuda, torch.mps
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_states(device: torch.device, states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], device)


@contextlib.contextmanager
def forked_rng(
    device: torch.device, start: int | dict[str, Tensor] | None = None
) -> Iterator[None]:
    """A context that does not affect random numbers drawn after it.

    start: seed inside the context, or states of the generators; they go on from their current
    states unless given.
    """
    states = random_states(device)
    try:
        if isinstance(start, int):
            torch.manual_seed(start)
        elif start is not None:
            set_random_states(device, start)
        yield
    finally:
        set_random_states(device, states)


def hardware(device: torch.device) -> str:
    """The name of the hardware, for logs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    count = torch.get_num_threads()
    return f"{name}, {count} thread{'s' if count > 1 else ''} of {os.cpu_count()}"
