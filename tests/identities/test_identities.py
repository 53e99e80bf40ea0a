"""Where two lessons share an equation, they compute the same."""

from lesson_02 import dpm
from lesson_05 import ddpm
from lesson_05 import published as published_5
from lesson_05 import unet as unet_5
from lesson_05.text_to_image.text import Attention, Context
from lesson_06 import ddim
from lesson_09 import iddpm
from lesson_09 import published as published_9
from lesson_09 import unet as unet_9

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = 1000
TIMES = torch.tensor([1, 2, 3, 250, 999, 1000])


@pytest.fixture(params=["beta", "beta_tilde"])
def pair(request: pytest.FixtureRequest) -> tuple[ddpm.DDPM, iddpm.ImprovedDDPM]:
    """Lesson 5, and lesson 9 with a linear schedule, fixed variance and L_simple."""
    return (
        ddpm.DDPM(ddpm.linear_beta(T), request.param),
        iddpm.ImprovedDDPM(iddpm.linear_beta(T), request.param, 1.0, 0.0),
    )


def images(*shape: int) -> Tensor:
    return (torch.rand(*shape) * 255).round() / 127.5 - 1


def network(xt: Tensor, t: Tensor) -> Tensor:
    """An arbitrary estimate of the noise that depends on both inputs."""
    return torch.sin(3 * xt) + (t / T).view(-1, 1, 1, 1)


