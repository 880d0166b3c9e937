"""Options that are declared once: values check themselves, and the page of all options is made of them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest

from nas.cli.reference import reference
from nas.config import DataConfig, SearchConfig
from nas.errors import FieldError
from nas.options import Checked, at_least, option, options, parts, same_as
from nas.validation.config import BaselineConfig

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fishing(Checked):
    hooks: int = option(2, "--hooks", "Number of hooks", bounds=at_least(1))
    depth_m: float | None = option(None, "--depth", "Depth in metres", bounds=at_least(0))
    bait: list[str] = option(lambda: ["worms"], "--bait", "Bait", default="worms")
    data_dir: str = same_as(DataConfig, "data_dir")


def test_a_value_checks_itself_and_says_which_field_is_wrong() -> None:
    assert Fishing().depth_m is None
    with pytest.raises(FieldError, match="hooks=0 is not at least 1") as caught:
        Fishing(hooks=0)
    error = caught.value
    assert (error.owner, error.field, error.value, error.expected) == (Fishing, "hooks", 0, "at least 1")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    with pytest.raises(FieldError, match="depth_m=nan"):
        Fishing(depth_m=float("nan"))


def test_a_declaration_is_read_by_name() -> None:
    declared = options(Fishing)
    assert list(declared) == ["hooks", "depth_m", "bait", "data_dir"]
    assert [each.default for each in declared.values()] == ["2", "", "worms", "data"]
    assert declared["data_dir"] is options(DataConfig)["data_dir"] is options(BaselineConfig)["data_dir"]
    assert Fishing().bait == ["worms"]
    assert list(parts(SearchConfig)) == ["data", "proxy", "latency", "limits"]


def test_the_page_of_all_options_is_up_to_date() -> None:
    """`python -m nas.cli.reference > docs/options.md` writes it."""
    assert (ROOT / "docs" / "options.md").read_text() == reference()
