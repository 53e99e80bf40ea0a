"""Lesson 5 with labels and prompts: the condition reaches the network, and guidance is exact.
Below, its interpolation."""

import copy
import math
from functools import partial

import pytest
import torch
from conftest import NETWORK
from PIL import Image
from torch import Tensor

from common import cli
from common.errors import UserError
from common.run import RunOptions
from lesson_05 import guidance
from lesson_05 import interpolate as interpolate_script
from lesson_05.class_conditional import sample_mnist as sample_classes
from lesson_05.class_conditional import train_mnist as train_classes
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.ddpm import DDPM, linear_beta, preview
from lesson_05.interpolate import interpolate
from lesson_05.text_to_image import sample_mnist as sample_text
from lesson_05.text_to_image import train_mnist as train_text
from lesson_05.text_to_image.network import TextAttention, TextToImageUNet
from lesson_05.text_to_image.text import (
    MAX_LENGTH,
    NULL,
    PADDING,
    Context,
    TextEncoder,
    all_digit_prompts,
    digit_prompts,
    null_prompt,
    tokenize,
)

TEXT = {"dim": 16, "num_layers": 2, "num_heads": 2}


def wake(model: torch.nn.Module) -> None:
    """Every weight off zero, so that nothing hides behind a layer that starts as nothing."""
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    model.eval()


@pytest.fixture
def prompted() -> TextToImageUNet:
    model = TextToImageUNet(TextEncoder(**TEXT), **NETWORK)
    wake(model)
    return model


@pytest.fixture
def classed() -> ClassConditionalUNet:
    model = ClassConditionalUNet(10, **NETWORK)
    wake(model)
    return model


def noisy(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 1, 28, 28), torch.randint(1, 61, (count,))


def test_guidance_identities(prompted, classed):
    xt, t = noisy(3)
    label, tokens = torch.tensor([3, 1, 4]), tokenize(["3", "one", "the digit 4"])
    for model, raw, null in [
        (classed, label, torch.tensor([10, 10, 10])),
        (prompted, tokens, null_prompt(tokens)),
    ]:
        condition = getattr(model, "encode", lambda raw: raw)
        with torch.no_grad():
            eps_cond, eps_null = model(xt, t, condition(raw)), model(xt, t, condition(null))
            assert not torch.allclose(eps_cond, eps_null, atol=1e-3)
            assert torch.equal(model.bind(raw)(xt, t), eps_cond)
            assert torch.equal(model.bind(raw, 0.0)(xt, t), eps_null)
            expected = eps_null + 2.5 * (eps_cond - eps_null)
            torch.testing.assert_close(model.bind(raw, 2.5)(xt, t), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("scale", "sizes"), [(0.0, [2]), (1.0, [2]), (2.0, [4])])
def test_guidance_asks_the_network_once(scale, sizes):
    seen = []

    def model(xt, t, condition):
        seen.append(len(xt))
        return xt * condition.view(-1, 1, 1, 1)

    xt, t = noisy(2)
    out = guidance.Guided(model, scale, torch.ones(2), torch.zeros(2))(xt, t)
    assert seen == sizes
    torch.testing.assert_close(out, scale * xt)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_impossible_guidance_is_refused(scale):
    with pytest.raises(UserError, match="guidance"):
        guidance.Guided(lambda xt, t, c: xt, scale, torch.ones(1), torch.zeros(1))


def test_conditions_are_dropped_one_by_one():
    """Not by one coin for the batch: every batch of 1,000 loses about a tenth."""
    label, null = torch.zeros(1000, dtype=torch.long), torch.full((1000,), 10)
    for _ in range(5):
        share = (guidance.drop(label, null, 0.1) == 10).float().mean()
        assert 0.05 < share < 0.15
    assert (guidance.drop(label, null, 0.0) == 0).all()
    assert (guidance.drop(label, null, 1.0) == 10).all()
    tokens = tokenize(["seven", "a handwritten 3"] * 50)
    dropped = guidance.drop(tokens, null_prompt(tokens), 0.5)
    whole = (dropped == tokens).all(1) | (dropped == null_prompt(tokens)).all(1)
    assert whole.all()
    assert 20 < (dropped == null_prompt(tokens)).all(1).sum() < 80
    with pytest.raises(UserError, match="drop_probability"):
        guidance.drop(label, null, 1.5)


