"""Parameters of the marker `long`, which `make test FAST=1` leaves out."""

from collections.abc import Iterable
from typing import Any

import pytest


def long_but(short: set[tuple[str, str]], rows: Iterable[tuple]) -> list[Any]:
    """``rows`` for `parametrize`, marked `long` but for those that begin with a pair in ``short``.

    Tests that share a report must be long or short together, or a short one pays for the rest.
    """
    return [row if row[:2] in short else pytest.param(*row, marks=pytest.mark.long) for row in rows]
