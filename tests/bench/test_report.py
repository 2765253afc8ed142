"""Result files: the agreed columns, failures as rows, the command beside the figures."""

from __future__ import annotations

import csv
import json

from report import Row, write_csv, write_json
from timing import Spread, spread

AGREED = (
    "commit,device,torch,triton,deepspeed,transformers,workload,provider,metric,unit,p20,p50,p80"
)


def written(tmp_path, *rows):
    path = tmp_path / "deep" / "generate.csv"
    write_csv(path, rows, "cpu")
    text = path.read_text()
    return text.splitlines()[0], list(csv.DictReader(text.splitlines()))


def test_csv_has_the_agreed_columns_and_the_versions_of_this_process(tmp_path):
    import torch

    figure = Row("batch_1 fp32", "hf_generate", "tokens_per_s", "tokens/s", Spread(1.5, 2.0, 2.5))
    header, rows = written(tmp_path, figure)
    assert header == AGREED
    assert rows[0]["torch"] == torch.__version__
    assert [rows[0][key] for key in ("workload", "provider", "metric", "unit")] == [
        "batch_1 fp32",
        "hf_generate",
        "tokens_per_s",
        "tokens/s",
    ]
    assert [float(rows[0][key]) for key in ("p20", "p50", "p80")] == [1.5, 2.0, 2.5]


def test_a_failure_is_a_row_that_says_how_and_has_no_figures(tmp_path):
    message = "failed: RuntimeError: no room, says 'it' (peer.py:3)"
    _, rows = written(tmp_path, Row("batch_1 fp32", "peer", message))
    assert rows[0]["metric"] == message
    assert [rows[0][key] for key in ("p20", "p50", "p80")] == ["", "", ""]


def test_json_names_the_command_and_replaces_the_file_whole(tmp_path):
    path = tmp_path / "part.json"
    write_json(path, {"figures": [1]}, "cpu")
    write_json(path, {"figures": [1, 2]}, "cpu")
    document = json.loads(path.read_text())
    assert document["figures"] == [1, 2]
    assert document["command"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["part.json"]


def test_spread_interpolates_percentiles():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == Spread(2.0, 3.5, 5.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
