from __future__ import annotations

from pathlib import Path

from kernels.lab.results import ResultFile


def test_half_a_line_and_other_machines_rows_are_passed_over(tmp_path: Path) -> None:
    path, key = tmp_path / "results.jsonl", ("kind", "name")
    ResultFile(path, {"identity": {"device": "other"}}, key).add({"kind": "block", "name": "a"})
    ours = ResultFile(path, {"identity": {"device": "this"}}, key)
    assert ours.find("block", "a") is None
    with path.open("a") as file:
        file.write('{"kind": "block", "na')
    ours.add({"kind": "block", "name": "b"})
    again = ResultFile(path, {"identity": {"device": "this"}}, key)
    assert again.records == ours.records
    assert again.find("block", "b") is not None


def test_values_of_the_key_may_be_fields_themselves(tmp_path: Path) -> None:
    """As a sweep's problems are."""
    path = tmp_path / "sweep.jsonl"
    written = ResultFile(path, {"sources": "x"}, ("problem",)).add({"problem": {"batch": 1, "stride": 2}, "ms": 1.0})
    assert ResultFile(path, {"sources": "x"}, ("problem",)).find({"stride": 2, "batch": 1}) == written
    assert ResultFile(path, {"sources": "y"}, ("problem",)).records == []


def test_of_two_lines_with_the_same_key_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"name": "a", "ms": 1}\n[]\n\n3\nno json\n{"name": "a", "ms": 2}\n')
    assert ResultFile(path, {}, ("name",)).records == [{"name": "a", "ms": 2}]
