"""The scoreboard: its rows, what it reports, and what it stores."""

import json

from benchmarks.quality import scoreboard
from benchmarks.records import read_json, write_json
from common import cli, lessons

import pytest
from helpers import ROOT, error_line


def test_every_row_has_a_checkpoint_that_its_sampler_can_sample():
    assert len(scoreboard.ROWS) == 20
    methods = {"ddpm": "sample", "ddim": "predict_x0", "strided": "strided"}
    for name, row in scoreboard.ROWS.items():
        process, model, content = lessons.load(str(ROOT / row.checkpoint))
        assert content.dataset == "mnist"
        assert hasattr(process, methods[row.sampler]), name
        if row.guidance != 1:
            assert hasattr(model, "bind"), name


def test_the_stored_results_are_of_the_shipped_checkpoints():
    """The metrics of a row are those of the file that is shipped, by its sum."""
    from benchmarks.quality import classifier
    from common.files import file_sha256

    results = read_json(scoreboard.STORED / "results.json")
    assert list(results) == [*scoreboard.ROWS, scoreboard.REAL]
    for name, row in scoreboard.ROWS.items():
        assert results[name]["checkpoint_sha256"] == file_sha256(ROOT / row.checkpoint), name
    assert {result["classifier_sha256"] for result in results.values()} == {classifier.SHA256}


@pytest.fixture
def board(monkeypatch, tmp_path, digits, reference):
    """The scoreboard on scikit-learn's digits, with a temporary folder for stored results."""
    monkeypatch.setattr(scoreboard, "load_images", lambda *_: digits)
    monkeypatch.setattr(scoreboard, "Reference", lambda *_: reference)
    monkeypatch.setattr(scoreboard, "STORED", tmp_path / "stored")

    def run(*words: str) -> str:
        flags = ["--num_samples", "66", "--num_images", "0", "--device", "cpu"]
        folder = tmp_path / "rows"
        cli.run(scoreboard.main, [*flags, "--output_dir", str(folder), *words])
        return (folder / "table.md").read_text()

    return run


def test_rows_are_measured_and_compared_with_the_stored_ones(board, capsys, tmp_path, monkeypatch):
    rows = ("--rows", "real", "ddim_10", "vlb_10")
    monkeypatch.setitem(
        scoreboard.ROWS, "vlb_10", scoreboard.ROWS["vlb_10"]._replace(checkpoint="missing")
    )
    table = board(*rows)
    out = capsys.readouterr().out
    assert "there is no stored result to compare with" in out
    assert "skipped: there is no missing" in out
    header, _, real, ddim, *rest = table.splitlines()
    assert header.count("|") == real.count("|") == ddim.count("|")
    assert "real training images" in real
    assert "DDPM, sampled by DDIM" in ddim
    assert "Not measured:" in rest[-1]
    assert "vlb_10" in rest[-1]
    for name in ("real", "ddim_10"):
        assert (tmp_path / "rows" / name / "strip.png").exists()

    stored = json.loads((tmp_path / "rows" / "results.json").read_text())
    (tmp_path / "stored").mkdir()
    write_json(tmp_path / "stored" / "results.json", stored)
    assert board(*rows) == table
    out = capsys.readouterr().out
    assert out.count("as stored") == 2
    assert "measured before" in out

    stored["ddim_10"]["fid"] *= 1.1
    write_json(tmp_path / "stored" / "results.json", stored)
    board(*rows)
    assert "moved: fid from" in capsys.readouterr().out
    board("--rows", "ddim_10", "--fresh", "true")
    assert "measured before" not in capsys.readouterr().out


def test_the_table_is_stored_in_the_readme_between_its_markers(board, tmp_path, monkeypatch):
    monkeypatch.setattr(scoreboard, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- scoreboard -->\nold\n<!-- /scoreboard -->\nafter\n")
    board("--rows", "real")
    measured = json.loads((tmp_path / "rows" / "results.json").read_text())["real"]
    (tmp_path / "stored").mkdir()
    write_json(tmp_path / "stored" / "results.json", {"ddim_10": measured})
    board("--rows", "real", "--store", "true")
    text = readme.read_text()
    assert text.startswith("before\n<!-- scoreboard -->\n| model |")
    assert text.endswith("<!-- /scoreboard -->\nafter\n")
    assert "old" not in text
    assert "benchmarks/scoreboard/real.png" in text
    assert (tmp_path / "stored" / "real.png").exists()
    # A row that was not measured this time stays.
    assert list(read_json(tmp_path / "stored" / "results.json")) == ["ddim_10", "real"]
    assert "sampled by DDIM" in text


def test_the_readme_has_a_place_for_the_table():
    text = (ROOT / "README.md").read_text()
    first, last = (text.index(marker) for marker in scoreboard.MARKERS)
    assert first < last


def test_an_unknown_row_is_refused(capsys):
    error = error_line(capsys, scoreboard.main, "--rows", "ddim_11")
    assert "row ddim_11 is not known: choose from dpm, ddpm" in error
