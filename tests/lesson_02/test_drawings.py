"""The drawings of lesson 2's README."""

from xml.etree import ElementTree

from lesson_02 import drawings

import pytest
from helpers import ROOT


@pytest.mark.parametrize("name", list(drawings.drawings()))
def test_a_stored_drawing_is_what_the_code_draws(name):
    stored = (ROOT / "lesson_02" / "figures" / name).read_text(encoding="utf-8")
    assert stored == drawings.drawings()[name]


@pytest.mark.parametrize("name", list(drawings.drawings()))
def test_a_drawing_has_a_light_ground_and_all_within_it(name):
    """So it is legible on a dark page, too."""
    root = ElementTree.fromstring(drawings.drawings()[name])
    width, height = int(root.attrib["width"]), int(root.attrib["height"])
    ground = next(e for e in root if e.tag.endswith("rect"))
    assert (ground.attrib["fill"], ground.attrib["width"]) == ("#ffffff", str(width))
    texts = [e for e in root.iter() if e.tag.endswith("text")]
    assert len(texts) > 10
    for text in texts:
        half = len("".join(text.itertext())) * 0.3 * float(text.attrib["font-size"])
        assert half <= float(text.attrib["x"]) <= width - half, "".join(text.itertext())
        assert 10 < float(text.attrib["y"]) < height
