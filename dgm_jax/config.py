"""Experiment configs: sections of documented fields, built in Python, locked, kept as JSON."""

import dataclasses
import difflib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from dgm_jax import models, optim, sharding
from dgm_jax.core import UserError
from dgm_jax.data import dataset as data
from dgm_jax.data import toys
from dgm_jax.evaluators import likelihood


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The `train` section. Lengths are texts with their unit: `"100 epochs"`, `"2000 steps"`.

    Attributes:
      duration: how long to train; rounded up to a whole number of dispatches.
      batch_size: B, over all devices.
      num_parts: into which each batch is cut, one after another ("gradient accumulation"): where
        all of it would not fit in memory, or, on a CPU, a part of a convolutional network fits in
        the cache (docs/performance.md). The update is that of the whole batch, but the noise is
        drawn anew for each part; what looks at a whole batch, such as the β-TCVAE, looks at a part;
        and what a model keeps, such as Markov chains, goes from part to part.
      steps_per_dispatch: K updates in one compiled call; one row of metrics each.
      validate_every: length between measurements on the validation split.
      checkpoint_every: length between checkpoints; there is one at the end in any case.
      checkpoint_minutes: there is one also whenever so many have passed: what a run of slow steps
        loses at most where it is killed without a word.
      keep_best: a number of the validation split, such as `elbo`: the checkpoint where it is best
        is kept as well, and is what is evaluated, sampled and started from. Empty for the last.
      init_from: a work directory whose parameters training starts from, in place of random ones.
      ramp: numbers of the model that go linearly to their value at the start of training, from 0 or
        from what is said, and how long: `"model.beta over 20 epochs"` is KL warm-up (Sønderby et
        al. 2016), `"model.temperature from 2 over 10 epochs"` an annealing. Several are separated
        by commas.
      compute_dtype: in which layers multiply in training: `float32`, `tensorfloat32` (float32 whose
        factors are rounded to 10 bits, on accelerators that have it; elsewhere float32) or
        `bfloat16` (a CPU without such instructions is slower). Parameters are float32, and so is
        all that is measured.
      members_per_program: how many members of a sweep train side by side at most, where all that
        could would not fit in memory, or are to be spread over the jobs of a cluster; 0 for all.
    """

    duration: str = "100 epochs"
    batch_size: int = 100
    num_parts: int = 1
    steps_per_dispatch: int = 200
    validate_every: str = "5 epochs"
    checkpoint_every: str = "10 epochs"
    checkpoint_minutes: float = 10.0
    keep_best: str = ""
    init_from: str = ""
    ramp: str = ""
    compute_dtype: str = "float32"
    members_per_program: int = 0


SECTIONS = {
    "data": data.Config,
    "mesh": sharding.Config,
    "optimizer": optim.Config,
    "train": TrainConfig,
    "eval": likelihood.Config,
}

# Variants of the experiments in the plane: what they learn.
TOYS = {name.replace("_", "-"): {"data.dataset": name} for name in toys.NAMES}

_MOST_ENTRIES = 1000  # of a field, in a config that is read back

# What `:smoke` changes in every config: the whole path on small real data, in seconds.
_SMOKE = {
    "data.source": "embedded",
    "train.duration": "200 steps",
    "train.steps_per_dispatch": 50,
    "train.validate_every": "100 steps",
    "train.checkpoint_every": "100 steps",
    "eval.num_samples": 50,
    "eval.aggregate_examples": 100,
}


def experiment(model: str) -> ConfigDict:
    """A config with the defaults of every section and of the named model."""
    sections = {name: dataclasses.asdict(section()) for name, section in SECTIONS.items()}
    return ConfigDict({"seed": 0, "model": models.defaults(model), **sections}).lock()


def variant(config: ConfigDict, arg: str | None, **variants: Mapping[str, Any]) -> ConfigDict:
    """The variant of `config` named behind the colon of `--config=file.py:arg`.

    Args:
      config: the config without an argument.
      arg: the argument, or None or "".
      **variants: name -> overrides (`{"model.latents": 2}`); `smoke` is always there, and what is
        given for it comes on top.

    Raises:
      UserError: no such variant; lists those that there are.
    """
    smoke = {**_SMOKE, **variants.get("smoke", {})}
    if config.data.dataset in (*data.GENERATED, *data.FILES):
        del smoke["data.source"]  # there is one only
    variants = {**variants, "smoke": smoke}
    if not arg:
        return config
    if arg not in variants:
        raise UserError(f"the config has no variant {arg!r}; it has: {', '.join(variants)}")
    return override(config, variants[arg])


def override(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """A copy of `config` with the fields named by dotted paths replaced.

    Raises:
      UserError: an unknown field, or a value of another type than the field's.
    """
    config = config.copy_and_resolve_references()
    known = fields(config)
    for path, value in values.items():
        if path not in known:
            raise UserError(unknown_field(path, known))
        try:
            config.update_from_flattened_dict({path: value})
        except TypeError as error:
            raise UserError(f"{path}={value!r}: expected {type(known[path]).__name__}") from error
    return config


def load(path: str, values: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config in a file, as the command line would read it.

    Args:
      path: `configs/vae_mnist.py`, or with a variant `configs/vae_mnist.py:smoke`.
      values: overrides by dotted path.

    Raises:
      UserError: no such file, variant or field.
    """
    filename, _, arg = path.partition(":")
    module = _module(filename)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={filename}: the file has no function get_config(arg)")
    return override(module.get_config(arg), values or {})


