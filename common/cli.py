"""A typed, documented function as a command line, through jsonargparse.

    def main(clip_x0: bool = True, options: SamplingOptions = SamplingOptions()) -> None:
        "What it does, and an `Args:` section that becomes the help."

    if __name__ == "__main__":
        cli.run(main)

Every parameter is a flag; so is every field of a dataclass among them. Flags on the command line
override those of files. A mistake is one line on standard error and exit code 2.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from common.checkpoint import PATHS, find_checkpoint, read_header
from common.device import pick_device
from common.distributed import rank
from common.errors import UserError, one_line
from common.files import expand

KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


def run(
    main: Callable[..., None],
    argv: Sequence[str] | None = None,
    presets: bool = False,
    **groups: type,
) -> None:
    """Call main with what is on the command line.

    Args:
        main: the function.
        argv: the words of the command line; those of this process unless given.
        presets: whether configs/laptop.yaml or paper.yaml beside main's file applies by default.
        groups: parameters of main, each with the class whose arguments it collects in a dict: with
            network=UNet, `--network.channels 64` becomes main(network={"channels": 64, ...}).
            Arguments without a default are for the script to add.
    """
    for stream in (sys.stdout, sys.stderr):  # letters that it cannot show; None if it is closed
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        return main(**arguments(main, words, presets, groups))
    except (UserError, OSError) as error:
        line, code = f"error: {one_line(error)}\n", 2
    except KeyboardInterrupt:
        line, code = "stopped\n", 130
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(f"process {rank()}: {line}" if rank() > 0 else line)
    sys.exit(code)


def arguments(
    main: Callable[..., None], words: list[str], presets: bool, groups: dict[str, type]
) -> dict[str, Any]:
    """What to call main with."""
    parser = Parser(main, groups)
    folder = Path(inspect.getfile(main)).resolve().parent
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config", action="append", default=[])
    early.add_argument("--resume", nargs="?", const="latest")
    for name in ("output_dir", "device", "num_training_steps"):
        early.add_argument(f"--{name}")
    try:
        found, rest = early.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name} needs a value") from None
    typed = {name: v for name, v in vars(found).items() if v is not None and name != "config"}
    rest += [word for name, value in typed.items() for word in (f"--{name}", value)]
    output = expand(found.output_dir or folder / "output")
    resumed = find_checkpoint(found.resume, output) if found.resume else None
    if resumed:
        config = dict(read_header(resumed).config)
        if "num_training_steps" in typed:
            config["num_epochs"] = None  # which would override it
        parser.take_defaults(config, str(resumed), unknown_is_error=False)
    elif presets and not found.config:
        quiet = any(word.split("=")[0] in ("-h", "--help", "--print_config") for word in rest)
        found.config = [parser.default_preset(folder, found.device or "auto", quiet)]
    for name in found.config:
        path = find_preset(name, folder)
        parser.take_defaults(read_preset(path), str(path))
    return parser.parse(rest)


class Parser(ArgumentParser):
    """The flags of a function, those of its dataclasses and groups among them."""

    def __init__(self, main: Callable[..., None], groups: dict[str, type]) -> None:
        super().__init__(
            prog=Path(inspect.getfile(main)).name,
            usage="%(prog)s [--config FILE] [--FLAG VALUE ...]",
            description=(inspect.getdoc(main) or "").split("\nArgs:")[0].strip(),
            allow_abbrev=False,
        )
        self.classes = groups
        self.options: dict[str, type] = {}
        self.hints: dict[str, Any] = {}  # the type of each flag
        self.add_argument("--config", action="config", help="a preset: a YAML file of flags")
        for name, parameter in inspect.signature(main, eval_str=True).parameters.items():
            kind = parameter.annotation
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                self.options[name] = kind
                self.hints |= typing.get_type_hints(kind)
                self.add_class_arguments(kind, as_positional=False)
                if parameter.default is not parameter.empty:
                    self.set_defaults(dataclasses.asdict(parameter.default))
            elif name not in groups:
                self.hints[name] = kind
        self.add_function_arguments(main, as_positional=False, skip={*self.options, *groups})
        for name, group in groups.items():
            inner = inspect.signature(group, eval_str=True).parameters.values()
            self.hints |= {f"{name}.{p.name}": p.annotation for p in inner if p.default != p.empty}
            skip = {p.name for p in inner if p.default == p.empty}
            self.add_class_arguments(group, name, as_positional=False, skip=skip)

    def default_preset(self, folder: Path, device: str, quiet: bool) -> str:
        """paper.yaml for a GPU, laptop.yaml for anything else; says so, with its first line."""
        kind = pick_device(device).type
        chosen, other = ("paper", "laptop") if kind == "cuda" else ("laptop", "paper")
        path = folder / "configs" / f"{chosen}.yaml"
        about = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        text = f"Preset configs/{chosen}.yaml, as the device is {kind}: {about}\n"
        text += f"The other one: --config configs/{other}.yaml"
        self.description = f"{self.description} {text}. The defaults below are the preset's."
        if rank() == 0 and not quiet:
            print(text, flush=True)
        return str(path)

    def take_defaults(self, config: dict, source: str, unknown_is_error: bool = True) -> None:
        """Make a file's values the defaults, once they are known to be valid."""
        flat: dict[str, Any] = {}
        for name, value in config.items():
            group = name in self.classes and isinstance(value, dict)
            flat |= {f"{name}.{k}": v for k, v in value.items()} if group else {name: value}
        if not unknown_is_error:
            flat = {name: value for name, value in flat.items() if name in {*self.hints} - PATHS}
        try:
            for name in flat:
                if name in PATHS:
                    raise UserError(f"{name} is for the command line")
                if name not in self.hints:
                    self.error(f"unrecognized arguments: --{name}")
            values = self.parse_object(flat)
        except UserError as error:
            raise UserError(f"{source}: {one_line(error)}") from None
        self.set_defaults({name: values[name] for name in flat})

    def parse(self, words: list[str]) -> dict[str, Any]:
        """The arguments of the function, from the command line without its files."""
        values = self.parse_args(self.join_lists(words))
        for name, hint in self.hints.items():
            numbers = values[name] if isinstance(values[name], list) else [values[name]]
            if any(isinstance(n, int | float) and not abs(n) < 1e18 for n in numbers):
                self.refuse(name, values[name], in_words(hint))
        if not 0 <= values.get("seed", 0) < 2**32:
            self.refuse("seed", values.seed, f"from 0 to {2**32 - 1:,}")
        result = {name: v for name, v in values.as_dict().items() if name != "config"}
        if result.get("output_dir"):
            result["output_dir"] = str(expand(result["output_dir"]))
        for name, kind in self.options.items():
            fields = [field.name for field in dataclasses.fields(kind)]
            result[name] = kind(**{field: result.pop(field) for field in fields})
        return result

    def join_lists(self, words: list[str]) -> list[str]:
        """`--labels 3 1 4` as the one value that jsonargparse reads, `--labels=[3, 1, 4]`. Refuses
        numbers that YAML reads in its own way: 1:30 as 90, 010 as 8."""
        rest = [part for word in words for part in split_flag(word)]
        result: list[str] = []
        while rest:
            result.append(rest.pop(0))
            name = result[-1].removeprefix("--")
            if result[-1].startswith("--") and name in self.classes:
                raise UserError(f"--{name} takes no file: set its flags, such as --{name}.NAME")
            hint, values = self.hints.get(name), []
            while hint is not None and rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
                if not is_list(hint):
                    break
            is_text = str in parts_of(hint)
            is_number = {int, float} & {*parts_of(hint)}
            if any(re.search(r"\d:|(^|[\s,[])[-+]?0\d|\d_", v) for v in values if is_number):
                self.refuse(name, " ".join(values), in_words(hint))
            if is_list(hint) and not (len(values) == 1 and values[0].startswith("[")):
                joined = ", ".join(json.dumps(v) if is_text else v for v in values)
                values = [f"[{joined}]"]
            result[-1] += f"={values[0]}" if values else ""
        return result

    def refuse(self, name: str, value: Any, wanted: str) -> NoReturn:
        raise UserError(f"--{name} is {one_line(value, 60)}: it must be {wanted}")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UserError: which flag, and what it must be, in words."""
        text = " ".join(message.split())
        if unknown := re.search(r"(?:unrecognized arguments: |[Oo]ption ')(?:--)?([\w.]+)", text):
            near = difflib.get_close_matches(unknown[1], list(self.hints), 1)
            advice = f"did you mean --{near[0]}?" if near else "--help lists the flags"
            raise UserError(f"--{unknown[1]} is not known: {advice}")
        wrong = re.search(r'key "([\w.]+)".*Got value: (.*)', text)
        if wrong and wrong[1] in self.hints:
            self.refuse(wrong[1], wrong[2], in_words(self.hints[wrong[1]]))
        if empty := re.search(r"argument --([\w.]+).*expected one argument", text):
            raise UserError(f"--{empty[1]} needs a value")
        raise UserError(text.replace("Parser key", "flag"))


def split_flag(word: str) -> list[str]:
    """--flag=value as its two parts."""
    return word.split("=", 1) if re.match(r"--[\w.]+=", word) else [word]


def parts_of(hint: Any) -> list[Any]:
    """A type and all types within it: list[int] | None is made of list[int], int and None."""
    return [hint, *(part for inner in typing.get_args(hint) for part in parts_of(inner))]


def is_list(hint: Any) -> bool:
    return any(typing.get_origin(part) in (list, Sequence) for part in parts_of(hint))


def in_words(hint: Any) -> str:
    """A type in words."""
    inner = [in_words(part) for part in typing.get_args(hint) if part is not type(None)]
    if is_list(hint):
        return (
            f"a list, each {inner[0]}" if typing.get_origin(hint) in (list, Sequence) else inner[0]
        )
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    return " or ".join(inner) or KINDS.get(hint, str(hint))


def find_preset(name: str, folder: Path) -> Path:
    """A preset's file: as seen from here, else beside the script."""
    for path in (Path(name), folder / name):
        if path.is_file():
            return path
    names = sorted(str(path.relative_to(folder)) for path in folder.glob("configs/*.yaml"))
    raise UserError(f"--config {name} is not a file; beside the script are {', '.join(names)}")


def read_preset(path: Path) -> dict[str, Any]:
    """The flags in a YAML file, which may be neither long nor refer to itself."""
    try:
        if path.stat().st_size > 20_000:
            raise ValueError("it is too long")
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("it has aliases")
        flags = yaml.safe_load(text) or {}
        if not isinstance(flags, dict) or not all(isinstance(key, str) for key in flags):
            raise ValueError("it has no line such as `batch_size: 64`")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a file of flags ({one_line(error, 200)})") from None
    return {name: v for name, v in flags.items() if name not in PATHS or v is not None}