def test_everything_that_conditioning_adds_gets_gradient():
    """Queries and keys among it: with one context token they would get none."""
    model = TextToImageUNet(TextEncoder(**TEXT), **NETWORK)
    wake(model)
    tokens = tokenize(["7", "seven", "the digit 3"])
    tokens = torch.cat([tokens, null_prompt(tokens)[:1]])
    process = DDPM(linear_beta(60))
    x0, t = noisy(4)
    context = model.encode(tokens)
    process.loss(partial(model, context=context), x0, t, torch.randn_like(x0)).mean().backward()
    layers = [module for module in model.modules() if isinstance(module, TextAttention)]
    assert len(layers) >= 4
    for layer in layers:
        keys, values = layer.cross.kv.weight.grad.chunk(2)
        for gradient in (layer.cross.q.weight.grad, keys, values):
            assert gradient.abs().max() > 1e-7
    embedding = model.text.token.weight.grad
    assert (embedding[list(NULL)].abs().amax(1) > 0).all()
    assert (embedding[ord("7")].abs() > 0).any()
    assert (embedding[PADDING] == 0).all()


def test_classes_and_the_null_class_get_gradient(classed):
    x0, t = noisy(2)
    loss = DDPM(linear_beta(60)).loss(
        partial(classed, label=torch.tensor([3, 10])), x0, t, torch.randn_like(x0)
    )
    loss.mean().backward()
    rows = classed.label.weight.grad.abs().amax(1)
    assert rows.nonzero().flatten().tolist() == [3, 10]


def test_at_first_the_prompt_changes_nothing():
    """Both ways in start as nothing, so that what they add is learned."""
    model = TextToImageUNet(TextEncoder(**TEXT), **NETWORK).eval()
    torch.nn.init.normal_(model.conv_out.weight)
    xt, t = noisy(2)
    with torch.no_grad():
        one, two = (model.bind(tokenize([p, p]))(xt, t) for p in ("3", "seven"))
    assert torch.equal(one, two)


def test_padding_is_masked(prompted):
    """The same prompt in a batch with a long one, and with nothing beside it."""
    xt, t = noisy(1)
    alone = tokenize(["seven"])
    padded = tokenize(["seven", "an image of the digit three"])[:1]
    assert padded.shape[1] > alone.shape[1]
    with torch.no_grad():
        torch.testing.assert_close(
            prompted.bind(padded)(xt, t), prompted.bind(alone)(xt, t), atol=1e-5, rtol=1e-4
        )
        context = prompted.encode(padded)
        other = Context(torch.where(context.real[..., None], context.sequence, 1e3), context.real)
        assert torch.equal(prompted(xt, t, context), prompted(xt, t, other))


def test_each_way_into_the_network_carries_the_prompt(prompted):
    """With the joined mean silenced, the attention still tells prompts apart; and vice versa."""
    xt, t = noisy(1)
    deaf = copy.deepcopy(prompted)
    torch.nn.init.zeros_(prompted.summary.weight)
    for layer in deaf.modules():
        if isinstance(layer, TextAttention):
            torch.nn.init.zeros_(layer.cross.out.weight)
    with torch.no_grad():
        for model in (prompted, deaf):
            three, seven = (model.bind(tokenize([p]))(xt, t) for p in ("3", "seven"))
            assert (three - seven).abs().mean() > 1e-3


