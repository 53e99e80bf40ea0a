"""A typed, documented function as a command line, through jsonargparse.

    def main(batch_size: int = 128, options: RunOptions = RunOptions()) -> None:
        "What it does, and an `Args:` section that becomes the help."

    if __name__ == "__main__":
        cli.run(main)

Every parameter is a flag; so is every field of a dataclass among them. A mistake is one line on
standard error and exit code 2.
"""

import dataclasses
import inspect
import json
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from common import checkpoint, processes
from common.device import pick_device
from common.errors import UserError, printable
from common.folder import find_checkpoint, saved


class Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        raise UserError(" ".join(message.split()).replace("Parser key", "flag"))


def run(
    main: Callable[..., None],
    argv: Sequence[str] | None = None,
    presets: bool = False,
    **groups: type,
) -> None:
    """Call main with what stands on the command line.

    Args:
        main: the function.
        argv: the words of the command line; those of this process unless given.
        presets: whether configs/laptop.yaml or paper.yaml beside main's file applies by default.
        groups: parameters of main, each with the class whose arguments it collects in a dict: with
            network=UNet, `--network.channels 64` arrives as main(network={"channels": 64, ...}).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        call(main, words, presets, groups)
    except (UserError, OSError) as error:
        which = f"process {processes.rank()}: " if processes.rank() > 0 else ""
        print(f"{which}error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def call(
    main: Callable[..., None], words: list[str], presets: bool, groups: dict[str, type]
) -> None:
    folder = Path(inspect.getfile(main)).resolve().parent
    parameters = inspect.signature(main, eval_str=True).parameters
    flat: dict[str, Any] = {
        p.name: p.annotation for p in parameters.values() if dataclasses.is_dataclass(p.annotation)
    }
    parser = Parser(
        prog=Path(inspect.getfile(main)).name, description=summary(main), allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="a preset: a YAML file of flags")
    parser.add_function_arguments(main, as_positional=False, skip={*flat, *groups})
    for name, kind in groups.items():
        # The script says these, from its data and its own flags.
        skip = {"image_channels", "image_size", "learned_variance", "num_timesteps"}
        parser.add_class_arguments(kind, name, as_positional=False, skip=skip)
    for kind in flat.values():
        parser.add_class_arguments(kind, as_positional=False)

    words = bare_resume(several_words(words, lists(parameters, groups)))
    if "resume" in fields(flat):
        words = resume_latest(words, output_of(words, folder))
    resumed = value_of(words, "resume") if "resume" in fields(flat) else None
    if resumed is not None:
        parser.set_defaults(known(parser, resumed_config(resumed, words, folder)))
    elif (
        presets
        and value_of(words, "config") is None
        and "--help" not in words
        and "-h" not in words
    ):
        quiet = any(word.startswith("--print_config") for word in words)
        words = ["--config", default_preset(folder, value_of(words, "device"), quiet), *words]
    words = presets_first(find_presets(words, folder))
    values = parser.parse_args(words).as_dict()
    values.pop("config", None)
    check_seed(values.get("seed", 0))
    if values.get("output_dir"):
        values["output_dir"] = str(Path(values["output_dir"]).expanduser())
    arguments = {p: values.pop(p) for p in list(values) if p in parameters}
    for name, kind in flat.items():
        arguments[name] = kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)})
    main(**arguments)


def summary(main: Callable[..., None]) -> str:
    return (inspect.getdoc(main) or "").split("\nArgs:")[0].strip()


def lists(parameters: Mapping[str, inspect.Parameter], groups: dict[str, type]) -> dict[str, bool]:
    """The flags that take several words, each with whether these are strings."""
    named = {p.name: p.annotation for p in parameters.values()}
    for group, kind in groups.items():
        inner = inspect.signature(kind, eval_str=True).parameters.values()
        named |= {f"{group}.{p.name}": p.annotation for p in inner}
    result = {}
    for name, annotation in named.items():
        for part in [annotation, *typing.get_args(annotation)]:
            if typing.get_origin(part) in (list, Sequence):
                result[name] = typing.get_args(part) == (str,)
    return result


def fields(flat: dict[str, Any]) -> set[str]:
    return {field.name for kind in flat.values() for field in dataclasses.fields(kind)}


def value_of(words: list[str], flag: str) -> str | None:
    """What stands behind --flag, the last time it is given."""
    value = None
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word == f"--{flag}":
            value = following
        elif word.startswith(f"--{flag}="):
            value = word.partition("=")[2]
    return value


def several_words(words: list[str], lists: dict[str, bool]) -> list[str]:
    """`--labels 3 1 4` as the one YAML value that jsonargparse reads: `--labels [3, 1, 4]`."""
    result: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        result.append(word)
        if word.startswith("--") and word[2:] in lists:
            values = []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            if lists[word[2:]]:
                values = [json.dumps(value) for value in values]
            one = len(values) == 1 and values[0].startswith("[")
            result.append(values[0] if one else "[" + ", ".join(values) + "]")
    return result


def bare_resume(words: list[str]) -> list[str]:
    result = []
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        result.append(word)
        if word == "--resume" and following.startswith("--"):
            result.append("latest")
    return result


def resume_latest(words: list[str], output: Path) -> list[str]:
    """As torchrun starts a run anew: from its last checkpoint, if it had saved one."""
    again = processes.restarted(output) and saved(output)
    return [*words, "--resume", "latest"] if again else words


def output_of(words: list[str], folder: Path) -> Path:
    """Where a run's checkpoints are."""
    return Path(value_of(words, "output_dir") or folder / "output").expanduser()


