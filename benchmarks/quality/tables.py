"""The scoreboard's tables and its picture, from its results alone."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.evaluate import cell, columns, plus_minus, real_error
from benchmarks.quality.rows import ETAS, NOISE, REAL, ROWS, STEPS, STRIPS, is_in_readme
from common.pictures import new_figure

Result = Mapping[str, Any]
Results = Mapping[str, Result]
CIFAR10 = {  # Table 1 of Song et al. 2021, FID at S = 10, 20, 50, 100
    "": (13.36, 6.84, 4.67, 4.16),
    "_eta_0.5": (16.66, 8.35, 5.25, 4.46),
    "_eta_1": (41.07, 18.36, 8.01, 5.78),
    "_sigma_hat": (367.43, 133.37, 32.72, 9.99),
}


def markdown(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:], ""]


def sample_tables(results: Results, short: bool) -> str:
    """A table for each number of samples: FID, precision and recall depend on it. The last line of
    each is that of as many real images. short: only the rows that the README shows."""
    lines: list[str] = []
    counts = {result["num_samples"] for result in results.values()}
    for count in sorted(counts, reverse=True):
        chosen = {n: r for n, r in results.items() if r["num_samples"] == count}
        # Real images drawn at random, if there is a row that is compared with these.
        free = [r["real"] for n, r in chosen.items() if n == REAL or r["guidance"] is None]
        real = [*free, *(r["real"] for r in chosen.values())][0]
        names = [n for n in chosen if n != REAL and not (short and not is_in_readme(n))]
        rows = [[label(n), *cells(chosen[n])] for n in names]
        as_result = {**real, "real": real, "network_calls": None, "bits_per_dim": None}
        as_result |= {"fid_error": real_error(real), "num_samples": count * max(real["draws"], 1)}
        real_cells = cells(as_result)
        real_cells[3] = "1"  # the ratio to itself has no error
        head = ["model and sampler", "network calls", "FID", "real", "ratio", "sure", "as asked"]
        lines += [f"{count:,} samples a row, on which FID, precision and recall depend:", ""]
        lines += markdown(
            [*head, "precision, recall"], [*rows, ["real training images", *real_cells]]
        )
    missing = [n for n in ROWS if n not in results and not (short and not is_in_readme(n))]
    return "\n".join(lines + ([f"Not measured: {', '.join(missing)}.", ""] if missing else []))


def cells(result: Result) -> list[str]:
    row = columns(result)
    names = ["network calls", "FID", "real", "ratio", "sure", "as asked"]
    return [*(row[name] for name in names), f"{row['precision']}, {row['recall']}"]


def label(name: str) -> str:
    return f"{ROWS[name].network}: {ROWS[name].method}"


def likelihoods(results: Results) -> dict[str, Result]:
    """By checkpoint, a result with the bound on all of its steps; any other where there is none."""
    found: dict[str, Result] = {}
    for name in sorted(results, key=lambda name: results[name]["bits_per_dim"] is None):
        if name in ROWS:
            found.setdefault(ROWS[name].checkpoint, results[name])
    return found


def likelihood_table(results: Results) -> str:
    """A row for each network: its size, what it was trained on, and its bound."""
    rows, found = [], likelihoods(results)
    for checkpoint in dict.fromkeys(row.checkpoint for row in ROWS.values()):
        if checkpoint not in found:
            continue
        result = found[checkpoint]
        network = next(row.network for row in ROWS.values() if row.checkpoint == checkpoint)
        images, bits = result["training_images"], result["bits_per_dim"] or {}
        bounds = [
            plus_minus(*bits[part].values()) if part in bits else ""
            for part in ("total", "kl", "decoder")
        ]
        bounds.insert(1, f"{bits['prior']['mean']:.1g}" if "prior" in bits else "")  # nearly 0
        seen = f"{images:,}" if images else ""
        rows.append([network, f"{result['parameters']:,}", seen, *bounds])
    bits = next((r["bits_per_dim"] for r in found.values() if r["bits_per_dim"]), None)
    note = "The bound on {num_images:,} test images drawn at random, in bits per dimension, "
    note += "{num_terms:,} of its terms drawn for each image:"
    lines = [note.format(**bits), ""] if bits else []
    head = ["network", "parameters", "images trained on", "bits/dim", "prior", "KL", "decoder"]
    return "\n".join(lines + markdown(head, rows))


def strips(results: Results, folder: str) -> str:
    """The first ten samples of a few rows."""
    rows = [
        ["real images" if n == REAL else label(n), cell(results[n]["network_calls"], ","), picture]
        for n in STRIPS
        if n in results
        for picture in [f"![ten samples]({folder}/{n}.png)"]
    ]
    return "\n".join(markdown(["", "network calls", "the first ten samples"], rows))


def grid(results: Results, names: Mapping[str, str], paper: Mapping[str, Iterable[float]]) -> str:
    """FID by S, a line for each of the names, in which {} stands for S. paper: by the same labels,
    the paper's own figures, in parentheses."""
    steps, rows = sorted(STEPS), []
    for text, pattern in names.items():
        line = [results.get(pattern.format(S)) for S in steps]
        figures = [plus_minus(r["fid"], r["fid_error"]) if r else "" for r in line]
        theirs = [f" ({value:g})" for value in paper.get(text, ())] or [""] * len(steps)
        rows.append([text, *(a + b for a, b in zip(figures, theirs, strict=True))])
    free = [r["real"] for r in results.values() if r["num_samples"] == 2000 and not r["guidance"]]
    real = free and f" Real images: {plus_minus(free[0]['fid'], real_error(free[0]))}."
    note = ["FID of 2,000 samples ± one standard error, by $S$." + (real or ""), ""]
    return "\n".join(note + markdown(["$S$", *map(str, steps)], rows))


