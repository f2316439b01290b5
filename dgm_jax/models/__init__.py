"""One file per model, which is found by its file's name; there is nothing to register.

Each module has `Config`, a frozen dataclass of numbers and names; `check(config, spec)`, which
refuses values that make no sense; and `build(config, spec) -> Model`, cheap and pure, so that it
may be called inside a traced function with any numeric field replaced by a traced scalar.
`SAMPLING` names the fields, if any, on which only samples depend, `MEASURING` those on which only
likelihoods do. `LEARNS_FROM_FEW_LABELS` is there and true where `data.labelled` means something to
the model.
"""

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from dgm_jax.core import DataSpec, Model, UserError


def names() -> list[str]:
    """Names of all models, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> ModuleType:
    """The module of a model.

    Raises:
      UserError: no such model; names the nearest.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.3) or names()
        raise UserError(f"model.name={name!r} is not a model; did you mean {', '.join(near)}?")
    return importlib.import_module(f"{__name__}.{name}")


def defaults(name: str) -> dict[str, Any]:
    """The `model` section of a config: the model's name and its default fields."""
    return {"name": name, **dataclasses.asdict(get(name).Config())}


def of_sampling(name: str) -> tuple[str, ...]:
    """A model's fields on which only samples depend."""
    return getattr(get(name), "SAMPLING", ())


def of_trained(name: str) -> tuple[str, ...]:
    """A model's fields on which no training depends: a trained model may get other values."""
    return of_sampling(name) + getattr(get(name), "MEASURING", ())


def check(config: Mapping[str, Any], spec: DataSpec) -> None:
    """Check a `model` section's values, once, before anything is traced.

    Raises:
      UserError: a field is unknown or its value makes no sense for this data.
    """
    module = get(config["name"])
    if spec.labelled and not getattr(module, "LEARNS_FROM_FEW_LABELS", False):
        raise UserError(
            f"data.labelled={spec.labelled.num}: model.name={config['name']!r} does not learn from "
            "a few labels, as 'm2' does; leave data.labelled at 0"
        )
    module.check(_config(module, config), spec)


def build(config: Mapping[str, Any], spec: DataSpec) -> Model:
    """The model that a `model` section describes, for data of the given spec."""
    module = get(config["name"])
    return module.build(_config(module, config), spec)


def _config(module: ModuleType, config: Mapping[str, Any]) -> Any:
    fields = {field.name for field in dataclasses.fields(module.Config)}
    given = {key: value for key, value in config.items() if key != "name"}
    if unknown := sorted(set(given) - fields):
        raise UserError(
            f"model.name={config['name']!r}: this config is of another model, with model."
            f"{unknown[0]}; choose by --config one whose model it is"
        )
    return module.Config(**given)
