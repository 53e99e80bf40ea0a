"""The page that denoises digits in the browser: that the built file is what its sources give.

What its JavaScript computes is compared with PyTorch by `make demo-test`, which needs node.
"""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from common.errors import UserError
from lesson_05.class_conditional.sample_mnist import SHIPPED, load
from lesson_06.demo import build

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import ROOT

PAGE = build.OUTPUT.read_text(encoding="utf-8")
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in build.FOLDER.glob("*.js")}


def part(name: str) -> str:
    """The content of the script with this id."""
    return re.search(rf'<script[^>]* id="{name}">(.*?)</script>', PAGE, re.DOTALL)[1]


def test_the_committed_page_is_what_the_build_gives(tmp_path):
    build.main(str(tmp_path / "demo.html"))
    same = (tmp_path / "demo.html").read_text(encoding="utf-8") == PAGE
    assert same, "python lesson_06/demo/build.py, or make demo, writes it"


def test_the_page_is_small_and_needs_nothing_else():
    assert len(PAGE.encode()) <= 4_000_000
    text = PAGE.replace(part("checkpoint"), "")
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,"]
    for word in ("http:", "https:", "fetch(", "import(", "importScripts", "@import", "url("):
        assert word not in text, word


def test_the_weights_are_the_checkpoint():
    weights = safetensors.torch.load(base64.b64decode(part("checkpoint")))
    _, model, _ = load(SHIPPED)
    state = model.state_dict()
    assert {f"ema.{name}" for name in state} == weights.keys()
    for name, weight in state.items():
        assert torch.equal(weights[f"ema.{name}"].float(), weight), name


def test_the_table_is_the_process():
    process, _, _ = load(SHIPPED)
    alpha_bar = np.frombuffer(base64.b64decode(part("alpha-bar")), "<f8")
    assert np.array_equal(alpha_bar, process.alpha_bar.numpy())


def test_the_digits_are_the_first_test_image_of_each_class(real_mnist):
    digits = np.frombuffer(base64.b64decode(part("digits")), np.uint8).reshape(10, 28, 28)
    for digit, image in enumerate(digits):
        first = (real_mnist.test_labels == digit).nonzero()[0]
        assert np.array_equal(image, real_mnist.test[first, 0][0].numpy())


def test_the_lines_of_python_are_where_the_page_says():
    mirrors = json.loads(part("mirrors"))
    assert len(mirrors) > 20
    for name, mirror in mirrors.items():
        line = (ROOT / mirror["file"]).read_text(encoding="utf-8").splitlines()[mirror["line"] - 1]
        assert line.strip() == mirror["code"], name


@pytest.mark.parametrize("panel", ["steps", "digit", "between", "breaking", "losses"])
def test_every_panel_names_lines_of_python(panel):
    named = re.findall(r'(?:mirror|gone): (?:[^"\n]*\? )?"(\w+)"', SOURCES[f"{panel}.js"])
    assert len(named) >= 2
    assert set(named) <= json.loads(part("mirrors")).keys()


def test_every_line_of_python_is_shown():
    scripts = "".join(SOURCES.values())
    assert [name for name in json.loads(part("mirrors")) if f'"{name}"' not in scripts] == []


def test_a_line_of_python_that_has_changed_stops_the_build():
    with pytest.raises(UserError, match=r"0 lines of lesson_06/ddim\.py are 'x0 = nothing'"):
        build.find_line("lesson_06/ddim.py", "x0 = nothing")
    with pytest.raises(UserError, match=r"[2-9] lines of lesson_06/ddim\.py"):
        build.find_line("lesson_06/ddim.py", "@torch.no_grad()")


def test_modules_must_not_share_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    (tmp_path / "a.js").write_text('import { f } from "./b.js";\n\nconst size = f();\n')
    (tmp_path / "b.js").write_text("export function f() {\n  return 1;\n}\n")
    assert build.bundle("a.js") == "function f() {\n  return 1;\n}\n\n\nconst size = f();\n"
    (tmp_path / "b.js").write_text("export function f() {}\nconst size = 2;\n")
    with pytest.raises(UserError, match=r"a\.js and its imports define size twice"):
        build.bundle("a.js")


class Fields(HTMLParser):
    """The ids of the fields of a page, and those that labels are for."""

    def __init__(self) -> None:
        super().__init__()
        self.fields: set[str] = set()
        self.labelled: set[str] = set()
        self.inside = 0  # labels around the current place

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag == "label":
            self.inside += 1
            self.labelled.add(values.get("for") or "")
        if tag in ("input", "select") and not self.inside:
            self.fields.add(values.get("id") or "without an id")

    def handle_endtag(self, tag: str) -> None:
        self.inside -= tag == "label"


def test_every_field_has_a_label():
    fields = Fields()
    fields.feed((build.FOLDER / "index.html").read_text(encoding="utf-8"))
    assert len(fields.fields) > 20
    assert fields.fields <= fields.labelled


def test_the_style_has_no_small_text_and_both_schemes():
    style = (build.FOLDER / "style.css").read_text(encoding="utf-8")
    sizes = [int(size) for size in re.findall(r"font(?:-size)?:[^;]*?(\d+)px", style)]
    assert len(sizes) > 10
    assert min(sizes) >= 14
    assert "prefers-color-scheme: dark" in style
    assert "prefers-reduced-motion" in style
    assert "prefers-reduced-motion" in SOURCES["denoise.js"]


def test_the_picture_is_small():
    picture = Path(build.FOLDER / "screenshot.png")
    assert 0 < picture.stat().st_size < 200_000