def resumed_config(resume: str, words: list[str], folder: Path) -> dict[str, Any]:
    """The flags of the run to go on with; what stands on the command line comes on top."""
    config = checkpoint.load(find_checkpoint(resume, output_of(words, folder)))["config"]
    if value_of(words, "num_training_steps") is not None:
        config.pop("num_epochs", None)  # it would decide
    return config


def check_seed(seed: int | None) -> None:
    """Every seed there is makes 100,000 more, which must fit into 64 bits."""
    if seed is not None and not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: take 0 to {2**32 - 1:,}")


def known(parser: ArgumentParser, config: dict[str, Any]) -> dict[str, Any]:
    """What of a checkpoint's config is still a flag; nested keys are joined by dots."""
    joined: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            joined |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            joined[key] = value
    flags = set(parser.get_defaults().keys())
    return {key: value for key, value in joined.items() if key in flags}


def default_preset(folder: Path, device: str | None, quiet: bool) -> str:
    """paper.yaml for a GPU, laptop.yaml for anything else; says so, with its first line."""
    kind = pick_device(device or "auto").type
    chosen, other = ("paper", "laptop") if kind == "cuda" else ("laptop", "paper")
    path = folder / "configs" / f"{chosen}.yaml"
    note = path.read_text().splitlines()[0].lstrip("# ")
    if processes.rank() == 0 and not quiet:
        print(f"Preset configs/{chosen}.yaml, as the device is {kind}: {note}")
        print(f"The other one: --config configs/{other}.yaml", flush=True)
    return str(path)


def find_presets(words: list[str], folder: Path) -> list[str]:
    """Each --config as a path that exists: from here, else beside the script."""
    result = list(words)
    for index, word in enumerate(words):
        if word.startswith("--config="):
            result[index] = "--config=" + preset_path(word.partition("=")[2], folder)
        elif word == "--config" and index + 1 < len(words):
            result[index + 1] = preset_path(words[index + 1], folder)
    return result


def presets_first(words: list[str]) -> list[str]:
    """As jsonargparse lets a preset override the flags that stand before it."""
    presets: list[str] = []
    rest: list[str] = []
    for word, before in zip(words, ["", *words], strict=False):
        is_preset = word == "--config" or word.startswith("--config=") or before == "--config"
        (presets if is_preset else rest).append(word)
    return [*presets, *rest]


def preset_path(name: str, folder: Path) -> str:
    for path in (Path(name), folder / name):
        if path.is_file():
            check_preset(path)
            return str(path)
    there = sorted(str(p.relative_to(folder)) for p in folder.glob("configs/*.yaml"))
    raise UserError(
        f"--config {name} does not exist; beside the script are {', '.join(there) or 'none'}"
    )


def check_preset(path: Path) -> None:
    """Refuse a file that is no short list of flags, before anything is made of it."""
    if path.stat().st_size > 20_000:
        raise UserError(f"--config {path} is too long for a preset: a YAML file of flags is wanted")
    depth = 0
    try:
        text = path.read_text(encoding="utf-8")
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > 10 or isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
                raise UserError(f"--config {path}: lists this deep, tags and aliases are refused")
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > 1000:
                raise UserError(f"--config {path}: a value of more than 1,000 letters is refused")
        root = yaml.compose(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--config {path} is no valid YAML ({reason})") from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {path} is no list of flags, such as `batch_size: 64`")
    for key, value in root.value if root is not None else []:
        if key.value == "config":
            raise UserError(f"--config {path} names another preset: put their flags into one")
        if key.value in ("output_dir", "resume") and value.value not in ("null", "~", ""):
            raise UserError(
                f"--config {path} sets {key.value}: give it on the command line instead"
            )
