"""The chart of a front, of invented candidates."""

from __future__ import annotations

import pandas as pd
import pytest

from nas.display.study_plots import MOST_LABELS, front_chart


def candidates(count: int, **columns: object) -> pd.DataFrame:
    """Rows as the views have them: each slower and more accurate than the one before."""
    numbers = range(count)
    return pd.DataFrame({
        "number": numbers, "accuracy": [0.5 + 0.01 * number for number in numbers],
        "latency_ms": [1.0 + number for number in numbers], "latency_p20_ms": [0.9 + number for number in numbers],
        "latency_p80_ms": [1.2 + number for number in numbers], "params": 1000, "macs": 2_000_000,
        "summary": "silu stem 16 | 1x24 k3", "latency_over_limit": False, "confirmed": 0,
        **columns,
    })  # fmt: skip


def test_each_candidate_is_in_one_series() -> None:
    """Four candidates: the last two are on the front, the first broke the limit when it was measured again."""
    rows = candidates(4, latency_over_limit=[True, False, False, None])
    # Rows of a view come in any order; a staircase needs that of latencies.
    dominated, over, front = front_chart(rows, rows.iloc[[3, 2]]).series
    assert (dominated.name, dominated.x, dominated.y) == ("dominated (1)", [2.0], pytest.approx([51]))
    assert (over.name, over.x) == ("over the limit, measured again (1)", [1.0])
    assert (front.x, front.low, front.high) == ([3.0, 4.0], [2.9, 3.9], [3.2, 4.2])
    assert front.labels == ["2", "3"]
    assert front.stairs
    assert front.details[0].splitlines() == [
        "trial 2", "52.00 % at 3 ms", "p20 to p80: 2.9 to 3.2 ms", "1 k parameters, 2.00 MMACs",
        "silu stem 16", "1x24 k3",
    ]  # fmt: skip


def test_of_a_long_front_no_trial_is_named() -> None:
    rows = candidates(MOST_LABELS + 1)
    _, front = front_chart(rows, rows).series
    assert not front.labels
    assert len(front.x) == MOST_LABELS + 1


def test_a_confirmed_front_has_intervals_and_says_what_was_searched() -> None:
    rows = candidates(3, confirmed=1)
    front = rows.iloc[[1, 2]].assign(
        accuracy=[0.5, 0.6], accuracy_low=[0.48, 0.57], accuracy_high=[0.52, 0.63], accuracy_trainings=[2, 3],
        searched_accuracy=[0.51, 0.52],
    )  # fmt: skip
    others, confirmed = front_chart(rows, front).series
    assert (others.name, confirmed.name) == ("others as searched (1)", "front (2), confirmed; bars: 95 %, p20 to p80")
    assert (confirmed.y, confirmed.below, confirmed.above) == (
        pytest.approx([50, 60]), pytest.approx([48, 57]), pytest.approx([52, 63])
    )  # fmt: skip
    assert confirmed.details[1].splitlines()[1:4] == [
        "60.00 % at 3 ms", "57.00 to 63.00 %, 3 trainings", "as searched: 52.00 %"
    ]  # fmt: skip
