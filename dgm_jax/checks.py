"""What models refuse in the same words, each naming the field, its value and what is allowed.

They raise a `UserError`.
"""

import math
from collections.abc import Iterable
from typing import Any

from dgm_jax.core import UserError


def one_of(config: Any, **known: Iterable[str]) -> None:
    """Each field has one of the names known for it."""
    for field, names in known.items():
        if (value := getattr(config, field)) not in names:
            raise UserError(f"model.{field}={value!r}: choose one of {', '.join(names)}")


def at_least(config: Any, **lowest: int) -> None:
    """Each field is at least so much, and finite."""
    for field, low in lowest.items():
        if not low <= (value := getattr(config, field)) < math.inf:
            finite = " and finite" if isinstance(value, float) else ""
            raise UserError(f"model.{field}={value}: must be at least {low}{finite}")


def positive(config: Any, *fields: str) -> None:
    """Each field is above 0, and finite."""
    for field in fields:
        if not 0 < (value := getattr(config, field)) < math.inf:
            raise UserError(f"model.{field}={value}: must be above 0 and finite")


def finite(config: Any, *fields: str) -> None:
    """Each field is finite."""
    for field in fields:
        if not math.isfinite(value := getattr(config, field)):
            raise UserError(f"model.{field}={value}: must be finite")


def widths(config: Any, *fields: str) -> None:
    """Each field has the widths of one or more layers."""
    for field in fields:
        value = getattr(config, field)
        if not value or not all(isinstance(width, int) and width > 0 for width in value):
            raise UserError(
                f"model.{field}={value}: give one or more widths, whole numbers, each at least 1"
            )
