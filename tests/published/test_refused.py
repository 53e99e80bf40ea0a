"""Files that cannot be imported: each gets one line and exit code 2, and nothing is written."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

from common import import_weights
from lesson_05 import published as five
from lesson_09 import published as nine

import official
import pytest
import safetensors.torch
import torch
from torch import Tensor

RAN = []  # code in a file has run


def record(*_: object) -> None:
    RAN.append(1)


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return record, (1,)


def error_line(capsys: pytest.CaptureFixture, path: Path | str, *words: str) -> str:
    before = set(Path.cwd().rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        import_weights.main([str(path), *words])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ")
    assert not captured.out
    assert set(Path.cwd().rglob("*")) == before
    assert not RAN
    return line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def empty(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights that take no memory."""
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


OPENAI = official.shapes("openai_imagenet64_uncond_100M")
GUIDED = {name: shape for name, shape in OPENAI.items() if ".op." not in name}
OTHERS = {
    "labels, as it is class-conditional": {**OPENAI, "label_emb.weight": (1000, 512)},
    "an upsampler": {**OPENAI, "input_blocks.0.0.weight": (128, 6, 3, 3)},
    "residual blocks that resize, as it is from guided-diffusion": GUIDED,
    "labels, as it is class-conditional and residual blocks that resize": {
        **GUIDED,
        "label_emb.weight": (1000, 512),
    },
    "a classifier": {name: shape for name, shape in OPENAI.items() if "output_blocks" not in name},
    "prompts": {"conv_in.weight": (320, 4, 3, 3), "down_blocks.0.attn2.to_k.weight": (320, 768)},
    "nearest is ddpm-cifar10-32: conv_in.weight has the shape (64, 3, 3, 3), not (128, 3, 3, 3)": {
        **official.shapes("google_ddpm_cifar10_32"),
        "conv_in.weight": (64, 3, 3, 3),
    },
    "nearest is iddpm-cifar10: input_blocks.5.1.qkv.bias is missing": {
        name: shape
        for name, shape in official.shapes("openai_cifar10_uncond_50M").items()
        if name != "input_blocks.5.1.qkv.bias"
    },
    "nearest is ddpm-cifar10-32: extra is not expected": {
        **official.shapes("ermongroup_cifar10"),
        "extra": (3,),
    },
    "no network that these lessons know, which are ddpm-cifar10-32, ddim-celeba-64, ddpm-256, ": {
        "bert.embeddings.weight": (3, 4)
    },
}


@pytest.mark.parametrize("words", OTHERS)
def test_other_networks_are_refused_by_name(words, folder, capsys):
    torch.save(empty(OTHERS[words]), folder / "weights.pt")
    assert words in error_line(capsys, "weights.pt")


def small() -> dict[str, Tensor]:
    return official.renamed(official.network(), five.DIFFUSERS)


