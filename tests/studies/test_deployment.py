from __future__ import annotations

import pandas as pd

from studies import CandidateLatency, Deployment

HERE = Deployment(1, "eager", "float32", 1, 32, 2)


def test_a_deployment_is_that_of_its_rows() -> None:
    view = pd.DataFrame([HERE.as_columns() | {"latency_ms": 1.0}, HERE.as_columns() | {"dtype": "float16"}])
    assert Deployment.of(CandidateLatency(**HERE.as_columns())) == HERE
    assert Deployment.of_view(view.iloc[0]) == HERE
    assert list(HERE.rows_of(view)["latency_ms"]) == [1.0]


def test_each_column_tells_one_deployment_from_another() -> None:
    for column, value in dict(
        device_id=2, engine="fused", dtype="float16", batch_size=8, resolution=64, threads=1
    ).items():
        view = pd.DataFrame([HERE.as_columns() | {column: value}])
        assert HERE.rows_of(view).empty
        assert Deployment.of_view(view.iloc[0]) != HERE
    assert Deployment.columns() == ["device_id", "engine", "dtype", "batch_size", "resolution", "threads"]
