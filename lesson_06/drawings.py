"""Draw graphs.svg: which image depends on which, in DDPM and in DDIM."""

import math
from collections.abc import Iterable

from common import cli
from common.files import output_folder
from common.options import ScriptOptions
from common.svg import BLUE, GREY, INK, ORANGE, PALE, RED, Drawings, circle, line, page, save, text

NODES = [130 + 125 * k for k in range(5)]  # the x of x_0 ... x_4
RADIUS = 20


def main(options: ScriptOptions = ScriptOptions()) -> None:
    """Draw graphs.svg."""
    save(DRAWINGS, output_folder(options.output_dir, "lesson_06"))


def graphs() -> str:
    """Three rows: DDPM's chain, DDIM's process given x0, and sampling that skips times."""
    return page(760, 530, [*chain(105), *non_markovian(315), *skipping(485)])


def chain(y: float) -> Iterable[str]:
    yield heading(y - 70, "DDPM", "a Markov chain: each image depends on the one before it")
    for k in range(4):
        yield arc(NODES[k], NODES[k + 1], y, 20, BLUE)
        yield arc(NODES[k + 1], NODES[k], y, -20, RED)
    middle = (NODES[1] + NODES[2]) / 2
    yield text(middle, y - 34, "p(x_{t−1} | x_{t})", RED)
    yield text(middle, y + 44, "q(x_{t} | x_{t−1})", BLUE)
    yield from nodes(y, range(5))


def non_markovian(y: float) -> Iterable[str]:
    yield heading(y - 122, "DDIM, defined", "each step depends on x_{0} too: non-Markovian")
    for k in range(4, 1, -1):
        yield arc(NODES[k], NODES[k - 1], y, 0, BLUE)
        yield arc(NODES[0], NODES[k - 1], y, -22 * (k - 1), ORANGE)
    yield arc(NODES[0], NODES[4], y, -98, ORANGE)
    yield text((NODES[2] + NODES[3]) / 2, y + 40, "q_{σ}(x_{s} | x_{t}, x_{0})", BLUE)
    yield text(NODES[3] + 70, y - 78, "q(x_{4} | x_{0})", ORANGE)
    yield from nodes(y, range(5))


def skipping(y: float) -> Iterable[str]:
    rest = "x̂_{0}, the estimate, replaces x_{0}; times are skipped"
    yield heading(y - 92, "DDIM, sampled", rest)
    for later, earlier in ((4, 2), (2, 0)):
        yield arc(NODES[later], NODES[earlier], y, -36, RED)
        words = "√ᾱ_{s} x̂_{0} + k ε̂ + σz" if earlier else "x̂_{0}"
        yield text((NODES[later] + NODES[earlier]) / 2, y - 50, words, RED)
    yield from nodes(y, (0, 2, 4))


def heading(y: float, name: str, rest: str) -> str:
    bold = f'<tspan font-size="17" font-weight="bold">{name}</tspan>'
    return text(30, y, f"{bold}\u2003{rest}", size=15, anchor="start")


def nodes(y: float, used: Iterable[int]) -> Iterable[str]:
    """x_0 ... x_4, those that are not used pale; from the clean image to noise."""
    for k, x in enumerate(NODES):
        yield circle(x, y, RADIUS, f"x_{{{k}}}", INK if k in used else PALE)
    yield text(NODES[0] - 62, y + 5, "image", GREY)
    yield text(NODES[4] + 62, y + 5, "noise", GREY)


def arc(start: float, end: float, y: float, bend: float, colour: str) -> str:
    """An arrow between two nodes, by a quadratic curve whose middle is bend below their line."""
    middle = (start + end) / 2, y + 2 * bend
    (x1, y1), (x2, y2) = (rim((x, y), middle) for x in (start, end))
    return line(f"M{x1:.1f} {y1:.1f}Q{middle[0]:g} {middle[1]:g} {x2:.1f} {y2:.1f}", colour)


def rim(centre: tuple[float, float], towards: tuple[float, float]) -> tuple[float, float]:
    """The point on the circle of a node, and a little outside, in the direction of another."""
    dx, dy = towards[0] - centre[0], towards[1] - centre[1]
    scale = (RADIUS + 3) / math.hypot(dx, dy)
    return centre[0] + scale * dx, centre[1] + scale * dy


DRAWINGS: Drawings = {"graphs.svg": graphs}


if __name__ == "__main__":
    cli.run(main)
