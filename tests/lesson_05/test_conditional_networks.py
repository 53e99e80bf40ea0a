"""Lesson 5 with labels and prompts: how the condition enters the network, and guidance."""

import copy
from functools import partial

from common.errors import UserError
from lesson_05 import guidance
from lesson_05.class_conditional.network import ClassConditionalUNet
from lesson_05.ddpm import DDPM, linear_beta, preview
from lesson_05.text_to_image.network import TextAttention, TextToImageUNet
from lesson_05.text_to_image.text import NULL, PADDING, Context, null_prompt, tokenize

import pytest
import torch
from helpers import NETWORK
from small_networks import IMAGE, perturb, small_prompted
from torch import Tensor


@pytest.fixture
def prompted() -> TextToImageUNet:
    return perturb(small_prompted())


@pytest.fixture
def labelled() -> ClassConditionalUNet:
    return perturb(ClassConditionalUNet(10, **IMAGE, **NETWORK))


def noisy(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 1, 28, 28), torch.randint(1, 61, (count,))


def test_guidance_identities(prompted, labelled):
    xt, t = noisy(3)
    label, tokens = torch.tensor([3, 1, 4]), tokenize(["3", "one", "the digit 4"])
    for model, raw, null in [
        (labelled, label, torch.tensor([10, 10, 10])),
        (prompted, tokens, null_prompt(tokens)),
    ]:
        encode = getattr(model, "encode", lambda raw: raw)
        with torch.no_grad():
            eps_cond, eps_null = model(xt, t, encode(raw)), model(xt, t, encode(null))
            assert not torch.allclose(eps_cond, eps_null, atol=1e-3)
            assert torch.equal(model.bind(raw)(xt, t), eps_cond)
            assert torch.equal(model.bind(raw, 0.0)(xt, t), eps_null)
            expected = eps_null + 2.5 * (eps_cond - eps_null)
            torch.testing.assert_close(model.bind(raw, 2.5)(xt, t), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("scale", "sizes"), [(0.0, [2]), (1.0, [2]), (2.0, [4])])
def test_guidance_evaluates_the_network_once(scale, sizes):
    batch_sizes = []

    def model(xt, t, condition):
        batch_sizes.append(len(xt))
        return xt * condition.view(-1, 1, 1, 1)

    xt, t = noisy(2)
    out = guidance.Guided(model, scale, torch.ones(2), torch.zeros(2))(xt, t)
    assert batch_sizes == sizes
    torch.testing.assert_close(out, scale * xt)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_impossible_guidance_is_refused(scale):
    with pytest.raises(UserError, match="guidance"):
        guidance.Guided(lambda xt, t, c: xt, scale, torch.ones(1), torch.zeros(1))


def test_conditions_are_dropped_independently():
    """Not all or none of a batch: every batch of 1,000 loses about a tenth."""
    label, null = torch.zeros(1000, dtype=torch.long), torch.full((1000,), 10)
    for _ in range(5):
        fraction = (guidance.drop(label, null, 0.1) == 10).float().mean()
        assert 0.05 < fraction < 0.15
    assert (guidance.drop(label, null, 0.0) == 0).all()
    assert (guidance.drop(label, null, 1.0) == 10).all()
    tokens = tokenize(["seven", "a handwritten 3"] * 50)
    dropped = guidance.drop(tokens, null_prompt(tokens), 0.5)
    is_null = (dropped == null_prompt(tokens)).all(1)
    assert ((dropped == tokens).all(1) | is_null).all()
    assert 20 < is_null.sum() < 80
    with pytest.raises(UserError, match="drop_probability"):
        guidance.drop(label, null, 1.5)


def test_all_weights_that_read_the_prompt_get_gradient():
    """Queries and keys, too: with a single context token they would get none."""
    model = perturb(small_prompted())
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


def test_labels_and_the_null_class_get_gradient(labelled):
    x0, t = noisy(2)
    loss = DDPM(linear_beta(60)).loss(
        partial(labelled, label=torch.tensor([3, 10])), x0, t, torch.randn_like(x0)
    )
    loss.mean().backward()
    rows = labelled.label.weight.grad.abs().amax(1)
    assert rows.nonzero().flatten().tolist() == [3, 10]


def test_the_prompt_changes_nothing_in_a_new_network():
    """Both ways in which it enters have zero initial weights."""
    model = small_prompted().eval()
    torch.nn.init.normal_(model.conv_out.weight)
    xt, t = noisy(2)
    with torch.no_grad():
        one, other = (model.bind(tokenize([p, p]))(xt, t) for p in ("3", "seven"))
    assert torch.equal(one, other)


def test_padding_is_masked(prompted):
    """A prompt gives the same beside a longer one as alone."""
    xt, t = noisy(1)
    alone = tokenize(["seven"])
    padded = tokenize(["seven", "an image of the digit three"])[:1]
    assert padded.shape[1] > alone.shape[1]
    with torch.no_grad():
        torch.testing.assert_close(
            prompted.bind(padded)(xt, t), prompted.bind(alone)(xt, t), atol=1e-5, rtol=1e-4
        )
        context = prompted.encode(padded)
        other = Context(torch.where(context.mask[..., None], context.sequence, 1e3), context.mask)
        assert torch.equal(prompted(xt, t, context), prompted(xt, t, other))


def test_the_prompt_enters_by_its_mean_and_by_attention(prompted):
    """Each of the two alone tells prompts apart."""
    xt, t = noisy(1)
    without_attention = copy.deepcopy(prompted)
    torch.nn.init.zeros_(prompted.summary.weight)  # now without the mean
    for layer in without_attention.modules():
        if isinstance(layer, TextAttention):
            torch.nn.init.zeros_(layer.cross.out.weight)
    with torch.no_grad():
        for model in (prompted, without_attention):
            three, seven = (model.bind(tokenize([p]))(xt, t) for p in ("3", "seven"))
            assert (three - seven).abs().mean() > 1e-3


def test_each_image_follows_its_own_prompt(prompted):
    """Two prompts give two images from the same noise; permuting them permutes the images."""
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


@pytest.mark.parametrize(
    "prompt", ["qwertz", "7" * 64, "🙂", "\x00", "\udcff", "a\nb", "-1", "null"]
)
def test_any_text_gives_an_image(prompted, prompt):
    xt, t = noisy(1)
    with torch.no_grad():
        assert prompted.bind(tokenize([prompt]), 2.0)(xt, t).isfinite().all()


def test_a_bound_network_can_be_previewed(labelled):
    x_T = torch.randn(2, 1, 28, 28)
    images = preview(DDPM(linear_beta(60)), labelled.bind(torch.tensor([3, 7]), 1.5), x_T, 5)
    assert images.shape == x_T.shape
    assert images.isfinite().all()
