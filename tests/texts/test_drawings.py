"""The SVG drawings of the READMEs: stored as drawn, legible on a dark page, and nothing cut off."""

import importlib
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers import ROOT

MODULES = [f"lesson_{number}.drawings" for number in ("02", "05", "06", "09")]
MODULES.append("lesson_05.class_conditional.geometry")
DRAWN = [(name, file) for name in MODULES for file in importlib.import_module(name).DRAWINGS]
NUMBER = r"-?\d+(?:\.\d+)?"
SVG = "{http://www.w3.org/2000/svg}"


def path_of(module: str, file: str) -> Path:
    return ROOT.joinpath(*module.split(".")[:-1], "figures", file)


def test_every_stored_drawing_is_drawn():
    drawn = {path_of(module, file) for module, file in DRAWN}
    assert drawn == set(ROOT.glob("lesson_*/**/figures/*.svg"))


@pytest.mark.parametrize(("module", "file"), DRAWN)
def test_a_drawing(module, file):
    stored = path_of(module, file).read_text(encoding="utf-8")
    draw = importlib.import_module(module).DRAWINGS[file]
    drawn = draw()
    assert draw() == drawn, "drawing twice gives the same"
    # Another machine may round a number differently.
    assert re.split(NUMBER, stored) == re.split(NUMBER, drawn), "redraw it: make figures"
    numbers = [[float(x) for x in re.findall(NUMBER, text)] for text in (stored, drawn)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.2)
    assert len(stored) < 50_000

    root = ElementTree.fromstring(stored)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    ground = root.find(f"{SVG}rect").attrib
    size = float(ground["width"]), float(ground["height"])
    assert (ground["fill"], *size) == ("#ffffff", width, height), "opaque, for dark pages"
    for text in root.iter(f"{SVG}text"):
        words = "".join(text.itertext())
        assert "_{" not in words, "a subscript that was not set"
        length = 0.6 * float(text.attrib["font-size"]) * len(words)
        before = {"start": 0, "middle": length / 2, "end": length}[text.attrib["text-anchor"]]
        left = float(text.attrib["x"]) - before
        assert 0 < left < left + length < width, words
        assert 10 < float(text.attrib["y"]) < height - 5, words
    for circle in root.iter(f"{SVG}circle"):
        x, y, r = (float(circle.attrib[name]) for name in ("cx", "cy", "r"))
        assert r < x < width - r
        assert r < y < height - r
    for box in root.iter(f"{SVG}rect"):
        assert 0 <= float(box.get("x", 0)) <= width - float(box.attrib["width"])
        assert 0 <= float(box.get("y", 0)) <= height - float(box.attrib["height"])
