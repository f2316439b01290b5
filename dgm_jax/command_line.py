"""The flags of the command line, which modes they are for, and what is said of wrong ones."""

import itertools
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from dgm_jax import config as configs
from dgm_jax.core import UserError

# Modes that look at a trained model; `Workdir.load_config` says which fields they may set.
_OF_TRAINED = ("evaluate", "sample", "features", "quality", "ais")

config_flags.DEFINE_config_file(
    "config", None, "An experiment, e.g. configs/vae_mnist.py, or a variant of it: ...py:smoke."
)
flags.DEFINE_string(
    "workdir",
    None,
    "Where everything is. Default: runs/<config>-<variant>, -sweep or -search behind.",
)
_MODES = ["train", *_OF_TRAINED, "sweep", "plan", "replay"]
flags.DEFINE_enum("mode", "train", _MODES, "What to do; see the examples above.")
flags.DEFINE_integer(
    "num",
    None,
    "Samples of --mode=sample, images of --mode=ais: default 100. Samples of --mode=quality: "
    "default half as many as test examples.",
)
flags.DEFINE_integer(
    "sample_seed", 0, "Seed of --mode=sample and quality.", lower_bound=0, upper_bound=2**31 - 1
)
flags.DEFINE_list(
    "classes", [], "Of --mode=sample and a model that is told labels: which to draw. Default: all."
)
flags.DEFINE_string(
    "judge", None, "Of --mode=quality: whose features, a work directory or an .onnx file."
)
flags.DEFINE_string(
    "distributed", None, "Of several processes of one run: auto, or address:port,how many,which."
)
flags.DEFINE_integer(
    "lost_after",
    60,
    "Seconds without a sign of life from a process that end all of a run.",
    lower_bound=1,
)
flags.DEFINE_list(
    "devices", ["1", "2", "4", "8"], "Of --mode=plan: numbers of devices that can share a batch."
)
flags.DEFINE_string(
    "sweep", None, "Grid of --mode=sweep: 'field=value,value;seed=0:3'. Default: the config's own."
)
flags.DEFINE_string(
    "launcher", None, "Run a sweep's programs as jobs: local, or slurm;slurm_partition=gpu;..."
)
flags.DEFINE_string(
    "trials", None, "Search by Optuna: rounds x members, 4x8; ranges in --sweep: uniform(0.5,2)."
)
flags.DEFINE_integer("program", None, "Of a sweep, run this program only: for jobs.")

# Flags that only some modes look at.
_MODES_OF = {
    "num": ("sample", "ais", "quality"),
    "sample_seed": ("sample", "quality"),
    "classes": ("sample",),
    "judge": ("quality",),
    "devices": ("plan",),
    **dict.fromkeys(("distributed", "lost_after"), ("train", "evaluate")),
    **dict.fromkeys(("sweep", "launcher", "trials", "program"), ("sweep",)),
    "workdir": tuple(mode for mode in _MODES if mode != "plan"),
}


def parse(argv: list[str]) -> list[str]:
    """Read the flags, `--config` and its fields among them.

    Raises:
      UserError: names a flag, file, variant, field or value that there is not, and the nearest.
    """
    app.define_help_flags()
    argv = _checked_fields(["--help" if arg == "-h" else arg for arg in argv])
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(f"{error} (--help lists the flags)") from error


def _checked_fields(argv: list[str]) -> list[str]:
    """Refuse `--config=...` and `--config.field=...` flags that name what is not there.

    ml_collections finds the same faults later, as tracebacks.

    Returns:
      The flags; where fields are set of a model that was trained, with its own config before them.

    Raises:
      UserError: names the file, variant or field, and the nearest that there are.
    """
    named = {}
    for arg, following in itertools.pairwise([*argv[1:], ""]):
        name, equals, value = arg.partition("=")
        if name.startswith("-"):  # --name=value, or --name value
            named[name.lstrip("-")] = value if equals else following
    for name in named:
        if name.partition(".")[0] in ("seed", "model", *configs.SECTIONS):
            raise UserError(f"--{name}: a field of the config is set by --config.{name}")
    paths = [name for name in named if name.startswith(("config.", "noconfig."))]
    if paths and "config" not in named:
        if named.get("mode") not in _OF_TRAINED or not named.get("workdir"):
            raise UserError(f"--{paths[0]} needs --config, the file whose field it sets")
        named["config"] = f"{Path(__file__).with_name('kept_config.py')}:{named['workdir']}"
        argv = [argv[0], f"--config={named['config']}", *argv[1:]]
    if "config" in named:
        known = configs.fields(configs.load(named["config"]))
        for field in (path.removeprefix("no").removeprefix("config.") for path in paths):
            if field not in known:
                raise UserError(configs.unknown_field(field, known))
    return argv


def check(argv: list[str]) -> None:
    """Refuse what is no flag, and flags that the mode does not look at or cannot do without.

    Raises:
      UserError: says which, and what to do.
    """
    if len(argv) > 1:
        raise UserError(
            f"{argv[1]!r} is not a flag: write --flag=value, a value with spaces in quotes, as in "
            "--config.train.duration='10 epochs'"
        )
    given, mode = flags.FLAGS, flags.FLAGS.mode
    for name, modes in _MODES_OF.items():
        if given[name].present and mode not in modes:
            raise UserError(
                f"--{name} is for --mode={' or '.join(modes)}: leave it out of --mode={mode}"
            )
    if given["lost_after"].present and given.distributed is None:
        raise UserError("--lost_after is of several processes: leave it out, or give --distributed")
    if given.workdir == "":
        raise UserError("--workdir=: name a directory, or leave it out for the default")
    if given.workdir is None and given.config is None:
        raise UserError(f"--mode={mode} needs --workdir or --config")
    if mode in ("train", "plan") and given.config is None:
        raise UserError(f"--mode={mode} needs --config, e.g. --config=configs/vae_mnist.py")
