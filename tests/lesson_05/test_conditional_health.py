"""The loss with the right, the null and a wrong condition; guidance where everything is known."""

from common import lessons
from common.data import from_uint8
from lesson_05.class_conditional import geometry, health
from lesson_05.class_conditional.sample_mnist import SHIPPED
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.guidance import Guided
from lesson_06.ddim import ddim_trajectory

import pytest
import torch
from helpers import ROOT
from torch import Tensor


@pytest.fixture(scope="module")
def process() -> DDPM:
    return DDPM(linear_beta(1000))


def test_the_right_label_has_the_least_loss_and_a_wrong_one_the_highest(process):
    """With exact noise estimates, for images that are noise around one of four centres."""
    torch.manual_seed(0)
    centres = 2 * torch.randn(4, 1, 8, 8)
    label = torch.arange(120) % 4
    x0 = centres[label] + torch.randn(120, 1, 8, 8)

    def bind(label: Tensor, guidance: float):
        def network(xt: Tensor, t: Tensor) -> Tensor:
            mean = centres[label] if guidance else centres.mean(0)
            return process.noise_rate[t] * (xt - process.signal_rate[t] * mean)

        return network

    right, null, wrong = health.losses(process, bind, x0, label, 4).mean(2)
    assert (right < null).all()
    assert (null < wrong).all()
    table = health.table(health.losses(process, bind, x0, label, 4))
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "right", "null", "wrong", "null - right", "wrong - right",
    ]  # fmt: skip


def test_the_three_losses_share_images_times_and_noise(process):
    """A network that ignores its condition has the same loss with each."""
    x0, label = from_uint8(torch.randint(256, (70, 1, 8, 8), dtype=torch.uint8)), torch.arange(70)
    losses = health.losses(process, lambda label, guidance: lambda xt, t: 0.5 * xt, x0, label, 70)
    assert losses.shape == (3, 4, 70)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_wrong_labels_are_wrong(process):
    seen = []

    def bind(label: Tensor, guidance: float):
        seen.append((label, guidance))
        return lambda xt, t: xt

    label = torch.arange(60) % 3
    health.losses(process, bind, torch.zeros(60, 1, 4, 4), label, 3)
    wrong = torch.stack([c for c, guidance in seen if guidance == 1.0][1::2])
    assert (wrong != label).all()
    assert wrong.unique().tolist() == [0, 1, 2]


def test_exact_noise_is_the_score_of_the_density(process):
    """Without guidance from autograd of the log densities; guided, from their mixture."""
    t, c, null = torch.tensor([300]), torch.tensor([1.0]), torch.tensor([torch.nan])
    a = process.alpha_bar[300]
    xt = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    log_c, log_x = -((xt - a.sqrt()) ** 2) / 2, -(xt**2) / (2 * (1 + a))
    (score,) = torch.autograd.grad(log_x + 3 * (log_c - log_x), xt)

    def model(xt: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return geometry.exact_noise(process, xt, t, condition)

    eps = Guided(model, 3.0, c, null)(torch.tensor(0.7).view(1, 1, 1, 1), t)
    assert eps.item() == pytest.approx(-(1 - a).sqrt().item() * score.item(), rel=1e-4)


def test_guided_samples_overshoot_the_guided_density(process):
    """The table of the README: exact for s = 1, too far and too narrow above it; Langevin steps at
    each t bring the samples back, up to the variance that their size adds."""
    text = (ROOT / "lesson_05" / "class_conditional" / "README.md").read_text()
    for s in (1.0, 2.0, 4.0, 8.0):
        results = [
            geometry.density(s), geometry.sampled(process, s), geometry.sampled(process, s, 20)
        ]  # fmt: skip
        assert f"| {s:g} | " + " | ".join(f"{m:.3f}, {v:.3f}" for m, v in results) + " |" in text
        (mean, variance), drawn, corrected = results
        assert corrected == pytest.approx((mean, variance / (1 - 0.1 / 4)), rel=2e-3)
        if s == 1:
            assert drawn == pytest.approx((mean, variance), rel=1e-3)
        else:
            assert drawn[0] > 1.1 * mean
            assert drawn[1] < 0.9 * variance
    slow = geometry.sampled(DDPM(linear_beta(4000)), 2.0)
    assert slow == pytest.approx((1.500, 0.583), abs=1e-3)


@pytest.mark.parametrize(("clip_x0", "deviation"), [(True, 1.66), (False, 1.23)])
def test_a_doubled_estimate_is_corrected_by_the_following_steps(clip_x0, deviation):
    """The README's third break: from too little noise the network predicts less."""
    process, model, _ = lessons.load(SHIPPED)
    conditional = model.bind(torch.arange(10))
    deviations: list[float] = []

    def doubled(xt: Tensor, t: Tensor) -> Tensor:
        eps_hat = 2 * conditional(xt, t)
        deviations.append(eps_hat.std().item())
        return eps_hat

    torch.manual_seed(0)
    with torch.no_grad():
        x_T = torch.randn(10, 1, 28, 28)
        for t, _ in ddim_trajectory(doubled, process, x_T, 50, 1.0, clip_x0=clip_x0):
            if t < 400:
                break
    assert deviations[0] == pytest.approx(2, abs=0.05)
    assert deviations[-1] == pytest.approx(deviation, abs=0.03)
