"""Make a checkpoint of lesson 5 or 9 from weights that others published.

    python -m common.import_weights FILE_OR_URL [--out F.safetensors] [--sha256 SUM] [--half]

A file is recognised by the names and shapes of its weights, which the lessons' published.py list.
This is the only place that reads pickles. PyTorch reads tensors and plain values from them, and
refuses everything else, so that no code in a file runs.
"""

import argparse
import json
import shlex
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

from common.checkpoint import Checkpoint, save, translate_errors
from common.errors import UserError, one_line
from common.files import MAX_BYTES, ROOT, check_sha256, expand, fetch, file_sha256, is_address
from common.lessons import Published, published

import safetensors.torch
import torch
from torch import Tensor, nn

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Shapes = dict[str, tuple[int, ...]]


def import_weights(source: str, out: str | None, sha256: str | None, half: bool) -> list[str]:
    """Make a checkpoint of lesson 5 or 9 from published weights. Returns the words of a command
    that draws samples from it.

    Raises:
        UserError: the file cannot be read, is not the one with that sha256, or holds no network of
            these lessons; or the output exists.
    """
    check_sha256(sha256)
    path = fetch(source, sha256, check=read_tensors) if is_address(source) else expand(source)
    if not path.is_file():
        raise UserError(f"{path} is not a file: name one, or its address")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES:,} bytes: no network here is")
    found = file_sha256(path)
    if sha256 and found != sha256.lower():
        raise UserError(f"{path} has the sha256 {found}, not {sha256}: it is another file")
    tensors = read_tensors(path)
    lesson, name, known, weights = recognise(tensors, path)
    target = expand(out or f"{name}.safetensors")
    if target.exists():
        raise UserError(f"{target} exists: name another file with --out")
    size = sum(weight.numel() for weight in weights.values())
    saved = {f"ema.{k}": weight.half() if half else weight for k, weight in weights.items()}
    config = {**known.config, "published": name, "published_sha256": found}
    # Step 0: most files do not say how long they were trained.
    save(target, Checkpoint(lesson, config, known.dataset, 0, saved))
    print(f"{path}: {name}, {size:,} weights, sha256 {found}")
    print(f"{target}: a checkpoint of {lesson}, {target.stat().st_size / 1e6:.1f} MB. Sample it:")
    script, *flags = published()[lesson].SAMPLE
    words = [str(ROOT / script).removeprefix(f"{Path.cwd()}/"), *flags, "--num_samples", "4"]
    return [sys.executable, *words, "--model_checkpoint", str(target)]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a file of torch.save: a state dict, or a list that
    ends with one, as the training code of DDIM's authors saves."""
    with translate_errors(str(path)):
        with path.open("rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # after the length of the header
        content = safetensors.torch.load_file(path) if is_safetensors else read_pickle(path)
        content = content[-1] if isinstance(content, list) and content else content
        if not isinstance(content, dict) or not content:
            raise UserError("it holds no weights by name")
        for name, tensor in content.items():
            if not isinstance(name, str) or not is_weight(tensor):
                raise UserError(f"{str(name)[:80]!a} in it is no weight")
        return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def read_pickle(path: Path) -> Any:
    """What torch.save wrote, in a zip archive or in the older format."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise UserError("it is compressed, which torch.save does not do")
    try:
        with path.open("rb") as file:  # torch.load would take the name x.safetensors for a format
            return torch.load(file, "cpu", weights_only=True)
    except UnpicklingError:
        raise UserError("it is incomplete, or holds objects that may run code") from None


def is_weight(value: Any) -> bool:
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided
    return is_dense and value.device.type == "cpu" and value.dtype in DTYPES


def recognise(
    tensors: dict[str, Tensor], path: Path
) -> tuple[str, str, Published, dict[str, Tensor]]:
    """Which published network this is: its lesson, its name, what is known about it, and its
    weights under our names."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    nearest = (0, "")
    for lesson, module in published().items():
        if missing := module.missing(shapes):
            needs = " and ".join(missing)
            raise UserError(f"{path} needs {needs}: no network of these lessons has this")
        for name, known, network, names in candidates(lesson, module, shapes, path):
            wanted = their_shapes(network, names)
            difference = first_difference(shapes, wanted)
            if not difference:
                return lesson, name, known, convert(tensors, network, names, path)
            nearest = max(nearest, (len(shapes.keys() & wanted), f"{name}: {difference}"))
    if nearest[0] > 0:
        raise UserError(f"{path} is no network that these lessons know; nearest is {nearest[1]}")
    known_names = ", ".join(name for module in published().values() for name in module.PUBLISHED)
    raise UserError(f"{path} is no network that these lessons know, which are {known_names}")


def candidates(
    lesson: str, module: ModuleType, shapes: Shapes, path: Path
) -> Iterator[tuple[str, Published, nn.Module, dict[str, list[str]]]]:
    """The networks of a lesson that the file may hold, each without memory, and for each naming
    the names of its weights."""
    for name, known in known_networks(lesson, module, shapes, path).items():
        with translate_errors(str(path)), torch.device("meta"):
            network = module.UNet(**known.config["network"])
        for table in known.names:
            yield name, known, network, their_names(network, table)


def convert(
    tensors: dict[str, Tensor], network: nn.Module, names: dict[str, list[str]], path: Path
) -> dict[str, Tensor]:
    """The weights of our network from theirs, which have the right shapes, as float32."""
    result = {}
    for ours, weight in network.state_dict().items():
        joined = torch.cat([tensors[name] for name in names[ours]]).float()
        if not joined.isfinite().all():
            raise UserError(f"{path}: {', '.join(names[ours])} has values that are not finite")
        result[ours] = joined.reshape(weight.shape)
    return result


def known_networks(
    lesson: str, module: ModuleType, shapes: Shapes, path: Path
) -> dict[str, Published]:
    """The network that a config.json beside the file describes, as in a Hub folder, else all that
    the lesson lists."""
    config = path.absolute().with_name("config.json")  # the Hub's cache has links to elsewhere
    from_diffusers = getattr(module, "from_diffusers", None)
    if not (from_diffusers and config.is_file() and "conv_norm_out.weight" in shapes):
        return module.PUBLISHED
    with translate_errors(str(config)):
        scheduler = read_json(config.with_name("scheduler_config.json"))
        known = from_diffusers(read_json(config), scheduler, str(config))
        Checkpoint(lesson, known.config, known.dataset, 0, {}, source=str(config))  # checks values
    return {config.parent.name: known}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; an empty one if there is no file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > 100_000:
        raise UserError("it is too long")
    return dict(json.loads(path.read_bytes()))


def their_names(network: Any, table: dict[str, str]) -> dict[str, list[str]]:
    """The names that another code has for each weight of our network, from a table such as
    lesson_05/published.py has: three names where q, k and v are kept apart."""
    places, result = dict(table), {}
    num_levels = 1 + sum(isinstance(layer, nn.Conv2d) for layer in network.down)
    for side in ("down", "up"):
        level = number = block = last = 0
        for index, layer in enumerate(getattr(network, side)):
            depth = level if side == "down" else num_levels - 1 - level
            at = {"level": level, "depth": depth, "number": number, "layer": index + 1}
            if isinstance(layer, nn.Conv2d):  # it halves or doubles the image
                places[f"{side}.{index}"] = table[side].format(**at, block=block - 1, last=last)
                level, number = level + 1, 0
                continue
            for part in ("residual", "attention"):
                name = table[f"{side}.{part}"].format(**at, block=block)
                places[f"{side}.{index}.{part}"] = name
            number, block, last = number + 1, block + 1, 1 + (layer.attention is not None)
    for ours in network.state_dict():  # such as down.4.attention.qkv.weight
        layer, _, kind = ours.rpartition(".")
        theirs = [places[layer]] if layer in places else []
        if not theirs:  # inside a residual block or an attention layer
            place, _, part = layer.rpartition(".")
            inner = table[f"{place.rpartition('.')[2]}.{part}"]
            theirs = [f"{places[place]}.{name}" for name in inner.split()]
        result[ours] = [f"{name}.{kind}" for name in theirs]
    return result


def their_shapes(network: nn.Module, names: dict[str, list[str]]) -> Shapes:
    """The shapes of the weights in the other code, as our network has them."""
    result = {}
    for ours, weight in network.state_dict().items():
        for theirs in names[ours]:
            result[theirs] = (len(weight) // len(names[ours]), *weight.shape[1:])
    return result


def first_difference(found: Shapes, wanted: Shapes) -> str | None:
    """The first weight that is missing or of another shape, in words. A matrix may be written as
    the kernel of a 1x1 convolution."""
    for name in [*wanted, *found]:
        if name not in found or name not in wanted:
            return f"{name} is {'missing' if name in wanted else 'not expected'}"
        ones = (1,) * (len(found[name]) - len(wanted[name]))
        if found[name] != (*wanted[name], *ones):
            return f"{name} has the shape {found[name]}, not {wanted[name]}"
    return None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m common.import_weights",
        description="Make a checkpoint of lesson 5 or 9 from published weights.",
    )
    parser.add_argument("source", metavar="FILE_OR_URL", help="safetensors, .bin, .pt or .ckpt")
    parser.add_argument("--out", metavar="F", help="the checkpoint; NAME.safetensors unless given")
    parser.add_argument("--sha256", metavar="SUM", help="refuse a file with another sum")
    parser.add_argument("--half", action="store_true", help="save float16 instead of float32")
    try:
        print(shlex.join(import_weights(**vars(parser.parse_args(argv)))))
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {one_line(error)}\n")


if __name__ == "__main__":
    main()
