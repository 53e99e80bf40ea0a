"""What the learned variance is, and what it is worth beside the two fixed ones.

Three measurements of a trained network: f of Eq. 15 at each t; samples and bound with the learned
variance, with β̃ and with β, from the same noise; and how much of the gradient of the layers that
ε̂ and v share comes from L_vlb.
"""

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import cli
from common.data import Images, from_uint8, load_images_for
from common.errors import UserError, check_at_least
from common.options import CheckpointOptions
from common.pictures import new_figure, save_rows
from common.sampling import draw_samples, inference
from lesson_09.ablation import Judge
from lesson_09.evaluate import bound
from lesson_09.iddpm import ImprovedDDPM, Network, Variance
from lesson_09.sample_mnist import SHIPPED, load
from lesson_09.unet import UNet

import torch
from torch import Tensor

LABELS: dict[Variance, str] = {"learned": "learned", "beta_tilde": "β̃", "beta": "β"}


def main(
    num_images: int = 200,
    num_terms: int = 20,
    steps: Sequence[int] = (1000, 50, 25, 10),
    num_samples: int = 128,
    max_sampling_steps: int = 50,
    num_classifier_steps: int = 1000,
    data_dir: str | None = None,
    options: CheckpointOptions = CheckpointOptions(model_checkpoint=SHIPPED, precision="float32"),
) -> None:
    """Measure the learned variance: learned_variance.png, variances.png, variance.json, and tables.

    Args:
        num_images: test images, counted from the first.
        num_terms: terms of the bound drawn for each image; fewer if a process has fewer steps.
        steps: numbers of steps S, one row each.
        num_samples: samples for each S and each variance; 0 for none.
        max_sampling_steps: where S is larger, no samples are drawn, only the bound is computed.
        num_classifier_steps: training steps of the classifier in whose features samples are
            compared.
        data_dir: folder of the data, in torchvision's layout or your own; else $DIFFUSION_DATA,
            else data/.
    """
    check_at_least(2, num_images=num_images, num_terms=num_terms)
    if num_samples:
        check_at_least(3, num_samples=num_samples)
    check_at_least(1, num_classifier_steps=num_classifier_steps)
    processes = {v: load(options.model_checkpoint, options.sha256, v)[0] for v in LABELS}
    learned, model, content = load(options.model_checkpoint, options.sha256)
    T = learned.num_timesteps
    if not steps or not all(2 <= S <= T for S in steps):
        raise UserError(f"steps must be numbers from 2 to {T}")
    data = load_images_for(content, content.dataset, data_dir)
    with inference(options, "lesson_09") as (folder, device):
        model = model.to(device)
        processes = {name: process.to(device) for name, process in processes.items()}
        x0 = from_uint8(data.test[:num_images]).to(device)
        result: dict[str, Any] = {"num_images": len(x0), "num_samples": num_samples}
        result |= {"num_terms": num_terms, "seed": options.seed, "step": content.step}
        result["f"] = fractions(processes["learned"], model, x0)
        save_fractions(folder / "learned_variance.png", result["f"])
        print_fractions(result["f"])
        norms = shared_gradient(learned.to(device), model, data.train.to(device))
        result["gradient"] = norms
        print("\nGradient of the shared layers, median norm of a batch and norm of the mean:")
        print(f"  L_simple {norms['simple']:.3g}, {norms['mean_simple']:.3g}")
        print(f"  λ L_vlb  {norms['vlb']:.3g}, {norms['mean_vlb']:.3g}", flush=True)
        levels = data.test[:num_images].to(device)
        result["bits_per_dim"] = {
            S: bits_of(processes, model, levels, S, num_terms, options.seed) for S in steps
        }
        rows = few_samples(processes, model, data, min(steps), options.seed)
        save_rows(folder / "variances.png", rows)
        result["distance"] = {}
        if num_samples:
            judge = Judge(data, num_classifier_steps, device)
            result["distance"] = {
                S: distances(processes, model, data, judge, S, num_samples, options.seed)
                for S in steps
                if max_sampling_steps >= S
            }
    (folder / "variance.json").write_text(json.dumps(result, indent=2) + "\n")
    print_comparison(result)
    print(f"{folder}/variance.json, learned_variance.png, variances.png")


