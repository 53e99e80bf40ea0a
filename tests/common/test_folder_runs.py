"""Every lesson with own images of 3x12x8: trained, resumed, sampled, evaluated."""

import json
from pathlib import Path
from typing import Any

from benchmarks.quality import evaluate as measure
from common import checkpoint, cli, lessons
from common.checkpoint import Checkpoint, saved
from common.errors import UserError
from common.network_checks import feature_map_sizes, fit_attention
from lesson_02 import sample_mnist as sample_dpm
from lesson_02 import train_mnist as train_dpm
from lesson_02.network import ConvDense
from lesson_02.options import DPMOptions
from lesson_05 import interpolate
from lesson_05 import train_mnist as train_ddpm
from lesson_05.class_conditional import break_it as break_labels
from lesson_05.class_conditional import sample_mnist as sample_labels
from lesson_05.class_conditional import train_mnist as train_labels
from lesson_05.options import ConditionalOptions, TextToImageOptions
from lesson_05.text_to_image import break_it as break_prompts
from lesson_05.text_to_image import sample_mnist as sample_prompts
from lesson_05.text_to_image import train_mnist as train_prompts
from lesson_05.text_to_image.text import TEMPLATES, class_prompts, digit_prompts
from lesson_05.unet import UNet
from lesson_06 import laboratory, sample_ddim
from lesson_09 import evaluate
from lesson_09 import train_mnist as train_9
from lesson_09.options import IDDPMOptions
from lesson_09.unet import UNet as UNet9

import numpy as np
import pytest
import torch
from helpers import TINY_RUN, error_line, train
from PIL import Image
from small_networks import TEXT, perturb, save_small_checkpoint
from torch import nn

