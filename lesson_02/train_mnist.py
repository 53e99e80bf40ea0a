"""Train a DPM on MNIST: the loop below maximises the bound of Sohl-Dickstein et al. 2015."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from common import cli
from common.data import from_uint8
from common.device import autocast
from common.ema import Ema
from common.pictures import read_curves, save_plot
from common.sampling import save_samples
from common.training import Run
from lesson_02.dpm import DPM, L_NULL, Pair, draw_times, erasing_beta, k_minus_null, strata
from lesson_02.network import ConvDense
from lesson_02.options import DPMOptions
from lesson_02.sample_mnist import draw, save_forward
from lesson_02.scaler import Scaler

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_


def main(options: DPMOptions, network: dict[str, Any]) -> None:
    """Train a DPM [SD15 Section 2.4], showing samples and the bound as it goes."""
    with Run("lesson_02", options) as run:
        data, batches = run.load_data()
        T = options.num_timesteps
        scaler = Scaler.fit(data.train)
        encode = partial(scaler.encode, dequantize=options.dequantize)
        process = DPM(erasing_beta(T), options.learned_beta)
        edges = strata(T, min(options.num_strata, T - 1))
        network = run.network_for(data, network)
        network["num_timesteps"] = T
        model = run.prepare(Pair(ConvDense(**network), process))
        ema = Ema(model, options.ema_decay)
        optimizer = torch.optim.Adam(model.parameters(), options.learning_rate, fused=True)
        config = {"network": network, "data_mean": scaler.mean, "data_std": scaler.std}
        run.track(config, model=model, ema=ema, optimizer=optimizer)
        wrapped = run.distribute(model)  # the model itself unless torchrun or --accumulate is used
        average = cast(Pair, ema.module)

        for step in run.steps():
            images, _ = batches[step]
            x0 = encode(images)
            t, weight = draw_times(len(x0), edges, run.device)
            x0, t_shard, eps, weight = run.shard(x0, t, torch.randn_like(x0), weight)
            with run.autocast():  # L_null - K [SD15 Eq. 14], estimated from one t per image
                losses = weight * process.vlb_term(wrapped, x0, t_shard, eps) - process.ceiling()
            losses.mean().backward()
            losses = run.gather(losses)
            grad_norm = clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.param_groups[0]["lr"] = run.learning_rate
            if not run.skip_step(losses, t, grad_norm):
                optimizer.step()
                ema.update_parameters(model)
            optimizer.zero_grad()

            run.record(losses, t, grad_norm=grad_norm)
            if run.due("log"):
                run.log(**bounds(run, average, encode, min(128, options.num_bound_images), 16))
            if run.due("preview"):
                with run.evaluating():
                    x_T = torch.randn(options.num_previews, *data.shape, device=run.device)
                    images = scaler.decode(average.process.sample(average, x_T))
                    run.save_preview(images)
                save_bound(run.folder, data.channels * average.process.ceiling().item())

        save_forward(run.folder / "forward.png", process, scaler, data.test[:4])
        final = bounds(run, average, encode, options.num_bound_images, 50)
        run.say(summary(final, scaler, data.channels))
        if options.num_samples > 0:
            with run.evaluating(options.seed):
                samples = draw(average.process, average, scaler, data.shape, options.num_samples)
            save_samples(run.folder, samples, options)
        run.finish("sample_mnist.py")


def bounds(
    run: Run, average: Pair, encode: Callable[[Tensor], Tensor], num_images: int, num_terms: int
) -> dict[str, float]:
    """K - L_null of the averaged network on training and on test images, in bits per pixel: the
    mean and its standard error. Computed in float32."""
    figures, process = {}, average.process
    num_terms = min(num_terms, process.num_timesteps - 1)
    for name, levels in {"train": run.data.train, "test": run.data.test}.items():
        totals = []
        with run.evaluating(), autocast(run.device, "float32"):
            for batch in levels[:num_images].split(250):
                x0 = encode(from_uint8(batch.to(run.device)))
                totals.append(process.bits_per_dim(average, x0, num_terms).total)
        gain = k_minus_null(torch.cat(totals), levels.shape[1])
        figures[f"k_minus_null_{name}"] = gain.mean().item()
        figures[f"standard_error_{name}"] = gain.std().item() / len(gain) ** 0.5
    return figures


def summary(bounds: dict[str, float], scaler: Scaler, channels: int) -> str:
    """One line for the training images and one for the test images."""
    lines = []
    for name, images in {"train": "training", "test": "test"}.items():
        gain, error = bounds[f"k_minus_null_{name}"], bounds[f"standard_error_{name}"]
        bits = scaler.bits_per_level(-L_NULL - gain / channels)
        lines.append(
            f"Bound on {images} images: K - L_null = {gain:.3f} ± {error:.3f}, "
            f"K = {gain + channels * L_NULL:.3f} bits per pixel; {bits:.3f} bits/dim"
        )
    return "\n".join(lines)


def save_bound(folder: Path, ceiling: float) -> None:
    """The bound while training, beside its ceiling, in bits per pixel."""
    columns = {"k_minus_null_train": "training images", "k_minus_null_test": "test images"}
    read = read_curves(folder / "metrics.csv", list(columns))
    curves = {columns[name]: curve for name, curve in read.items()}
    steps = read["k_minus_null_train"][0]
    curves["ceiling"] = (steps, [ceiling] * len(steps))
    title = "The bound on the log-likelihood, relative to a standard normal distribution"
    label = "K - L_null, bits per pixel"
    save_plot(folder / "bound.png", curves, "training step", label, title, yscale="linear")


if __name__ == "__main__":
    cli.run(main, presets=True, network=ConvDense)
