"""The mixture of lesson 2's chain with lesson 5's network, which shows what limits the samples."""

from benchmarks.quality import lesson_02_swap
from common.options import ScriptOptions
from lesson_02.dpm import DPM, erasing_beta
from lesson_02.scaler import Scaler
from lesson_05.ddpm import DDPM, linear_beta

import pytest
import torch
from torch import Tensor


@pytest.mark.parametrize("t", [2, 40, 95])
def test_a_borrowed_guess_gives_the_posterior(t):
    """A network of lesson 5 that knows the noise gives the reverse step of lesson 2 for known x0,
    and sees its own noise in its own units."""
    process, ddpm = DPM(erasing_beta(100)), DDPM(linear_beta(1000))
    scaler = Scaler(33.3, 78.6)
    images = torch.rand(2, 1, 20, 20) * 2 - 1
    asked = []

    def unet(noisy: Tensor, there: Tensor) -> Tensor:
        noise = (noisy - ddpm.signal_rate[there] * images) / ddpm.noise_rate[there]
        asked.append(noise.std().item())
        return noise

    x0, times = scaler.encode(images, dequantize=False), torch.full((2,), t)
    xt = process.q_sample(x0, times, torch.randn_like(x0))
    borrowed = lesson_02_swap.Borrowed(process, scaler, ddpm, unet)
    assert torch.allclose(borrowed.guess(xt, times), x0, atol=1e-3)
    p = process.p_mean_variance(borrowed(xt, times), xt, times)
    q = process.q_posterior(x0, xt, times)
    assert torch.allclose(p.mean, q.mean, atol=1e-3)
    assert torch.allclose(p.log_var, q.log_var, atol=1e-3)
    assert asked[0] == pytest.approx(1, abs=0.1)  # the same ratio of signal to noise


def test_the_mixtures_are_drawn(tmp_path, monkeypatch, capsys):
    load = lesson_02_swap.sample_mnist.load

    def short(source: str) -> tuple:
        _, network, content = load(source)
        return DPM(erasing_beta(6)), network, content

    monkeypatch.setattr(lesson_02_swap.sample_mnist, "load", short)
    options = ScriptOptions(str(tmp_path), device="cpu")
    lesson_02_swap.main(num_samples=2, border=3, options=options)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "lesson 5's at t > 3: sure of" in lines[2]
    assert (tmp_path / "which_t.png").stat().st_size > 0
