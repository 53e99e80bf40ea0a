"""Every script works on a checkpoint of imported weights: three channels, another size."""

import json
from pathlib import Path
from typing import Any

from common import import_weights
from common.checkpoint import Checkpoint
from common.data import Images
from common.options import CheckpointOptions, SamplingOptions
from lesson_05 import interpolate, sample_mnist
from lesson_05 import published as five
from lesson_06 import laboratory, sample_ddim
from lesson_09 import evaluate
from lesson_09 import published as nine
from lesson_09 import sample_mnist as sample_iddpm

import numpy as np
import official
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.fixture
def checkpoints(tmp_path: Path) -> dict[str, str]:
    """An imported checkpoint of each lesson. Weights near zero: a network that predicts little."""
    five.PUBLISHED["small"].config["num_timesteps"] = 50  # so that all steps are soon taken
    result = {}
    for lesson, module, table in [("5", five, five.ERMONGROUP), ("9", nine, nine.OPENAI)]:
        model = official.network(module)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.02)
        torch.save(official.renamed(model, table), tmp_path / "weights.pt")
        result[lesson] = str(tmp_path / f"{lesson}.safetensors")
        import_weights.import_weights(str(tmp_path / "weights.pt"), result[lesson], None, False)
    return result


@pytest.fixture
def photographs(monkeypatch: pytest.MonkeyPatch) -> Images:
    """A data set of the size of the small networks, under the name that the import gives it."""
    levels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    labels = torch.zeros(12, dtype=torch.int64)
    images = Images("cifar10", levels[:8], labels[:8], levels[8:], labels[8:])

    def load_images_for(content: Checkpoint, *_: object) -> Images:
        assert content.dataset == "cifar10"
        return images

    for module in (interpolate, laboratory, evaluate):
        monkeypatch.setattr(module, "load_images_for", load_images_for)
    return images


def sampling(checkpoint: str, folder: Path) -> Any:
    return SamplingOptions(
        model_checkpoint=checkpoint,
        num_samples=2,
        save_npz=True,
        device="cpu",
        output_dir=str(folder),
    )


@pytest.mark.parametrize("lesson", ["5", "9"])
def test_ddim_draws_from_imported_weights(lesson, checkpoints, tmp_path):
    options = sampling(checkpoints[lesson], tmp_path / "out")
    sample_ddim.main(num_steps=3, options=options)
    samples = np.load(tmp_path / "out" / "unconditional.npz")["samples"]
    assert samples.shape == (2, 3, 16, 16)
    assert Image.open(tmp_path / "out" / "unconditional.png").mode == "RGB"


def test_the_samplers_of_lessons_5_and_9_draw_from_imported_weights(checkpoints, tmp_path):
    options = sampling(checkpoints["9"], tmp_path / "9")
    sample_iddpm.main(num_steps=4, options=options)
    assert np.load(tmp_path / "9" / "samples.npz")["samples"].shape == (2, 3, 16, 16)
    options = sampling(checkpoints["5"], tmp_path / "5")
    sample_mnist.main(options=options)
    assert np.load(tmp_path / "5" / "samples.npz")["samples"].shape == (2, 3, 16, 16)


@pytest.mark.usefixtures("photographs")
def test_images_are_encoded_and_noises_interpolated(checkpoints, tmp_path):
    for lesson in "59":
        for figure in ("reconstruction", "interpolation"):
            options = laboratory.Options(
                model_checkpoint=checkpoints[lesson],
                dataset="cifar10",
                num_samples=2,
                device="cpu",
                output_dir=str(tmp_path / lesson),
            )
            laboratory.main(figure, steps=[3], options=options)
            assert (tmp_path / lesson / f"{figure}.png").exists()
    options = interpolate.Options(
        model_checkpoint=checkpoints["5"], dataset="cifar10", output_dir=str(tmp_path / "between")
    )
    interpolate.main(times=[3], num_columns=2, options=options)
    assert (tmp_path / "between" / "interpolation.png").exists()


@pytest.mark.usefixtures("photographs")
def test_bits_per_dimension_of_imported_weights(checkpoints, tmp_path):
    options = CheckpointOptions(
        model_checkpoint=checkpoints["9"], device="cpu", output_dir=str(tmp_path / "bits")
    )
    evaluate.main(num_images=4, num_terms=5, options=options)
    result = json.loads((tmp_path / "bits" / "bits_per_dim.json").read_text())
    assert result["num_timesteps"] == 4000
    assert 0 < result["total"]["mean"] < 1000
