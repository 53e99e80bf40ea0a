"""What a checkpoint's file may hold: looked at before it is loaded, and again afterwards.

A checkpoint is a zip archive of torch.save: one pickle, which says how tensors and plain values are
put together, and one entry for each tensor's numbers. A pickle can name functions to call, sizes
that no memory holds, and lists within lists without end. Nothing here runs what is in the file.
"""

import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from common.errors import UserError

# All that torch.save writes for dicts of tensors and plain values.
KINDS = ["Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"]
NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
NAMES |= {f"torch {kind}Storage" for kind in KINDS}
MOST_VALUES, MOST_DEPTH = 1_000_000, 12
MOST = {"num_timesteps": 1_000_000, "image_size": 4096, "image_channels": 64}


class Damaged(Exception):
    """What is wrong with the file, in a few words."""


def check_archive(path: Path) -> None:
    """Refuse a file that is not whole, that unpacks to more than itself, or that names code."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4" or not zipfile.is_zipfile(file):
            raise UserError(f"{path} is no checkpoint, or was cut short: copy or download it again")
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > size:
            raise UserError(f"{path} claims more than it holds and was not loaded")
        if len({entry.filename for entry in entries}) < len(entries):
            raise Damaged("an entry occurs twice")
        if (broken := archive.testzip()) is not None:
            raise Damaged(f"the sum of {broken!a:.60} is wrong")
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if [entry.filename.rpartition("/")[2] for entry in pickles] != ["data.pkl"]:
            raise Damaged("it has no data.pkl, or several")
        if not named(archive.read(pickles[0])) <= NAMES:
            raise UserError(
                f"{path} holds more than tensors and plain values; it could run code and was not "
                "loaded"
            )


def named(pickled: bytes) -> set[str]:
    """The names of code in a pickle, without running it."""
    names = set()
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            names.add(str(argument))
        elif opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            names.add("?")  # other ways to name code, which torch.save does not take
    return names


def check_values(content: Any, size: int) -> None:
    """Refuse what is not a plain value or a tensor, and values that are more than the file is.

    size: of the file, in bytes. One list may be in a pickle many times over: each is counted.
    """
    numbers = 0
    waiting = [(content, 0)]
    for count, (value, depth) in enumerate(drain(waiting)):
        if count > MOST_VALUES or depth > MOST_DEPTH:
            raise Damaged("it has lists within lists without end")
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu":
                raise Damaged("it has a tensor of another kind")
            numbers += value.numel() * value.element_size()
            if numbers > size:
                raise Damaged("its tensors claim more than it holds")
        elif isinstance(value, dict):
            waiting += [(inner, depth + 1) for pair in value.items() for inner in pair]
        elif isinstance(value, list | tuple):
            waiting += [(inner, depth + 1) for inner in value]
        elif isinstance(value, int):
            if abs(value) >= 2**64:
                raise Damaged("it has a number without end")
        elif not isinstance(value, str | float | None):
            raise Damaged(f"it has a {type(value).__name__}")


def drain(waiting: list[Any]) -> Iterator[Any]:
    while waiting:
        yield waiting.pop()


def check_sizes(config: dict[str, Any]) -> None:
    """Refuse figures in a config, and in the groups within it, that no lesson has."""
    for name, value in config.items():
        if isinstance(value, dict):
            check_sizes(value)
        elif isinstance(value, int | float) and name in MOST and not value <= MOST[name]:
            raise Damaged(f"{name} is {value}")


@contextmanager
def at_most(num_weights: int) -> Iterator[None]:
    """Inside it no network can be made that has more weights than that."""
    made = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += 0 if parameter is None else 1 + parameter.numel()
        if made > num_weights:
            raise ValueError("its config describes a larger network than it holds")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