def agree(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_lessons_5_and_9_have_the_same_schedule_and_tables(pair):
    for steps in (100, T, 4000):
        assert torch.equal(ddpm.linear_beta(steps), iddpm.linear_beta(steps))
    old, new = pair
    assert torch.equal(old.alpha_bar, new.alpha_bar)
    tables = dict(new.named_buffers())
    for name, table in old.named_buffers():
        agree(table, tables[name])


def test_lessons_5_and_9_have_the_same_process(pair):
    old, new = pair
    x0, eps = images(len(TIMES), 3, 4, 4), torch.randn(len(TIMES), 3, 4, 4)
    xt = old.q_sample(x0, TIMES, eps)
    agree(xt, new.q_sample(x0, TIMES, eps))
    agree(old.predict_x0(xt, TIMES, eps), new.predict_x0(xt, TIMES, eps))
    for one, other in zip(
        old.q_posterior(x0, xt, TIMES), new.q_posterior(x0, xt, TIMES), strict=True
    ):
        agree(one, other)
    out = network(xt, TIMES)
    with_v = torch.cat([out, torch.randn_like(out)], 1)  # a fixed variance does not read v
    for clip_x0 in (True, False):
        expected = old.p_mean_variance(out, xt, TIMES, clip_x0)
        for answer in (out, with_v):
            p = new.p_mean_variance(answer, xt, TIMES, clip_x0)
            agree(expected.mean, p.mean)
            agree(expected.log_var, p.log_var)


def test_lessons_5_and_9_have_the_same_loss_and_bound(pair):
    old, new = pair
    x0, eps = images(len(TIMES), 1, 6, 6), torch.randn(len(TIMES), 1, 6, 6)
    agree(old.loss(network, x0, TIMES, eps), new.loss(network, x0, TIMES, eps))
    agree(old.prior_bits(x0), new.prior_bits(x0))
    for clip_x0 in (True, False):
        one, other = (p.vlb_term(network, x0, TIMES, eps, clip_x0) for p in pair)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    simple, vlb = new.loss_terms(network, x0, TIMES, eps)
    agree(simple, old.loss(network, x0, TIMES, eps))
    agree(vlb, new.vlb_term(network, x0, TIMES, eps))
    bounds = []
    for process in pair:
        torch.manual_seed(3)
        bounds.append(process.bits_per_dim(network, x0, num_terms=9))
    for one, other in zip(*bounds, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_lessons_5_and_9_take_the_same_steps(pair):
    for t in (1, 2, 700):
        steps = []
        for process in pair:
            torch.manual_seed(t)
            steps.append(process.p_sample(network, torch.randn(2, 1, 4, 4), t))
        agree(*steps)


def test_lessons_5_and_9_have_the_same_gaussians():
    p, q = ([torch.randn(2, 3, 4, 4), 3 * torch.randn(2, 3, 4, 4)] for _ in range(2))
    agree(
        ddpm.kl(ddpm.Gaussian(*p), ddpm.Gaussian(*q)),
        iddpm.kl(iddpm.Gaussian(*p), iddpm.Gaussian(*q)),
    )
    far = torch.linspace(-1e4, 1e4, 1001)
    agree(ddpm.log_ndtr(far), iddpm.log_ndtr(far))
    x = images(2, 3, 4, 4)
    x[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
    agree(
        ddpm.discretized_log_likelihood(x, ddpm.Gaussian(*p)),
        iddpm.discretized_log_likelihood(x, iddpm.Gaussian(*p)),
    )
    for log_var in (-40.0, -9.8, 14.0, 40.0):  # levels that are wide and narrow beside σ
        results = []
        for lesson in (ddpm, iddpm):
            wide = torch.full_like(x, log_var, requires_grad=True)
            log_p = lesson.discretized_log_likelihood(x, lesson.Gaussian(x + 0.01, wide))
            log_p.sum().backward()
            assert wide.grad is not None
            assert wide.grad.isfinite().all()
            results.append((log_p, wide.grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for steps, terms in [(T, None), (T, 33), (10, 4), (1, None)]:
        assert ddpm.strata(steps, terms) == iddpm.strata(steps, terms)


def test_lessons_2_and_5_have_the_same_process_and_gaussians():
    """The same betas, the same forward process, posterior and divergence, for t > 1."""
    beta = dpm.erasing_beta(T)
    old, new = dpm.DPM(beta), ddpm.DDPM(beta)
    t = TIMES[1:]
    x0, eps = torch.randn(2, len(t), 3, 4, 4)
    xt = new.q_sample(x0, t, eps)
    agree(old.q_sample(x0, t, eps), xt)
    for one, other in zip(old.q_posterior(x0, xt, t), new.q_posterior(x0, xt, t), strict=True):
        agree(one, other)
    p, q = ([torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)] for _ in range(2))
    agree(dpm.kl(dpm.Gaussian(*p), dpm.Gaussian(*q)), ddpm.kl(ddpm.Gaussian(*p), ddpm.Gaussian(*q)))


def test_lessons_2_and_5_have_the_same_reverse_steps():
    """For each estimated noise of lesson 5 there is a (μ, b) of lesson 2 with the same reverse
    step."""
    beta = dpm.erasing_beta(T)
    old, new = dpm.DPM(beta), ddpm.DDPM(beta, "beta_tilde")
    t = TIMES[1:]
    x0, eps = torch.randn(2, len(t), 1, 4, 4)
    xt = new.q_sample(x0, t, eps)
    true = new.p_mean_variance(eps, xt, t, clip_x0=False)
    r = old.rates()
    mu = (true.mean - r.decay[t] * xt) / r.spread[t]
    b = T**0.5 * (true.log_var.double().exp().logit() - r.log_odds[t])
    p = old.p_mean_variance(torch.cat([mu, b.float()], 1), xt, t)
    torch.testing.assert_close(p.mean, true.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(p.log_var, true.log_var, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unet", [unet_5, unet_9])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7)])
def test_upsampling_is_each_pixel_four_times_then_a_convolution(unet, size):
    layer = unet.Upsample(6).double()
    h = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    enlarged = F.interpolate(h, scale_factor=2.0, mode="nearest")
    expected = F.conv2d(enlarged, layer.weight, layer.bias, padding=1)
    answer = layer(h)
    torch.testing.assert_close(answer, expected)
    g = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(answer, [h, *layer.parameters()], g),
        torch.autograd.grad(expected, [h, *layer.parameters()], g),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_to_pixels_and_to_tokens_equals_that_of_torch(heads):
    layer = unet_5.SelfAttention(12, heads, 2)
    nn.init.normal_(layer.out.weight)
    h = torch.randn(2, 12, 4, 4)
    pixels = layer.qkv(layer.norm(h).flatten(2).transpose(1, 2))
    q, k, v = pixels.unflatten(2, (3, heads, 12 // heads)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    agree(layer(h), h + layer.out(y).transpose(1, 2).unflatten(2, (4, 4)))

    cross, x = Attention(12, 5, heads), torch.randn(2, 7, 12)
    context = Context(torch.randn(2, 4, 5), torch.tensor([[True] * 4, [True, True, False, False]]))
    q = cross.q(x).unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = cross.kv(context.sequence).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask[:, None, None])
    agree(cross(x, context), cross.out(y.transpose(1, 2).flatten(2)))


def test_lessons_5_and_9_name_diffusers_layers_alike():
    """Their networks differ in what the time does to a block, not in the layers."""
    assert published_5.DIFFUSERS == published_9.DIFFUSERS


def test_a_long_step_with_a_fixed_variance_is_a_step_of_lesson_6():
    """With β̃ it is DDIM's with η = 1, with β the one with σ̂, from the same noise."""
    xt, eps_hat = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    for variance, sigma_hat in [("beta_tilde", False), ("beta", True)]:
        few = iddpm.ImprovedDDPM(iddpm.linear_beta(1000), variance).strided(10)
        for i in range(2, 11):
            torch.manual_seed(i)
            ours = few.p_sample(lambda xt, t: eps_hat, xt, i, clip_x0=False)
            torch.manual_seed(i)
            bars = few.alpha_bar[i].item(), few.alpha_bar[i - 1].item()
            theirs = ddim.ddim_step(xt, eps_hat, *bars, eta=1.0, sigma_hat=sigma_hat)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
