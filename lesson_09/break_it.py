"""Leave one thing out, and see what it is for.

Each break differs from the lesson in one line. The shipped network is sampled with and without it,
with the same noise in every step. For the last break, its output layer is trained again to predict
v.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Literal

from common import cli
from common.break_it import Bench, BreakOptions, run_breaks
from common.data import Batches, Images, from_uint8, load_images_for
from common.device import autocast, pick_device
from common.errors import check_at_least
from common.files import output_folder
from common.pictures import save_plot
from lesson_09.iddpm import Gaussian, ImprovedDDPM
from lesson_09.sample_mnist import SHIPPED, load
from lesson_09.unet import UNet

import torch
from torch import Tensor
from tqdm import trange

Break = Literal["raw_log_variance", "no_clipping", "number_for_time", "lambda_over_T"]


def main(
    what: list[Break] | None = None,
    num_steps: int = 10,
    num_training_steps: int = 80,
    data_dir: str | None = None,
    options: BreakOptions = BreakOptions(model_checkpoint=SHIPPED),
) -> None:
    """Break the lesson, one thing at a time: broken_raw_log_variance.png and so on.

    Args:
        what: raw_log_variance, v itself is used as the log of the variance; no_clipping, the
            predicted clean image is not clipped; number_for_time, the network gets the index of the
            step instead of its time; lambda_over_T, λ multiplies a single term of the bound instead
            of the sum. All of them unless given.
        num_steps: S, the number of sampling steps.
        num_training_steps: training steps of lambda_over_T.
        data_dir: folder of the images for lambda_over_T; else $DIFFUSION_DATA, else data/.
    """
    check_at_least(1, num_training_steps=num_training_steps)
    names: list[Break] = what or [*BREAKS, "lambda_over_T"]
    breaks = {name: partial(compare, BREAKS[name], num_steps) for name in names if name in BREAKS}
    if breaks:
        run_breaks("lesson_09", breaks, None, options)
    if "lambda_over_T" in names:
        lambda_over_T(num_training_steps, data_dir, options)


def compare(
    broken: Callable[[Bench, ImprovedDDPM], dict[str, Tensor]], num_steps: int, bench: Bench
) -> dict[str, Tensor]:
    few = bench.process.strided(num_steps)
    return {"unchanged": draw(bench, few)} | broken(bench, few)


def draw(bench: Bench, process: ImprovedDDPM, clip_x0: bool = True) -> Tensor:
    """Samples (B, C, H, W), with the same noise in every step for every process."""
    trajectory = process.trajectory(bench.model, bench.noise(), clip_x0)
    return bench.last(trajectory, process.num_timesteps, "sampling")


class RawLogVariance(ImprovedDDPM):
    """v itself as the log of the variance, without Eq. 15."""

    def p_mean_variance(self, out: Tensor, xt: Tensor, t: Tensor, clip_x0: bool = True) -> Gaussian:
        mean, _ = super().p_mean_variance(out, xt, t, clip_x0)
        return Gaussian(mean, out[:, xt.shape[1] :])


def raw_log_variance(bench: Bench, few: ImprovedDDPM) -> dict[str, Tensor]:
    beta = 1 - few.alpha_bar[1:] / few.alpha_bar[:-1]
    broken = RawLogVariance(beta, timesteps=few.timesteps[1:].cpu()).to(bench.device)
    return {"raw log variance": draw(bench, broken)}


def no_clipping(bench: Bench, few: ImprovedDDPM) -> dict[str, Tensor]:
    return {"no clipping": draw(bench, few, clip_x0=False)}


def number_for_time(bench: Bench, few: ImprovedDDPM) -> dict[str, Tensor]:
    broken = deepcopy(few)
    broken.timesteps = torch.arange(few.num_timesteps + 1, device=bench.device)
    return {"i instead of τ": draw(bench, broken)}


BREAKS: dict[Break, Callable[[Bench, ImprovedDDPM], dict[str, Tensor]]] = {
    "raw_log_variance": raw_log_variance,
    "no_clipping": no_clipping,
    "number_for_time": number_for_time,
}


def lambda_over_T(num_training_steps: int, data_dir: str | None, options: BreakOptions) -> None:
    """Plot v at each t after it was trained again for a few steps, with λ times the sum and with λ
    times one term; by Adam, which rescales each weight's gradient, and by plain gradient descent,
    which does not."""
    process, model, content = load(options.model_checkpoint, options.sha256)
    device = pick_device(options.device)
    bench = Bench(process.to(device), model.to(device), content, options, device)
    path = output_folder(options.output_dir, "lesson_09") / "broken_lambda_over_T.png"
    data = load_images_for(content, content.dataset, data_dir)
    x0 = from_uint8(data.test[:32]).to(device)
    times = torch.linspace(1, process.num_timesteps, 26).round().long().tolist()
    curves = {}
    for optimizer in ("Adam", "SGD"):
        for name, factor in [("λ T L", 1.0), ("λ L", 1 / process.num_timesteps)]:
            model = relearn_v(bench, data, optimizer, factor, num_training_steps)
            fracs = []
            for t in times:
                t_batch = torch.full((len(x0),), t, device=device)
                torch.manual_seed(t)
                with torch.no_grad(), autocast(device, options.precision):
                    out = model(process.q_sample(x0, t_batch, torch.randn_like(x0)), t_batch)
                fracs.append(((out[:, data.channels :] + 1) / 2).mean().item())
            curves[f"{name}, {optimizer}"] = (times, fracs)
    title = f"f = (v + 1)/2, between β̃ (0) and β (1), after {num_training_steps} steps from f = ½"
    save_plot(path, curves, "t", "f", title, yscale="linear")
    print(path)


def relearn_v(
    bench: Bench, data: Images, optimizer: str, factor: float, num_training_steps: int
) -> UNet:
    """The network with its output layer's weights for v set to zero and trained again, with λ
    multiplied by `factor`."""
    process, model, options = deepcopy(bench.process), deepcopy(bench.model), bench.options
    process.vlb_weight *= factor
    last = list(model.conv_out.parameters())
    for parameter in last:
        parameter.data[data.channels :] = 0
        parameter.requires_grad_(True)
    descent = torch.optim.Adam(last, lr=3e-3) if optimizer == "Adam" else torch.optim.SGD(last, 3)
    batches = Batches(data.train, data.train_labels, 32, options.seed, bench.device)
    torch.manual_seed(options.seed)
    for step in trange(1, num_training_steps + 1, unit="step", desc=optimizer, disable=None):
        x0, _ = batches[step]
        t = torch.randint(1, process.num_timesteps + 1, (len(x0),), device=bench.device)
        with autocast(bench.device, options.precision):
            losses = process.loss(model, x0, t, torch.randn_like(x0))
        losses.mean().backward()
        for parameter in last:  # the weights for the noise are not trained
            assert parameter.grad is not None
            parameter.grad[: data.channels] = 0
        descent.step()
        descent.zero_grad()
    return model


if __name__ == "__main__":
    cli.run(main)
