"""Sample a trained DPM, or its posterior given a part of an image or a noisy one."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from common import checkpoint, cli, mnist
from common.device import Precision, autocast, pick_device
from common.errors import UserError
from common.images import from_uint8, save_gif, save_grid, save_npz
from common.run import check
from lesson_02.dpm import DPM, Network, Pair, Standard, erasing_beta
from lesson_02.network import ConvDense

SHIPPED = str(Path(__file__).parent / "pretrained" / "mnist.pt")
Shape = tuple[int, int, int]


def main(
    model_checkpoint: str = SHIPPED,
    num_samples: int = 64,
    inpaint: str | None = None,
    denoise: float | None = None,
    num_images: int = 8,
    num_draws: int = 5,
    dataset: mnist.Dataset = "auto",
    data_dir: str | None = None,
    save_npz: bool = False,
    output_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
    sha256: str | None = None,
) -> None:
    """Sample images from a checkpoint of this lesson [SD15 Section 2.2]; or, with --inpaint or
    --denoise, draw from the posterior of spoilt test images [SD15 Section 2.5].

    Args:
        model_checkpoint: a file, or an http(s) address; the shipped one unless given.
        num_samples: how many images.
        inpaint: what of the test images is missing: left, top, or a PNG of their size that is white
            where it is missing and black where the image is known.
        denoise: standard deviation of the noise on the test images, where that of the data is 1.
        num_images: test images to spoil.
        num_draws: posterior draws for each of them.
        dataset: whose test images; auto is MNIST or, failing that, scikit-learn's digits.
        data_dir: folder of the data in torchvision's layout; else $DIFFUSION_DATA, else data/.
        save_npz: also write samples.npz: key samples, uint8 (N, C, H, W).
        output_dir: folder of the pictures; output/ in this lesson's folder unless given.
        seed: of the noise.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic; auto is bfloat16 where the hardware has it.
        sha256: refuse a file with another sum.
    """
    counts = {"num_samples": num_samples, "num_images": num_images, "num_draws": num_draws}
    check(lambda value: value >= 1, "at least 1", **counts)
    if inpaint is not None and denoise is not None:
        raise UserError("--inpaint and --denoise: take one at a time")
    if denoise is not None:
        check(lambda value: 0 <= value < float("inf"), "at least 0", denoise=denoise)
    place = pick_device(device)
    process, model, content = load(model_checkpoint, sha256)
    process, model = process.to(place), model.to(place)
    standard, shape = standard_and_shape(content)
    folder = Path(output_dir) if output_dir else Path(__file__).parent / "output"
    missing = None if inpaint is None else read_mask(inpaint, shape)
    checkpoint.make_folder(folder)
    torch.manual_seed(seed)
    if missing is None and denoise is None:
        with autocast(place, precision):
            save_samples(process, model, standard, shape, num_samples, folder, save_npz)
        print(f"{num_samples} samples: {folder}/samples.png, reverse.gif, reverse.png")
        return
    data = mnist.load(dataset, data_dir)
    if data.shape != shape:
        raise UserError(f"{data} is not what {model_checkpoint} was trained on: give --dataset")
    x0 = standard.encode(from_uint8(data.test[:num_images]), dequantize=False).to(place)
    if missing is not None:
        noise_var = torch.where(missing, float("inf"), 0.0).to(place).expand_as(x0)
        y, name = torch.where(noise_var > 0, standard_grey(standard), x0), "inpainted"
    else:
        assert denoise is not None
        noise_var, name = torch.full_like(x0, denoise**2), "denoised"
        y = x0 + denoise * torch.randn_like(x0)
    with autocast(place, precision):
        save_posterior(
            folder / f"{name}.png", process, model, standard, x0, y, noise_var, num_draws
        )
    print(f"{folder}/{name}.png: the image, what is known of it, {num_draws} posterior draws")


def load(source: str, sha256: str | None = None) -> tuple[DPM, ConvDense, checkpoint.Checkpoint]:
    """The averaged process and network, in eval mode, from a checkpoint alone."""
    content = checkpoint.load(source, "lesson_02", sha256)
    config = content["config"]
    with checkpoint.must_fit(source):
        network = ConvDense(**config["network"])
        process = DPM(erasing_beta(config["num_timesteps"]), config["learned_beta"])
        checkpoint.load_weights(Pair(network, process), content)
        standard_and_shape(content)
    return process, network, content


def standard_and_shape(content: checkpoint.Checkpoint) -> tuple[Standard, Shape]:
    """How its data were standardised, and (C, H, W)."""
    config, network = content["config"], content["config"]["network"]
    size = network["image_size"]
    standard = Standard(float(config["data_mean"]), float(config["data_std"]))
    return standard, (network["image_channels"], size, size)


def to_images(content: checkpoint.Checkpoint, x0: Tensor) -> Tensor:
    """x0 as images on the scale [-1, 1], for common/evaluate.py."""
    return standard_and_shape(content)[0].decode(x0)


def bits_per_dim(
    process: DPM, model: Network, content: checkpoint.Checkpoint, images: Tensor, num_terms: int
) -> dict[str, Tensor]:
    """The bound on images in [-1, 1] as bits per dimension, and K - L_null in bits per pixel, (B,)
    each, for common/evaluate.py."""
    standard, (channels, _, _) = standard_and_shape(content)
    num_terms = min(num_terms, process.num_timesteps - 1)
    gain = process.bound(model, standard.encode(images), num_terms).total
    return {"total": standard.bits_per_dim(gain, channels), "gain": gain}


def standard_grey(standard: Standard) -> float:
    """Mid-grey, for what is not known."""
    return (127.5 - standard.mean) / standard.std


def read_mask(name: str, shape: Shape) -> Tensor:
    """Where the image is missing: bool (1, 1, H, W)."""
    _, height, width = shape
    missing = torch.zeros(height, width, dtype=torch.bool)
    if name == "left":
        missing[:, : width // 2] = True
    elif name == "top":
        missing[: height // 2] = True
    else:
        size = (width, height)
        try:
            if not Path(name).is_file():
                raise OSError("there is no such file")
            with Image.open(name, formats=["PNG"]) as image:
                size = image.size  # known before a pixel is unpacked
                if size == (width, height):
                    missing = pil_to_tensor(image.convert("L"))[0] > 127
        except Exception as error:  # a damaged picture fails in many ways
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--inpaint {name} cannot be read ({reason}): take left, top or a PNG"
            ) from None
        if size != (width, height):
            raise UserError(
                f"the mask {name} is {size[0]}x{size[1]}: it must have the images' "
                f"{width}x{height} pixels"
            )
        if missing.all() or not missing.any():
            raise UserError(
                f"the mask {name} leaves {'nothing' if missing.all() else 'everything'} of the "
                "image known: make it white where the image is missing and black elsewhere"
            )
    return missing[None, None]


@torch.no_grad()
def save_samples(
    process: DPM,
    model: Network,
    standard: Standard,
    shape: Shape,
    num_samples: int,
    folder: Path,
    npz: bool = False,
) -> None:
    """Draw the samples and write their grid and the way of the first few."""
    frames: list[Tensor] = []
    samples = draw(process, model, standard, shape, num_samples, frames)
    save_grid(folder / "samples.png", samples)
    save_gif(folder / "reverse.gif", frames, columns=4)
    strip = torch.stack(frames[:: max(len(frames) // 10, 1)], 1)[:4]  # 4 images, 11 or so moments
    save_grid(folder / "reverse.png", strip.flatten(0, 1), columns=strip.shape[1])
    if npz:
        save_npz(folder / "samples.npz", samples)


@torch.no_grad()
def draw(
    process: DPM,
    model: Network,
    standard: Standard,
    shape: Shape,
    num_samples: int,
    frames: list[Tensor] | None = None,
) -> Tensor:
    """Samples as images on the scale [-1, 1], on the CPU, 64 at a time; frames takes the first 16
    on their way."""
    T = process.num_timesteps
    batches: list[Tensor] = []
    times = {round(T * k / 60) for k in range(61)} | {1}
    with tqdm(total=-(-num_samples // 64) * (T - 1), unit="step", desc="sampling") as bar:

        def watch(t: int, xt: Tensor) -> None:
            bar.update()
            if frames is not None and not batches and t in times:
                frames.append(standard.decode(xt[:16]).cpu())

        for first in range(0, num_samples, 64):
            x_T = torch.randn(min(64, num_samples - first), *shape, device=process.device)
            if frames is not None and first == 0:
                frames.append(standard.decode(x_T[:16]).cpu())
            batches.append(standard.decode(process.sample(model, x_T, on_step=watch)).cpu())
    return torch.cat(batches)


@torch.no_grad()
def save_posterior(
    path: Path,
    process: DPM,
    model: Network,
    standard: Standard,
    x0: Tensor,
    y: Tensor,
    noise_var: Tensor,
    num_draws: int,
) -> None:
    """A row for each image: itself, what is known of it, and draws from its posterior
    [SD15 Figure 3, 5]."""
    columns = [x0, y]
    with tqdm(total=num_draws * (process.num_timesteps - 1), unit="step", desc="sampling") as bar:
        for _ in range(num_draws):
            draws = process.posterior_sample(model, y, noise_var, lambda *_: bar.update())
            columns.append(draws)
    rows = standard.decode(torch.stack(columns, 1).flatten(0, 1))
    save_grid(path, rows.cpu(), columns=len(columns))


def save_forward(path: Path, process: DPM, standard: Standard, levels: Tensor) -> None:
    """Real images on their way to noise: a row each, from x0 to xT [SD15 Section 2.1]."""
    x0 = standard.encode(from_uint8(levels)).to(process.device)
    eps = torch.randn_like(x0)
    times = torch.linspace(0, process.num_timesteps, 11).round().long().to(x0.device)
    strip = torch.stack([process.q_sample(x0, t.expand(len(x0)), eps) for t in times], 1)
    save_grid(path, standard.decode(strip.flatten(0, 1)), columns=len(times))


if __name__ == "__main__":
    cli.run(main)
