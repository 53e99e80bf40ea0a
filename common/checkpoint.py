"""Checkpoints: one safetensors file each, written atomically and checked before anything uses it.

Tensors: `ema.<name>`, the averaged weights, named as in the network's state dict; in a training
checkpoint also `model.<name>`, `optimizer.<name>.exp_avg`, `rng.cpu` and so on. Metadata: JSON with
the flags of the run, the scalars that it needs to resume, and a sha256 of the tensors' bytes.

    python -m common.checkpoint --training FILE --small FILE    # makes a small one, for sampling

A file runs no code, and never decides where anything is read or written.
"""

import contextlib
import hashlib
import io
import json
import math
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from common.errors import UserError, one_line
from common.files import check_sha256, expand, fetch, is_address, write_atomically

KEY, FORMAT, MAX_HEADER = "diffusion-lessons", 2, 10_000_000
KINDS = {"lesson": str, "config": dict, "dataset": str, "step": int, "training": dict | None}
PATHS = {"output_dir", "resume", "start_from", "config", "data_dir"}
MAX_SIZES = {"num_timesteps": 1_000_000, "image_size": 4096, "image_channels": 64}
MAX_ARGUMENT = 1_000_000  # of any other argument of a network
N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory. Values that no lesson has are refused, from a file or from flags.

    Args:
        lesson: such as lesson_05 or lesson_05.class_conditional.
        config: the run's flags, the network's among them as `network`; paths are left out.
        dataset: name of the data.
        step: number of steps trained.
        tensors: by name.
        training: scalars to resume from; None in a small file.
        source: the file it was read from.
    """

    lesson: str
    config: dict[str, Any]
    dataset: str
    step: int
    tensors: dict[str, Tensor]
    training: dict[str, Any] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        with self.must_fit():
            for name, expected in KINDS.items():
                if not isinstance(getattr(self, name), expected):
                    raise UserError(f"its {name} is not of the right type")
            if not re.fullmatch(r"\w+(\.\w+)*", self.lesson, re.ASCII):
                raise UserError(f"the lesson {self.lesson!a} is not valid")
            if not 0 <= self.step < 10**12:
                raise UserError("its step is not valid")
            json.dumps([self.config, self.training], allow_nan=False)  # fails if not plain values
            check_sizes(self.config)
            config = {name: value for name, value in self.config.items() if name not in PATHS}
            object.__setattr__(self, "config", config)

    def must_fit(self) -> contextlib.AbstractContextManager[None]:
        """While something is made of the config: whatever fails is one line that names the file."""
        return translate_errors(self.source)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the network is for."""
        with self.must_fit():
            network = self.config["network"]
            return network["image_channels"], network["image_size"], network["image_size"]

    def build(self, make: Callable[[], N], prefix: str = "ema.") -> N:
        """The network that make() returns, with the tensors under prefix as its weights, in eval
        mode and without gradients. A config cannot make it larger than the file is."""
        num_values = sum(1 + tensor.numel() for tensor in self.tensors.values())
        with self.must_fit(), at_most(num_values):
            module = make()
        self.fill(module, prefix)
        return module.eval().requires_grad_(False)

    def fill(self, module: nn.Module, prefix: str = "ema.") -> None:
        """Copy the tensors under prefix into a module, which keeps its dtype and memory layout.
        float16 stands for float32; other differences in names, shapes or dtypes are refused."""
        found = {
            name.removeprefix(prefix): tensor.float() if tensor.dtype == torch.float16 else tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }
        wanted = module.state_dict()
        if difference := first_difference(found, wanted):
            raise UserError(
                f"{self.source} holds another network ({difference}): use another file, or the "
                "--network flags that it was trained with"
            )
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(found[name])


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the same content gives the same bytes. Tensors must be finite."""
    tensors = {}
    for name, tensor in checkpoint.tensors.items():  # safetensors refuses other and shared layouts
        dense = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
        tensors[name] = dense.copy_(tensor.detach())
    if bad := first_not_finite(tensors):
        raise UserError(f"{path} was not written: {bad} has values that are not finite")
    values = {name: getattr(checkpoint, name) for name in KINDS}
    values |= {"format": FORMAT, "sha256": digest(tensors)}
    metadata = {KEY: json.dumps(values, sort_keys=True)}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load(source: str | Path, lesson: str | None = None, sha256: str | None = None) -> Checkpoint:
    """Read a checkpoint and check that it is one.

    Args:
        source: a file, or an http(s) address, which is downloaded once and kept in a cache.
        lesson: refuse a checkpoint of another lesson.
        sha256: refuse a file with another sum.
    """
    check_sha256(sha256)
    with opened(source, sha256) as (path, file):
        data = file.read()
    if sha256 and (found := hashlib.sha256(data).hexdigest()) != sha256.lower():
        raise UserError(f"{path} has the sha256 {found}, not {sha256}: it is another file")
    header, tensors_sha256 = parse_header(io.BytesIO(data), path)
    if lesson is not None and header.lesson != lesson:
        raise UserError(
            f"{path} is a checkpoint of {header.lesson}, not of {lesson}: "
            f"use the scripts in {header.lesson.replace('.', '/')}/"
        )
    with translate_errors(path):
        tensors = safetensors.torch.load(data)
        if digest(tensors) != tensors_sha256:
            raise UserError("its tensors are not those that were saved")
        if bad := first_not_finite(tensors):
            raise UserError(f"{bad} has values that are not finite")
    return replace(header, tensors=tensors)


def read_header(source: str | Path) -> Checkpoint:
    """A checkpoint without its tensors, which are not read."""
    with opened(source) as (path, file):
        return parse_header(file, path)[0]


@contextlib.contextmanager
def opened(source: str | Path, sha256: str | None = None) -> Iterator[tuple[str, BinaryIO]]:
    """The path of a file, and the file; an address is downloaded first."""
    path = fetch(str(source), sha256, check=load) if is_address(source) else expand(source)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(0, "It is a folder or a pipe")
        with path.open("rb") as file:
            yield str(path), file
    except OSError as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({error.strerror}): "
            "name a file such as output/checkpoint_001000.safetensors"
        ) from None


def parse_header(file: BinaryIO, source: str) -> tuple[Checkpoint, str]:
    """A checkpoint without its tensors, and the sha256 of these."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= MAX_HEADER:
        raise UserError(f"{source} is no checkpoint: these are .safetensors files, no longer .pt")
    with translate_errors(source):
        header = json.loads(file.read(length).decode())
        text = header.get("__metadata__", {}).get(KEY)
        if text is None:
            raise UserError(f"{source} holds no checkpoint of these lessons")
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise UserError(
                f"{source} has format {values['format']}, but this version reads {FORMAT}: "
                "update the repository"
            )
        fields = {name: values[name] for name in KINDS}
        return Checkpoint(**fields, tensors={}, source=source), values["sha256"]