NETWORK = {"channels": 4, "multipliers": [1, 2], "num_blocks": 1, "attention_resolutions": [7]}
NETWORK |= {"num_groups": 1, "dropout": 0.1, "num_heads": 1}
CLASSES = ["barn owl", "cat"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    root, random = tmp_path_factory.mktemp("own") / "my images", np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for number in range(11):
            levels = random.integers(0, 256, (12, 8, 3), dtype=np.uint8)
            Image.fromarray(levels).save(root / name / f"{number}.png")
    return str(root)


@pytest.fixture
def tiny(images, tmp_path) -> dict[str, Any]:
    """The options of a tiny run on these images."""
    own = {"dataset": "folder", "data_dir": images, "output_dir": str(tmp_path / "run")}
    return {**TINY_RUN, **own, "num_warmup_steps": 2, "num_timesteps": 24}


def words(*flags: object) -> list[str]:
    return [*map(str, flags), "--device", "cpu", "--precision", "float32"]


def last(folder: Path) -> str:
    return str(saved(folder)[-1])


def test_lesson_5_trains_resumes_and_interpolates(tiny, images, tmp_path):
    run = Path(tiny.pop("output_dir"))
    train(run, NETWORK, **tiny)
    content = checkpoint.load(last(run))
    assert content.image_shape == (3, 12, 8)
    assert (content.classes, content.dataset) == (CLASSES, "folder")
    assert content.config["network"]["attention_resolutions"] == [6]  # 12 and 6 are the sizes
    assert "data_dir" not in content.config
    half = tmp_path / "half"
    train(half, NETWORK, **tiny, checkpoint_every=2)
    for file in (*saved(half)[1:], half / "samples.png"):
        file.unlink()
    network = content.config["network"]
    train(half, {k: network[k] for k in NETWORK}, **tiny, checkpoint_every=2, resume="latest")
    assert (half / "samples.png").read_bytes() == (run / "samples.png").read_bytes()
    for change in ({"image_size": [8]}, {"image_channels": 1}, {"data_dir": f"{images}/cat"}):
        with pytest.raises(UserError, match="was trained on other images"):
            train(half, NETWORK, **{**tiny, **change}, resume="latest")
    square = tmp_path / "square"
    train(square, NETWORK, **tiny, image_size=[8], image_channels=1)
    flags = ("--resume", "--data_dir", images, "--output_dir", square, "--num_training_steps", 5)
    cli.run(train_ddpm.main, words(*flags), presets=True, network=UNet)
    assert checkpoint.load(last(square)).image_shape == (1, 8, 8)
    with Image.open(run / "forward.png") as picture:
        assert picture.size == (2 * (11 * 9 + 1), 2 * (2 * 13 + 1))  # two images are held out
    flags = ("--model_checkpoint", last(run), "--data_dir", images, "--output_dir", tmp_path)
    cli.run(interpolate.main, words(*flags, "--times", 5, "--num_columns", 2))
    flags += ("--figure", "reconstruction", "--steps", 3, "--num_samples", 2)
    cli.run(laboratory.main, words(*flags))
    assert {"interpolation.png", "reconstruction.png"} <= {file.name for file in tmp_path.iterdir()}


def test_a_run_on_a_data_set_is_not_resumed_in_another_size(trained):
    with pytest.raises(UserError, match="was trained on other images"):
        train(trained, image_size=[32], resume="latest")


def test_classes_keep_their_names(tiny, images, tmp_path, capsys):
    train_labels.main(ConditionalOptions(**tiny), NETWORK)
    file, out = last(tmp_path / "run"), ("--output_dir", tmp_path / "out")
    assert (tmp_path / "run" / "labels.txt").read_text() == "barn owl cat\n"
    flags = ("--model_checkpoint", file, *out, "--num_samples", 3)
    for labels, written in [(["cat", "0"], "cat barn owl cat"), ([], "barn owl cat barn owl")]:
        chosen = ["--labels", *labels] if labels else []
        cli.run(sample_labels.main, words(*flags, *chosen))
        assert " ".join((tmp_path / "out" / "labels.txt").read_text().split()) == written
    line = error_line(capsys, sample_labels.main, *words(*flags, "--labels", "dog"))
    assert "label dog is not known: choose from barn owl, cat" in line
    cli.run(sample_ddim.main, words(*flags, "--num_steps", 2, "--prompts", "cat", "barn owl"))
    assert (tmp_path / "out" / "prompts.txt").read_text().split() == ["cat", "barn", "owl", "cat"]
    cli.run(break_labels.main, words(*flags, "--num_steps", 2, "--what", "never_dropped"))
    flags = ("--model_checkpoint", file, "--data_dir", images, *out, "--num_images", 2)
    cli.run(measure.main, words(*flags, "--num_samples", 65, "--sampler", "ddpm"))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["bits_per_dim"]["total"]["mean"] > 0
    assert result["nearest_median"] > 0
    assert (result["fid"], result["classifier_sha256"]) == (None, None)


def test_prompts_name_the_classes(tiny, tmp_path):
    train_prompts.main(TextToImageOptions(**tiny), NETWORK, TEXT)
    out = ("--model_checkpoint", last(tmp_path / "run"), "--output_dir", tmp_path / "out")
    cli.run(sample_prompts.main, words(*out, "--num_samples", 4))
    known = {prompt for row in class_prompts(CLASSES) for prompt in row}
    written = (tmp_path / "out" / "prompts.txt").read_text().strip()
    assert {*written.split("  ")} - {""} <= {prompt.strip() for prompt in known}
    cli.run(break_prompts.main, words(*out, "--num_samples", 2, "--num_steps", 2))


def test_the_templates_name_classes_and_digits():
    owl, cat = class_prompts(["amber_owl", "cat"])
    assert {"amber owl", "an amber owl", "the amber owl", "please draw an amber owl"} < {*owl}
    assert {"cat", "a cat", "a picture of a cat"} < {*cat}
    assert len(owl) == len(cat) == len({*cat}) == 5
    assert {prompt.replace("cat", "{}") for prompt in cat} <= {*TEMPLATES}
    assert class_prompts(["7", "3"]) == [digit_prompts(7), digit_prompts(3)]


def test_lesson_9_trains_and_is_evaluated(tiny, images, tmp_path):
    train_9.main(IDDPMOptions(**tiny), NETWORK)
    flags = ("--model_checkpoint", last(tmp_path / "run"), "--data_dir", images)
    flags += ("--output_dir", tmp_path, "--num_images", 2, "--num_terms", 3)
    cli.run(evaluate.main, words(*flags))
    assert json.loads((tmp_path / "bits_per_dim.json").read_text())["num_images"] == 2


def test_lesson_2_trains_and_inpaints(tiny, images, tmp_path, capsys):
    network = {"conv_channels": 3, "num_scales": 2, "dense_channels": 4}
    train_dpm.main(DPMOptions(**tiny, num_bound_images=2), network)
    flags = ("--model_checkpoint", last(tmp_path / "run"), "--output_dir", tmp_path)
    flags += ("--inpaint", "left", "--num_images", 2, "--num_draws", 1)
    cli.run(sample_dpm.main, words(*flags, "--data_dir", images))
    with Image.open(tmp_path / "inpainted.png") as picture:
        assert picture.size == (2 * (3 * 9 + 1), 2 * (2 * 13 + 1))
    assert "with --data_dir" in error_line(capsys, sample_dpm.main, *words(*flags))
    line = error_line(capsys, sample_dpm.main, *words(*flags, "--dataset", "digits"))
    assert "was not trained on images like digits" in line
    with pytest.raises(UserError, match="12x10, divisible by"):
        ConvDense(3, [12, 10], 12, num_scales=3)


@pytest.mark.parametrize("kind", [UNet, UNet9])
@torch.no_grad()
def test_height_and_width_are_not_mixed_up(kind):
    """With every kernel transposed, the transposed images give the transposed result."""
    network = {**NETWORK, "multipliers": [1, 2, 2], "attention_resolutions": [6]}
    network |= {"learned_variance": True} if kind is UNet9 else {}
    model, turned = perturb(kind(3, [22, 9], **network)), kind(3, [9, 22], **network).eval()
    turned.load_state_dict(model.state_dict())
    for layer in turned.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.copy_(layer.weight.mT.clone())
    xt, t = torch.randn(2, 3, 22, 9), torch.tensor([1, 7])
    torch.testing.assert_close(turned(xt.mT, t), model(xt, t).mT, atol=1e-4, rtol=1e-4)


def test_attention_is_moved_to_a_size_that_there_is():
    assert feature_map_sizes(28, 3) == feature_map_sizes([28, 28], 3) == [28, 14, 7]
    assert feature_map_sizes([64, 48], 3) == feature_map_sizes([48, 64], 3) == [64, 32, 16]
    assert fit_attention([7, 8], [28, 14, 7]) == [7, 8]
    assert fit_attention([7, 8], [64, 32, 16]) == [16]
    assert fit_attention([16], [96, 48, 24, 12]) == [12]
    assert fit_attention([40, 8], [96, 48, 24, 12]) == [12, 24]
    assert fit_attention([], [64, 32]) == []
    with pytest.raises(UserError, match=r"a 64x3 image cannot be halved 2 times: .* at most 2"):
        feature_map_sizes([64, 3], 3)


@pytest.mark.parametrize("size", [0, [28], [28, 28, 28], [28, 28.0], [[28], 28], "28", [28, 5000]])
def test_image_sizes_that_no_network_has_are_refused(size):
    for config in ({"network": {"image_size": size}}, {"image_size": size}):
        with pytest.raises(UserError, match=r"image_size is .*, not an integer from 1 to 4,096"):
            Checkpoint("lesson_05", config, "folder", 1, {})
    with pytest.raises(UserError, match="image_size is None"):
        Checkpoint("lesson_05", {"network": {"image_size": None}}, "folder", 1, {})


def test_wrong_classes_in_a_file_are_refused(tmp_path):
    path = save_small_checkpoint(tmp_path, "lesson_05.class_conditional")  # it has ten
    content = checkpoint.load(path)
    for classes in (["cat"], [*"abcdefghijk"], "abcdefghij", [*range(10)], {"a": 1}):
        content.config["classes"] = classes
        checkpoint.save(Path(path), content)
        with pytest.raises(UserError, match=r"conditional.safetensors is damaged \(it"):
            lessons.load(path)
    content.config["classes"] = [f"class {letter}" for letter in "abcdefghij"]
    checkpoint.save(Path(path), content)
    assert lessons.load(path)[1].classes[9] == "class j"
