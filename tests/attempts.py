"""Attempts to break the scripts: `make attempts`, or

    python tests/attempts.py flags --share 0.1      # and fields; --share is how many of all

flags: every numeric flag of every script, with every value of a table of bad ones.
fields: every field of every lesson's checkpoint, with every value of a table of wrong kinds.

An attempt fails if it ends in anything but one clear line, takes more than ten seconds, writes
outside its output folder, or if a bad value is accepted. Work that would be slow is cut off where
it begins: at the first call of a network, or of another process.
"""

import argparse
import collections
import contextlib
import copy
import importlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 10
# For any number; what is more for whole numbers only; what may be right for some flags.
BAD = ["nan", "inf", "-inf", "1e400", "1:30", "[010]", "010", "0x10", "1_000", "", " ", "x", "1e"]
BAD += ["true", "١٢", "1,5", "5%", "½", "--5", "{}", "[[1]]", "1;2"]
BAD_INTEGER = ["1e30", "-1e30", "1.5", "1e3", str(2**32), str(-(2**33)), str(2**64), "9" * 400]
EDGE = ["0", "-1", "1", "2", "16", "1000001", str(2**31), str(2**32 - 1)]
EDGE_FLOAT = ["1e30", "1e-30", "-1e30", "0.5", str(2**64), "1e308"]
KINDS: list[Any] = [None, True, "x", "", "1", [], [1], [1, 2, 2, 2], {}, {"a": 1}, [[1]]]
KINDS += [-1, 0, 1.5, 28.0, 1e30, -1e30, 2**31, 10**12, 2**64, 10**4000, "x" * 10**5]


class Outcome(NamedTuple):
    """What an attempt ended with: "refused", "began" or "valid", or a fault in words."""

    what: str
    line: str = ""


class Began(BaseException):
    """Slow work begins."""


class TooLong(BaseException):
    """The time is over."""


class Fault(NamedTuple):
    attempt: str
    what: str


written: list[str] = []
allowed: list[str] = []


def audit(event: str, arguments: tuple) -> None:
    """Record what is written outside the allowed folders."""
    path: Any = None
    if event == "open" and isinstance(arguments[2], int):
        path = arguments[0] if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
    elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"):
        path = arguments[1] if event == "os.rename" else arguments[0]
    if allowed and isinstance(path, str | bytes | os.PathLike):
        name = os.path.abspath(os.fsdecode(path))
        if not name.startswith((*allowed, "/dev/", "/proc/")) and "__pycache__" not in name:
            written.append(f"{event} {name}")


@contextlib.contextmanager
def watching(folder: Path) -> Iterator[None]:
    """Slow work raises Began, and more than ten seconds TooLong."""

    def begins(*_: Any, **__: Any) -> None:
        raise Began

    def too_long(*_: Any) -> None:
        raise TooLong

    written.clear()
    allowed[:] = [str(folder), tempfile.gettempdir()]
    call, popen, before = nn.Module.__call__, subprocess.Popen, signal.getsignal(signal.SIGALRM)
    nn.Module.__call__, subprocess.Popen = begins, begins  # type: ignore[assignment,misc]
    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        nn.Module.__call__, subprocess.Popen = call, popen  # type: ignore[assignment,misc]
        allowed.clear()