def load_sweep(path: str) -> list[dict[str, Any]]:
    """The members that a config file's `sweep()` gives: overrides by dotted path.

    Raises:
      UserError: no such file, it has no sweep, or one of something else.
    """
    filename, _, _ = path.partition(":")
    module = _module(filename)
    if not hasattr(module, "sweep"):
        raise UserError(
            f"{filename} has no function sweep(): write one, or give --sweep='field=value,value'"
        )
    found = module.sweep()
    members = list(found) if isinstance(found, Iterable) else [found]
    if not all(isinstance(member, Mapping) for member in members):
        raise UserError(
            f"{filename}: sweep() must give a list of dictionaries of overrides, such as "
            "[{'model.beta': 0.5}, {'model.beta': 1.0}]"
        )
    return members


def _module(filename: str) -> ModuleType:
    if not Path(filename).is_file():
        raise UserError(_no_such_file(filename))
    spec = importlib.util.spec_from_file_location(Path(filename).stem, filename)
    if spec is None:
        raise UserError(f"--config={filename}: a config is a Python file, such as name.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _no_such_file(filename: str) -> str:
    """What to say of a config file that is not there."""
    folders = Path(filename).parent, Path("configs")
    there = {path.stem: path for folder in folders for path in sorted(folder.glob("*.py"))}
    near = [str(there[stem]) for stem in difflib.get_close_matches(Path(filename).stem, there, n=3)]
    advice = f"did you mean {', or '.join(near)}?" if near else "give its path, configs/name.py"
    return f"--config={filename}: no such file; {advice}"


def unknown_field(path: str, known: Mapping[str, Any]) -> str:
    """What to say of a field that is not there, with the nearest that are."""
    last = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(path, known, n=3)
    near = near or [last[n] for n in difflib.get_close_matches(path.rpartition(".")[2], last, n=3)]
    near = near or [name for name in known if name.startswith(path.partition(".")[0])]
    return f"config has no field {path!r}; nearest: {', '.join(near or known)}"


def fields(config: ConfigDict) -> dict[str, Any]:
    """All fields by dotted path."""
    found = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            found |= {f"{name}.{rest}": inner for rest, inner in fields(value).items()}
        else:
            found[name] = value
    return found


def value_of(config: ConfigDict, path: str) -> Any:
    """The value of the field at a dotted path.

    Raises:
      UserError: no such field; names the nearest.
    """
    known = fields(config)
    if path not in known:
        raise UserError(unknown_field(path, known))
    return known[path]


def section(config: ConfigDict, name: str, numbers: Mapping[str, Any] | None = None) -> Any:
    """A section as its dataclass, e.g. `section(config, "data")` -> `data.Config`.

    Args:
      config: the config.
      name: of the section.
      numbers: fields by dotted path, of any section, that replace the config's; may be traced.
    """
    return SECTIONS[name](**{**config[name], **of_section(numbers or {}, name)})


def of_section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The values of one section, by field: `{"model.beta": 2.0}` -> `{"beta": 2.0}`."""
    split = {path: path.partition(".") for path in values}
    return {field: values[path] for path, (first, _, field) in split.items() if first == name}


def differences(config: ConfigDict, other: ConfigDict) -> list[str]:
    """How a config differs from the other before it: `["model.latents was 50, is 40", ...]`."""
    mine, theirs = fields(config), fields(other)
    return [
        f"{name} was {theirs.get(name, 'absent')}, is {mine.get(name, 'absent')}"
        for name in sorted({*mine, *theirs})
        if mine.get(name, "absent") != theirs.get(name, "absent")
    ]


def to_json(config: ConfigDict) -> str:
    """The config as JSON text."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_dict(value: Any) -> ConfigDict:
    """The config that `to_json` wrote, from the JSON value.

    Raises:
      UserError: it is none.
    """
    sections = {"seed", "model", *SECTIONS}
    try:
        name, given = value["model"]["name"], fields(ConfigDict(tuples(value)))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"a config has the sections {', '.join(sorted(sections))}") from error
    usual = fields(experiment(name))
    if unknown := sorted(set(given) - set(usual)):
        raise UserError(f"this version of the project knows no field {unknown[0]}")
    for path, field in given.items():
        for number in field if isinstance(field, tuple) else (field,):
            if isinstance(number, int) and not -(2**31) <= number < 2**31:
                raise UserError(f"{path} is too large a number")
        if isinstance(field, tuple) and len(field) > _MOST_ENTRIES:
            raise UserError(f"{path} has more than {_MOST_ENTRIES} entries")
    # A field that came later has the default that keeps what was done before.
    return override(experiment(name), given)


def num_steps(length: str, field: str, steps_per_epoch: int, multiple: int) -> int:
    """A length such as `"100 epochs"` or `"2000 steps"` in steps, rounded up.

    Args:
      length: the text.
      field: its name, for the error.
      steps_per_epoch: what an epoch is.
      multiple: the result is a multiple of this.

    Raises:
      UserError: not a positive number and a unit.
    """
    number, _, unit = str(length).partition(" ")
    scale = {"epochs": steps_per_epoch, "epoch": steps_per_epoch, "steps": 1, "step": 1}
    try:
        steps = float(number) * scale[unit.strip()]
        if not 0 < steps < 2**31:
            raise ValueError(length)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{field}={length!r}: give a positive number and its unit, "
            'such as "100 epochs" or "2000 steps"'
        ) from error
    return -int(-steps // multiple) * multiple


def tuples(value: Any) -> Any:
    """JSON's lists back to the tuples that they were."""
    if isinstance(value, dict):
        return {name: tuples(inner) for name, inner in value.items()}
    return tuple(tuples(v) for v in value) if isinstance(value, list) else value
