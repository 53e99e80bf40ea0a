"""A typed, documented function as a command line, through jsonargparse.

    def main(clip_x0: bool = True, options: SamplingOptions = SamplingOptions()) -> None:
        "What it does, and an `Args:` section that becomes the help."

    if __name__ == "__main__":
        cli.run(main)

Every parameter is a flag; so is every field of a dataclass among them. Flags on the command line
override those of files. A mistake is one line on standard error and exit code 2.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import math
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from common.checkpoint import PATHS, find_checkpoint, read_header
from common.device import pick_device
from common.distributed import rank
from common.errors import UserError, is_out_of_memory, one_line
from common.files import expand
from common.stopping import stoppable
from common.streams import forgiving_streams

import yaml
from jsonargparse import ArgumentParser, Namespace

Main = Callable[..., None]
NUMBER = re.compile(r"[-+]?(0|[1-9]\d*|(?=\.\d))(\.\d*)?([eE][-+]?\d+)?")
KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


def run(
    main: Main,
    argv: Sequence[str] | None = None,
    presets: bool = False,
    resumes: bool = False,
    **groups: type,
) -> None:
    """Call main with what is on the command line. Ctrl-C, SIGTERM and SIGHUP stop it.

    Args:
        main: the function.
        argv: the words of the command line; those of this process unless given.
        presets: whether configs/laptop.yaml or paper.yaml beside main's file applies by default.
        resumes: whether main, when it is started again, goes on where it was stopped.
        groups: parameters of main, each with the class whose arguments it collects in a dict: with
            network=UNet, `--network.channels 64` becomes main(network={"channels": 64, ...}).
            Arguments without a default are for the script to add.
    """
    words = sys.argv[1:] if argv is None else argv
    with forgiving_streams():
        try:
            with stoppable():
                return main(**arguments(main, words, presets, groups))
        except (UserError, OSError) as error:
            line, code = f"error: {one_line(error)}\n", 2
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            line, code = "error: out of memory: try smaller numbers, such as fewer samples\n", 2
        except KeyboardInterrupt as error:
            code = 128 + getattr(error, "number", 2)
            line = "goes on from here" if resumes else "starts again"
            line = f"stopped: the same command {line}\n"
        sys.stderr.write(f"process {rank()}: {line}" if rank() > 0 else line)
    sys.exit(code)


def arguments(main: Main, words: Sequence[str], presets: bool, groups: dict) -> dict[str, Any]:
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
    if found.output_dir == "":
        raise UserError("--output_dir is empty: name a folder, or leave the flag out")
    typed = {name: v for name, v in vars(found).items() if v is not None and name != "config"}
    output = expand(found.output_dir or folder / "output")
    typed |= {"output_dir": str(output)} if found.output_dir else {}
    rest += [word for name, value in typed.items() for word in (f"--{name}", value)]
    resumed = find_checkpoint(found.resume, output) if found.resume else None
    if resumed:
        config = dict(read_header(resumed).config)
        if "num_training_steps" in typed:
            config |= {"num_epochs": None, "minutes": None}  # which would override it
        parser.take_defaults(config, str(resumed), unknown_is_error=False)
    elif presets and not found.config:
        found.config = [parser.default_preset(folder, found.device or "auto")]
    for name in found.config:
        path = find_preset(name, folder)
        parser.take_defaults(read_preset(path), str(path))
    return parser.parse(rest)


class Parser(ArgumentParser):
    """The flags of a function, those of its dataclasses and groups among them."""

    def __init__(self, main: Main, groups: dict[str, type]) -> None:
        description = (inspect.getdoc(main) or "").split("\nArgs:")[0].strip()
        usage = "%(prog)s [--config FILE] [--FLAG VALUE ...]"
        super().__init__(usage=usage, description=description, allow_abbrev=False)
        self.classes, self.notice = groups, ""
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
            self._option_string_actions.pop(f"--{name}").help = argparse.SUPPRESS  # it takes a file
        if path := self.hints.get("model_checkpoint") and self.get_default("model_checkpoint"):
            self.set_defaults(model_checkpoint=path.removeprefix(f"{Path.cwd()}/"))  # for --help

    def default_preset(self, folder: Path, device: str) -> str:
        """paper.yaml for a GPU, laptop.yaml for anything else; --help and parse() say so."""
        kind = pick_device(device).type
        chosen, other = ("paper", "laptop") if kind == "cuda" else ("laptop", "paper")
        path = folder / "configs" / f"{chosen}.yaml"
        about = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        self.notice = f"Preset configs/{chosen}.yaml, as the device is {kind}: {about}\n"
        self.notice += f"The other one: --config configs/{other}.yaml"
        self.description = f"{self.description} {self.notice}. The defaults below are the preset's."
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
            if paths := PATHS & {*flat}:
                raise UserError(f"{min(paths)} is for the command line")
            flat = {name: self.as_word(name, value) for name, value in flat.items()}
            values = self.parse_object(flat, _skip_required=True)
        except UserError as error:
            raise UserError(f"{source}: {one_line(error)}") from None
        self.set_defaults({name: values[name] for name in flat})

    def parse(self, words: list[str]) -> dict[str, Any]:
        """The arguments of the function, from the command line without its files."""
        values = self.parse_args(self.join_lists(words))
        result = {name: v for name, v in values.as_dict().items() if name != "config"}
        for name, kind in self.options.items():
            result[name] = kind(**{f.name: result.pop(f.name) for f in dataclasses.fields(kind)})
        if self.notice and rank() == 0:
            print(self.notice, flush=True)
        return result

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """What --print_config prints: a preset, which has no paths."""
        flags = {name: v for name, v in vars(namespace).items() if name not in PATHS}
        return super().dump(Namespace(flags), *args, **kwargs)

    def join_lists(self, words: list[str]) -> list[str]:
        """`--labels 3 1 4` as the one word that jsonargparse reads, `--labels=[3, 1, 4]`."""
        result, rest = [], list(words)
        while rest:
            word = rest.pop(0)
            flag, equals, value = word.partition("=")
            name = flag.removeprefix("--").removesuffix("+")
            values = [value] if equals else []
            hint = self.hints.get(name) if word.startswith("--") else None
            parts = parts_of(hint)
            is_list = any(typing.get_origin(part) in (list, Sequence) for part in parts)
            while hint and rest and not rest[0].startswith("--") and (is_list or not values):
                values.append(rest.pop(0))
            if hint and values:
                start = ("[]", '["') if str in parts else "["  # of a list as one word
                is_list &= len(values) > 1 or not values[0].startswith(start)
                word = f"{flag}={self.as_word(name, values if is_list else values[0])}"
            result.append(word)
        return result

    def as_word(self, name: str, value: Any) -> str:
        """A value for jsonargparse. Refuses numbers that YAML misreads: 1:30 as 90, 010 as 8."""
        if name not in self.hints:
            self.error(f"unrecognized arguments: --{name}")
        is_number = bool({int, float} & {*parts_of(self.hints[name])})
        text = value if isinstance(value, str) else json.dumps(value)
        text = text.replace('"', "") if is_number else text
        low = 0 if name == "seed" else -(2**32)
        most = 10_000 if "." in name else 2**32 - 1  # of a network's argument, such as channels
        for number in re.findall(r"[^\s,[\]]+", text) if is_number and text != "null" else []:
            if not NUMBER.fullmatch(number):
                self.refuse(name, text, in_words(self.hints[name]))
            if float in parts_of(self.hints[name]) and not math.isfinite(float(number)):
                self.refuse(name, text, KINDS[float])
            if float not in parts_of(self.hints[name]) and not low <= float(number) <= most:
                self.refuse(name, text, f"from {low:,} to {most:,}")
        return text

    def refuse(self, name: str, value: Any, wanted: str) -> NoReturn:
        raise UserError(f"--{name} is {one_line(value, 60) or 'empty'}: it must be {wanted}")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UserError: which flag, and what it must be, in words."""
        text = " ".join(message.split())
        if unknown := re.search(r"(?i)unrecognized arguments: ([^\s=]+)", text):
            near = difflib.get_close_matches(unknown[1].removeprefix("--"), list(self.hints), 1)
            advice = f"did you mean --{near[0]}?" if near else "--help lists the flags"
            raise UserError(f"{unknown[1]} is not known: {advice}")
        if wrong := re.search(r'key "([\w.]+)".*(?:Got|Given) value:(.*)', text):
            self.refuse(wrong[1], wrong[2], in_words(self.hints.get(wrong[1])))
        if empty := re.search(r"(?:required: |argument --(?=.*expected one))([\w.]+)", text):
            raise UserError(f"--{empty[1]} needs a value")
        raise UserError(text.replace("Parser key", "flag"))


