"""The command line: flags from functions and dataclasses, files of flags, and errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common import cli
from common.checkpoint import Checkpoint, save
from common.errors import UserError

import pytest
import torch
import yaml
from helpers import error_line

CALLS: list[dict[str, Any]] = []


@dataclass
class Base:
    """What both have.

    Args:
        output_dir: folder for the files.
        seed: of the random numbers.
        device: such as cpu.
    """

    output_dir: str | None = None
    seed: int = 0
    device: str = "auto"


@dataclass
class Options(Base):
    """The toy's.

    Args:
        num_training_steps: optimiser steps.
        num_epochs: passes over 100 % of the data.
        rate: of learning.
    """

    resume: str | None = None
    data_dir: str | None = None
    num_training_steps: int = 10
    num_epochs: int | None = None
    rate: float = 0.5
    compile: bool = False
    kind: Literal["simple", "hybrid"] = "simple"

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise UserError(f"rate is {self.rate}: it must be above 0")


class Network:
    """A class that is not a dataclass.

    Args:
        image_size: known from the data.
        channels: feature maps.
        scales: of each level.
    """

    def __init__(
        self, image_size: int, channels: int = 8, scales: Sequence[int] = (1,)
    ) -> None: ...


GROUPS: dict[str, Any] = {"presets": True, "network": Network}


def train(options: Options, network: dict[str, Any]) -> None:
    """Train the toy."""
    CALLS.append({**vars(options), **{f"network.{k}": v for k, v in network.items()}})


def sample(
    figure: str,
    labels: list[int] | None = None,
    prompts: list[str] | None = None,
    etas: Sequence[float] = (0.0, 1.0),
    options: Base = Base(seed=7),
) -> None:
    """Sample the toy.

    Args:
        figure: one of many
            that there are.
        labels: of the classes.
    """
    CALLS.append({"figure": figure, "labels": labels, "prompts": prompts, "etas": etas})
    CALLS[-1] |= vars(options)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two presets that `train` takes for its own."""
    (tmp_path / "lesson" / "configs").mkdir(parents=True)
    small = "num_training_steps: 3\nrate: 1e-3\nnetwork:\n  channels: 4\n  scales: [5, 2]\n"
    (tmp_path / "lesson" / "configs" / "laptop.yaml").write_text(f"# A small one.\n{small}")
    large = "# A large one.\nnetwork:\n  channels: 512\n"
    (tmp_path / "lesson" / "configs" / "paper.yaml").write_text(large)
    code = train.__code__.replace(co_filename=str(tmp_path / "lesson" / "train.py"))
    monkeypatch.setattr(train, "__code__", code)
    CALLS.clear()
    return tmp_path / "lesson"


def values(*words: object) -> dict[str, Any]:
    """The arguments that `train` receives."""
    cli.run(train, [str(word) for word in words], **GROUPS)
    return CALLS.pop()


def sampled(*words: str) -> dict[str, Any]:
    cli.run(sample, ["--figure", "eta", *words])
    return CALLS.pop()


