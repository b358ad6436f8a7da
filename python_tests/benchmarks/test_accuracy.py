"""The table of goals: of the committed results, and its verdicts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import accuracy_table
from bench.documents import read_block


def test_the_table_in_the_documents_is_of_the_results() -> None:
    assert read_block(accuracy_table.DOCUMENT, "accuracy_table").strip() == accuracy_table.text()


@pytest.mark.parametrize(("low", "verdict"), [(67.0, "yes"), (66.9, "**no**")])
def test_a_drop_of_three_points_is_the_most(low: float, verdict: str) -> None:
    rows = [
        {"row": "float", "seed": 0, "AP50": 70.0},
        {"row": "W2A2", "seed": 0, "AP50": low},
        {"row": "W2A2 scores calibrated", "seed": 0, "AP50": 0.0},
        {"row": "float trained on", "seed": 0, "AP50": 68.0},
    ]
    lines = accuracy_table.neu_det(rows)
    assert len(lines) == 4 and all(f"| {verdict} | 68.0 |" in line for line in lines[2:])


@pytest.mark.parametrize(
    ("shift", "f1", "verdict"),
    [(-0.01, 50.5, "yes"), (0.011, 50.0, "**no**"), (0.0, 49.4, "**no**")],
)
def test_scores_count_with_their_signs_left_out(shift: float, f1: float, verdict: str) -> None:
    (*_, line) = accuracy_table.scores([("x", {"score_shift": shift, "f1": f1}, 50.0)])
    assert line.endswith(f"| {verdict} |")
