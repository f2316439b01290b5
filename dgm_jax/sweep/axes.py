"""What a sweep varies: its members, each a few fields of the config with other values.

A config file may have, beside `get_config`, a function `sweep()` that returns the members; the
command line takes a grid as text, `--sweep='model.beta=0.5,1,2;seed=0:3'`.
"""

import ast
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dgm_jax import config as configs
from dgm_jax.core import UserError

Member = dict[str, Any]  # values by dotted path

_MOST_MEMBERS = 10_000


def grid(axes: Mapping[str, Sequence[Any]]) -> list[Member]:
    """Every combination of the values of each field, the last field varying fastest.

    Raises:
      UserError: there are too many.
    """
    _check_size(math.prod(len(values) for values in axes.values()))
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _check_size(num: int) -> None:
    if num > _MOST_MEMBERS:
        raise UserError(f"a sweep has at most {_MOST_MEMBERS:,} members, and this one {num:,}")


class Uniform(NamedTuple):
    """Real numbers between `low` and `high`, they or their logarithms evenly spread."""

    low: float
    high: float
    log: bool = False

    def draw(self, source: np.random.Generator) -> float:
        """One number."""
        if self.log:
            return float(np.exp(source.uniform(math.log(self.low), math.log(self.high))))
        return float(source.uniform(self.low, self.high))

    def suggest(self, trial: Any, path: str) -> float:
        """What Optuna would try."""
        return trial.suggest_float(path, self.low, self.high, log=self.log)

    def key(self, value: float) -> float:
        """What Optuna calls a value."""
        return value

    def contains(self, value: Any) -> bool:
        """Whether it may be drawn."""
        return isinstance(value, float) and self.low <= value <= self.high


class Choice(NamedTuple):
    """One of some values, each as likely."""

    values: tuple[Any, ...]

    def draw(self, source: np.random.Generator) -> Any:
        """One of them."""
        return self.values[source.integers(len(self.values))]

    def suggest(self, trial: Any, path: str) -> Any:
        """What Optuna would try; it knows the values by their numbers."""
        return self.values[trial.suggest_categorical(path, list(range(len(self.values))))]

    def key(self, value: Any) -> int:
        """What Optuna calls a value."""
        return self.values.index(value)

    def contains(self, value: Any) -> bool:
        """Whether it may be drawn."""
        return value in self.values


Distribution = Uniform | Choice


def uniform(low: float, high: float) -> Uniform:
    """Real numbers, evenly spread."""
    return Uniform(low, high)


def log_uniform(low: float, high: float) -> Uniform:
    """Positive real numbers whose logarithm is evenly spread."""
    return Uniform(low, high, log=True)


def choice(*values: Any) -> Choice:
    """One of the values, each as likely."""
    return Choice(values)


def random(num: int, over: Mapping[str, Distribution], seed: int = 0) -> list[Member]:
    """`num` members with each field drawn independently, e.g. from `log_uniform(1e-4, 1e-2)`."""
    source = np.random.default_rng(seed)
    return [{path: of.draw(source) for path, of in over.items()} for _ in range(num)]


def parse(text: str, config: ConfigDict) -> list[Member]:
    """The grid that a text describes: `"model.beta=0.5,1;model.encoder=(200,),(500,);seed=0:5"`.

    Args:
      text: fields separated by `;`, values by `,`; `0:5` are the whole numbers 0, 1, 2, 3, 4.
      config: the config that is varied: a value is read as its field's type.

    Raises:
      UserError: an unknown field, a value of another type, nothing to vary, or too many members.
    """
    return grid({path: _values(path, t, now) for path, (t, now) in _fields(text, config).items()})


def parse_search(text: str, config: ConfigDict) -> dict[str, Distribution]:
    """Ranges from `"optimizer.learning_rate=log_uniform(1e-4,1e-2);model.beta=uniform(0.5,2)"`.

    `choice(elbo,stl)` is for anything else; values are read as their fields' types.

    Raises:
      UserError: as `parse`, or a range that is none.
    """
    found: dict[str, Distribution] = {}
    for path, (given, current) in _fields(text, config).items():
        match = re.fullmatch(r"(uniform|log_uniform|choice)\((.*)\)", given)
        if match is None:
            raise UserError(
                f"--sweep: {path}={given!r}: a search wants uniform(low,high), "
                "log_uniform(low,high) or choice(value,value)"
            )
        values = [_value(path, part, current) for part in _split(match[2])]
        if match[1] == "choice":
            found[path] = Choice(tuple(values))
            continue
        if not isinstance(current, float) or len(values) != 2 or not values[0] < values[1]:
            raise UserError(f"--sweep: {path}={given!r}: give two real numbers, the lower first")
        found[path] = Uniform(*values, log=match[1] == "log_uniform")
        if found[path].log and values[0] <= 0:
            raise UserError(f"--sweep: {path}={given!r}: a logarithm wants numbers above 0")
    return found


def _fields(text: str, config: ConfigDict) -> dict[str, tuple[str, Any]]:
    """What a text says of each field, and what the field is now."""
    found: dict[str, tuple[str, Any]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        path, equals, values = part.partition("=")
        path, values = path.strip(), values.strip()
        if not equals or not values:
            raise UserError(f"--sweep: {part!r}: write field=value,value or field=first:last+1")
        if path in found:
            raise UserError(f"--sweep: {path} is there twice: give all its values in one place")
        found[path] = values, configs.value_of(config, path)
    if not found:
        raise UserError("--sweep is empty: write fields and values, 'model.beta=0.5,1;seed=0:3'")
    return found


def _values(path: str, text: str, current: Any) -> Sequence[Any]:
    """The values in a text, each of the type of `current`."""
    # No more digits than `len` can count.
    if isinstance(current, int) and (span := re.fullmatch(r"(-?\d{1,18}):(-?\d{1,18})", text)):
        found = range(int(span[1]), int(span[2]))
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
      UserError: no members or too many, an unknown field, a value of another type, or two equal
        members.
    """
    if not members:
        raise UserError("the sweep is empty: it has no members")
    _check_size(len(members))
    paths = dict.fromkeys(path for member in members for path in member)
    found: dict[tuple, int] = {}
    for i, member in enumerate(members):
        fields = configs.fields(configs.override(config, member))
        whole = tuple(fields[path] for path in paths)
        if (first := found.setdefault(whole, i)) != i:
            raise UserError(f"members {first} and {i} of the sweep are the same: {member}")
    return [dict(zip(paths, whole, strict=True)) for whole in found]


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
