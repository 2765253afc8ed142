"""Which ops run on torch after their tests on the device."""

from __future__ import annotations

import sys

import pytest
from op_tests import run_file, unproven
from parts import run_child

OPS = ("linear", "sample_logits", "lm_head_sample", "add_rms_norm")


def test_only_ops_whose_tests_passed_stay_on_triton():
    results = {
        "linear": {"status": "passed"},
        "add_rms_norm": {"status": "timed out"},
        "sample_logits": {"status": "passed"},
        "lm_head_sample": {"status": "no test file"},
        "launch": {"status": "failed"},
    }
    assert unproven(results, OPS) == ["add_rms_norm", "lm_head_sample"]


def test_a_failing_device_function_takes_its_ops_along():
    results = {"philox": {"status": "failed"}, "sample_logits": {"status": "passed"}}
    assert unproven(results, OPS) == ["lm_head_sample", "sample_logits"]


@pytest.mark.parametrize(
    ("body", "status", "counts"),
    [
        ("def test_a(): assert 1\ndef test_b(): assert 1\n", "passed", (2, 0)),
        ("def test_a(): assert 1\ndef test_b(): assert 0, 'off by 3'\n", "failed", (1, 1)),
        ("def test_a():\n import os; os.abort()\n", "crashed (exit -6)", (0, 0)),
        ("def helper(): pass\n", "nothing ran", (0, 0)),
    ],
)
def test_a_file_is_counted_and_its_end_named(tmp_path, body, status, counts):
    path = tmp_path / "test_op.py"
    path.write_text(body)
    result = run_file(path, 60.0, [])
    assert result["status"] == status
    assert (result["passed"], result["failed"]) == counts
    if status == "failed":
        assert "off by 3" in result["failures"][0]


def test_a_hanging_child_is_killed_with_what_it_printed():
    ended = run_child([sys.executable, "-uc", "print('here'); import time; time.sleep(60)"], 1.5)
    assert ended.timed_out
    assert ended.tail == "here\n"
    assert ended.seconds < 20
