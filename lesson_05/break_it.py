"""Leave out one thing at a time, to see what it is for.

Each break differs from the lesson in one line. The shipped network is sampled with and without it,
with the same noise in every step.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from typing import Any, Literal

from common import cli
from common.break_it import Bench, BreakOptions, run_breaks
from common.data import Batches, Images, load_images_for, to_uint8
from common.device import forked_rng
from common.ema import Ema
from common.errors import check_at_least
from lesson_05.ddpm import DDPM, Network, linear_beta, preview
from lesson_05.sample_mnist import SHIPPED
from lesson_05.train_mnist import held_out_loss

import torch
from torch import Tensor, nn
from tqdm import trange

Break = Literal["no_noise", "noise_at_1", "no_clipping", "no_ema", "dropout_on"]


def main(
    what: list[Break] | None = None,
    num_training_steps: int = 100,
    data_dir: str | None = None,
    options: BreakOptions = BreakOptions(model_checkpoint=SHIPPED),
) -> None:
    """Break the lesson, one thing at a time. Writes broken_no_noise.png and so on.

    Args:
        what: no_noise, no step adds noise; noise_at_1, the last step adds noise, too; no_clipping,
            the estimate of the image is not clipped; no_ema, the trained network is sampled, not
            its average; dropout_on, the network is sampled in train mode. All five unless given.
        num_training_steps: for no_ema, which trains the network further, at the laptop preset's
            highest learning rate.
        data_dir: folder of the images for no_ema; else $DIFFUSION_DATA, else data/.
    """
    check_at_least(0, num_training_steps=num_training_steps)
    no_ema_here = partial(no_ema, num_training_steps=num_training_steps, data_dir=data_dir)
    run_breaks("lesson_05", {**BREAKS, "no_ema": no_ema_here}, what, options)


def draw(bench: Bench, process: DDPM, network: Network, name: str, **options: Any) -> Tensor:
    """Samples (B, C, H, W), with the same noise in every step."""
    trajectory = process.trajectory(network, bench.noise(), **options)
    return bench.last(trajectory, process.num_timesteps, name)


@cache
def unchanged(bench: Bench) -> Tensor:
    """The lesson's own samples, drawn once for all breaks."""
    return draw(bench, bench.process, bench.model, "unchanged")


def changed(bench: Bench, kind: type[DDPM]) -> DDPM:
    """The checkpoint's process with the steps of another class."""
    config = bench.content.config
    beta = linear_beta(config["num_timesteps"], config["beta_1"], config["beta_T"])
    return kind(beta, config["variance"], bench.process.prediction).to(bench.device)


class NoNoise(DDPM):
    """Each step returns its mean: lesson_05's p_sample without its noise."""

    @torch.no_grad()
    def p_sample(self, model: Network, xt: Tensor, t: int, clip_x0: bool = True) -> Tensor:
        t_batch = torch.full((len(xt),), t, device=xt.device)
        return self.p_mean_variance(model(xt, t_batch), xt, t_batch, clip_x0).mean


def no_noise(bench: Bench) -> dict[str, Tensor]:
    """The samples start from different noise and end nearly alike."""
    rows = {
        "unchanged": unchanged(bench),
        "no noise": draw(bench, changed(bench, NoNoise), bench.model, "no noise"),
    }
    for name, x0 in rows.items():
        if len(x0) > 1:
            distance = torch.pdist(x0.flatten(1).float() / 2).mean().item()  # pixels in [0, 1]
            print(f"{name}: two samples are {distance:.1f} apart on average")
    return rows


class NoiseAtOne(DDPM):
    """Adds noise at t = 1, too: lesson_05's p_sample without its `if t == 1`."""

    @torch.no_grad()
    def p_sample(self, model: Network, xt: Tensor, t: int, clip_x0: bool = True) -> Tensor:
        t_batch = torch.full((len(xt),), t, device=xt.device)
        p = self.p_mean_variance(model(xt, t_batch), xt, t_batch, clip_x0)
        return p.mean + torch.exp(0.5 * p.log_var) * torch.randn_like(xt)


