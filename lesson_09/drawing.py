"""Draw gradients.svg: what the two terms of L_hybrid train.

The drawing has its own light background, so that it is legible on a dark page, too.
"""

from common import cli
from common.files import output_folder

INK, GREY, BLUE, RED = "#1f2328", "#6e7781", "#0a58ca", "#c4320a"
WIDTH, HEIGHT = 860, 400
STYLE = "font-family: DejaVu Sans, Verdana, sans-serif; font-size: 15px"


def main(output_dir: str | None = None) -> None:
    """Draw gradients.svg.

    Args:
        output_dir: folder of the drawing; output/ beside this file unless given.
    """
    path = output_folder(output_dir, "lesson_09") / "gradients.svg"
    path.write_text(gradients(), encoding="utf-8")
    print(path)


def gradients() -> str:
    """The forward pass of L_hybrid in grey, and the gradient of each term in colour."""
    parts = [
        box(20, 165, 90, 60, ["x_t,  t"]),
        box(160, 155, 130, 80, ["shared", "layers"]),
        box(360, 85, 70, 50, ["ε̂"]),
        box(360, 265, 70, 50, ["v"]),
        box(520, 175, 120, 50, ["mean μ"]),
        box(520, 265, 120, 50, ["variance σ²"]),
        box(710, 75, 135, 70, ["L_simple", "|ε − ε̂|²"], BLUE),
        box(710, 195, 135, 90, ["λ L_vlb", "KL to the true", "reverse step"], RED),
        arrow(110, 195, 160, 195, GREY),
        arrow(290, 178, 360, 118, GREY),
        arrow(290, 212, 360, 282, GREY),
        arrow(430, 104, 710, 104, GREY),
        arrow(430, 124, 520, 188, GREY),
        arrow(430, 284, 520, 284, GREY),
        arrow(640, 200, 710, 220, GREY),
        arrow(640, 284, 710, 262, GREY),
        arrow(580, 352, 580, 315, GREY),
        words(580, 370, "log β̃ and log β", GREY),
        # The gradients run backwards, beside the arrows of the forward pass.
        arrow(710, 118, 430, 118, BLUE, dashed=True),
        arrow(360, 104, 284, 155, BLUE, dashed=True),
        arrow(710, 276, 640, 300, RED, dashed=True),
        arrow(520, 300, 430, 300, RED, dashed=True),
        arrow(360, 298, 284, 235, RED, dashed=True),
        # The cut between ε̂ and the mean.
        line(462, 172, 490, 140, RED, 5),
        words(512, 143, "stop-gradient:", RED, 13, "start"),
        words(512, 160, "eps_hat.detach()", RED, 13, "start"),
        words(WIDTH / 2, 32, "Which term of L_hybrid trains what", INK, 17),
        line(30, 330, 70, 330, GREY, 2),
        words(78, 335, "forward", GREY, 13, "start"),
        line(30, 352, 70, 352, BLUE, 2, dashed=True),
        words(78, 357, "gradient of L_simple", BLUE, 13, "start"),
        line(30, 374, 70, 374, RED, 2, dashed=True),
        words(78, 379, "gradient of λ L_vlb", RED, 13, "start"),
    ]
    heads = "".join(
        f'<marker id="{name(color)}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="{color}"/></marker>'
        for color in (GREY, BLUE, RED)
    )
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#ffffff"/>'
    body = "\n".join([f"<defs>{heads}</defs>", ground, *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{STYLE}">\n{body}\n</svg>\n'


def name(color: str) -> str:
    return f"head{color[1:]}"


def box(x: int, y: int, width: int, height: int, lines: list[str], color: str = INK) -> str:
    first = y + height / 2 + 5 - 10 * (len(lines) - 1)
    texts = [words(x + width / 2, first + 20 * k, line, color) for k, line in enumerate(lines)]
    frame = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="#f6f8fa"'
    return "".join([f'{frame} stroke="{color}" stroke-width="1.5"/>', *texts])


def words(
    x: float, y: float, text: str, color: str = INK, size: int = 15, anchor: str = "middle"
) -> str:
    """A line of text; _x is set as a subscript."""
    before, _, rest = text.partition("_")
    sub, gap, after = rest.partition(",") if "," in rest else rest.partition(" ")
    if rest and "(" not in rest:
        text = f'{before}<tspan dy="4" font-size="{size - 4}">{sub}</tspan>'
        text += f'<tspan dy="-4">{gap}{after}</tspan>' if gap else ""
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" xml:space="preserve"'
    return f'<text {place} fill="{color}" style="font-size: {size}px">{text}</text>'


def line(
    x1: int, y1: int, x2: int, y2: int, color: str, width: float, *, dashed: bool = False
) -> str:
    dashes = ' stroke-dasharray="6 4"' if dashed else ""
    ends = f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'
    return f'<line {ends} stroke="{color}" stroke-width="{width}"{dashes}/>'


def arrow(x1: int, y1: int, x2: int, y2: int, color: str, *, dashed: bool = False) -> str:
    plain = line(x1, y1, x2, y2, color, 2, dashed=dashed)
    return plain.replace("/>", f' marker-end="url(#{name(color)})"/>')


if __name__ == "__main__":
    cli.run(main)
