"""The scoreboard: its rows, what it reports, and what it stores."""

import json

from benchmarks.quality import scoreboard, tables
from benchmarks.quality.rows import ROWS, STRIPS, Row, is_in_readme, plan_options
from benchmarks.quality.samples import SamplePlan
from benchmarks.records import read_json, write_json
from common import cli

import pytest
from helpers import ROOT, error_line
from matplotlib.axes import Axes
from PIL import Image


def test_every_row_has_a_checkpoint_that_its_sampler_can_sample():
    assert len(ROWS) == 32
    settings = set()
    for row in ROWS.values():
        plan = SamplePlan(str(ROOT / row.checkpoint), plan_options(row))
        assert plan.content.dataset == "mnist"
        assert plan.num_samples == (2000 if plan.num_steps <= 100 else 500)
        assert plan.network_calls == plan.num_steps * (1 if row.guidance == 1 else 2)
        settings.add(json.dumps(plan.settings()))
    assert len(settings) == len(ROWS)  # no two rows are the same measurement


def test_rows_have_names_and_labels_that_tell_them_apart():
    for S in (10, 25, 50, 100):
        names = "ddim_{0} ddim_{0}_eta_0.5 ddim_{0}_eta_1 ddim_{0}_sigma_hat hybrid_{0} "
        if S == 10:
            names += "ddpm_{0}_beta_tilde ddpm_{0}_beta hybrid_{0}_beta_tilde hybrid_{0}_beta"
        for name in names.format(S).split():
            assert ROWS[name].num_steps == S
    labels = [(tables.label(name), row.num_steps) for name, row in ROWS.items()]
    assert len(set(labels)) == len(labels)
    assert tables.label("ddim_10_sigma_hat") == "DDPM: DDIM, σ̂"
    assert tables.label("ddpm_10_beta_tilde") == "DDPM: strides, β̃"
    assert tables.label("classes_guided") == "DDPM with labels: DDIM, η = 0, guidance 2"
    assert set(STRIPS) <= {*ROWS, scoreboard.REAL}


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
    rows = ("--rows", "real", "ddim_10", "ddim_10_eta_0.5", "vlb_25")
    monkeypatch.setitem(ROWS, "vlb_25", ROWS["vlb_25"]._replace(checkpoint="missing"))
    table = board(*rows)
    out = capsys.readouterr().out
    assert "there is no stored result to compare with" in out
    assert "skipped: there is no missing" in out
    lines = [line for line in table.splitlines() if line.startswith("|")]
    header, _, ddim, half, real, *networks = lines
    assert header.count("|") == real.count("|") == ddim.count("|") == 9  # eight columns
    assert "66 samples a row" in table
    assert ddim.startswith("| DDPM: DDIM, η = 0 | 10 | ")
    assert half.startswith("| DDPM: DDIM, η = 0.5 | 10 | ")
    assert " ± " in ddim
    assert real.startswith("| real training images |  | ")
    assert networks[0].startswith("| network | parameters | images trained on | bits/dim |")
    assert "Not measured:" in table
    assert ", vlb_25." in table
    assert (tmp_path / "rows" / "fid.png").stat().st_size > 0
    for name in ("real", "ddim_10"):
        assert (tmp_path / "rows" / name / "strip.png").exists()

    stored = json.loads((tmp_path / "rows" / "results.json").read_text())
    (tmp_path / "stored").mkdir()
    write_json(tmp_path / "stored" / "results.json", stored)
    assert board(*rows) == table
    out = capsys.readouterr().out
    assert out.count("as stored") == 3
    assert "measured before" in out

    stored["ddim_10"]["fid"] *= 1.1
    write_json(tmp_path / "stored" / "results.json", stored)
    board(*rows)
    assert "moved: fid from" in capsys.readouterr().out
    board("--rows", "ddim_10", "--fresh", "true")
    assert "measured before" not in capsys.readouterr().out


def test_the_tables_are_stored_in_the_readmes_between_their_markers(board, tmp_path, monkeypatch):
    monkeypatch.setattr(scoreboard, "ROOT", tmp_path)
    places = {"scoreboard": tmp_path / "README.md", "eta_table": tmp_path / "lesson_06/README.md"}
    for name, readme in places.items():
        readme.parent.mkdir(exist_ok=True)
        readme.write_text(f"before\n<!-- {name} -->\nold\n<!-- /{name} -->\nafter\n")
    unmarked = tmp_path / "lesson_09" / "README.md"  # has no place for its table: it stays
    unmarked.parent.mkdir()
    unmarked.write_text("no markers\n")
    board("--rows", "real")
    results = made_up_results()
    old = {"ddim_50": {"fid": 1.0}}  # as older code stored it
    (tmp_path / "stored").mkdir()
    write_json(tmp_path / "stored" / "results.json", {"ddim_10": results["ddim_10"], **old})
    (tmp_path / "stored" / "ddim_20.png").touch()  # of a row that is gone
    board("--rows", "real", "--store", "true")
    assert {path.stem for path in (tmp_path / "stored").glob("*.png")} == {"real", "fid"}
    for name, readme in places.items():
        text = readme.read_text()
        assert text.startswith(f"before\n<!-- {name} -->\n")
        assert text.endswith(f"<!-- /{name} -->\nafter\n")
        assert "old" not in text
    assert unmarked.read_text() == "no markers\n"
    text = places["scoreboard"].read_text()
    assert "benchmarks/scoreboard/real.png" in text
    assert "(benchmarks/scoreboard/fid.png)" in text
    assert (tmp_path / "stored" / "real.png").exists()
    # A row that was not measured this time stays.
    assert list(read_json(tmp_path / "stored" / "results.json")) == ["ddim_10", "real"]
    assert "DDIM, η = 0" in text


