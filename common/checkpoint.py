"""Checkpoints: one safetensors file each, written atomically and checked before anything uses it.

Tensors: `ema.<name>`, the averaged weights, named as in the network's state dict; in a training
checkpoint also `model.<name>`, `optimizer.<name>.exp_avg`, `rng.cpu` and so on. Metadata: JSON with
the flags of the run, the scalars that it needs to resume, and a sha256 of the tensors' bytes.

    python -m common.checkpoint --training FILE --small FILE    # a small file, for sampling

Loading a file runs no code, and no file decides what is read or written.
"""

import argparse
import contextlib
import hashlib
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from common.errors import UserError, one_line
from common.files import check_sha256, expand, fetch, file_sha256, is_address, replacing
from common.network_checks import height_and_width

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

KEY, FORMAT, MAX_HEADER = "diffusion-lessons", 2, 10_000_000
KINDS = {"lesson": str, "config": dict, "dataset": str, "step": int, "training": dict | None}
PATHS = {"output_dir", "resume", "start_from", "config", "data_dir"}
MAX_SIZES = {"num_timesteps": 1_000_000, "image_size": 4096, "image_channels": 64}
MAX_ARGUMENT = 1_000_000  # of any other argument of a network: some make lists of so many entries
N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory. It refuses values that no lesson can have, from files or flags."""

    lesson: str  # such as lesson_05 or lesson_05.class_conditional
    config: dict[str, Any]  # the run's flags except paths, the network's among them as `network`
    dataset: str  # name of the data
    step: int  # number of steps trained
    tensors: dict[str, Tensor]
    training: dict[str, Any] | None = None  # scalars to resume from; None in a small file
    source: str = ""  # the file that it was read from
    sha256: str = ""  # of the tensors' bytes, as that file states it

    def __post_init__(self) -> None:
        with self.must_fit():
            for name, expected in KINDS.items():
                if not isinstance(getattr(self, name), expected):
                    raise UserError(f"its {name} is not of the right type")
            if type(self.step) is not int or not 0 <= self.step < 10**12:
                raise UserError("its step is not valid")
            json.dumps([self.config, self.training], allow_nan=False)  # fails if not plain values
            network = self.config.get("network", {})
            unset = ("image_size", "image_channels")  # flags that may be None, unlike the network's
            flags = {k: v for k, v in self.config.items() if k not in unset or v is not None}
            for name, value in [*flags.items(), *network.items()]:
                most = MAX_SIZES.get(name, 0)
                pair = name == "image_size" and isinstance(value, list) and len(value) == 2
                for number in (value if pair else [value]) if most else []:
                    if type(number) is not int or not 1 <= number <= most:
                        raise UserError(f"{name} is {value!r}, not an integer from 1 to {most:,}")
                if name in network and isinstance(value, int | float) and abs(value) > MAX_ARGUMENT:
                    raise UserError(f"{name} is {value}: it must be at most {MAX_ARGUMENT:,}")
            config = {name: value for name, value in self.config.items() if name not in PATHS}
            object.__setattr__(self, "config", config)

    def must_fit(self) -> contextlib.AbstractContextManager[None]:
        """A context in which errors due to the config become one line that names the file."""
        return translate_errors(self.source)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the network is for."""
        with self.must_fit():
            network = self.config["network"]
            return network["image_channels"], *height_and_width(network["image_size"])

    @property
    def classes(self) -> list[str]:
        """The names of the classes that a folder of images has; none for other data."""
        with self.must_fit():
            names = self.config.get("classes", [])
            if not (isinstance(names, list) and all(type(name) is str for name in names)):
                raise UserError("its classes are not a list of names")
            return [one_line(name, 100) for name in names]

    def arguments(self, owner: type, group: str | None = None) -> dict[str, Any]:
        """The config, or a group in it, after checking that each value has the type of the owner's
        argument of that name."""
        values = self.config[group] if group else self.config
        wanted = inspect.signature(owner, eval_str=True).parameters
        for name, value in values.items():
            if name in wanted and not has_type(value, wanted[name].annotation):
                raise UserError(f"{name} is {one_line(repr(value), 60)}, of the wrong type")
        return values

    def build(self, make: Callable[[], N], prefix: str = "ema.") -> N:
        """The network that make() returns, with the tensors under prefix as its weights, in eval
        mode and without gradients. A network larger than the file is refused."""
        left = sum(1 + tensor.numel() for tensor in self.tensors.values())

        def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            """Called when a module registers a parameter, before it is initialised in memory."""
            nonlocal left
            left -= 0 if parameter is None else 1 + parameter.numel()
            if left < 0:
                raise UserError("its config describes a larger network than it holds")

        with self.must_fit(), register_module_parameter_registration_hook(count):
            module = make()
        self.fill(module, prefix)
        return module.eval().requires_grad_(False)

    def fill(self, module: nn.Module, prefix: str = "ema.") -> None:
        """Copy the tensors under prefix into a module, which keeps its dtype and memory layout.
        float16 is taken as float32; other differences in names, shapes or dtypes are refused."""
        found = {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}
        found |= {name: t.float() for name, t in found.items() if t.dtype == torch.float16}
        if difference := first_difference(found, module.state_dict()):
            raise UserError(
                f"{self.source} holds another network ({difference}): use the --network flags that "
                "it was trained with"
            )
        module.load_state_dict(found)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the same content gives the same bytes. Tensors must be finite."""
    tensors = {name: t.detach().contiguous().cpu() for name, t in checkpoint.tensors.items()}
    values = {name: getattr(checkpoint, name) for name in KINDS}
    values |= {"format": FORMAT, "sha256": digest(tensors)}
    with replacing(path) as temporary:
        metadata = {KEY: json.dumps(values, sort_keys=True)}
        safetensors.torch.save_file(tensors, temporary, metadata)


def load(source: str | Path, lesson: str | None = None, sha256: str | None = None) -> Checkpoint:
    """Read and check a file, or an http(s) address, which is downloaded once and kept in a cache.
    With lesson or sha256, a file of another lesson or with another sum is refused."""
    header = read_header(source, sha256)
    if lesson is not None and header.lesson != lesson:
        raise UserError(f"{header.source} is a checkpoint of {header.lesson}: use its scripts")
    with header.must_fit():
        tensors = safetensors.torch.load_file(header.source)  # mapped into memory, not copied
        if digest(tensors) != header.sha256:
            raise UserError("its tensors are not those that were saved")
    return replace(header, tensors=tensors)


def read_header(source: str | Path, sha256: str | None = None) -> Checkpoint:
    """A checkpoint without its tensors, which are not read unless sha256 is given."""
    check_sha256(sha256)
    path = fetch(str(source), sha256, check=load) if is_address(source) else expand(source)
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "It is a folder or a pipe")
        if sha256 and (found := file_sha256(path)) != sha256.lower():
            raise UserError(f"{path} has the sha256 {found}, not {sha256}: it is another file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= MAX_HEADER else b""
    except OSError as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({error.strerror}): "
            "name a file such as output/checkpoint_001000.safetensors"
        ) from None
    if not text:
        raise UserError(
            f"{path} is no checkpoint: these are .safetensors files, no longer .pt; published "
            "weights are converted by `python -m common.import_weights`"
        )
    with translate_errors(str(path)):
        values = json.loads(json.loads(text).get("__metadata__", {}).get(KEY, "{}"))
        if values.get("format") != FORMAT:
            raise UserError(
                f"{path} holds no checkpoint of these lessons (format {FORMAT}); published weights "
                "are converted by `python -m common.import_weights`"
            )
        fields = {name: values[name] for name in (*KINDS, "sha256")}
        return Checkpoint(**fields, tensors={}, source=str(path))


@contextlib.contextmanager
def translate_errors(source: str) -> Iterator[None]:
    """Turn every error that a damaged file causes into one line that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) and str(error).startswith(one_line(source)):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else one_line(error, 200)
        raise UserError(f"{source} is damaged ({reason}): use another file") from None


