"""Draw chain.svg, the two chains of the lesson, and network.svg, the layers of its network."""

from collections.abc import Iterator

from common import cli
from common.files import output_folder
from common.options import ScriptOptions
from common.svg import (
    BLUE,
    GREY,
    RED,
    Drawings,
    arrow,
    box,
    circle,
    line,
    page,
    save,
    text,
    through,
)
from lesson_02.dpm import bumps


def main(options: ScriptOptions = ScriptOptions()) -> None:
    """Draw chain.svg and network.svg."""
    save(DRAWINGS, output_folder(options.output_dir, "lesson_02"))


def chain() -> str:
    """The forward process q from left to right, and the reverse process p back."""
    places = {80: "x_{0}", 220: "x_{1}", 410: "x_{t−1}", 580: "x_{t}", 770: "x_{T}"}
    parts = [circle(x, 150, 28, name) for x, name in places.items()]
    parts += [text(x, 155, "· · ·", GREY, 20) for x in (315, 675)]
    parts += [
        arrow(left + 25, 130, right - 25, 130, BLUE) for left, right in [(80, 220), (410, 580)]
    ]
    parts += [
        arrow(555, 170, 435, 170, RED),
        arrow(195, 170, 105, 170, dashed=True),
        text(495, 110, "q(x_{t} | x_{t−1})", BLUE, 16),
        text(495, 206, "p(x_{t−1} | x_{t})", RED, 16),
        text(150, 110, "q(x_{1} | x_{0})", BLUE, 16),
        text(150, 206, "p(x_{0} | x_{1})", GREY, 16),
        text(430, 38, "Forward process q: fixed, adds Gaussian noise of variance β_{t}", BLUE, 17),
        text(430, 278, "Reverse process p: a learned Gaussian for t = T, ..., 2", RED, 17),
        text(150, 229, "not learned, left out", GREY, 13),
        text(150, 246, "when sampling", GREY, 13),
        text(80, 84, "data, variance 1", size=13),
        text(770, 84, "noise: π = N(0, 1)", size=13),
        text(770, 229, "sampling starts here", size=13),
    ]
    return page(860, 302, parts)


def network() -> str:
    """The layers of ConvDense, in the size of configs/laptop.yaml."""
    parts = [
        box(15, 165, 110, 70, "image x_{t}", "1 × 28 × 28"),
        arrow(125, 185, 165, 122),
        arrow(125, 215, 165, 303),
        box(165, 45, 320, 155, edge=BLUE),
        text(325, 33, "4 multi-scale convolutions", BLUE, 15),
        box(365, 90, 105, 65, "add, then", "leaky ReLU", edge=GREY),
        box(165, 262, 320, 82, "4 dense layers", "784 → 500 → 500 → 500 → 2 · 784", edge=BLUE),
        text(325, 366, "they see the whole image", GREY, 13),
        box(560, 150, 130, 110, "the same for", "every pixel:", "34 → 32 → 20", edge=BLUE),
        text(625, 138, "readout", BLUE, 15),
        arrow(485, 122, 560, 178),
        text(530, 108, "32 × 28 × 28", GREY, 12),
        arrow(485, 303, 560, 232),
        text(543, 318, "2 × 28 × 28", GREY, 12),
        arrow(690, 205, 765, 205),
        text(727, 196, "10 + 10", GREY, 12),
        text(727, 284, "coefficients y_{j} for μ", GREY, 12),
        text(727, 300, "and for b of every pixel", GREY, 12),
        box(765, 160, 110, 90, "Σ_{j} y_{j} g_{j}(t)", edge=RED),
        arrow(875, 190, 915, 165),
        arrow(875, 220, 915, 245),
        box(915, 135, 60, 50, "μ", edge=RED),
        box(915, 225, 60, 50, "b", edge=RED),
        *curves(750, 45, 140, 55),
        text(820, 33, "ten bumps g_{j}(t)", RED, 15),
        text(820, 116, "t from 1 to T", GREY, 12),
        arrow(820, 124, 820, 160, RED),
        text(835, 340, "The time t enters only through the", RED),
        text(835, 360, "bumps: no layer gets it as an input.", RED),
    ]
    rows = ["28²: 3 × 3", "14²: ÷ 2, 3 × 3, × 2", "7²: ÷ 4, 3 × 3, × 4"]
    for k, words in enumerate(rows):
        parts.append(box(177, 55 + 48 * k, 152, 38, words, edge=GREY))
        parts.append(arrow(329, 74 + 48 * k, 365, 108 + 14 * k))
    return page(990, 384, parts)


def curves(x: float, y: float, width: float, height: float) -> Iterator[str]:
    """The bumps over the time, drawn from the lesson's own."""
    for bump in bumps(100).T[:, 1:].tolist():
        points = ((x + width * k / 99, y + height * (1 - g)) for k, g in enumerate(bump))
        yield line(through(points), RED, head=False, width=1)


DRAWINGS: Drawings = {"chain.svg": chain, "network.svg": network}


if __name__ == "__main__":
    cli.run(main)