def as_bytes(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def compressed() -> bytes:
    """An archive whose pickle unpacks to 50 times its size."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
        archive.writestr("archive/version", "3")
    return buffer.getvalue()


def changed(name: str, value: Any) -> dict[str, Any]:
    return {**small(), name: value}


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) >= 1
    assert len(old) == len(new)
    return data.replace(old, new)


HOSTILE = {
    "empty": (lambda: b"", ""),
    "text": (lambda: b"<html>404 not found</html>" * 9, ""),
    "half a zip": (lambda: (data := as_bytes(small()))[: len(data) // 2], ""),
    "half an old file": (
        lambda: (data := as_bytes(small(), _use_new_zipfile_serialization=False))[: len(data) // 2],
        "",
    ),
    "half a safetensors": (lambda: (data := safetensors.torch.save(small()))[: len(data) // 2], ""),
    "header without end": (lambda: (2**62).to_bytes(8, "little") + b"{" + bytes(99), ""),
    "code": (lambda: as_bytes(changed("conv_in.bias", Code())), "may run code"),
    "code, old": (
        lambda: as_bytes([Code(), small()], _use_new_zipfile_serialization=False),
        "may run code",
    ),
    "bare pickle": (lambda: pickle.dumps(Code()), "may run code"),
    "unpacks to more": (compressed, "it is compressed"),
    "a module": (lambda: as_bytes(torch.nn.Linear(2, 2)), "may run code"),
    "nothing": (lambda: as_bytes({}), "no weights by name"),
    "a number": (lambda: as_bytes(3), "no weights by name"),
    "an empty list": (lambda: as_bytes([]), "no weights by name"),
    "a tensor": (lambda: as_bytes(torch.zeros(3)), "no weights by name"),
    "a nested dict": (lambda: as_bytes({"state_dict": small()}), "'state_dict' in it is no weight"),
    "names that are numbers": (lambda: as_bytes({1: torch.zeros(2)}), "'1' in it is no weight"),
    "whole numbers": (
        lambda: as_bytes(changed("conv_in.bias", torch.zeros(8, dtype=torch.int64))),
        "'conv_in.bias' in it is no weight",
    ),
    "sparse": (
        lambda: as_bytes(changed("conv_in.bias", torch.zeros(8).to_sparse())),
        "'conv_in.bias' in it is no weight",
    ),
    "without memory": (
        lambda: as_bytes(changed("conv_in.bias", torch.zeros(8, device="meta"))),
        "'conv_in.bias' in it is no weight",
    ),
    "not a number": (
        lambda: as_bytes(changed("conv_in.bias", torch.full((8,), torch.nan))),
        "conv_in.bias has values that are not finite",
    ),
    "infinite": (
        lambda: safetensors.torch.save(changed("conv_out.bias", torch.full((3,), torch.inf))),
        "conv_out.bias has values that are not finite",
    ),
    "larger than any memory": (
        lambda: as_bytes(changed("conv_in.bias", torch.zeros(1).expand(10**13))),
        "conv_in.bias has the shape (10000000000000,), not (8,)",
    ),
    "a name of many lines": (lambda: as_bytes(changed("a\nb\x1b[31m" * 9999, 3)), "is no weight"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_and_hostile_files_are_refused_in_one_line(name, folder, capsys):
    make, words = HOSTILE[name]
    (folder / "weights.pt").write_bytes(make())
    line = error_line(capsys, "weights.pt")
    assert "weights.pt" in line
    assert words in line
    assert len(line) < 800


@pytest.mark.usefixtures("small_networks")
def test_no_changed_byte_leads_to_a_traceback(folder, capsys):
    """Its shapes are wrong in any case."""
    torch.manual_seed(1)
    content = {name: weight[:1] for name, weight in small().items()}
    for data in (as_bytes(content), safetensors.torch.save(content)):
        for position in torch.randint(0, len(data), (12,)).tolist():
            bad = bytearray(data)
            bad[position] ^= 1 << int(torch.randint(0, 8, ()))
            (folder / "weights.pt").write_bytes(bad)
            error_line(capsys, "weights.pt")


CONFIGS = {
    "config.json has norm_eps 1e-05: this lesson has 1e-06": {"norm_eps": 1e-5},
    "has attention_head_dim 8: this lesson has None": {"attention_head_dim": 8},
    "has resnet_time_scale_shift scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "has out_channels 6: this lesson has 3": {"out_channels": 6},
    "has attn_norm_num_groups 2: this lesson has 4": {"attn_norm_num_groups": 2},
    "has _class_name UNet2DConditionModel": {"_class_name": "UNet2DConditionModel"},
    "image_size is 100000, not an integer from 1 to 4,096": {"sample_size": 100_000},
    "config.json is damaged": {"block_out_channels": "x"},
    "has the shape": {"block_out_channels": [8, 32]},
    "is missing": {"layers_per_block": 10**9},
    "scheduler has beta_schedule squaredcos_cap_v2: this lesson has linear": {
        "beta_schedule": "squaredcos_cap_v2"
    },
    "scheduler has prediction_type v_prediction": {"prediction_type": "v_prediction"},
    "scheduler has variance_type learned": {"variance_type": "learned"},
}


@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize("words", CONFIGS)
def test_settings_in_a_config_that_the_lesson_does_not_have_are_refused(words, folder, capsys):
    safetensors.torch.save_file(small(), "weights.safetensors")
    change = CONFIGS[words]
    unet = {**official.UNET, **change}
    (folder / "config.json").write_text(json.dumps(unet))
    (folder / "scheduler_config.json").write_text(json.dumps({**official.SCHEDULER, **change}))
    assert words in error_line(capsys, "weights.safetensors")


@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize("text", ["", "[", "3", "[1, 2]", "[" * 99_999, "x" * 200_000, '{"a": 1}'])
def test_a_damaged_config_is_refused(text, folder, capsys):
    safetensors.torch.save_file(small(), "weights.safetensors")
    (folder / "config.json").write_text(text)
    assert "config.json is damaged" in error_line(capsys, "weights.safetensors")


@pytest.mark.usefixtures("small_networks")
def test_mistakes_on_the_command_line(folder, capsys):
    weights = official.renamed(official.network(nine), nine.OPENAI)
    torch.save(weights, folder / "weights.pt")
    (folder / "mine.safetensors").write_text("mine")
    os.mkfifo("pipe")
    line = error_line(capsys, "weights.pt", "--out", "mine.safetensors")
    assert "mine.safetensors exists: name another file with --out" in line
    assert "could not be written" in error_line(capsys, "weights.pt", "--out", "nowhere/a")
    for path in ("missing.pt", ".", "pipe"):
        assert f"{path} is not a file" in error_line(capsys, path)
    Path("huge.pt").touch()
    os.truncate("huge.pt", 10**11)  # it takes no space
    assert "huge.pt is larger than 4,000,000,000 bytes" in error_line(capsys, "huge.pt")
    assert "it is another file" in error_line(capsys, "weights.pt", "--sha256", "0" * 64)
    assert "64 hexadecimal digits" in error_line(capsys, "weights.pt", "--sha256", "")
    weights["out.2.bias"] *= 1e9
    torch.save(weights, folder / "weights.pt")
    line = error_line(capsys, "weights.pt", "--half", "--out", "half.safetensors")
    assert "ema.conv_out.bias has values that are not finite" in line
