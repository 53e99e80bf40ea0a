"""Leave one thing out, and see what it was for.

A break differs from the lesson in one line. The network that comes with the lesson is sampled with
and without it, from the same noise at every step.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import trange

from common import checkpoint, cli, mnist
from common.device import Precision, autocast, pick_device
from common.ema import Ema
from common.images import save_rows, to_uint8
from common.run import check
from lesson_05.ddpm import DDPM, Network, linear_beta, preview
from lesson_05.sample_mnist import SHIPPED, load
from lesson_05.train_mnist import held_out_loss

Break = Literal["noise_at_1", "no_clipping", "no_ema", "dropout_on"]


def main(
    what: list[Break] | None = None,
    model_checkpoint: str = SHIPPED,
    num_samples: int = 8,
    num_training_steps: int = 100,
    data_dir: str | None = None,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Break the lesson, one thing at a time: broken_noise_at_1.png and so on.

    Args:
        what: noise_at_1, the last step adds noise; no_clipping, the estimate of the image is not
            clipped; no_ema, the trained network is sampled, not its average; dropout_on, the
            network is sampled in train mode. All of them unless given.
        model_checkpoint: a file, or an http(s) address; the shipped one unless given.
        num_samples: images in a row.
        num_training_steps: for no_ema, which goes on training, at the preset's highest rate.
        data_dir: of these steps; else $DIFFUSION_DATA, else data/.
        output_dir: folder of the pictures; output/ in this lesson's folder unless given.
        seed: of the noise.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic; auto is bfloat16 where the hardware has it.
    """
    check(lambda value: value >= 1, "at least 1", num_samples=num_samples)
    place = pick_device(device)
    process, model, content = load(model_checkpoint)
    folder = Path(output_dir) if output_dir else Path(__file__).parent / "output"
    checkpoint.make_folder(folder)
    bench = Bench(
        process.to(place), model.to(place), content, num_samples, seed, place, precision, data_dir
    )
    for name in what or list(BREAKS):
        rows = BREAKS[name](bench, num_training_steps)
        save_rows(folder / f"broken_{name}.png", rows)
        print(f"{folder}/broken_{name}.png")


@dataclass
class Bench:
    """A trained network, and what to sample it with."""

    process: DDPM
    model: nn.Module
    content: checkpoint.Checkpoint
    num_samples: int
    seed: int
    place: torch.device
    precision: Precision
    data_dir: str | None

    @cached_property
    def as_it_is(self) -> Tensor:
        """What the lesson draws."""
        return self.draw(self.process, self.model, "as it is")

    def noise(self) -> Tensor:
        """x_T; what is drawn after it is the same, too."""
        config = self.content["config"]["network"]
        size = config["image_size"]
        torch.manual_seed(self.seed)
        return torch.randn(
            self.num_samples, config["image_channels"], size, size, device=self.place
        )

    def draw(self, process: DDPM, network: Network, name: str, **options: Any) -> Tensor:
        """Samples (B, C, H, W); the noise of every step is always the same."""
        xt = self.noise()
        with autocast(self.place, self.precision):
            for t in trange(process.num_timesteps, 0, -1, unit="step", desc=name):
                xt = process.p_sample(network, xt, t, **options)
        return xt


class NoiseAtOne(DDPM):
    """Adds noise at t = 1, too: lesson_05's p_sample without its `if t == 1`."""

    @torch.no_grad()
    def p_sample(self, model: Network, xt: Tensor, t: int, clip_x0: bool = True) -> Tensor:
        t_batch = torch.full((len(xt),), t, device=xt.device)
        p = self.p_mean_variance(model(xt, t_batch), xt, t_batch, clip_x0)
        return p.mean + torch.exp(0.5 * p.log_var) * torch.randn_like(xt)


def noise_at_1(bench: Bench, _: int) -> dict[str, Tensor]:
    """The noise of the last step is one grey level: too little to see, so it is magnified."""
    config = bench.content["config"]
    beta = linear_beta(config["num_timesteps"], config["beta_1"], config["beta_T"])
    broken = NoiseAtOne(beta, config["variance"]).to(bench.place)
    rows = {
        "as it is": bench.as_it_is,
        "noise at t = 1": bench.draw(broken, bench.model, "noise at t = 1"),
    }
    for name, x0 in rows.items():
        levels = to_uint8(x0).double()
        left, right = levels[..., :-1], levels[..., 1:]
        dark = (left < 20) & (right < 20)
        steps = (left - right).abs()[dark].mean().item()
        print(f"{name}: neighbouring dark pixels differ by {steps:.2f} grey levels on average")
    return rows | {f"{name}, dark x 30": 30 * (x0 + 1) - 1 for name, x0 in rows.items()}


def no_clipping(bench: Bench, _: int) -> dict[str, Tensor]:
    """Of the first estimates of the image some pixels lie far outside of [-1, 1]; what then?"""
    x_T = bench.noise()
    t = torch.full((len(x_T),), bench.process.num_timesteps, device=bench.place)
    with autocast(bench.place, bench.precision), torch.no_grad():
        x0_hat = bench.process.predict_x0(x_T, t, bench.model(x_T, t))
    print(
        f"at t = T the estimate of the image reaches from {x0_hat.min():.1f} to {x0_hat.max():.1f}"
    )
    return {
        "as it is": bench.as_it_is,
        "no clipping": bench.draw(bench.process, bench.model, "no clipping", clip_x0=False),
    }


def no_ema(bench: Bench, num_training_steps: int) -> dict[str, Tensor]:
    """The averaged network learns on as in training; then both are sampled, in 100 steps."""
    data = mnist.load(bench.content["dataset"], bench.data_dir)
    batches = mnist.Batches(data.train, data.train_labels, 64, bench.seed, bench.place)
    model = deepcopy(bench.model).train().requires_grad_(True)
    ema = Ema(model, 0.999)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(bench.seed)
    for step in trange(1, num_training_steps + 1, unit="step", desc="training"):
        x0, _ = batches[step]
        t = torch.randint(1, bench.process.num_timesteps + 1, (len(x0),), device=bench.place)
        with autocast(bench.place, bench.precision):
            losses = bench.process.loss(model, x0, t, torch.randn_like(x0))
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
    rows = {}
    for name, network in [("the average", ema), ("the network", model.eval())]:
        with autocast(bench.place, bench.precision):
            rows[name] = preview(bench.process, network, bench.noise(), 100)
            torch.manual_seed(bench.seed)
            with torch.no_grad():
                loss = held_out_loss(bench.process, network, data.test)
        print(f"{name}: loss on test images {loss:.4f}")
    return rows


def dropout_on(bench: Bench, _: int) -> dict[str, Tensor]:
    """Train mode, with the dropout of the paper's network."""
    model = deepcopy(bench.model).train()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.1

    def network(xt: Tensor, t: Tensor) -> Tensor:
        with torch.random.fork_rng():  # the sampler's noise stays what it is in the first row
            torch.manual_seed(bench.seed + int(t[0]))
            return model(xt, t)

    return {
        "as it is": bench.as_it_is,
        "dropout on": bench.draw(bench.process, network, "dropout on"),
    }


BREAKS: dict[Break, Callable[[Bench, int], dict[str, Tensor]]] = {
    "noise_at_1": noise_at_1,
    "no_clipping": no_clipping,
    "no_ema": no_ema,
    "dropout_on": dropout_on,
}


if __name__ == "__main__":
    cli.run(main)