def test_everything_is_made_of_the_stored_results_alone(board, tmp_path, monkeypatch):
    monkeypatch.setattr(scoreboard, "Reference", None)  # nothing is measured
    monkeypatch.setattr(scoreboard, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("<!-- scoreboard --><!-- /scoreboard -->")
    (tmp_path / "stored").mkdir()
    results = made_up_results()
    write_json(tmp_path / "stored" / "results.json", results)
    table = board("--rows", "none", "--store", "true")
    assert table == (tmp_path / "stored" / "table.md").read_text()
    assert "Not measured" not in table
    assert (tmp_path / "stored" / "fid.png").read_bytes().startswith(b"\x89PNG")
    assert read_json(tmp_path / "stored" / "results.json") == results


def made_up(name: str, row: Row) -> dict:
    """Figures of the right kinds, the FID a function of the row."""
    count = 2000 if (row.num_steps or 1000) <= 100 else 500
    real = {"fid": 32 / count, "fid_error": 8 / count, "fid_deviation": 9 / count, "draws": 20}
    real |= {"share_sure": 0.99, "agreement": 0.99, "precision": 0.86, "recall": 0.87}
    real |= {"judge_typical": 0.95, "class_balance_bits": 3.3, "nearest_median": 4.3}
    bound = {"total": {"mean": 1.25, "standard_error": 0.004}, "num_images": 1000, "num_terms": 50}
    result = {**real, "real": real, "fid": 3 / (row.num_steps or 1000) + row.eta, "fid_error": 0.01}
    result |= {"num_samples": count, "network_calls": (row.num_steps or 1000), "parameters": 1234}
    result |= {"guidance": 1.0 if "with" in row.network else None, "training_images": 1_024_000}
    return result | {"bits_per_dim": bound if (row.num_steps or 1000) == 1000 else None}


def made_up_results() -> dict[str, dict]:
    results = {name: made_up(name, row) for name, row in ROWS.items()}
    return results | {"real": made_up("real", Row("", "", "ddim", 100)) | {"network_calls": None}}


def test_a_table_holds_rows_of_one_number_of_samples_only():
    """So that no ratio and no precision is beside one of another size."""
    results = made_up_results()
    for short in (False, True):
        text = tables.sample_tables(results, short)
        first, second = text.split("500 samples a row")
        assert "2,000 samples a row" in first
        for name, row in ROWS.items():
            line = f"| {tables.label(name)} | {results[name]['network_calls']:,} | "
            shown = not short or is_in_readme(name)
            assert (line in first) == (shown and row.num_steps not in (None, 1000)), name
            assert (line in second) == (shown and row.num_steps in (None, 1000)), name
        for part, floor in ((first, "0.0160 ± 0.0010"), (second, "0.064 ± 0.004")):
            table = [line.split(" | ") for line in part.splitlines() if line.startswith("|")][2:]
            assert {cells[3] for cells in table} == {floor}
            assert table[-1][0] == "| real training images"
            assert {len(cells) for cells in table} == {8}


def test_a_network_has_one_bound():
    results = made_up_results()
    lines = tables.likelihood_table(results).splitlines()
    assert "1,000 test images drawn at random" in lines[0]
    assert "50 of its terms" in lines[0]
    rows = [line for line in lines[4:] if line]
    assert len(rows) == len({row.checkpoint for row in ROWS.values()}) == 6
    assert sum("| 1.250 ± 0.004 |" in row for row in rows) == 3
    assert all("| 1,234 | 1,024,000 |" in row for row in rows)


def test_the_tables_of_eta_and_variance_have_every_row():
    results = made_up_results()
    eta, variance = tables.eta_table(results), tables.variance_table(results)
    assert "| $S$ | 10 | 25 | 50 | 100 |" in eta
    assert "| η = 0 | 0.300 ± 0.010 (13.36) | 0.120 ± 0.010 (6.84) |" in eta
    assert "| σ̂ | 1.300 ± 0.010 (367.43) |" in eta
    assert "Real images: 0.0160 ± 0.0010." in eta
    for text in ("learned variance", "β̃", "β"):
        assert f"| L_hybrid, {text} | 0.300 ± 0.010 |" in variance
    assert "| L_vlb, learned variance |  | 0.120 ± 0.010 |  |  |" in variance
    assert "| lesson 5, by DDIM | 0.300" in variance
    few = {"ddim_10": results["ddim_10"]}
    assert "| η = 1 |  (41.07) |" in tables.eta_table(few)


def test_the_picture_has_every_row_with_its_error(tmp_path, monkeypatch):
    results, drawn = made_up_results(), []
    errorbar = Axes.errorbar

    def record(self, xs, ys, errors, **style):
        drawn.extend(zip(xs, ys, errors, strict=True))
        return errorbar(self, xs, ys, errors, **style)

    monkeypatch.setattr(Axes, "errorbar", record)
    tables.save_picture(tmp_path / "fid.png", results)
    wanted = [results[name] for name in ROWS]
    keys = ("network_calls", "fid", "fid_error")
    assert sorted(drawn) == sorted(tuple(row[key] for key in keys) for row in wanted)
    with Image.open(tmp_path / "fid.png") as picture:  # opaque, for dark pages
        assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_the_readme_has_a_place_for_the_tables():
    text = (ROOT / "README.md").read_text()
    assert text.index("<!-- scoreboard -->") < text.index("<!-- /scoreboard -->")


def test_an_unknown_row_is_refused(capsys):
    error = error_line(capsys, scoreboard.main, "--rows", "ddim_11")
    assert "row ddim_11 is not known: choose from dpm, ddpm" in error
