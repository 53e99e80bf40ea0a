"""Lesson 5's ablation: the rows of Table 2."""

import re

from common import cli
from lesson_05 import ablation

from helpers import error_line


def test_the_table_has_each_row_with_its_error_and_is_resumed(tmp_path, capsys, monkeypatch):
    words = "--rows mean_vlb eps_simple --seeds 0 1 --num_training_steps 1 --num_steps 1"
    words += " --num_samples 66 --num_images 4 --dataset digits --device cpu"
    words = [*words.split(), "--output_dir", str(tmp_path)]
    cli.run(ablation.main, words)
    table = (tmp_path / "table.md").read_text()
    number = r"[\d.e+]+ ± [\d.e+]+"
    for row, paper in {"mean | vlb": "13.22", "eps | simple": "3.17"}.items():
        pattern = rf"\| {re.escape(row)} \| {number} \| {number} \| {re.escape(paper)} \|"
        assert re.search(pattern, table), table
    monkeypatch.setattr(ablation.train_mnist, "main", None)  # nothing is trained again
    cli.run(ablation.main, words)
    assert (tmp_path / "table.md").read_text() == table


def test_unknown_rows_are_refused_at_once(tmp_path, capsys):
    line = error_line(capsys, ablation.main, "--rows", "v_simple", "--output_dir", tmp_path)
    assert "mean_vlb" in line
    line = error_line(capsys, ablation.main, "--num_samples", "3", "--output_dir", tmp_path)
    assert "num_samples" in line