def test_prompts_make_the_image(prompted):
    """Same noise, two prompts: two images; the batch permuted: the images permuted."""
    process, noise = DDPM(linear_beta(30)), torch.randn(1, 1, 28, 28).expand(3, -1, -1, -1)
    tokens = tokenize(["3", "seven", "a handwritten 0"])
    order = torch.tensor([2, 0, 1])

    def sample(tokens: Tensor) -> Tensor:
        model, xt = prompted.bind(tokens), noise
        for time in range(process.num_timesteps, 0, -1):  # the means of Algorithm 2, no new noise
            t = torch.full((3,), time)
            with torch.no_grad():
                xt = process.p_mean_variance(model(xt, t), xt, t).mean
        return xt

    images = sample(tokens)
    assert (images[0] - images[1]).abs().mean() > 1e-3
    torch.testing.assert_close(sample(tokens[order]), images[order], atol=1e-4, rtol=1e-3)


def test_tokens_are_bytes():
    tokens = tokenize(["Seven", "  the   digit 7 ", "ß漢"])
    assert tokens.dtype == torch.int64
    assert tokens[0, :5].tolist() == list(b"seven")
    assert (tokens[0, 5:] == PADDING).all()
    assert bytes(tokens[1, :11].tolist()) == b"the digit 7"
    assert bytes(tokens[2, :5].tolist()).decode() == "ß漢"
    assert torch.equal(tokenize(["SEVEN"]), tokenize(["seven"]))
    assert tokenize(["7"]).shape == (1, len(NULL))
    assert (null_prompt(tokens) == null_prompt(tokens)[0]).all()


@pytest.mark.parametrize(
    "prompt", ["qwertz", "7" * MAX_LENGTH, "🙂", "\x00", "\udcff", "a\nb", "-1", "null"]
)
def test_any_text_gives_an_image(prompted, prompt):
    xt, t = noisy(1)
    with torch.no_grad():
        assert prompted.bind(tokenize([prompt]), 2.0)(xt, t).isfinite().all()


@pytest.mark.parametrize("prompt", ["", "   ", "\n", "x" * 10_000, "ß" * 33])
def test_an_empty_or_endless_prompt_is_one_clear_line(prompt):
    with pytest.raises(UserError, match=r"write 1 to 64") as caught:
        tokenize(["seven", prompt])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_training_prompts():
    prompts = digit_prompts(8)
    assert {"8", "eight", "a handwritten eight", "the digit 8", "an 8"} <= set(prompts)
    assert len(set(prompts)) == len(prompts)
    tokens = all_digit_prompts()
    assert tokens.shape[:2] == (10, len(prompts))
    assert tokens.shape[2] <= MAX_LENGTH
    assert bytes(tokens[7, 0, :1].tolist()) == b"7"


def run(folder, **changes):
    flags = {"output_dir": str(folder), "device": "cpu", "precision": "float32", "num_previews": 2}
    arguments = {
        "dataset": "digits",
        "network": NETWORK,
        "num_timesteps": 30,
        "num_training_steps": 3,
        "batch_size": 8,
        "num_warmup_steps": 2,
        "num_samples": 2,
    }
    return {**arguments, **changes, "options": RunOptions(**flags)}


def test_class_conditional_trains_and_samples(tmp_path, capsys):
    train_classes.main(**run(tmp_path / "run"))
    file = str(tmp_path / "run" / "checkpoint_000003.pt")
    flags = {"num_samples": 10, "output_dir": str(tmp_path / "out"), "device": "cpu"}
    sample_classes.main(file, labels=[3, 1, 4], guidance=2.0, save_npz=True, **flags)
    assert (tmp_path / "out" / "labels.txt").read_text() == "3 1 4 3 1 4 3 1\n4 3\n"
    assert {"samples.png", "samples.npz"} <= {f.name for f in (tmp_path / "out").iterdir()}
    for labels, message in [
        ([10], "label 10"),
        ([-1], "label -1"),
        ([], "labels"),
        ([1] * 11, "labels"),
    ]:
        with pytest.raises(UserError, match=message):
            sample_classes.main(file, labels=labels, **flags)


