"""Draw chain.svg, the two chains of the lesson, and network.svg, the layers of its network.

The drawings have their own light background, so that they are legible on a dark page, too.
"""

import re
from pathlib import Path

from common import cli
from common.files import output_folder
from common.options import ScriptOptions
from lesson_02.dpm import NUM_BUMPS, bumps

INK, GREY, BLUE, RED = "#1f2328", "#57606a", "#0a58ca", "#b8330a"
FONT = "font-family: DejaVu Sans, Verdana, sans-serif"


def main(options: ScriptOptions = ScriptOptions()) -> None:
    """Draw chain.svg and network.svg."""
    folder = output_folder(options.output_dir, "lesson_02")
    for name, drawing in drawings().items():
        Path(folder / name).write_text(drawing, encoding="utf-8")
        print(f"{folder}/{name}")


def drawings() -> dict[str, str]:
    return {"chain.svg": chain(), "network.svg": network()}


def chain() -> str:
    """The forward process q from left to right, and the reverse process p back."""
    places = {60: "x_{0}", 200: "x_{1}", 390: "x_{t-1}", 560: "x_{t}", 750: "x_{T}"}
    parts = [circle(x, 150, name) for x, name in places.items()]
    parts += [words(x, 155, "· · ·", GREY, 20) for x in (295, 655)]
    for left, right in [(60, 200), (390, 560)]:
        parts.append(arrow(left + 25, 130, right - 25, 130, BLUE))
    parts += [
        arrow(535, 170, 415, 170, RED),
        arrow(175, 170, 85, 170, GREY, dashed=True),
        words(475, 110, "q(x_{t} | x_{t-1})", BLUE, 16),
        words(475, 203, "p(x_{t-1} | x_{t})", RED, 16),
        words(130, 110, "q(x_{1} | x_{0})", BLUE, 16),
        words(130, 203, "p(x_{0} | x_{1})", GREY, 16),
        words(405, 38, "Forward process q: fixed, adds Gaussian noise of variance β_{t}", BLUE, 17),
        words(405, 272, "Reverse process p: a learned Gaussian for t = T, ..., 2", RED, 17),
        words(130, 228, "not learned,", GREY, 13),
        words(130, 246, "left out when sampling", GREY, 13),
        words(82, 80, "data, variance 1", INK, 13),
        words(735, 80, "noise: π = N(0, 1)", INK, 13),
        words(735, 228, "sampling starts here", INK, 13),
    ]
    return page(820, 300, parts)


def network() -> str:
    """The layers of ConvDense, in the size of configs/laptop.yaml."""
    parts = [
        box(15, 170, 95, 70, ["image x_{t}", "1 × 28 × 28"]),
        arrow(110, 195, 150, 122),
        arrow(110, 215, 150, 305),
        box(150, 45, 255, 150, [], BLUE),
        words(277, 35, "4 multi-scale convolutions", BLUE, 15),
        box(320, 95, 70, 50, ["add,", "leaky ReLU"], GREY, 12),
        box(150, 260, 255, 90, ["4 dense layers", "784 → 500 → 500 → 500 → 2 · 784"], BLUE, 14),
        words(277, 375, "they see the whole image", GREY, 13),
        box(455, 150, 120, 110, ["the same for", "every pixel:", "34 → 32 → 20"], BLUE, 14),
        words(515, 140, "readout", BLUE, 15),
        arrow(405, 120, 455, 180),
        words(470, 112, "32 × 28 × 28", GREY, 12),
        arrow(405, 305, 455, 230),
        words(480, 300, "2 × 28 × 28", GREY, 12),
        arrow(575, 205, 645, 205),
        words(608, 195, "10 + 10", GREY, 12),
        words(608, 280, "coefficients y_{j} for μ and b", GREY, 12),
        words(608, 296, "of every pixel", GREY, 12),
        box(645, 160, 105, 90, ["Σ_{j} y_{j} g_{j}(t)"], RED, 15),
        arrow(750, 190, 785, 165),
        arrow(750, 220, 785, 245),
        box(785, 135, 60, 50, ["μ"], RED, 17),
        box(785, 225, 60, 50, ["b"], RED, 17),
        *curves(628, 45, 140, 55),
        words(698, 35, "ten bumps g_{j}(t)", RED, 15),
        words(698, 118, "t from 1 to T", GREY, 12),
        arrow(698, 126, 698, 160, RED),
        words(680, 345, "The time t enters here only:", RED, 14),
        words(680, 365, "no layer gets it as an input.", RED, 14),
    ]
    for row, (size, y) in enumerate(zip((28, 14, 7), (57, 105, 153), strict=True)):
        text = "3 × 3" if row == 0 else f"÷ {2**row}, 3 × 3, × {2**row}"
        parts.append(box(160, y, 130, 32, [f"{size}²:  {text}"], GREY, 12))
        parts.append(arrow(290, y + 16, 320, 120 + 12 * (row - 1)))
    return page(860, 395, parts)


def curves(x: float, y: float, width: float, height: float) -> list[str]:
    """The bumps over the time, drawn from the lesson's own."""
    table = bumps(100)[1:]
    lines = []
    for j in range(NUM_BUMPS):
        points = " ".join(
            f"{x + width * k / 99:.0f},{y + height * (1 - table[k, j].item()):.0f}"
            for k in range(0, 100, 3)
        )
        lines.append(f'<polyline points="{points}" fill="none" stroke="{RED}"/>')
    return lines


def page(width: int, height: int, parts: list[str]) -> str:
    heads = "".join(
        f'<marker id="head{color[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="{color}"/></marker>'
        for color in (INK, GREY, BLUE, RED)
    )
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    ground = f'<rect width="{width}" height="{height}" rx="12" fill="#ffffff"/>'
    body = "\n".join([f"<defs>{heads}</defs>", ground, *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{FONT}">\n{body}\n</svg>\n'


def words(x: float, y: float, text: str, color: str = INK, size: int = 15) -> str:
    """A line of text around x; _{...} is a subscript."""
    down, up = f'<tspan dy="4" font-size="{size - 4}">', '<tspan dy="-4">'
    text = re.sub(r"_\{(.*?)\}([^_]*)", rf"{down}\1</tspan>{up}\2</tspan>", text)
    text = text.replace(f"{up}</tspan>", "")
    place = f'x="{x:g}" y="{y:g}" text-anchor="middle"'
    return f'<text {place} fill="{color}" font-size="{size}">{text}</text>'


def box(
    x: float,
    y: float,
    width: float,
    height: float,
    lines: list[str],
    color: str = INK,
    size: int = 13,
) -> str:
    first, gap = y + height / 2 + size / 3, 1.4 * size
    texts = [
        words(x + width / 2, first + gap * (k - (len(lines) - 1) / 2), line, INK, size)
        for k, line in enumerate(lines)
    ]
    frame = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="#f6f8fa"'
    return "".join([f'{frame} stroke="{color}" stroke-width="1.5"/>', *texts])


def circle(x: float, y: float, name: str) -> str:
    shape = f'<circle cx="{x}" cy="{y}" r="28" fill="#f6f8fa" stroke="{INK}" stroke-width="1.5"/>'
    return shape + words(x, y + 5, name, INK, 17)


def arrow(
    x1: float, y1: float, x2: float, y2: float, color: str = GREY, *, dashed: bool = False
) -> str:
    dashes = ' stroke-dasharray="6 4"' if dashed else ""
    ends = f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" marker-end="url(#head{color[1:]})"'
    return f'<line {ends} stroke="{color}" stroke-width="2"{dashes}/>'


if __name__ == "__main__":
    cli.run(main)
