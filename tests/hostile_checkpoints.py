"""Hostile checkpoints: a good one with other bytes, another header, other values or tensors.

Those with changed values or tensors have the right checksum: only their content is wrong.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from common import checkpoint, lessons
from common.checkpoint import FORMAT, KEY, Checkpoint
from lesson_05.unet import UNet

import safetensors.torch
import torch
from hostile_files import changed, refuses_in_one_line
from hypothesis import strategies as st
from torch import Tensor

NETWORK: dict[str, Any] = {
    "image_channels": 1,
    "image_size": 28,
    "channels": 4,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention_resolutions": [14],
    "num_groups": 2,
    "dropout": 0.0,
}


def good_checkpoint() -> Checkpoint:
    """A training checkpoint of a tiny network of lesson 5, with random weights."""
    torch.manual_seed(0)
    weights = UNet(**NETWORK).state_dict()
    groups = ("ema", "model")
    tensors = {f"{group}.{k}": v.clone() for group in groups for k, v in weights.items()}
    tensors |= {f"optimizer.{k}.exp_avg": torch.zeros_like(v) for k, v in weights.items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    config = {"num_timesteps": 60, "beta_1": 1e-4, "beta_T": 0.02, "variance": "beta"}
    config |= {"network": dict(NETWORK), "batch_size": 8, "learning_rate": 1e-3}
    training = {"totals": {"loss": 1.5}, "counts": {"loss": 2.0}, "num_bad_steps": 0}
    return Checkpoint("lesson_05", config, "digits", 3, tensors, training)


def values_of(content: Checkpoint) -> dict[str, Any]:
    """The metadata, without the checksum."""
    values = {name: getattr(content, name) for name in checkpoint.KINDS}
    return {"format": FORMAT, **json.loads(json.dumps(values))}


def as_file(values: Any, tensors: dict[str, Tensor], sha256: str | None = None) -> bytes:
    """A file with these values and tensors, valid or not, and the right checksum."""
    if isinstance(values, dict):
        parts = [
            t.reshape(-1).view(torch.uint8).numpy().tobytes() for _, t in sorted(tensors.items())
        ]
        right = hashlib.sha256(b"".join(parts)).hexdigest()
        values = json.dumps({"sha256": sha256 or right, **values}, sort_keys=True, default=repr)
    return safetensors.torch.save(tensors, {KEY: values})


def with_header(data: bytes, header: Any) -> bytes:
    """The file with another header."""
    length = int.from_bytes(data[:8], "little")
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def header_of(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


GOOD = good_checkpoint()
GOOD_FILE = as_file(values_of(GOOD), GOOD.tensors)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 10**6, 10**9, 10**12, 10**4000]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["a\nb", "\x1b[31m", "\ud800", "x" * 100_000, "../../evil", "lesson_09"]),
    st.lists(st.integers(0, 9), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=3),
    st.builds(nested, st.sampled_from([3, 20, 300, 900])),
)
HEADERS: dict[str, Any] = {
    "length": [0, 1, 10**6, 2**31, 2**63, 2**64 - 1],
    "text": [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 50_000],
    "offsets": [[0, 0], [0, 10**12], [-1, 3], [8, 4], [0], None, [0.5, 1], [0, 2**64]],
    "dtype": ["F64", "F8_E4M3", "F8_E8M0", "F4", "C64", "U64", "BOOL", "", None, 3],
    "shape": [[], [0], [-1], [2**40, 2**40], [1] * 200, [0, 2**62, 2**62], None, "4", [1.5]],
}


@st.composite
def changed_values(draw: st.DrawFn) -> bytes:
    """Values that are random, missing, or under another name."""
    values = values_of(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        parts = [values, values.get("config"), values.get("training")]
        parts += [part.get("network") for part in parts if isinstance(part, dict)]
        part = draw(st.sampled_from([p for p in parts if isinstance(p, dict) and p]))
        key = draw(st.sampled_from(list(part)))
        kind = draw(st.sampled_from(["junk", "junk", "remove", "rename"]))
        if kind == "junk":
            part[key] = draw(JUNK)
        elif kind == "remove":
            del part[key]
        else:
            part[draw(st.text(max_size=5))] = part.pop(key)
    return as_file(values, GOOD.tensors)


@st.composite
def changed_tensors(draw: st.DrawFn) -> bytes:
    """Tensors that are missing, not finite, under another name, or of another shape or dtype."""
    tensors = dict(GOOD.tensors)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(tensors)))
        kind = draw(st.sampled_from(["remove", "rename", "add", "shape", "dtype", "value"]))
        tensor = tensors[name]
        if kind == "remove":
            del tensors[name]
        elif kind in ("rename", "add"):
            prefix = draw(st.sampled_from(["", "ema.", "optimizer.", "\x1b[31m"]))
            other = prefix + draw(st.text(st.characters(codec="utf-8"), max_size=5))
            tensors[other] = tensors.pop(name) if kind == "rename" else torch.zeros(3)
        elif kind == "shape":
            shapes = [tensor.flatten(), tensor[None], tensor[:0] if tensor.ndim else tensor]
            tensors[name] = draw(st.sampled_from(shapes)).clone()
        elif kind == "dtype":
            dtypes = [torch.float16, torch.int64, torch.bool, torch.complex64, torch.float64]
            tensors[name] = tensor.to(draw(st.sampled_from([*dtypes, torch.float8_e4m3fn])))
        elif tensor.is_floating_point() and tensor.numel():
            tensors[name] = torch.full_like(tensor, draw(st.sampled_from([torch.nan, torch.inf])))
    return as_file(values_of(GOOD), tensors)


@st.composite
def changed_header(draw: st.DrawFn) -> bytes:
    """A header of another length, with other text, or with a wrong description of a tensor."""
    kind = draw(st.sampled_from(sorted(HEADERS)))
    value = draw(st.sampled_from(HEADERS[kind]))
    if kind == "length":
        return value.to_bytes(8, "little") + GOOD_FILE[8:]
    if kind == "text":
        return with_header(GOOD_FILE, value)
    header = header_of(GOOD_FILE)
    entry = header[draw(st.sampled_from(sorted(GOOD.tensors)))]
    entry["data_offsets" if kind == "offsets" else kind] = value
    return with_header(GOOD_FILE, header)


checkpoint_files = st.one_of(
    changed(GOOD_FILE), changed_values(), changed_tensors(), changed_header()
)


@refuses_in_one_line
def read_checkpoint(path: Path) -> None:
    lessons.load(str(path))


@refuses_in_one_line
def read_training(path: Path) -> None:
    """As --resume does. A file that passes must not differ from what the run itself would save."""
    content = checkpoint.load(path, "lesson_05")
    assert GOOD.training is not None
    checkpoint.check_template(content, GOOD.tensors, GOOD.training)
    for name, tensor in GOOD.tensors.items():
        found = content.tensors[name]
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        assert found.isfinite().all()
    assert content.training is not None
    assert content.training.keys() == GOOD.training.keys()
    assert not checkpoint.PATHS & content.config.keys()