def test_text_to_image_trains_and_samples(tmp_path, capsys):
    train_text.main(**run(tmp_path / "run", text=TEXT))
    file = str(tmp_path / "run" / "checkpoint_000003.pt")
    flags = {"num_samples": 9, "output_dir": str(tmp_path / "out"), "device": "cpu"}
    sample_text.main(file, prompts=["seven", "a handwritten 3"], guidance=2.0, **flags)
    rows = (tmp_path / "out" / "prompts.txt").read_text().splitlines()
    assert len(rows) == 2
    assert rows[0].split()[:4] == ["seven", "a", "handwritten", "3"]
    assert rows[1] == "seven"
    sample_text.main(file, **flags)  # prompts drawn at random
    for prompts in ([], [""], ["3"] * 10):
        with pytest.raises(UserError, match="prompt"):
            sample_text.main(file, prompts=prompts, **flags)


def test_a_preview_of_a_bound_network(classed):
    x_T = torch.randn(2, 1, 28, 28)
    images = preview(DDPM(linear_beta(60)), classed.bind(torch.tensor([3, 7]), 1.5), x_T, 5)
    assert images.shape == x_T.shape
    assert images.isfinite().all()


# Interpolation


def test_the_ends_of_an_interpolation_have_noise_of_their_own():
    """Halfway between two noised copies of one image the noise has 1/√2 of its size; with the
    same noise at both ends it would have all of it."""
    process, seen = DDPM(linear_beta(60)), []

    def model(xt: Tensor, t: Tensor) -> Tensor:
        seen.append((t[0].item(), xt))
        return torch.zeros_like(xt)

    x0 = torch.full((1, 1, 100, 100), 0.4)
    images = interpolate(process, model, x0, -x0, 30, [0.0, 0.25, 0.5, 1.0])
    assert images.shape == (4, 1, 100, 100)
    assert [t for t, _ in seen] == list(range(30, 0, -1))
    first, quarter, half, second = seen[0][1]
    signal, noise = process.signal_rate[30].item(), process.noise_rate[30].item()
    for image, mean, size in [
        (first, 0.4, 1.0),
        (quarter, 0.2, math.hypot(0.75, 0.25)),
        (half, 0.0, math.sqrt(0.5)),
        (second, -0.4, 1.0),
    ]:
        assert image.mean().item() == pytest.approx(signal * mean, abs=0.05)
        assert image.std().item() == pytest.approx(noise * size, rel=0.05)
    torch.testing.assert_close(quarter, 0.75 * first + 0.25 * second)


def test_an_interpolation_from_little_noise_ends_at_the_images():
    """With the true noise for a network: t = 1 gives the straight line between the images."""
    process = DDPM(linear_beta(60))
    x0, other = torch.rand(2, 1, 1, 8, 8) * 2 - 1
    fractions = torch.linspace(0, 1, 5).view(-1, 1, 1, 1)
    line = (1 - fractions) * x0 + fractions * other

    def true_noise(xt: Tensor, t: Tensor) -> Tensor:
        return (xt - process.signal_rate[t] * line) / process.noise_rate[t]

    images = interpolate(process, true_noise, x0, other, 1, fractions.flatten().tolist())
    torch.testing.assert_close(images, line, atol=1e-5, rtol=0)


def test_interpolate_writes_its_picture_and_refuses_what_there_is_not(trained, tmp_path, capsys):
    flags = ["--model_checkpoint", str(trained / "checkpoint_000004.pt"), "--dataset", "digits"]
    flags += ["--num_columns", "3", "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    cli.run(interpolate_script.main, [*flags, "--times", "2", "5"])
    with Image.open(tmp_path / "out" / "interpolation.png") as picture:
        assert picture.size == (2 * (5 * 29 + 1), 2 * (2 * 29 + 1))
    for words, said in [
        (["--times", "0"], "times [0]"),
        (["--times", "5", "61"], "take one or more of 1 to 60"),
        (["--first", "-1"], "there is no test image -1"),
        (["--second", "297"], "take 0 to 296"),
        (["--num_columns", "1"], "2 columns"),
    ]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run(interpolate_script.main, [*flags, *words])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