def noise_at_1(bench: Bench) -> dict[str, Tensor]:
    """The last step's noise is about one grey level, too little to see; so it is magnified."""
    rows = {
        "unchanged": unchanged(bench),
        "noise at t = 1": draw(bench, changed(bench, NoiseAtOne), bench.model, "noise at t = 1"),
    }
    for name, x0 in rows.items():
        levels = to_uint8(x0).double()
        left, right = levels[..., :-1], levels[..., 1:]
        dark = (left < 20) & (right < 20)
        difference = (left - right).abs()[dark].mean().item()
        print(f"{name}: neighbouring dark pixels differ by {difference:.2f} grey levels on average")
    return {f"{name}, dark x 30": 30 * (x0 + 1) - 1 for name, x0 in rows.items()}


def no_clipping(bench: Bench) -> dict[str, Tensor]:
    """Estimates of the image outside [-1, 1]; what becomes of them in all steps, and in ten."""
    x_T = bench.noise()
    t = torch.full((len(x_T),), bench.process.num_timesteps, device=bench.device)
    x0_hat = bench.process.predict_x0(x_T, t, bench.model(x_T, t))
    print(f"at t = T the estimate of the image has values {x0_hat.min():.1f} to {x0_hat.max():.1f}")
    rows: dict[str, Tensor] = {}
    for process, network in [(bench.process, bench.model), ten_steps(bench)]:
        name = f"{process.num_timesteps} steps"
        clipped = draw(bench, process, network, name)
        free = draw(bench, process, network, f"{name}, no clipping", clip_x0=False)
        difference = free.clamp(-1, 1) - clipped.clamp(-1, 1)
        levels = 127.5 * difference.abs().mean().item()
        print(f"{name}: without clipping pixels differ by {levels:.2f} grey levels on average")
        rows |= {name: clipped, f"{name}, no clipping": free}
        rows[f"{name}, difference x 10"] = 10 * difference
    return rows


def ten_steps(bench: Bench) -> tuple[DDPM, Network]:
    """A process of ten long steps, and the network, which is told the times that they stand for."""
    T = bench.process.num_timesteps
    times = torch.linspace(0, T, min(T, 10) + 1).round().long()
    alpha_bar = bench.process.alpha_bar[times]
    process = DDPM(1 - alpha_bar[1:] / alpha_bar[:-1], "beta_tilde", bench.process.prediction)
    times = times.to(bench.device)
    return process.to(bench.device), lambda xt, t: bench.model(xt, times[t])


def no_ema(bench: Bench, num_training_steps: int, data_dir: str | None) -> dict[str, Tensor]:
    """Train the shipped network further; then sample it and its average in 100 steps."""
    data = load_images_for(bench.content, bench.content.dataset, data_dir)
    model = deepcopy(bench.model).train().requires_grad_(True)
    ema = train_on(bench, model, data, num_training_steps)
    rows = {}
    for name, network in [("the average", ema), ("the network", model.eval())]:
        rows[name] = preview(bench.process, network, bench.noise(), 100)
        torch.manual_seed(bench.options.seed)
        loss = held_out_loss(bench.process, network, data.test)
        print(f"{name}: loss on test images {loss:.4f}")
    return rows


@torch.enable_grad()
def train_on(bench: Bench, model: nn.Module, data: Images, num_steps: int) -> Ema:
    """Train the network for some steps and return its average."""
    batches = Batches(data.train, data.train_labels, 64, bench.options.seed, bench.device)
    ema = Ema(model, 0.999)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(bench.options.seed)
    for step in trange(1, num_steps + 1, unit="step", desc="training", disable=None):
        x0, _ = batches[step]
        t = torch.randint(1, bench.process.num_timesteps + 1, (len(x0),), device=bench.device)
        losses = bench.process.loss(model, x0, t, torch.randn_like(x0))
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch.clear_autocast_cache()  # which holds the weights from before this step
        optimizer.zero_grad()
        ema.update_parameters(model)
    return ema


def dropout_on(bench: Bench) -> dict[str, Tensor]:
    """Sample in train mode, with the dropout of the paper's network."""
    model = deepcopy(bench.model).train()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.1

    def network(xt: Tensor, t: Tensor) -> Tensor:
        with forked_rng(bench.device, bench.options.seed + int(t[0])):  # keeps the sampler's noise
            return model(xt, t)

    return {
        "unchanged": unchanged(bench),
        "dropout on": draw(bench, bench.process, network, "dropout on"),
    }


BREAKS: dict[Break, Callable[..., dict[str, Tensor]]] = {
    "no_noise": no_noise,
    "noise_at_1": noise_at_1,
    "no_clipping": no_clipping,
    "no_ema": no_ema,
    "dropout_on": dropout_on,
}


if __name__ == "__main__":
    cli.run(main)
