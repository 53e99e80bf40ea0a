"""A typed, documented function as a command line.

    def main(num_steps: int = 50, options: SamplingOptions = SamplingOptions()) -> None:
        "What it does, and an `Args:` section that becomes the help."

    if __name__ == "__main__":
        cli.run(main)

Every parameter is a flag; so is every field of a parameter that is a dataclass. A value comes from
the command line, else from a file (--config, the checkpoint of --resume), else it is the default.
A mistake is one line on standard error and exit code 2.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin

import yaml

from common import distributed
from common.device import pick_device
from common.errors import UserError, one_line
from common.files import expand

REQUIRED = inspect.Parameter.empty
LARGEST = 2**32 - 1  # of whole numbers, seeds among them
NOT_IN_PRESETS = ("config", "output_dir", "resume")
FLOAT = r"[+-]?([0-9]{1,40}\.?|[0-9]{0,9}\.[0-9]{1,40})([eE][+-]?[0-9]{1,2})?"  # always finite
TYPES: dict[Any, tuple[str, str, str, Callable[[str], Any]]] = {
    # its name in the help and in messages, its pattern, and how its text is read
    bool: ("true|false", "true or false", "(?i:true|false)", lambda text: text.lower() == "true"),
    int: ("N", "a whole number", "[+-]?(0|[1-9][0-9]{0,9})", int),
    float: ("X", "a finite number", FLOAT, float),
    str: ("TEXT", "text", "(?s:.*)", str),
}
RESUME = "go on from the latest checkpoint, or from a file; auto begins a run if there is none"


class Flag(NamedTuple):
    """A flag: the type of its values, in TYPES or a Literal; whether it takes several; whether null
    is one; its default; its help."""

    type: Any
    many: bool
    optional: bool
    default: Any
    help: str

    def in_words(self) -> tuple[str, str, str, Callable[[str], Any]]:
        """As in TYPES."""
        choices = get_args(self.type)
        one_of = "|".join(choices)
        return TYPES.get(self.type) or (one_of, f"one of {', '.join(choices)}", one_of, str)

    def read(self, name: str, value: Any) -> Any:
        """The value that text, from a command line or YAML, or JSON stands for."""
        if self.optional and value in (None, "null"):
            return None
        if self.many and isinstance(value, list):
            if self.type is not str and len(value) == 1 and str(value[0]).startswith("["):
                value = re.findall(r"[^][,\s]+", str(value[0]))  # as one word: [1, 2]
            one = self._replace(many=False, optional=False)
            return [one.read(name, item) for item in value]
        text = value if isinstance(value, str) else json.dumps(value)
        _, wanted, pattern, convert = self.in_words()
        if not self.many and re.fullmatch(pattern, text):
            if self.type is not int or abs(int(text)) <= LARGEST:
                return convert(text)
            wanted = f"at most {LARGEST:,}"
        raise UserError(f"{name} is {text!r:.80}: it must be {'a list' if self.many else wanted}")


Flags = dict[str, Flag]
Values = dict[str, Any]


def run(
    main: Callable[..., None],
    argv: Sequence[str] | None = None,
    presets: bool = False,
    **groups: type,
) -> None:
    """Call main with the values of its flags.

    Args:
        main: the function.
        argv: the words of the command line; those of this process unless given.
        presets: whether configs/paper.yaml (on cuda) or configs/laptop.yaml beside main's file
            applies where neither --config nor --resume is given.
        groups: parameters of main that are dicts, each with the class whose arguments it holds:
            with network=UNet, `--network.channels 64` arrives as network={"channels": 64, ...}.
            Arguments without a default are left to main.
    """
    for stream in (sys.stdout, sys.stderr):  # None if closed
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return call(main, list(sys.argv[1:] if argv is None else argv), presets, groups)
    except (UserError, OSError) as error:
        line, code = f"error: {one_line(error)}", 2
    except KeyboardInterrupt:
        line, code = "stopped", 130
    process = f"process {distributed.rank()}: " if distributed.rank() > 0 else ""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(f"{process}{line}\n")
    sys.exit(code)


def call(
    main: Callable[..., None], words: list[str], presets: bool, groups: dict[str, type]
) -> None:
    folder = Path(inspect.getfile(inspect.unwrap(main))).resolve().parent
    parameters = find_flags(main, groups)
    flags = {name: flag for _, own in parameters.values() for name, flag in own.items()}
    parser = make_parser(inspect.getdoc(main) or "", flags)
    typed = read_words(parser, words, flags)
    show, files = typed.pop("show", None), typed.pop("config", [])
    stored, note = read_files(files, typed, flags, folder, presets)
    values = {name: flag.default for name, flag in flags.items()} | stored | typed
    if show is not None:
        print(help_text(parser, values, note) if show == "help" else preset_text(values), end="")
        sys.exit()
    for name in values:
        if values[name] is REQUIRED:
            raise UserError(f"--{name} is missing: {flags[name].help}")
    if (values.get("seed") or 0) < 0:
        raise UserError(f"--seed is {values['seed']}: it must be from 0 to {LARGEST:,}")
    arguments = {}
    for name, (make, own) in parameters.items():
        inner = {key.rpartition(".")[2]: values[key] for key in own}
        arguments[name] = make(**inner) if make else inner[name]
    if note and distributed.rank() == 0:
        print(note, flush=True)
    main(**arguments)


def find_flags(
    main: Callable[..., None], groups: dict[str, type]
) -> dict[str, tuple[type | None, Flags]]:
    """For each parameter of main its flags, and what is made of their values, if it has several.
    A dict that is not a group has none."""
    found: dict[str, tuple[type | None, Flags]] = {}
    for name, flag in documented(main).items():
        if name in groups:
            inner = documented(groups[name]).items()
            own = {f"{name}.{key}": f for key, f in inner if f.default is not REQUIRED}
            found[name] = dict, own
        elif dataclasses.is_dataclass(flag.type):
            given = {} if flag.default is REQUIRED else vars(flag.default)
            inner = documented(flag.type).items()
            own = {key: f._replace(default=given.get(key, f.default)) for key, f in inner}
            found[name] = flag.type, own
        elif get_origin(flag.type) is not dict:
            found[name] = None, {name: flag}
    return found


def documented(owner: Callable[..., Any]) -> Flags:
    """The parameters of a function or class, with what its docstring or a base class's says."""
    docs = {"resume": RESUME}
    for part in reversed(getattr(owner, "__mro__", [owner])):
        text = inspect.cleandoc(part.__doc__ or "")
        docs |= re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", text, re.MULTILINE)
    flags: Flags = {}
    for name, parameter in inspect.signature(owner, eval_str=True).parameters.items():
        kind = parameter.annotation
        optional = NoneType in get_args(kind)
        kind = get_args(kind)[0] if optional else kind
        many = get_origin(kind) in (list, Sequence)
        kind = get_args(kind)[0] if many else kind
        text = " ".join(docs.get(name, "").split()).rstrip(".")
        flags[name] = Flag(kind, many, optional, parameter.default, text)
    return flags