def output(capsys: pytest.CaptureFixture, *words: str) -> str:
    """The output of a command line that exits before `train` is called."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(train, words, **GROUPS)
    assert stopped.value.code in (None, 0)
    return capsys.readouterr().out


def write_checkpoint(path: Path, **config: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    save(path, Checkpoint("lesson_05", config, "digits", 3, {"ema.w": torch.zeros(1)}, {}))
    return path


# Values from the command line


def test_defaults_are_those_of_parameters_fields_and_instances():
    assert sampled() == {
        "figure": "eta",
        "labels": None,
        "prompts": None,
        "etas": (0.0, 1.0),
        "output_dir": None,
        "seed": 7,
        "device": "auto",
    }


def test_lists_take_several_words_and_text_stays_text():
    words = ["--labels", "3", "1", "4", "--prompts", "3", "[x]", "null", "a: b"]
    result = sampled(*words, "--etas", ".5", "-2.5", "1e-3")
    assert result["labels"] == [3, 1, 4]
    assert result["prompts"] == ["3", "[x]", "null", "a: b"]
    assert result["etas"] == [0.5, -2.5, 0.001]
    assert sampled("--labels", "[10, 20]")["labels"] == [10, 20]  # as one word
    assert sampled("--prompts", "[x]")["prompts"] == ["[x]"]
    assert sampled("--prompts", '["x", "3"]')["prompts"] == ["x", "3"]
    assert sampled("--figure", "1.0", "--device", "true")["figure"] == "1.0"


def test_values_are_read_by_their_types(folder):
    words = ["--rate", "1e-4", "--compile", "true", "--kind", "hybrid", "--num_epochs", "3"]
    result = values(*words, "--network.scales", "1", "+5", "-2")
    assert result["rate"] == 1e-4
    assert (result["compile"], result["kind"], result["num_epochs"]) == (True, "hybrid", 3)
    assert result["network.scales"] == [1, 5, -2]
    assert values("--num_epochs", "null")["num_epochs"] is None
    assert "network.image_size" not in result  # without a default: it comes from the data


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num_training_steps 1e3", "it must be a whole number"),
        (f"--num_training_steps {10**30}", "to 4,294,967,295"),
        (f"--num_epochs {2**32}", "--num_epochs is 4294967296: it must be from -4,294,967,296 to"),
        ("--num_epochs", "--num_epochs needs a value"),
        ("--config", "--config needs a value"),
        ("--rate 1e400", "--rate is 1e400: it must be a finite"),
        (f"--rate {'9' * 400}", "it must be a finite number"),
        ("--rate=", "--rate is empty: it must be a finite number"),
        ("--rate -1", "rate is -1.0: it must be above 0"),  # checked by Options
        ("--compile maybe", "--compile is maybe: it must be true or false"),
        ("--compile 1", "--compile is 1: it must be true or false"),
        ("--kind vlb", "--kind is vlb: it must be one of simple, hybrid"),
        ("--network.scales [010]", "--network.scales is [010]: it must be a list, each a whole"),
        ("--network.scales 1 010", "--network.scales is [1, 010]: it must be a list, each a whole"),
        ("--network.scales+ 010", "--network.scales is [010]: it must be a list"),
        ("--network.image_size 3", "--network.image_size is not known"),
        ("--rates 3", "--rates is not known: did you mean --rate?"),
        ("--channels=3", "--channels is not known: did you mean --network.channels?"),
        ("--num_training 3", "--num_training is not known: did you mean --num_training_steps?"),
        ("--zzz 3", "--zzz is not known: --help lists the flags"),
        ("--kind simple hybrid", "hybrid is not known"),
        ("--network small.yaml", "--network is not known"),
        ("--seed -1", "--seed is -1: it must be from 0 to 4,294,967,295"),
        (f"--seed {2**32}", "--seed is 4294967296: it must be from 0 to 4,294,967,295"),
        ("--output_dir ~nosuchuser/x", "~nosuchuser/x"),
        ("--config none.yaml", "beside the script are configs/laptop.yaml, configs/paper.yaml"),
        ("--config configs", "--config configs is not a file"),
        ("--device abacus", "abacus"),
        ("--resume", "no checkpoint to resume"),
        ("--resume gone.safetensors", "gone.safetensors"),
    ],
)
def test_bad_command_lines_give_one_line(words, said, folder, capsys):
    assert said in error_line(capsys, train, *words.split(), **GROUPS)
    assert not CALLS


ODD = ["many", "1:30", "-1:30", "010", "0x1F", "1_0", "nan", ".nan", "-inf", "true", "[1:30]"]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize(("name", "kind"), [("num_training_steps", "whole"), ("rate", "finite")])
def test_ambiguous_numbers_are_refused(name, kind, value, folder, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(f"{name}: {value}\n")
    for words in ([f"--{name}={value}"], ["--config", tmp_path / "mine.yaml"]):
        line = error_line(capsys, train, *words, **GROUPS)
        assert f"--{name} is {value}: it must be a {kind} number" in line


def test_a_missing_required_flag_is_reported(capsys):
    assert error_line(capsys, sample) == "error: --figure needs a value"


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sampled("--output_dir=~/pictures")["output_dir"] == str(tmp_path / "pictures")
    assert sampled("--seed", str(2**32 - 1))["seed"] == 2**32 - 1


# Files of flags


def test_a_plain_run_takes_the_preset_for_its_device(folder, capsys, monkeypatch):
    result = values("--rate", "2")
    assert (result["num_training_steps"], result["rate"]) == (3, 2.0)
    assert (result["network.channels"], result["network.scales"]) == (4, [5, 2])
    assert capsys.readouterr().out.splitlines() == [
        "Preset configs/laptop.yaml, as the device is cpu: A small one.",
        "The other one: --config configs/paper.yaml",
    ]
    monkeypatch.setattr(cli, "pick_device", lambda name: torch.device("cuda"))
    result = values()
    assert (result["num_training_steps"], result["network.channels"]) == (10, 512)
    assert "Preset configs/paper.yaml, as the device is cuda" in capsys.readouterr().out
    monkeypatch.setattr(cli, "rank", lambda: 2)
    assert values()["network.channels"] == 512
    assert capsys.readouterr().out == ""  # only process 0 names the preset


def test_an_error_comes_without_the_notice_about_the_preset(folder, capsys):
    with pytest.raises(SystemExit):
        cli.run(train, ["--rate", "-1"], **GROUPS)
    assert capsys.readouterr().out == ""


def test_flags_override_the_file_in_any_order(folder, tmp_path, monkeypatch, capsys):
    preset = ["--config", "configs/paper.yaml"]
    assert values("--network.channels", "6", *preset)["network.channels"] == 6
    assert values(*preset, "--network.channels", "6")["network.channels"] == 6
    assert values(*preset)["num_training_steps"] == 10  # the default preset does not apply
    assert capsys.readouterr().out == ""
    (tmp_path / "mine.yaml").write_text("network.channels: 5\nnum_epochs: null\nrate: 3")
    both = values(*preset, "--config", str(tmp_path / "mine.yaml"))
    assert (both["network.channels"], both["num_epochs"], both["rate"]) == (5, None, 3.0)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "paper.yaml").write_text("rate: 4")
    monkeypatch.chdir(tmp_path)  # a file here comes before one beside the script
    assert values(*preset)["rate"] == 4.0


def test_the_printed_config_is_a_preset(folder, tmp_path, capsys):
    text = output(capsys, "--num_epochs", "2", "--output_dir", "x", "--print_config")
    printed = yaml.safe_load(text)
    assert printed["network"] == {"channels": 4, "scales": [5, 2]}
    assert (printed["num_epochs"], printed["rate"]) == (2, 1e-3)
    (tmp_path / "mine.yaml").write_text(text)
    assert values("--config", tmp_path / "mine.yaml") == values("--num_epochs", "2")


def test_help_shows_the_values_of_a_plain_run(folder, capsys):
    text = output(capsys, "--help", "--nonsense", "3")
    assert text.startswith("usage: ")
    flat = " ".join(text.split())
    assert "Train the toy." in flat
    assert "NUM_TRAINING_STEPS optimiser steps. (type: int, default: 3)" in flat
    assert "CHANNELS feature maps. (type: int, default: 4)" in flat
    assert "NUM_EPOCHS passes over 100 % of the data. (type:" in flat
    assert (
        "SEED of the random numbers. (type: int, default: 0)" in flat
    )  # documented in the base class
    assert "--kind {simple,hybrid}" in flat
    assert "--network CONFIG" not in flat
    assert "Preset configs/laptop.yaml, as the device is cpu: A small one." in flat
    assert "default: 512)" in output(capsys, "-h", "--config", "configs/paper.yaml")


BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (BOMB, "it has aliases, or lists in lists"),
        ("[" * 5000, "lists in lists"),
        ("rate: " + "[" * 5000 + "]" * 5000, "lists in lists"),
        ("rate: !!python/object/apply:os.system [ls]\n", "--rate is [ls]"),
        ("x" * 30_000, "it is too long"),
        (b"\xff\xfe\0", "is not a file of flags"),
        ("batch: [3\n", "is not a file of flags"),
        ("- 1\n", "it has no line such as"),
        ("a: 1\n---\nb: 2\n", "is not a file of flags"),
        ("? [1, 2]\n: 3\n", "is not a file of flags"),
        ("rates: 3\n", "mine.yaml: --rates is not known: did you mean --rate?"),
        ("'\\e[31m': 1\n", "is not known"),
        ("1: 2\n", "mine.yaml: --1 is not known"),
        ("network: 3\n", "--network is not known"),
        (
            "network: {channels: {a: 1}}\n",
            "--network.channels is {a: 1}: it must be a whole number",
        ),
        ("network: {class_path: os.system}\n", "--network.class_path is not known"),
        ("num_training_steps: null\n", "--num_training_steps is None: it must be a whole"),
        ("network: {scales: [010]}\n", "--network.scales is [010]"),
        ("network: {scales: 1}\n", "--network.scales is 1: it must be a list"),
        ("seed: -3\n", "mine.yaml: --seed is -3"),
        ("config: other.yaml\n", "config is for the command line"),
        ("output_dir: /\n", "output_dir is for the command line"),
        ("resume: latest\n", "resume is for the command line"),
    ],
)
def test_bad_files_give_one_line(content, said, folder, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = error_line(capsys, train, "--config", file, **GROUPS)
    assert said in line
    assert len(line) < 700
    assert line.isprintable()
    assert not CALLS


# Resuming a run


def test_resume_takes_the_flags_of_the_run(folder, tmp_path, capsys):
    config = {"rate": 0.25, "network": {"channels": 16, "image_size": 28}, "kind": "hybrid"}
    config |= {"no_flag_any_more": 1, "output_dir": "/elsewhere", "data_dir": "/elsewhere"}
    config |= {"resume": "/elsewhere", "config": "/elsewhere", "num_epochs": 5}
    path = write_checkpoint(folder / "output" / "checkpoint_000003.safetensors", **config)
    for words in (["--resume"], ["--resume=latest"], ["--resume", path], ["--resume", "auto"]):
        result = values(*words, "--kind", "simple")
        assert (result["rate"], result["kind"], result["num_epochs"]) == (0.25, "simple", 5)
        assert (result["network.channels"], result["num_training_steps"]) == (16, 10)
        assert result["resume"] == str(words[1] if len(words) > 1 else words[0][9:] or "latest")
        assert result["data_dir"] is result["output_dir"] is None
    assert capsys.readouterr().out == ""  # no preset applies
    assert values("--resume", "--num_training_steps", "7")["num_epochs"] is None
    assert values("--resume", "--config", "configs/paper.yaml")["network.channels"] == 512
    (tmp_path / "run").mkdir()
    path.rename(tmp_path / "run" / path.name)
    assert values("--resume", "--output_dir", tmp_path / "run")["rate"] == 0.25


def test_auto_begins_a_run_where_there_is_no_checkpoint(folder, capsys):
    result = values("--resume", "auto")
    assert (result["resume"], result["network.channels"]) == ("auto", 4)
    assert "Preset configs/laptop.yaml" in capsys.readouterr().out
    assert values("--resume", "auto", "--config", "configs/paper.yaml")["network.channels"] == 512


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rate": "fast"}, "--rate is fast: it must be a finite number"),
        ({"rate": [0.5]}, "--rate is [0.5]: it must be a finite number"),
        ({"num_training_steps": 3.0}, "--num_training_steps is 3.0: it must be a whole number"),
        ({"num_training_steps": True}, "--num_training_steps is true: it must be a whole number"),
        ({"num_training_steps": None}, "--num_training_steps is None: it must be a whole number"),
        ({"compile": 1}, "--compile is 1: it must be true or false"),
        ({"kind": 3}, "--kind is 3: it must be one of simple, hybrid"),
        ({"network": {"scales": 3}}, "--network.scales is 3: it must be a list"),
        ({"network": {"scales": [1, [2]]}}, "--network.scales is [2]: it must be a list"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_values_of_a_checkpoint_are_checked(config, said, folder, capsys):
    path = write_checkpoint(folder / "output" / "checkpoint_000003.safetensors", **config)
    line = error_line(capsys, train, "--resume", **GROUPS)
    assert said in line
    assert path.name in line
