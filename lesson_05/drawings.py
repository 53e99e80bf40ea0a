"""Draw the README's two diagrams as SVG: the chain of noisy images, and the network.

They are made without a plotting library, so that the files are the same everywhere.
"""

from functools import partial
from pathlib import Path

from common import cli
from common.data import digits, from_uint8
from common.files import output_folder
from common.svg import line, pixels, svg, text
from lesson_05.ddpm import DDPM, linear_beta
from lesson_05.unet import Block, Downsample, UNet, Upsample

import torch
import yaml
from torch import Tensor, nn

COLOURS = {
    "residual block": "#7fa8d9",
    "residual block with attention": "#c79ad6",
    "convolution": "#a9c48a",
}


def main(seed: int = 0, output_dir: str | None = None) -> None:
    """Write chain.svg and unet.svg.

    Args:
        seed: seed of the noise in the chain.
        output_dir: folder for the files; output/ in the lesson's folder unless given.
    """
    folder = output_folder(output_dir, "lesson_05")
    (folder / "chain.svg").write_text(chain(seed), encoding="utf-8")
    (folder / "unet.svg").write_text(unet(), encoding="utf-8")
    print(f"{folder}/chain.svg, unet.svg")


def chain(seed: int = 0) -> str:
    """x0, ..., x_{t-1}, xt, ..., xT with the steps q and p, and a digit becoming noise."""
    process, size, y = DDPM(linear_beta(1000)), 88, 62
    x0 = from_uint8(digits().test[:1])[..., 3:-2:3, 3:-2:3]  # its 8x8 pixels
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    parts = []
    names = {"x_{0}": (24, 0), "x_{t−1}": (240, 280), "x_{t}": (448, 300), "x_{T}": (664, 1000)}
    for name, (x, t) in names.items():
        parts += pixels(x, y, size, process.q_sample(x0, torch.tensor([t]), eps)[0, 0])
        parts.append(text(x + size / 2, y + size + 20, name, 17))
    for left, right, dashed in [(112, 240, True), (328, 448, False), (536, 664, True)]:
        for start, end, height in [(left + 8, right - 8, 88), (right - 8, left + 8, 124)]:
            parts.append(line(f"M{start} {height}H{end}", dashed))
    q, p = "q(x_{t} | x_{t−1})", "p(x_{t−1} | x_{t})"
    parts += [text(388, 76, q, 14), text(388, 144, p, 14)]
    parts += [text(176, 110, "…", 22), text(600, 110, "…", 22)]
    parts.append(line("M68 54C 150 18 400 18 488 54"))
    parts.append(text(278, 20, "q(x_{t} | x_{0}): any t at once", 14))
    parts.append(text(708, 54, "noise", 14))
    parts.append(text(68, 200, "fixed: q adds noise →", 14, "start"))
    parts.append(text(708, 200, "← learned: p takes noise away", 14, "end"))
    return svg(776, 212, parts)


def shapes() -> list[tuple[str, str, list[int]]]:
    """The layers of the laptop preset's network in order: name, kind, and the shape (C, H, W) of
    the output, as the network itself reports it."""
    config = yaml.safe_load((Path(__file__).parent / "configs" / "laptop.yaml").read_text())
    model = UNet(1, 28, **config["network"]).eval()
    found: list[tuple[str, str, list[int]]] = []

    def note(name: str, layer: nn.Module, _: object, out: Tensor) -> None:
        attends = isinstance(layer, Block) and layer.attention is not None
        kinds = list(COLOURS)
        kind = kinds[1 if attends else 0] if isinstance(layer, Block) else kinds[2]
        found.append((name, kind, list(out.shape[1:])))

    for name, layer in model.named_modules():
        if name in ("conv_in", "conv_out") or isinstance(layer, Block | Downsample | Upsample):
            layer.register_forward_hook(partial(note, name))
    with torch.no_grad():
        model(torch.zeros(1, 1, 28, 28), torch.ones(1, dtype=torch.long))
    return found


def unet() -> str:
    """Its layers from left to right, a level of resolution to a row, and the skip connections."""
    layers, step, top, drop = shapes(), 46, 74, 100
    sizes = sorted({shape[1] for _, _, shape in layers}, reverse=True)
    parts: list[str] = []
    skips: list[tuple[float, float]] = []
    before: tuple[float, float] | None = None
    for k, (name, kind, (channels, size, _)) in enumerate(layers):
        x, y, half = 118 + step * k, top + drop * sizes.index(size), 10 + size / 2
        if before:
            parts.append(line(f"M{before[0] + 12} {before[1]}L{x - 13} {y}"))
        before = x, y
        box = f'x="{x - 11}" y="{y - half:g}" width="22" height="{2 * half:g}" rx="3"'
        parts.append(f'<rect {box} fill="{COLOURS[kind]}" stroke="#333"/>')
        parts.append(text(x, y + half + 15, str(channels), 12))
        if name == "conv_in" or name.startswith("down"):
            skips.append((x, y - half))
        elif name.startswith("up") and kind != "convolution":
            start, height = skips.pop()
            lift = height - 10 - (x - start) / 16
            path = f"M{start} {height:g}C{start + 20} {lift:g} {x - 20} {lift:g} {x} {height - 2:g}"
            parts.append(line(path, dashed=True))
    right = 118 + step * (len(layers) - 1)
    parts += [text(84, top + 5, "x_{t}", 16), text(right + 30, top + 5, "ε̂", 16)]
    parts += [text(34, top + drop * k + 5, f"{n} × {n}", 14) for k, n in enumerate(sizes)]
    bottom, x = top + drop * len(sizes) - 14, 14
    for kind, colour in COLOURS.items():
        parts.append(f'<rect x="{x}" y="{bottom - 11}" width="13" height="13" fill="{colour}"/>')
        parts.append(text(x + 19, bottom, kind, 13, "start"))
        x += 42 + 7 * len(kind)
    parts.append(line(f"M{x} {bottom - 4}h34", dashed=True))
    parts.append(text(x + 42, bottom, "skip connection", 13, "start"))
    words = "Below each layer: its feature maps. Every residual block also receives the time t."
    parts.append(text(14, bottom + 24, words, 13, "start"))
    return svg(right + 60, bottom + 38, parts)


if __name__ == "__main__":
    cli.run(main)
