"""What a sweep varies: its members, each a few fields of the config with other values.

A config file may have, beside `get_config`, a function `sweep()` that returns the members; the
command line takes a grid as text, `--sweep='model.beta=0.5,1,2;seed=0:3'`.
"""

import ast
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dgm_jax import config as configs
from dgm_jax.core import UserError

Member = dict[str, Any]  # values by dotted path


def grid(axes: Mapping[str, Sequence[Any]]) -> list[Member]:
    """Every combination of the values of each field, the last field varying fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def random(
    num: int, axes: Mapping[str, Callable[[np.random.Generator], Any]], seed: int = 0
) -> list[Member]:
    """`num` members with each field drawn independently, e.g. by `log_uniform(1e-4, 1e-2)`."""
    source = np.random.default_rng(seed)
    return [{path: draw(source) for path, draw in axes.items()} for _ in range(num)]


def uniform(low: float, high: float) -> Callable[[np.random.Generator], float]:
    """Real numbers, evenly spread."""
    return lambda source: float(source.uniform(low, high))


def log_uniform(low: float, high: float) -> Callable[[np.random.Generator], float]:
    """Positive real numbers whose logarithm is evenly spread."""
    return lambda source: float(np.exp(source.uniform(math.log(low), math.log(high))))


def choice(*values: Any) -> Callable[[np.random.Generator], Any]:
    """One of the values, each as likely."""
    return lambda source: values[source.integers(len(values))]


def parse(text: str, config: ConfigDict) -> list[Member]:
    """The grid that a text describes: `"model.beta=0.5,1;model.encoder=(200,),(500,);seed=0:5"`.

    Args:
      text: fields separated by `;`, values by `,`; `0:5` are the whole numbers 0, 1, 2, 3, 4.
      config: the config that is varied: a value is read as its field's type.

    Raises:
      UserError: an unknown field, a value of another type, or nothing to vary.
    """
    axes: dict[str, list[Any]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        path, equals, values = part.partition("=")
        if not equals or not values:
            raise UserError(f"--sweep: {part!r}: write field=value,value or field=first:last+1")
        path = path.strip()
        if path in axes:
            raise UserError(f"--sweep: {path} is there twice: give all its values in one place")
        axes[path] = _values(path, values.strip(), configs.value_of(config, path))
    if not axes:
        raise UserError("--sweep is empty: write fields and values, 'model.beta=0.5,1;seed=0:3'")
    return grid(axes)


def _values(path: str, text: str, current: Any) -> list[Any]:
    """The values in a text, each of the type of `current`."""
    if isinstance(current, int) and (span := re.fullmatch(r"(-?\d+):(-?\d+)", text)):
        found = list(range(int(span[1]), int(span[2])))
        if not found:
            raise UserError(f"--sweep: {path}={text} has no numbers in it")
        return found
    return [_value(path, part, current) for part in _split(text)]


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _value(path: str, text: str, current: Any) -> Any:
    if isinstance(current, str):
        return text
    try:
        value = ast.literal_eval(text)
        if isinstance(current, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(current):
            raise ValueError(text)
    except (ValueError, SyntaxError) as error:
        kind = type(current).__name__
        raise UserError(f"--sweep: {path}={text!r}: expected {kind}, as {current!r}") from error
    return value


def complete(config: ConfigDict, members: Sequence[Member]) -> list[Member]:
    """The members, each with a value for every field that any of them sets.

    Args:
      config: gives the values that a member does not set.
      members: possibly with different fields.

    Raises:
      UserError: no members, an unknown field, a value of another type, or two equal members.
    """
    if not members:
        raise UserError("the sweep is empty: it has no members")
    paths = dict.fromkeys(path for member in members for path in member)
    found: list[Member] = []
    for i, member in enumerate(members):
        fields = configs.fields(configs.override(config, member))
        whole = {path: fields[path] for path in paths}
        if whole in found:
            first = found.index(whole)
            raise UserError(f"members {first} and {i} of the sweep are the same: {member}")
        found.append(whole)
    return found


def labels(paths: Sequence[str]) -> dict[str, str]:
    """A short name for each field: its last part, or the whole where two would be alike."""
    short = [path.rpartition(".")[2] for path in paths]
    return {
        path: name if short.count(name) == 1 else path
        for path, name in zip(paths, short, strict=True)
    }


def name(member: Member, short: Mapping[str, str]) -> str:
    """`"beta=0.5, seed=0"`."""
    return ", ".join(f"{short[path]}={shown(value)}" for path, value in member.items())


def shown(value: Any) -> str:
    """A value for people: real numbers to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