def make_parser(doc: str, flags: Flags) -> argparse.ArgumentParser:
    """The parser that finds the words of each flag."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--flag value ...]",
        description=doc.partition("\nArgs:")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    add: Callable[..., Any] = parser.add_argument
    add("-h", "--help", dest="show", action="store_const", const="help", help="print this")
    text = "print the values of all flags, as a file for --config"
    add("--print_config", dest="show", action="store_const", const="config", help=text)
    text = "a YAML file of flags, here or beside the script; flags typed come on top"
    add("--config", metavar="FILE", action="append", help=text)
    for name, flag in flags.items():
        nargs = {"nargs": "+"} if flag.many else {}
        nargs = {"nargs": "?", "const": "latest"} if name == "resume" else nargs
        text = flag.help.replace("%", "%%") + " (required)" * (flag.default is REQUIRED)
        add(f"--{name}", metavar=flag.in_words()[0], help=text, **nargs)
    return parser


def read_words(parser: argparse.ArgumentParser, words: list[str], flags: Flags) -> Values:
    """What stands on the command line."""
    try:
        namespace, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name} {error.message}") from None
    typed = vars(namespace)
    if rest and "show" not in typed:
        raise UserError(unknown(rest[0], flags))
    for name in typed.keys() & flags.keys():
        typed[name] = flags[name].read(f"--{name}", typed[name])
    if typed.get("output_dir"):
        typed["output_dir"] = str(expand(typed["output_dir"]))
    return typed


def unknown(word: str, flags: Flags) -> str:
    name = word.lstrip("-").partition("=")[0]
    inner = [flag for flag in flags if flag.startswith(f"{name}.")]
    close = difflib.get_close_matches(name, [*flags, "config", "help", "print_config"], 1)
    advice = f"did you mean --{close[0]}?" if close else "--help lists the flags"
    if inner:
        advice = f"take --{inner[0]} and so on, or --config for a file of flags"
    return f"{word.partition('=')[0]} is not a flag: {advice}"


def read_files(
    files: list[str], typed: Values, flags: Flags, folder: Path, presets: bool
) -> tuple[Values, str]:
    """The values in the checkpoint to resume, in each --config, or else in the preset that
    applies; and a note about that preset."""
    stored, note = read_resumed(typed, flags, folder) if typed.get("resume") else {}, ""
    if presets and not stored and not files:
        files, note = default_preset(folder, typed.get("device", "auto"))
    for file in files:
        path = find_preset(file, folder)
        for name, value in read_preset(path).items():
            if name not in flags:
                raise UserError(f"{path}: {unknown(name, flags)}")
            stored[name] = flags[name].read(f"{path}: {name}", value)
    if "num_training_steps" in typed:
        stored.pop("num_epochs", None)  # it would override them
    return stored, note


def read_resumed(typed: Values, flags: Flags, folder: Path) -> Values:
    """The flags of the run to go on with; without paths, and those that are no flags any more."""
    from common import checkpoint  # here, as it imports this module

    output = Path(typed.get("output_dir") or folder / "output")
    path = checkpoint.find_checkpoint(typed["resume"], output)
    config = flat(checkpoint.read_header(path).config) if path else {}
    names = config.keys() & flags.keys() - checkpoint.PATHS
    return {name: flags[name].read(f"{path}: {name}", config[name]) for name in names}


def default_preset(folder: Path, device: str) -> tuple[list[str], str]:
    """The preset for the device, with a note about it."""
    kind = pick_device(device).type
    chosen, other = ("paper", "laptop") if kind == "cuda" else ("laptop", "paper")
    path = folder / "configs" / f"{chosen}.yaml"
    about = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    note = f"Preset configs/{chosen}.yaml, as the device is {kind}: {about}\n"
    return [str(path)], f"{note}The other one: --config configs/{other}.yaml"


def find_preset(name: str, folder: Path) -> Path:
    """The file, here or beside the script."""
    for path in (Path(name), folder / name):
        if path.is_file():
            return path
    beside = sorted(str(path.relative_to(folder)) for path in folder.glob("configs/*.yaml"))
    raise UserError(f"--config {name} is not a file; beside the script are {', '.join(beside)}")


def read_preset(path: Path) -> Values:
    """The flags in a YAML file, their values as text."""
    depth = 0
    try:
        if path.stat().st_size > 20_000:
            raise ValueError("it is too long")
        text = path.read_text(encoding="utf-8")
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > 5 or isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
                raise ValueError("it has tags, aliases, or lists in lists")
        values = yaml.load(text, yaml.BaseLoader) or {}
        if not isinstance(values, dict):
            raise ValueError("it has no line such as `batch_size: 64`")
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not a file of flags ({one_line(error, 200)})") from None
    values = flat(values)
    for name in NOT_IN_PRESETS:
        if values.pop(name, "null") not in ("null", "~", ""):
            raise UserError(f"{path} sets {name}: give it on the command line instead")
    return values


def flat(values: Values) -> Values:
    """{"network": {"channels": 64}} as {"network.channels": 64}."""
    result: Values = {}
    for name, value in values.items():
        group = isinstance(value, dict)
        result |= {f"{name}.{key}": v for key, v in value.items()} if group else {name: value}
    return result


def help_text(parser: argparse.ArgumentParser, values: Values, note: str) -> str:
    """The help, with the values that the same command takes without --help."""
    shown = {name: value for name, value in values.items() if value not in (None, REQUIRED)}
    parser.set_defaults(**shown)
    parser.epilog = note
    return parser.format_help()


def preset_text(values: Values) -> str:
    """The values as a file for --config."""
    nested: Values = {}
    for name, value in values.items():
        group, _, key = name.rpartition(".")
        if value is not REQUIRED and name not in NOT_IN_PRESETS:
            (nested.setdefault(group, {}) if group else nested)[key] = value
    return yaml.safe_dump(nested, sort_keys=False)