def frac(out: Tensor) -> Tensor:
    """f = (v + 1)/2 of the network's output (B, 2C, H, W)."""
    return (out[:, out.shape[1] // 2 :] + 1) / 2


def fractions(process: ImprovedDDPM, model: Network, x0: Tensor) -> dict[str, list[float]]:
    """f over the pixels of noisy images at some t: mean, 5th and 95th percentile, and the shares
    below 0 and above 1."""
    T = process.num_timesteps
    times = torch.logspace(0, math.log10(T), 31).round().long().unique()
    names = ("t", "mean", "p5", "p95", "below_0", "above_1")
    columns: dict[str, list[float]] = {name: [] for name in names}
    for t in times.tolist():
        t_batch = torch.full((len(x0),), t, device=x0.device)
        out = model(process.q_sample(x0, t_batch, torch.randn_like(x0)), process.timesteps[t_batch])
        f = frac(out.float()).flatten()
        low, high = (f.kthvalue(max(1, round(len(f) * q))).values for q in (0.05, 0.95))
        below, above = (f < 0).float().mean(), (f > 1).float().mean()
        row = [t, f.mean().item(), low.item(), high.item(), below.item(), above.item()]
        for name, value in zip(names, row, strict=True):
            columns[name].append(value)
    return columns


def shared_gradient(
    process: ImprovedDDPM, model: UNet, levels: Tensor, num_batches: int = 16, size: int = 64
) -> dict[str, float]:
    """Norms of the gradients of the weighted L_simple and λ L_vlb in the layers that ε̂ and v share,
    all but the last: the median of batches of `size`, and the norm of the batches' mean."""
    last = set(model.conv_out.parameters())
    shared = [parameter for parameter in model.parameters() if parameter not in last]
    for parameter in shared:
        parameter.requires_grad_(True)
    rows: dict[str, list[Tensor]] = {"simple": [], "vlb": []}
    with torch.enable_grad():
        for _ in range(num_batches):
            index = torch.randint(len(levels), (size,)).to(levels.device)
            x0 = from_uint8(levels[index])
            t = torch.randint(1, process.num_timesteps + 1, (size,)).to(levels.device)
            simple, vlb = process.loss_terms(model, x0, t, torch.randn_like(x0))
            parts = {
                "simple": process.simple_weight * simple.mean(),
                "vlb": process.vlb_weight * process.num_timesteps * vlb.mean(),
            }
            for name, loss in parts.items():
                gradients = torch.autograd.grad(loss, shared, retain_graph=True)
                rows[name].append(torch.cat([gradient.flatten() for gradient in gradients]))
    for parameter in shared:
        parameter.requires_grad_(False)
    norms = {}
    for name, batches in rows.items():
        stacked = torch.stack(batches).double()
        norms[name] = stacked.norm(dim=1).median().item()
        norms[f"mean_{name}"] = stacked.mean(0).norm().item()
    return norms


def in_steps(
    processes: dict[Variance, ImprovedDDPM], num_steps: int, seed: int
) -> Iterator[tuple[Variance, ImprovedDDPM]]:
    """Each variance with its process in S steps, the seed set, so that all see the same noise."""
    for name, process in processes.items():
        torch.manual_seed(seed)
        yield name, process.strided(num_steps)


def bits_of(
    processes: dict[Variance, ImprovedDDPM],
    model: Network,
    levels: Tensor,
    num_steps: int,
    num_terms: int,
    seed: int,
) -> dict[Variance, tuple[float, float]]:
    """The bound in S steps with each variance: mean and standard error, from the same noise."""
    results = {}
    for name, few in in_steps(processes, num_steps, seed):
        bits = bound(few, model, levels, min(num_terms, num_steps), 100, clip_x0=True).total
        results[name] = (bits.mean().item(), bits.std().item() / len(bits) ** 0.5)
    return results


def few_samples(
    processes: dict[Variance, ImprovedDDPM],
    model: Network,
    data: Images,
    num_steps: int,
    seed: int,
) -> dict[str, Tensor]:
    """Eight samples in S steps with each variance, from the same noise."""
    rows = {}
    for name, few in in_steps(processes, num_steps, seed):
        x_T = torch.randn(8, *data.shape).to(few.device)
        rows[LABELS[name]] = few.sample(model, x_T).cpu()
    return rows


def distances(
    processes: dict[Variance, ImprovedDDPM],
    model: Network,
    data: Images,
    judge: Judge,
    num_steps: int,
    num_samples: int,
    seed: int,
) -> dict[Variance, tuple[float, float]]:
    """The kernel distance of samples in S steps with each variance, from the same noise."""
    results = {}
    for name, few in in_steps(processes, num_steps, seed):
        trajectory = partial(few.trajectory, model)
        images = draw_samples(trajectory, num_samples, data.shape, num_steps, few.device).images
        results[name] = judge.distance(images)
    return results


def save_fractions(path: Path, f: dict[str, list[float]]) -> None:
    """f against t: mean, and the range that holds 90 % of the pixels."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    axes.axhspan(0, 1, color="tab:green", alpha=0.12, label="between β̃ (0) and β (1)")
    axes.fill_between(f["t"], f["p5"], f["p95"], alpha=0.25, label="90 % of the pixels")
    axes.plot(f["t"], f["mean"], marker=".", label="mean")
    axes.set(xlabel="t", ylabel="f = (v + 1)/2", xscale="log")
    title = "The learned f. Nothing keeps it in [0, 1], and at t = 1 it is far below 0."
    axes.set_title(title, fontsize=9, loc="left")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def print_fractions(f: dict[str, list[float]]) -> None:
    print("f over all pixels\n\n| t | mean | 5 % | 95 % | below 0 | above 1 |\n" + "|---" * 6 + "|")
    for t, mean, low, high, below, above in zip(*f.values(), strict=True):
        print(f"| {t} | {mean:.2f} | {low:.2f} | {high:.2f} | {below:.0%} | {above:.0%} |")


def print_comparison(result: dict[str, Any]) -> None:
    heads = " | ".join(f"{kind}, {v}" for kind in ("bits/dim", "distance") for v in LABELS)
    print(f"\n| S | {heads} |\n" + "|---" * 7 + "|")
    for S, bits in result["bits_per_dim"].items():
        cells = [f"{bits[v][0]:.3f} ± {bits[v][1]:.3f}" for v in LABELS]
        drawn = result["distance"].get(S)
        cells += [f"{drawn[v][0]:.3f} ± {drawn[v][1]:.3f}" if drawn else "" for v in LABELS]
        print(f"| {S:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    cli.run(main)
