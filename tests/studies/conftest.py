"""A study database of every kind that is supported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from studies import Store


@pytest.fixture(autouse=True)
def _as_made(databases_made_anew: None) -> None:
    """What is tested here is how databases are made, opened and brought up to date."""


@pytest.fixture
def store(any_url: str) -> Iterator[Store]:
    opened = Store.open(any_url, create=True)
    assert opened is not None
    yield opened
    opened.close()