def eta_table(results: Results) -> str:
    """Table 1 of Song et al. 2021 for the network of lesson 5, for lesson 6's README."""
    names = {ROWS[f"ddim_10{end}"].method[6:]: f"ddim_{{}}{end}" for end in ETAS}
    paper = {ROWS[f"ddim_10{end}"].method[6:]: CIFAR10[end] for end in ETAS}
    text = grid(results, names, paper)
    return f"{text}\nIn parentheses: CIFAR-10, Song et al. 2021, Table 1, with 20 in place of 25.\n"


def variance_table(results: Results) -> str:
    """The variances of the strided steps, and DDIM, for lesson 9's README."""
    names = {f"L_hybrid, {NOISE['learned']}": "hybrid_{}"}
    names |= {f"L_hybrid, {NOISE[v]}": f"hybrid_{{}}_{v}" for v in ("beta_tilde", "beta")}
    names |= {f"L_vlb, {NOISE['learned']}": "vlb_{}"}
    names |= {f"lesson 5, {NOISE[v]}": f"ddpm_{{}}_{v}" for v in ("beta_tilde", "beta")}
    return grid(results, names | {"lesson 5, by DDIM": "ddim_{}"}, {})


PANELS = ("DDPM (lesson 5)", "IDDPM (lesson 9)", "Others")


def panel(name: str) -> int:
    """The part of the picture that shows the row."""
    network = ROWS[name].network
    return 0 if network == "DDPM" else 1 if network.startswith("IDDPM") else 2


def save_picture(path: Path, results: Results) -> None:
    """FID against the calls of the network, both logarithmic. Rows of fewer samples than most have
    hollow marks, and a line of real images of their own: FID falls as samples grow in number."""
    figure = new_figure(10.5, 5.4)
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    count = max(result["num_samples"] for result in results.values())
    series: dict[str, list[str]] = {}
    for name in (n for n in results if n != REAL):
        text = label(name) if panel(name) else ROWS[name].method
        series.setdefault(text.replace("all steps", "strides"), []).append(name)
    for text, names in series.items():
        part = axes[panel(names[0])]
        color = f"C{len({c.get_label() for c in part.containers})}"
        for full in (True, False):
            rows = [results[n] for n in names if (results[n]["num_samples"] == count) == full]
            rows.sort(key=lambda row: row["network_calls"])
            xs, ys, errors = ([r[k] for r in rows] for k in ("network_calls", "fid", "fid_error"))
            style = {"color": color, "capsize": 2, "linewidth": 1.2, "markersize": 4.5}
            style |= {"fmt": "o-"} if full else {"fmt": "o", "markerfacecolor": "white"}
            if rows:
                part.errorbar(xs, ys, errors, label=text.removesuffix(": strides"), **style)
    sizes = {result["num_samples"]: result["real"]["fid"] for result in results.values()}
    for part, title in zip(axes, PANELS, strict=True):
        for size, real in sizes.items():
            dashes = "--" if size == count else ":"
            part.axhline(real, color="black", linestyle=dashes, label=f"{size:,} real images")
        part.set(xscale="log", yscale="log", xlabel="calls of the network")
        part.set_xticks([10, 25, 50, 100, 200, 1000], ["10", "25", "50", "100", "200", "1,000"])
        part.minorticks_off()
        part.set_title(title, fontsize=10, loc="left")
        part.grid(alpha=0.3)
        lines: dict[str, Any] = {}
        for line, text in zip(*part.get_legend_handles_labels(), strict=True):
            lines.setdefault(text.removeprefix("IDDPM, "), line)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "frameon": False}
        part.legend(lines.values(), lines.keys(), fontsize=7.5, **place)
    few = ", ".join(f"{size:,}" for size in sizes if size != count)
    axes[0].set_ylabel(f"FID of {count:,} samples" + (f" (hollow: {few})" if few else ""))
    axes[0].yaxis.set_major_formatter("{x:g}")
    figure.savefig(path, dpi=110, facecolor="white")
