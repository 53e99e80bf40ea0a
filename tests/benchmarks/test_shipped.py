"""The shipped checkpoints: small, in half precision, and drawing the stored samples.

python tests/benchmarks/test_shipped.py     # stores new samples, after a checkpoint was replaced
"""

from pathlib import Path

from benchmarks.quality.samples import PlanOptions, SamplePlan
from common import checkpoint
from common.files import ROOT, file_sha256

import numpy as np
import pytest
import torch
from torch import Tensor

STORED = Path(__file__).with_name("shipped.npz")
FILES = sorted(ROOT.glob("lesson_*/**/pretrained/*.safetensors"))


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@torch.no_grad()
def draw(file: Path) -> Tensor:
    """Two samples, a 3 and a 7, in [-1, 1]: by ten steps of DDIM, or by all steps of lesson 2."""
    options = PlanOptions(device="cpu", sampler="ddim", num_steps=10)
    if "lesson_02" in file.parts:
        options = PlanOptions(device="cpu", sampler="ddpm")
    plan = SamplePlan(str(file), options)
    torch.manual_seed(0)
    for _, xt in plan.trajectory(torch.tensor([3, 7]), 0):
        images = xt
    return images.clamp(-1, 1)


def test_the_shipped_files_are_small_and_have_stored_samples():
    assert len(FILES) == 7
    sizes = [file.stat().st_size for file in FILES]
    assert max(sizes) <= 10_000_000
    assert sum(sizes) <= 40_000_000
    with np.load(STORED, allow_pickle=False) as stored:
        assert set(stored) == {name(file) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_shipped_file_draws_the_stored_samples(file):
    with np.load(STORED, allow_pickle=False) as stored:
        expected = torch.from_numpy(stored[name(file)]).float()
    assert (draw(file) - expected).abs().max() < 1e-2
    assert expected.std() > 0.3  # not empty


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_shipped_file_holds_averaged_weights_in_half_precision_and_no_more(file):
    content = checkpoint.load(file)
    assert content.dataset == "mnist"
    assert content.training is None
    assert all(key.startswith("ema.") for key in content.tensors)
    assert {t.dtype for t in content.tensors.values()} == {torch.float16}
    assert file_sha256(file) in (file.parent / "README.md").read_text()


if __name__ == "__main__":
    arrays = {name(file): draw(file).half().numpy() for file in FILES}
    np.savez_compressed(STORED, **arrays)
    print(f"{STORED}: {', '.join(arrays)}, {STORED.stat().st_size:,} bytes")