@contextlib.contextmanager
def translate_errors(source: str) -> Iterator[None]:
    """Turn whatever a damaged file makes fail into one line that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) and str(error).startswith(one_line(source)):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else one_line(error, 200)
        raise UserError(f"{source} is damaged ({reason}): use another file") from None


def check_sizes(config: dict[str, Any], most: float = math.inf) -> None:
    """Refuse sizes that no lesson has, before anything is made of them."""
    for name, value in config.items():
        limit = MAX_SIZES.get(name, most)
        if isinstance(value, dict):
            check_sizes(value, MAX_ARGUMENT)
        elif name in MAX_SIZES and not (type(value) is int and 1 <= value <= limit):
            raise UserError(f"{name} is {value!r}: it must be an integer from 1 to {limit:,}")
        elif isinstance(value, int | float) and abs(value) > limit:
            raise UserError(f"{name} is {value}: it must be at most {limit:,}")


@contextlib.contextmanager
def at_most(num_values: int) -> Iterator[None]:
    """Inside it, no network can be made that has more parameters. Modules register theirs before
    they initialise them, and so a larger one is refused before it takes memory."""
    made = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += 0 if parameter is None else 1 + parameter.numel()
        if made > num_values:
            raise UserError("its config describes a larger network than it holds")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def digest(tensors: dict[str, Tensor]) -> str:
    """The sha256 of all tensors' bytes in the order of their names."""
    sha256 = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    for name, tensor in tensors.items():
        has_floats = tensor.is_floating_point() and tensor.numel() > 0
        if has_floats and not torch.stack(tensor.aminmax()).isfinite().all():
            return name
    return None


def check_template(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], training: dict[str, Any]
) -> None:
    """Refuse a training checkpoint that is not of the kind that a run would save.

    Args:
        checkpoint: as it was loaded.
        tensors: the run's; the checkpoint must have the same names, shapes and dtypes.
        training: the run's scalars; the checkpoint must have the same keys and types. An empty dict
            among them stands for floats by any name.
    """
    with checkpoint.must_fit():
        difference = first_difference(checkpoint.tensors, tensors)
        difference = difference or first_difference(checkpoint.training, training, "training.")
    if difference:
        raise UserError(
            f"{checkpoint.source} does not fit this run ({difference}): resume with the flags that "
            "it was started with"
        )


def first_difference(found: Any, wanted: Any, name: str = "") -> str | None:
    """The first key, type, shape or dtype that differs, in words."""
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        kinds = kind(found), kind(wanted)
        return None if kinds[0] == kinds[1] else f"{name[:-1]} is {kinds[0]}, not {kinds[1]}"
    wanted = wanted or dict.fromkeys(found, 0.0)
    for key in [*wanted, *found]:
        if key not in found or key not in wanted:
            return f"{name}{key} is {'not expected' if key in found else 'missing'}"
        if difference := first_difference(found[key], wanted[key], f"{name}{key}."):
            return difference
    return None


def kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(kind, value))}]"
    return type(value).__name__


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; 0 for a file of another name."""
    number = re.fullmatch(r"checkpoint_(\d+)\.safetensors", path.name)
    return int(number[1]) if number else 0


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, in the order of their steps."""
    return sorted(filter(step_of, folder.glob("checkpoint_*.safetensors")), key=step_of)


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """The file that --resume means. auto is the latest in the folder, or None if there is none."""
    if resume not in ("latest", "auto"):
        return expand(resume)
    files = saved(folder)
    if not files and resume == "latest":
        raise UserError(f"{folder} holds no checkpoint to resume: start without --resume")
    return files[-1] if files else None


def shrink(training: str, small: str) -> None:
    """Make a small file for sampling: the averaged weights in half precision, and the config.

    Args:
        training: the checkpoint of a training run.
        small: the file to write; only a small checkpoint is replaced.
    """
    path = expand(small)
    if path.exists() and read_header(path).training is not None:
        raise UserError(f"--small {small} is a training checkpoint: name another file")
    checkpoint = load(training)
    tensors = {name: t for name, t in checkpoint.tensors.items() if name.startswith("ema.")}
    tensors |= {name: t.half() for name, t in tensors.items() if t.is_floating_point()}
    save(path, replace(checkpoint, tensors=tensors, training=None, source=""))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.modules["common.checkpoint"] = sys.modules["__main__"]  # cli must not load it once more
    from common import cli

    cli.run(shrink)