def parts_of(hint: Any) -> list[Any]:
    """A type and all types within it: list[int] | None is made of list[int], int and None."""
    return [hint, *(part for inner in typing.get_args(hint) for part in parts_of(inner))]


def in_words(hint: Any) -> str:
    """A type in words."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if typing.get_origin(hint) in (list, Sequence):
        return f"a list, each {in_words(parts[0])}"
    return " or ".join(map(in_words, parts)) or KINDS.get(hint, str(hint))


def find_preset(name: str, folder: Path) -> Path:
    """A preset's file: as seen from here, else beside the script."""
    for path in (Path(name), folder / name):
        if path.is_file():
            return path
    names = sorted(str(path.relative_to(folder)) for path in folder.glob("configs/*.yaml"))
    raise UserError(f"--config {name} is not a file; beside the script are {', '.join(names)}")


def read_preset(path: Path) -> dict[str, Any]:
    """The flags in a YAML file, which may be neither long nor deep nor refer to itself."""
    depth = 0
    try:
        if path.stat().st_size > 20_000:
            raise ValueError("it is too long")
        text = path.read_text(encoding="utf-8")
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > 5 or isinstance(event, yaml.AliasEvent):
                raise ValueError("it has aliases, or lists in lists")
        flags = yaml.load(text, yaml.BaseLoader) or {}  # text, which is read as on the command line
        if not isinstance(flags, dict):
            raise ValueError("it has no line such as `batch_size: 64`")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a file of flags ({one_line(error, 200)})") from None
    return flags
