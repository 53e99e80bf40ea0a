"""Checkpoints: loading restores what was saved, and a bad file gives a one-line error."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import checkpoint, files
from common.checkpoint import Checkpoint
from common.errors import UserError
from lesson_05.unet import UNet

import pytest
import torch
from helpers import ROOT, same
from hostile_checkpoints import GOOD, GOOD_FILE, NETWORK, as_file, values_of, with_header
from torch import nn

SHIPPED = ROOT / "lesson_05" / "pretrained" / "mnist.safetensors"


def small() -> Checkpoint:
    tensors = {"ema.weight": torch.randn(3, 2), "ema.bias": torch.randn(3)}
    return Checkpoint("lesson_05", {"network": {"channels": 3}}, "digits", 7, tensors)


def saved_good(folder: Path) -> Path:
    checkpoint.save(folder / "checkpoint_000003.safetensors", GOOD)
    return folder / "checkpoint_000003.safetensors"


def refused(path: Path, data: bytes | None = None) -> str:
    """The error line with which a file is refused."""
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError) as error:
        checkpoint.load(path, "lesson_05").build(lambda: UNet(**NETWORK))
    return str(error.value)


# Save and load


def test_loading_restores_what_was_saved(tmp_path):
    loaded = checkpoint.load(saved_good(tmp_path), "lesson_05")
    assert same(loaded.tensors, GOOD.tensors)
    assert values_of(loaded) == values_of(GOOD)
    assert loaded.image_shape == (1, 28, 28)
    assert loaded.source == str(tmp_path / "checkpoint_000003.safetensors")


def test_tensors_of_every_kind_survive(tmp_path):
    kinds = {
        "channels_last": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 5).T,
        "part": torch.arange(10)[::3],
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.randn(2)),
        **{str(d): torch.ones(3, dtype=d) for d in (torch.half, torch.bfloat16, torch.double)},
        **{str(d): torch.ones(3, dtype=d) for d in (torch.bool, torch.uint8, torch.int32)},
    }
    checkpoint.save(tmp_path / "file", replace(small(), tensors=kinds))
    loaded = checkpoint.load(tmp_path / "file").tensors
    assert same(loaded, kinds)
    assert all(loaded[name].dtype == kinds[name].dtype for name in kinds)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    """For any order of names and any layout in memory."""
    saved_good(tmp_path)
    tensors = dict(reversed(GOOD.tensors.items()))
    tensors = {
        k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in tensors.items()
    }
    config = dict(reversed(GOOD.config.items()))
    checkpoint.save(tmp_path / "other", replace(GOOD, tensors=tensors, config=config))
    one, other = (path.read_bytes() for path in tmp_path.iterdir())
    assert one == other


def test_the_header_is_read_without_the_tensors(tmp_path):
    path = saved_good(tmp_path)
    length = int.from_bytes(GOOD_FILE[:8], "little")
    path.write_bytes(path.read_bytes()[: 8 + length])
    header = checkpoint.read_header(path)
    assert header.tensors == {}
    assert values_of(header) == values_of(GOOD)


@pytest.mark.skipif(os.name != "posix", reason="no permissions of this kind here")
def test_who_may_read_other_new_files_may_read_a_checkpoint(tmp_path):
    (tmp_path / "plain").touch()
    assert saved_good(tmp_path).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = saved_good(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(path, replace(GOOD, step=9))
    monkeypatch.undo()
    assert checkpoint.load(path).step == 3
    assert list(tmp_path.iterdir()) == [path]


# Networks


def test_a_network_is_built_from_the_averaged_weights(tmp_path):
    tensors = {k: v + 1 if k.startswith("model.") else v for k, v in GOOD.tensors.items()}
    checkpoint.save(tmp_path / "file", replace(GOOD, tensors=tensors))
    model = checkpoint.load(tmp_path / "file").build(lambda: UNet(**NETWORK))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, GOOD.tensors[f"ema.{name}"])


def test_a_module_keeps_its_layout_and_dtype_when_it_is_filled(tmp_path):
    weight = torch.randn(4, 3, 2, 2)
    content = replace(small(), tensors={"ema.weight": weight.half(), "other": torch.ones(1)})
    module = nn.Conv2d(3, 4, 2, bias=False).to(memory_format=torch.channels_last)
    content.fill(module)
    assert torch.equal(module.weight, weight.half().float())
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert module.weight.requires_grad


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"ema.bias": None}, "bias is missing"),
        ({"ema.more": torch.ones(1)}, "more is not expected"),
        ({"ema.bias": torch.ones(3, 1)}, r"bias is torch\.float32 \(3, 1\), not torch\.float32"),
        (
            {"ema.bias": torch.ones(3, dtype=torch.double)},
            r"torch\.float64 \(3,\), not torch\.float32",
        ),
        (
            {"ema.bias": torch.ones(3, dtype=torch.int64)},
            r"torch\.int64 \(3,\), not torch\.float32",
        ),
    ],
)
def test_weights_of_another_network_are_refused_by_name(changes, difference):
    tensors = {k: v for k, v in {**small().tensors, **changes}.items() if v is not None}
    module = nn.Linear(2, 3)
    before = module.weight.clone()
    with pytest.raises(UserError, match=f"holds another network .*{difference}"):
        replace(small(), tensors=tensors).fill(module)
    assert torch.equal(module.weight, before)


def test_an_error_while_building_the_process_is_one_line():
    content = replace(small(), source="file.safetensors")
    with (
        pytest.raises(UserError, match=r"file\.safetensors is damaged \(no 'beta_T'\)"),
        content.must_fit(),
    ):
        content.config["beta_T"]
    with pytest.raises(UserError, match=r"file\.safetensors is damaged \(no 'image_channels'\)"):
        print(content.image_shape)


# Values that are not finite


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path):
    path = saved_good(tmp_path)
    before = path.read_bytes()
    for value in (torch.nan, torch.inf, -torch.inf):
        tensors = {**GOOD.tensors, "ema.conv_in.bias": torch.tensor([0.0, 1.0, value, 2.0])}
        with pytest.raises(UserError, match=r"^ema\.conv_in\.bias has values that are not finite"):
            checkpoint.save(path, replace(GOOD, tensors=tensors))
        assert path.read_bytes() == before
        bad = as_file(values_of(GOOD), tensors)
        assert "conv_in.bias has values that are not finite" in refused(tmp_path / "bad", bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "NaN", "1e999"])
def test_scalars_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path, value):
    if isinstance(value, float):
        with pytest.raises(UserError, match="not JSON compliant"):
            replace(GOOD, config={"beta_1": value})
    text = json.dumps({**values_of(GOOD), "config": {"beta_1": "?"}}).replace('"?"', str(value))
    assert "is damaged" in refused(tmp_path / "file", as_file(text, GOOD.tensors))


# Files that are not checkpoints


def bad_files() -> dict[str, tuple[bytes, str]]:
    values, tensors = values_of(GOOD), GOOD.tensors
    middle = len(GOOD_FILE) // 2
    return {
        "empty": (b"", "is no checkpoint"),
        "text": (b"hello" * 100, "is no checkpoint"),
        "zip": (b"PK\3\4" + bytes(1000), "these are .safetensors files, no longer .pt"),
        "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "no longer .pt"),
        "cut": (GOOD_FILE[:-100], "is damaged"),
        "cut header": (GOOD_FILE[:1000], "is damaged"),
        "longer": (GOOD_FILE + b"x", "is damaged"),
        "other program": (with_header(GOOD_FILE, {}), "holds no checkpoint of these lessons"),
        "format": (as_file({**values, "format": 3}, tensors), "of these lessons (format 2)"),
        "lesson": (
            as_file({**values, "lesson": "lesson_09"}, tensors),
            "is a checkpoint of lesson_09: use its scripts",
        ),
        "no step": (
            as_file({k: v for k, v in values.items() if k != "step"}, tensors),
            "no 'step'",
        ),
        "no weights": (as_file(values, {}), "describes a larger network than it holds"),
        "bit": (
            GOOD_FILE[:middle] + bytes([GOOD_FILE[middle] ^ 4]) + GOOD_FILE[middle + 1 :],
            "its tensors are not those that were saved",
        ),
        "sum": (as_file(values, tensors, "0" * 64), "its tensors are not those that were saved"),
        "sizes": (
            as_file({**values, "config": {"network": {"image_size": 28.0}}}, tensors),
            "image_size is 28.0, not an integer from 1 to 4,096",
        ),
    }


@pytest.mark.parametrize("name", bad_files())
def test_a_bad_file_is_one_line(name, tmp_path):
    data, reason = bad_files()[name]
    line = refused(tmp_path / "bad.safetensors", data)
    assert line.startswith(f"{tmp_path / 'bad.safetensors'} ")
    assert reason in line


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    assert "(No such file or directory): name a file such as" in refused(tmp_path / "missing")
    assert "a folder or a pipe" in refused(tmp_path)
    assert "~nosuchuser" in refused(Path("~nosuchuser/file"))
    assert "File name too long" in refused(tmp_path / ("x" * 300))

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = saved_good(tmp_path)
    monkeypatch.setattr(Path, "open", denied)
    assert "cannot be read (Permission denied)" in refused(path)


def test_a_checkpoint_of_a_run_is_checked_like_a_file():
    """So a run fails before its first step if its checkpoints could not be loaded."""
    for changes, reason in [
        ({"config": {"num_timesteps": 2_000_000}}, "^num_timesteps is 2000000, not an integer"),
        ({"config": {"num_timesteps": 0, "network": {"num_timesteps": 9}}}, "^num_timesteps is 0"),
        ({"config": {"network": {"channels": 10**7}}}, "^channels is 10000000: it must be at most"),
        ({"step": -1}, "^its step is not valid"),
        ({"step": 1.5}, "^its step is not of the right type"),
        ({"config": {"folder": Path("x")}}, "not JSON serializable"),
    ]:
        with pytest.raises(UserError, match=reason):
            replace(GOOD, **changes)


def test_a_file_names_no_paths(tmp_path):
    paths = dict.fromkeys(sorted(checkpoint.PATHS), "/elsewhere")
    values = {**values_of(GOOD), "config": {**GOOD.config, **paths}}
    (tmp_path / "file").write_bytes(as_file(values, GOOD.tensors))
    for content in (checkpoint.load(tmp_path / "file"), checkpoint.read_header(tmp_path / "file")):
        assert content.config == GOOD.config
    checkpoint.save(tmp_path / "file", replace(GOOD, config={**GOOD.config, **paths}))
    assert b"/elsewhere" not in (tmp_path / "file").read_bytes()


def test_the_checksum_of_the_file_is_compared(tmp_path):
    path = saved_good(tmp_path)
    right = files.file_sha256(path)
    assert checkpoint.load(path, sha256=right.upper()).step == 3
    with pytest.raises(UserError, match=f"has the sha256 {right}, not 000"):
        checkpoint.load(path, sha256="0" * 64)
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        checkpoint.load(path, sha256="")


def test_nothing_in_the_project_unpickles_except_tensors_of_published_weights():
    for folder in ("common", "lesson_*", "benchmarks"):
        for path in ROOT.glob(f"{folder}/**/*.py"):
            text = path.read_text()
            found = re.findall(r"(?<!safetensors\.)torch\.load\(.*|.*import pickle.*", text)
            allowed = ['torch.load(file, "cpu", weights_only=True)']
            assert found == (allowed if path.name == "import_weights.py" else []), path


# Templates


@pytest.mark.parametrize(
    ("tensors", "training", "difference"),
    [
        (
            {"rng.cpu": torch.zeros(3, dtype=torch.uint8)},
            {},
            r"rng\.cpu is torch\.uint8 \(3,\), not torch\.uint8",
        ),
        ({"rng.cpu": torch.zeros(5056)}, {}, r"rng\.cpu is torch\.float32"),
        ({"rng.more": torch.zeros(1)}, {}, r"rng\.more is not expected"),
        ({"rng.cpu": None}, {}, r"rng\.cpu is missing"),
        ({}, {"num_bad_steps": True}, r"training\.num_bad_steps is bool, not int"),
        ({}, {"num_bad_steps": None}, r"training\.num_bad_steps is NoneType, not int"),
        ({}, {"totals": {"loss": 1}}, r"training\.totals\.loss is int, not float"),
        ({}, {"totals": {}}, r"training\.totals\.loss is missing"),
        ({}, {"totals": [1.0]}, r"training\.totals is list, not dict"),
        ({}, {"counts": {"loss": []}}, r"training\.counts\.loss is list, not float"),
        ({}, {"more": 1}, r"training\.more is not expected"),
    ],
)
def test_content_that_a_run_would_not_save_is_not_resumed(tensors, training, difference):
    content = replace(
        GOOD,
        tensors={k: v for k, v in {**GOOD.tensors, **tensors}.items() if v is not None},
        training={**(GOOD.training or {}), **training},
        source="file.safetensors",
    )
    with pytest.raises(UserError, match=rf"file\.safetensors does not fit .*{difference}"):
        checkpoint.check_template(content, GOOD.tensors, GOOD.training or {})


def test_a_template_fits_its_own_checkpoint(tmp_path):
    loaded = checkpoint.load(saved_good(tmp_path))
    training: dict[str, Any] = {**(GOOD.training or {})}
    checkpoint.check_template(loaded, GOOD.tensors, training)
    training["totals"] = {}  # floats by any name
    checkpoint.check_template(loaded, GOOD.tensors, training)
    with pytest.raises(UserError, match="training is NoneType, not dict"):
        checkpoint.check_template(replace(loaded, training=None), GOOD.tensors, training)


def test_the_random_state_of_a_gpu_that_the_run_does_not_use_is_ignored():
    tensors = {**GOOD.tensors, "rng.cuda": torch.zeros(16, dtype=torch.uint8)}
    checkpoint.check_template(replace(GOOD, tensors=tensors), GOOD.tensors, GOOD.training or {})
    with pytest.raises(UserError, match=r"rng\.cuda is missing"):
        checkpoint.check_template(GOOD, tensors, GOOD.training or {})


# A run's folder


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("999999", "1000000", "000004", "best", "12x"):
        (tmp_path / f"checkpoint_{name}.safetensors").touch()
    (tmp_path / "checkpoint_2000000.pt").touch()
    steps = [checkpoint.step_of(path) for path in checkpoint.saved(tmp_path)]
    assert steps == [4, 999_999, 1_000_000]


def test_the_checkpoint_to_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkpoint.find_checkpoint("auto", tmp_path / "nowhere") is None
    with pytest.raises(UserError, match="holds no checkpoint to resume: start without --resume"):
        checkpoint.find_checkpoint("latest", tmp_path)
    path = saved_good(tmp_path)
    for resume in ("auto", "latest", "~/checkpoint_000003.safetensors"):
        assert checkpoint.find_checkpoint(resume, tmp_path) == path
    assert checkpoint.find_checkpoint("other.safetensors", tmp_path) == Path("other.safetensors")