def digest(tensors: dict[str, Tensor]) -> str:
    """The sha256 of all tensors' bytes in the order of their names. All values must be finite."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        extremes = tensor.aminmax() if tensor.is_floating_point() and tensor.numel() else ()
        if not all(map(torch.isfinite, extremes)):
            raise UserError(f"{name} has values that are not finite: a checkpoint may have none")
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value from JSON has this type: int, list[int] | None and the like."""
    inner, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin in (list, Sequence):
        return isinstance(value, list) and all(has_type(item, inner[0]) for item in value)
    if inner:
        return any(has_type(value, part) for part in inner)
    return hint is Any or type(value) in ((int, float) if hint is float else (hint,))


def check_template(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], training: dict[str, Any]
) -> None:
    """Refuse a checkpoint whose tensors differ from the run's in names, shapes or dtypes, or its
    scalars in names or types. An empty dict among the run's accepts floats by any name. The
    random state of a GPU that the run does not use is ignored."""
    unused = {"rng.cuda", "rng.mps"} - tensors.keys()
    found = {name: t for name, t in checkpoint.tensors.items() if name not in unused}
    with checkpoint.must_fit():
        difference = first_difference(found, tensors)
        difference = difference or first_difference(checkpoint.training, training, "training.")
    if difference:
        raise UserError(
            f"{checkpoint.source} does not fit this run ({difference}): resume with the flags that "
            "it was started with"
        )


def first_difference(found: Any, wanted: Any, name: str = "") -> str | None:
    """The first key, type, shape or dtype that differs, in words."""
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        one, other = (
            f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
            for v in (found, wanted)
        )
        return None if one == other else f"{name[:-1]} is {one}, not {other}"
    wanted = wanted or dict.fromkeys(found, 0.0)
    for key in [*wanted, *found]:
        if key not in found or key not in wanted:
            return f"{name}{key} is {'not expected' if key in found else 'missing'}"
        if difference := first_difference(found[key], wanted[key], f"{name}{key}."):
            return difference
    return None


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; 0 for a file of another name."""
    number = re.fullmatch(r"checkpoint_(\d+)\.safetensors", path.name)
    return int(number[1]) if number else 0


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, in the order of their steps."""
    return sorted(filter(step_of, folder.glob("checkpoint_*.safetensors")), key=step_of)


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """The file to resume from: for auto the latest in the folder, or None if there is none."""
    if resume not in ("latest", "auto"):
        return expand(resume)
    files = saved(folder)
    if not files and resume == "latest":
        raise UserError(f"{folder} holds no checkpoint to resume: start without --resume")
    return files[-1] if files else None


def shrink(training: str, small: str) -> None:
    """Make a small file for sampling from a training checkpoint: the averaged weights in half
    precision, and the config. A file that exists is replaced only if it is small, too."""
    path = expand(small)
    if path.exists() and read_header(path).training is not None:
        raise UserError(f"--small {small} is a training checkpoint: name another file")
    checkpoint = load(training)
    ema = {name: t for name, t in checkpoint.tensors.items() if name.startswith("ema.")}
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in ema.items()}
    save(path, replace(checkpoint, tensors=tensors, training=None))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":  # not by common/cli.py, which imports this module
    parser = argparse.ArgumentParser("python -m common.checkpoint", description=shrink.__doc__)
    parser.add_argument("--training", required=True, metavar="FILE")
    parser.add_argument("--small", required=True, metavar="FILE")
    try:
        shrink(**vars(parser.parse_args()))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
