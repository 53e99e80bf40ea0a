"""Sample a trained DPM, or its posterior given part of an image or a noisy image."""

from functools import partial
from pathlib import Path

from common import checkpoint, cli
from common.data import from_uint8, load_images_for
from common.errors import UserError, check_at_least, one_line
from common.options import DataOptions, SamplingOptions
from common.pictures import save_grid
from common.sampling import (
    Samples,
    Shape,
    check_finite,
    draw_samples,
    inference,
    last_images,
    save_samples,
)
from lesson_02.dpm import DPM, Network, Pair, erasing_beta
from lesson_02.network import ConvDense
from lesson_02.options import DPMOptions
from lesson_02.scaler import Scaler

import torch
from torch import Tensor, nn
from tqdm import tqdm

SHIPPED = str(Path(__file__).parent / "pretrained" / "mnist.safetensors")


def main(
    inpaint: str | None = None,
    denoise: float | None = None,
    num_images: int = 8,
    num_draws: int = 5,
    images: DataOptions = DataOptions(),
    options: SamplingOptions = SamplingOptions(model_checkpoint=SHIPPED),
) -> None:
    """Sample images from a checkpoint of this lesson [SD15 Section 2.2]; with --inpaint or
    --denoise, sample the posterior of damaged test images instead [SD15 Section 2.5].

    Args:
        inpaint: which part of the test images is missing: left, top, or a PNG of their size that is
            white where the image is missing and black where it is known.
        denoise: standard deviation of the noise on the test images, relative to that of the data.
        num_images: test images to damage.
        num_draws: posterior draws for each of them.
    """
    check_at_least(1, num_images=num_images, num_draws=num_draws)
    if inpaint is not None and denoise is not None:
        raise UserError("--inpaint and --denoise exclude each other: give one of them")
    process, model, content = load(options.model_checkpoint, options.sha256)
    scaler = scaler_of(content)
    with inference(options, "lesson_02") as (folder, device):
        process, model = process.to(device), model.to(device)
        if inpaint is None and denoise is None:
            samples = draw(process, model, scaler, content.image_shape, options.num_samples)
            save_samples(folder, samples, options)
            print(f"{options.num_samples} samples: {folder}/samples.png, reverse.gif, reverse.png")
        else:
            levels = load_images_for(content, images.dataset, images.data_dir).test[:num_images]
            x0 = scaler.encode(from_uint8(levels), dequantize=False).to(device)
            y, noise_var = damage(x0, scaler, inpaint, denoise)
            columns = [x0, y, *draw_posterior(process, model, y, noise_var, num_draws)]
            path = folder / ("denoised.png" if inpaint is None else "inpainted.png")
            rows = scaler.decode(torch.stack(columns, 1).flatten(0, 1))
            save_grid(path, rows, columns=len(columns))
            print(f"{path}: the image, what is known of it, {num_draws} posterior draws")


def load(source: str, sha256: str | None = None) -> tuple[DPM, nn.Module, checkpoint.Checkpoint]:
    """The averaged process and network, in eval mode, from a checkpoint alone."""
    content = checkpoint.load(source, "lesson_02", sha256)

    def make() -> Pair:
        config = content.arguments(DPMOptions)
        process = DPM(erasing_beta(config["num_timesteps"]), config["learned_beta"])
        return Pair(ConvDense(**content.arguments(ConvDense, "network")), process)

    with content.must_fit():
        pair = content.build(make)
        scaler_of(content)
    return pair.process, pair.network, content


def scaler_of(content: checkpoint.Checkpoint) -> Scaler:
    """How the training data were standardised."""
    mean, std = content.config["data_mean"], content.config["data_std"]
    if type(mean) is not float or type(std) is not float or not (0 <= mean < 256 > std > 0):
        raise UserError(f"data_mean is {mean!r:.60}, data_std is {std!r:.60}")
    return Scaler(mean, std)


def draw(process: DPM, model: Network, scaler: Scaler, shape: Shape, num_samples: int) -> Samples:
    """Samples of shape (C, H, W), as images in [-1, 1]."""
    trajectory = partial(process.trajectory, model)
    num_steps = process.num_timesteps - 1
    images, frames = draw_samples(trajectory, num_samples, shape, num_steps, process.device)
    return Samples(scaler.decode(images), [scaler.decode(frame) for frame in frames])


def damage(
    x0: Tensor, scaler: Scaler, inpaint: str | None, denoise: float | None
) -> tuple[Tensor, Tensor]:
    """The evidence about images x0 (B, C, H, W): the y and noise_var of `DPM.posterior_sample`."""
    if inpaint is not None:
        missing = read_mask(inpaint, x0.shape[-2], x0.shape[-1]).to(x0.device)
        grey = scaler.encode(torch.zeros_like(x0), dequantize=False)
        return torch.where(missing, grey, x0), torch.where(missing, torch.inf, 0.0).expand_as(x0)
    assert denoise is not None
    check_at_least(0, denoise=denoise)
    return x0 + denoise * torch.randn_like(x0), torch.full_like(x0, denoise**2)


def read_mask(name: str, height: int, width: int) -> Tensor:
    """Where images are missing: bool (1, 1, H, W)."""
    missing = torch.zeros(1, 1, height, width, dtype=torch.bool)
    if name == "left":
        missing[..., : width // 2] = True
    elif name == "top":
        missing[..., : height // 2, :] = True
    else:
        missing[:] = read_png(name, height, width)
        if missing.all() or not missing.any():
            raise UserError(
                f"the mask {name} leaves {'nothing' if missing.all() else 'everything'} of the "
                "image known: make it white where the image is missing and black elsewhere"
            )
    return missing


def read_png(name: str, height: int, width: int) -> Tensor:
    """Where a PNG of this size is white: bool (H, W)."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    size = (width, height)
    try:
        if not Path(name).is_file():
            raise OSError("there is no such file")
        with Image.open(name, formats=["PNG"]) as image:
            size = image.size  # known before a pixel is unpacked
            if size == (width, height):
                return pil_to_tensor(image.convert("L"))[0] > 127
    except Exception as error:  # a damaged picture fails in many ways
        reason = one_line(error, 200)
        raise UserError(
            f"--inpaint {name} cannot be read ({reason}): give left, top or a PNG"
        ) from None
    raise UserError(
        f"the mask {name} is {size[0]}x{size[1]}: it must have the images' {width}x{height} pixels"
    )


def draw_posterior(
    process: DPM, model: Network, y: Tensor, noise_var: Tensor, num_draws: int
) -> list[Tensor]:
    """Draws from the posterior of each image in y (B, C, H, W) [SD15 Figure 3, 5]."""
    draws = []
    for number in range(1, num_draws + 1):
        steps = process.posterior_trajectory(model, y, noise_var)
        name = f"draw {number} of {num_draws}"
        bar = tqdm(steps, name, process.num_timesteps - 1, unit="step", disable=None)
        draws.append(check_finite(last_images(bar)))
    return draws


def save_forward(path: Path, process: DPM, scaler: Scaler, levels: Tensor) -> None:
    """Real images becoming noise: a row each, from x0 to xT [SD15 Section 2.1]."""
    x0 = scaler.encode(from_uint8(levels)).to(process.device)
    eps = torch.randn_like(x0)
    times = torch.linspace(0, process.num_timesteps, 11).round().long().to(x0.device)
    strip = torch.stack([process.q_sample(x0, t.expand(len(x0)), eps) for t in times], 1)
    save_grid(path, scaler.decode(strip.flatten(0, 1)), columns=len(times))


if __name__ == "__main__":
    cli.run(main)
