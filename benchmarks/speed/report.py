"""The results of bench.py in Markdown."""

from collections.abc import Mapping
from typing import Any

from benchmarks.speed.timing import three_digits


def report(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    lines = [f"Measured in one run: {result['hardware']}; commit {result['commit']}."]
    lines.append(", ".join(f"{name} {number}" for name, number in result["versions"].items()))
    for part in ("training", "sampling"):
        if part in result:
            lines += comparison_lines(f"A step of {part}", result[part])
    for name, figures in result.get("whole", {}).items():
        lines += comparison_lines(f"Samples from noise to image: {name}", figures)
    if "training" in result:
        lines += training_lines(result["training"])
    if "attention" in result:
        lines += ["", "Attention, forward and backward: time of the fused one over lesson 5's:"]
        for what, times in result["attention"].items():
            lines.append(f"- {what}: {times['fused'] / times['written out']:.2f}")
    for part, title, form in (
        ("memory", "Peak memory while training, GB, imported libraries included:", ".2f"),
        ("bookkeeping", "The fraction of lesson 5's training step outside its network:", ".1%"),
    ):
        if part in result:
            lines += ["", title, *(f"- {k}: {format(v, form)}" for k, v in result[part].items())]
    return "\n".join(lines)


def training_lines(figures: Mapping[str, Any]) -> list[str]:
    """The operations of a training step, and how lesson 5's time is spent."""
    lines = ["", "| | parameters | operations per image, in training |", "|---|---|---|"]
    for name, flops in figures["flops_per_image"].items():
        lines.append(f"| {name} | {figures['parameters'][name]:,} | {flops / 1e9:.3g} billion |")
    lines += ["", "Lesson 5's training step reaches this fraction of the matrix product's peak:"]
    reached = figures["share_of_peak"]
    lines += [f"- {precision}: {share:.0%}" for precision, share in reached.items()]
    lines += ["", f"How its time is spent ({figures['quickest']}):"]
    lines += [f"- {kind}: {share:.1%}" for kind, share in figures["spent_on"].items()]
    share, ratio = figures["convolutions_share_of_peak"], figures["ratio_of_convolutions"]
    return [
        *lines,
        "",
        f"Its convolutions reach {share:.0%} of the peak; a step of convolutions alone would be "
        f"{ratio:.2f} times as fast as diffusers'.",
    ]


def comparison_lines(title: str, figures: Mapping[str, Any]) -> list[str]:
    lines = ["", title, "", "| | images/s |", "|---|---|"]
    speeds = figures["images_per_second"]
    lines += [f"| {name} | {three_digits(speed)} |" for name, speed in speeds.items()]
    lines += ["", "| speed of lesson 5 relative to | |", "|---|---|"]
    return lines + [f"| {name} | {ratio:.2f} |" for name, ratio in figures["ratio"].items()]
