"""Sample a trained DDPM: Algorithm 2 of Ho et al. 2020, as pictures and as an array."""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common import checkpoint, cli
from common.device import Precision, autocast, pick_device
from common.errors import UserError
from common.images import from_uint8, save_gif, save_grid, save_npz
from lesson_05.ddpm import DDPM, Network, Variance, linear_beta
from lesson_05.unet import UNet

SHIPPED = str(Path(__file__).parent / "pretrained" / "mnist.pt")


def main(
    model_checkpoint: str = SHIPPED,
    num_samples: int = 64,
    clip_x0: bool = True,
    variance: Variance | None = None,
    save_npz: bool = False,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
    sha256: str | None = None,
) -> None:
    """Sample images from a checkpoint of this lesson [Ho20 Algorithm 2].

    Args:
        model_checkpoint: a file, or an http(s) address; the shipped one unless given.
        num_samples: how many images.
        clip_x0: whether each estimate of the clean image is clipped to [-1, 1].
        variance: of the reverse steps; as in training unless given.
        save_npz: also write samples.npz: key samples, uint8 (N, C, H, W).
        output_dir: folder of the pictures; output/ in this lesson's folder unless given.
        seed: of the noise.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic; auto is bfloat16 where the hardware has it.
        sha256: refuse a file with another sum.
    """
    if num_samples < 1:
        raise UserError(f"num_samples is {num_samples}: it must be at least 1")
    place = pick_device(device)
    process, model, content = load(model_checkpoint, variance, sha256)
    network = content["config"]["network"]
    shape = (network["image_channels"], network["image_size"], network["image_size"])
    folder = Path(output_dir) if output_dir else Path(__file__).parent / "output"
    checkpoint.make_folder(folder)
    torch.manual_seed(seed)
    with autocast(place, precision):
        save_samples(
            process.to(place), model.to(place), shape, num_samples, folder, clip_x0, save_npz
        )
    print(f"{num_samples} samples: {folder}/samples.png, reverse.gif, reverse.png")


def load(
    source: str, variance: Variance | None = None, sha256: str | None = None
) -> tuple[DDPM, UNet, checkpoint.Checkpoint]:
    """The process and the averaged network, in eval mode, from a checkpoint alone."""
    content = checkpoint.load(source, "lesson_05", sha256)
    config = content["config"]
    with checkpoint.must_fit(source):
        beta = linear_beta(config["num_timesteps"], config["beta_1"], config["beta_T"])
        process = DDPM(beta, variance or config["variance"])
        model = checkpoint.load_weights(UNet(**config["network"]), content)
    return process, model, content


@torch.no_grad()
def save_samples(
    process: DDPM,
    model: Network,
    shape: tuple[int, int, int],
    num_samples: int,
    folder: Path,
    clip_x0: bool = True,
    npz: bool = False,
) -> None:
    """Draw the samples, 64 at a time, and write their grid and the way of the first few."""
    T, device = process.num_timesteps, process.signal_rate.device
    batches: list[Tensor] = []
    frames: list[Tensor] = []
    times = {round(T * k / 60) for k in range(61)}
    with tqdm(total=-(-num_samples // 64) * T, unit="step", desc="sampling") as bar:

        def watch(t: int, xt: Tensor) -> None:
            bar.update()
            if not batches and t in times:
                frames.append(xt[:16].cpu())

        for first in range(0, num_samples, 64):
            x_T = torch.randn(min(64, num_samples - first), *shape, device=device)
            if first == 0:
                frames.append(x_T[:16].cpu())
            batches.append(process.sample(model, x_T, clip_x0, watch).cpu())
    samples = torch.cat(batches)
    save_grid(folder / "samples.png", samples)
    save_gif(folder / "reverse.gif", frames, columns=4)
    strip = torch.stack(frames[:: max(len(frames) // 10, 1)], 1)[:4]  # 4 images, 11 or so moments
    save_grid(folder / "reverse.png", strip.flatten(0, 1), columns=strip.shape[1])
    if npz:
        save_npz(folder / "samples.npz", samples)


def save_forward(path: Path, process: DDPM, levels: Tensor) -> None:
    """Real images on their way to noise: a row each, from x0 to xT [Ho20 Figure 2]."""
    x0 = from_uint8(levels).to(process.signal_rate.device)
    eps = torch.randn_like(x0)
    times = torch.linspace(0, process.num_timesteps, 11).round().long().to(x0.device)
    strip = torch.stack([process.q_sample(x0, t.expand(len(x0)), eps) for t in times], 1)
    save_grid(path, strip.flatten(0, 1), columns=len(times))


if __name__ == "__main__":
    cli.run(main)