def attempt(call: Callable[[], object], folder: Path) -> Outcome:
    """Call it and say how it ended."""
    out, err = io.StringIO(), io.StringIO()
    what, line = "valid", ""
    try:
        with watching(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            call()
    except Began:
        what = "began"
    except TooLong:
        what = f"fault: more than {SECONDS} s"
    except SystemExit as end:
        if end.code in (129, 130, 143):  # the attempts themselves are stopped
            raise
        lines = [text for text in err.getvalue().splitlines() if text.strip()]
        line = lines[-1] if lines else ""
        clear = end.code == 2 and line.startswith("error: ") and line.isprintable()
        what = "refused" if clear and len(line) < 1000 else f"fault: exit {end.code}, {line:.200}"
        what = "fault: a traceback" if "Traceback" in err.getvalue() else what
    except BaseException as error:
        what = f"fault: {type(error).__name__}: {error!s:.200}".replace("\n", " ")
    if written and not what.startswith("fault"):
        what = f"fault: it wrote {written[0]}"
    return Outcome(what, line)


# Flags


class Script(NamedTuple):
    name: str
    main: Callable[..., None]
    presets: bool
    groups: dict[str, type]


def scripts() -> list[Script]:
    """Every script with flags."""
    found = []
    for path in sorted([*ROOT.glob("lesson_*/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]):
        if call := re.search(r"^    cli\.run\(main(.*)\)", path.read_text(), re.MULTILINE):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            module = importlib.import_module(name)
            words = re.findall(r"(\w+)=(?!True)(\w+)", call[1])
            groups = {key: getattr(module, value) for key, value in words}
            found.append(Script(name, module.main, "presets" in call[1], groups))
    return found


def flag_attempts(script: Script) -> Iterator[tuple[str, str, bool]]:
    """(flag, value, whether it must be refused) for each numeric flag of a script."""
    from common import cli

    for flag, hint in cli.Parser(script.main, script.groups).hints.items():
        kinds = {int, float} & {*cli.parts_of(hint)}
        bad = BAD + ([] if float in kinds else BAD_INTEGER)
        edge = EDGE + (EDGE_FLOAT if float in kinds else [])
        if kinds:
            yield from ((flag, value, True) for value in bad)
            yield from ((flag, value, False) for value in edge)


def try_flag(script: Script, flag: str, value: str, folder: Path, data: Path) -> Outcome:
    from common import cli

    hints = cli.Parser(script.main, script.groups).hints
    words = [f"--{flag}={value}"]
    fixed = {"device": "cpu", "output_dir": str(folder / "out"), "dataset": "digits"}
    fixed |= {"data_dir": str(data), "figure": "consistency", "num_training_steps": "2"}
    for name, text in fixed.items():
        if name in hints and name != flag:
            words.append(f"--{name}={text}")
    if "model_checkpoint" in hints and not script.name.startswith("lesson"):
        words.append(f"--model_checkpoint={ROOT}/lesson_09/pretrained/mnist.safetensors")
    outcome = attempt(
        lambda: cli.run(script.main, words, presets=script.presets, **script.groups), folder
    )
    name = flag.split(".")[-1]
    resource = re.search("not installed|out of memory", outcome.line)
    if outcome.what == "refused" and name not in outcome.line and not resource:
        return Outcome(f"fault: the line names another flag: {outcome.line:.200}")
    return outcome


def flags(share: float, seed: int, folder: Path) -> dict[str, list[Fault]]:
    """All faults by script, from a share of the attempts."""
    data = Path(os.environ.get("DIFFUSION_DATA") or folder / "data")
    draw, counts, faults = random.Random(seed), collections.Counter[str](), []
    for script in scripts():
        began = time.monotonic()
        for flag, value, must in flag_attempts(script):
            if draw.random() >= share:
                continue
            outcome = try_flag(script, flag, value, folder, data)
            if must and outcome.what in ("began", "valid"):
                outcome = Outcome("fault: accepted")
            kind = "fault" if outcome.what.startswith("fault") else outcome.what
            counts["bad values, " + kind if must else "values at the edge, " + kind] += 1
            if kind == "fault":
                faults.append(Fault(f"{script.name} --{flag}={value:.30}", outcome.what))
                print(*faults[-1], sep=": ", flush=True)
        print(f"{script.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return report("flags", counts, faults)


# Fields


def fields_of(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths to all values in nested dicts, the dicts among them."""
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from fields_of(inner, (*path, key))


# What loading does not read: the flags of the training that made the file.
USED = ("num_timesteps", "beta_1", "beta_T", "variance", "schedule", "simple_weight", "vlb_weight")
USED += (
    "learned_beta",
    "data_mean",
    "data_std",
    "num_classes",
    "network",
    "text",
    "lesson",
    "step",
)
USED += ("config", "format", "sha256")


def fits(old: Any, new: Any) -> bool:
    """Whether a new value may stand for the old one: of its type, and a number for a number."""
    number = isinstance(old, int | float) and not isinstance(old, bool)
    if number and isinstance(new, int) and not isinstance(new, bool):
        return abs(new) < 10**15
    if type(old) is float:
        return type(new) is float
    return type(old) is type(new)


def try_field(good: Any, path: tuple, value: Any, folder: Path) -> Outcome:
    from common import lessons
    from common.errors import UserError

    from hostile_checkpoints import as_file, values_of

    values = copy.deepcopy(values_of(good))
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    fit = fits(inner[path[-1]], value)
    inner[path[-1]] = value
    file = folder / "file.safetensors"
    file.write_bytes(as_file(values, good.tensors))

    def load() -> None:
        try:
            lessons.load(str(file))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    outcome = attempt(load, folder)
    used = path[-1] in USED or {"network", "text"} & {*path}
    if outcome.what == "valid" and not fit and used:
        return Outcome("fault: accepted")
    return outcome


def shipped() -> list[Any]:
    """The shipped checkpoints."""
    from common import checkpoint

    paths = sorted(ROOT.glob("lesson_*/**/pretrained/*.safetensors"))
    return [replace(checkpoint.load(path), source="") for path in paths]


def fields(share: float, seed: int, folder: Path) -> dict[str, list[Fault]]:
    """All faults by lesson, from a share of the attempts."""
    from hostile_checkpoints import values_of

    draw, counts, faults = random.Random(seed), collections.Counter[str](), []
    for good in shipped():
        began = time.monotonic()
        for path in fields_of(values_of(good)):
            for value in KINDS:
                if draw.random() >= share:
                    continue
                outcome = try_field(good, path, value, folder)
                kind = "fault" if outcome.what.startswith("fault") else outcome.what
                counts[f"wrong kinds, {kind}"] += 1
                if kind == "fault":
                    name = ".".join(map(str, path))
                    faults.append(Fault(f"{good.lesson}: {name} = {value!r:.30}", outcome.what))
                    print(*faults[-1], sep=": ", flush=True)
        print(f"{good.lesson}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return report("fields", counts, faults)


def report(name: str, counts: collections.Counter[str], faults: Sequence[Fault]) -> dict:
    print(f"{name}: {sum(counts.values())} attempts, {len(faults)} faults")
    for kind, count in sorted(counts.items()):
        print(f"  {kind}: {count}")
    return {"counts": dict(counts), "faults": list(faults)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["flags", "fields"])
    parser.add_argument("--share", type=float, default=1.0, help="share of the attempts")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    limit_memory()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run = {"flags": flags, "fields": fields}[words.what]
        result = run(words.share, words.seed, Path(folder))
    sys.exit(bool(result["faults"]))


def limit_memory(gigabytes: int = 8) -> None:
    """Too much memory is an error, not the end of the machine."""
    import resource

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.addaudithook(audit)
    main()
