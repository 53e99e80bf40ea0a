"""Draw the README's two diagrams: chain.svg, noisy images and the steps q and p between them, and
unet.svg, the layers of the network."""

from functools import partial
from pathlib import Path

from common import cli
from common.data import digits, from_uint8
from common.files import output_folder
from common.options import ScriptOptions
from common.svg import BLUE, FILLS, GREY, RED, Drawings, arrow, box, line, page, pixels, save, text
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.unet import Block, Downsample, UNet, Upsample

import torch
import yaml
from torch import Tensor, nn

KINDS = "residual block", "residual block with attention", "convolution"
COLOURS = dict(zip(KINDS, FILLS, strict=True))


def main(options: ScriptOptions = ScriptOptions()) -> None:
    """Draw chain.svg and unet.svg."""
    save(DRAWINGS, output_folder(options.output_dir, "lesson_05"))


def chain() -> str:
    """x0, ..., x_{t-1}, xt, ..., xT with the steps q and p, and a digit becoming noise."""
    process, size, y = DDPM(linear_beta(1000)), 88, 66
    x0 = from_uint8(digits().test[:1])[..., 3:-2:3, 3:-2:3]  # its 8x8 pixels
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    parts = []
    names = {"x_{0}": (24, 0), "x_{t−1}": (240, 280), "x_{t}": (448, 300), "x_{T}": (664, 1000)}
    for name, (x, t) in names.items():
        parts.append(pixels(x, y, size, process.q_sample(x0, torch.tensor([t]), eps)[0, 0]))
        parts.append(text(x + size / 2, y + size + 21, name, size=17))
    for left, right, dashed in [(112, 240, True), (328, 448, False), (536, 664, True)]:
        parts.append(arrow(left + 8, 92, right - 8, 92, BLUE, dashed=dashed))
        parts.append(arrow(right - 8, 128, left + 8, 128, RED, dashed=dashed))
    parts += [
        text(388, 82, "q(x_{t} | x_{t−1})", BLUE),
        text(388, 148, "p(x_{t−1} | x_{t})", RED),
        *[text(x, 114, "…", GREY, 20) for x in (176, 600)],
        line("M68 58C150 24 400 24 488 58", BLUE),
        text(278, 24, "q(x_{t} | x_{0}): any t at once", BLUE),
        text(708, 56, "noise"),
        text(24, 206, "fixed: q adds noise →", BLUE, anchor="start"),
        text(752, 206, "← learned: p removes noise", RED, anchor="end"),
    ]
    return page(776, 220, parts)


def shapes() -> list[tuple[str, str, list[int]]]:
    """The layers of the laptop preset's network in order: name, kind, and the shape (C, H, W) of
    the output, as the network itself reports it."""
    config = yaml.safe_load((Path(__file__).parent / "configs" / "laptop.yaml").read_text())
    model = UNet(1, 28, **config["network"]).eval()
    found: list[tuple[str, str, list[int]]] = []

    def note(name: str, layer: nn.Module, _: object, out: Tensor) -> None:
        attends = isinstance(layer, Block) and layer.attention is not None
        kind = KINDS[1 if attends else 0] if isinstance(layer, Block) else KINDS[2]
        found.append((name, kind, list(out.shape[1:])))

    for name, layer in model.named_modules():
        if name in ("conv_in", "conv_out") or isinstance(layer, Block | Downsample | Upsample):
            layer.register_forward_hook(partial(note, name))
    with torch.no_grad():
        model(torch.zeros(1, 1, 28, 28), torch.ones(1, dtype=torch.long))
    return found


def unet() -> str:
    """Its layers from left to right, a level of resolution to a row, and the skip connections."""
    layers, step, top, drop = shapes(), 46, 78, 100
    sizes = sorted({shape[1] for _, _, shape in layers}, reverse=True)
    parts: list[str] = []
    skips: list[tuple[float, float]] = []
    before: tuple[float, float] | None = None
    for k, (name, kind, (channels, size, _)) in enumerate(layers):
        x, y, half = 138 + step * k, top + drop * sizes.index(size), 10 + size / 2
        if before:
            parts.append(arrow(before[0] + 12, before[1], x - 13, y))
        before = x, y
        parts.append(box(x - 11, y - half, 22, 2 * half, fill=COLOURS[kind]))
        parts.append(text(x, y + half + 15, str(channels), size=12))
        if name == "conv_in" or name.startswith("down"):
            skips.append((x, y - half))
        elif name.startswith("up") and kind != "convolution":
            start, height = skips.pop()
            lift = height - 10 - (x - start) / 16
            path = f"M{start} {height:g}C{start + 20} {lift:g} {x - 20} {lift:g} {x} {height - 2:g}"
            parts.append(line(path, GREY, dashed=True))
    right, bottom, x = 138 + step * (len(layers) - 1), top + drop * len(sizes) - 14, 18
    parts += [text(104, top + 5, "x_{t}", size=16), text(right + 30, top + 5, "ε̂", size=16)]
    parts += [text(48, top + drop * k + 5, f"{n} × {n}", GREY) for k, n in enumerate(sizes)]
    for kind, colour in COLOURS.items():
        parts.append(box(x, bottom - 11, 13, 13, fill=colour))
        parts.append(text(x + 20, bottom, kind, size=13, anchor="start"))
        x += 44 + 8 * len(kind)
    parts.append(arrow(x, bottom - 4, x + 34, bottom - 4, dashed=True))
    parts.append(text(x + 42, bottom, "skip connection", size=13, anchor="start"))
    words = "Below each layer: its feature maps. Every residual block also receives the time t."
    parts.append(text(18, bottom + 26, words, size=13, anchor="start"))
    return page(right + 60, bottom + 44, parts)


DRAWINGS: Drawings = {"chain.svg": chain, "unet.svg": unet}


if __name__ == "__main__":
    cli.run(main)
