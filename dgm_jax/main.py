"""Train, evaluate and sample deep generative models.

    python -m dgm_jax.main --config=configs/vae_mnist.py            train, evaluate, pictures
    python -m dgm_jax.main --config=configs/vae_mnist.py:smoke      the same in seconds
    python -m dgm_jax.main --mode=evaluate --workdir=runs/vae_mnist --config.eval.num_samples=500
    python -m dgm_jax.main --mode=sample --num=1000 --workdir=runs/vae_mnist
    python -m dgm_jax.main --mode=features --workdir=runs/vae_mnist
    python -m dgm_jax.main --mode=quality --workdir=runs/vae_mnist
    python -m dgm_jax.main --mode=ais --num=100 --workdir=runs/vae_mnist
    python -m dgm_jax.main --mode=replay --workdir=runs/vae_mnist
    python -m dgm_jax.main --mode=plan --devices=1,8,40 --config=configs/vae_mnist.py
    python -m dgm_jax.main --mode=sweep --sweep='model.beta=1,4;seed=0:3' --config=...

Any field of the config can be set on the command line: --config.model.latents=40.
"""

import errno
import importlib
import signal
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from dgm_jax import cache, interruption, processes, run
from dgm_jax import config as configs
from dgm_jax.core import UserError
from dgm_jax.interruption import Interrupted
from dgm_jax.nn import precision
from dgm_jax.workdir import Workdir, default_path

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "An experiment, e.g. configs/vae_mnist.py, or a variant of it: ...py:smoke."
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where everything is. Default: runs/<config>-<variant>, -sweep or -search behind.",
)
_MODES = ["train", *configs.MODES_OF_TRAINED, "sweep", "plan", "replay"]
_MODE = flags.DEFINE_enum("mode", "train", _MODES, "What to do; see the examples above.")
_NUM = flags.DEFINE_integer(
    "num",
    None,
    "Samples of --mode=sample, images of --mode=ais: default 100. Samples of --mode=quality: "
    "default half as many as test examples.",
)
_SAMPLE_SEED = flags.DEFINE_integer(
    "sample_seed", 0, "Seed of --mode=sample and quality.", lower_bound=0, upper_bound=2**31 - 1
)
_CLASSES = flags.DEFINE_list(
    "classes", [], "Of --mode=sample and a model that is told labels: which to draw. Default: all."
)
_JUDGE = flags.DEFINE_string(
    "judge", None, "Of --mode=quality: whose features, a work directory or an .onnx file."
)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed", None, "Of several processes of one run: auto, or address:port,how many,which."
)
_LOST_AFTER = flags.DEFINE_integer(
    "lost_after",
    60,
    "Seconds without a sign of life from a process that end all of a run.",
    lower_bound=1,
)
_DEVICES = flags.DEFINE_list(
    "devices", ["1", "2", "4", "8"], "Of --mode=plan: numbers of devices that can share a batch."
)
_SWEEP = flags.DEFINE_string(
    "sweep", None, "Grid of --mode=sweep: 'field=value,value;seed=0:3'. Default: the config's own."
)
_LAUNCHER = flags.DEFINE_string(
    "launcher", None, "Run a sweep's programs as jobs: local, or slurm;slurm_partition=gpu;..."
)
_TRIALS = flags.DEFINE_string(
    "trials", None, "Search by Optuna: rounds x members, 4x8; ranges in --sweep: uniform(0.5,2)."
)
_PROGRAM = flags.DEFINE_integer("program", None, "Of a sweep, run this program only: for jobs.")

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


def main(argv: list[str]) -> None:
    """Do what the flags say."""
    if len(argv) > 1:
        raise UserError(
            f"{argv[1]!r} is not a flag: write --flag=value, a value with spaces in quotes, as in "
            "--config.train.duration='10 epochs'"
        )
    for name, modes in _MODES_OF.items():
        if flags.FLAGS[name].present and _MODE.value not in modes:
            raise UserError(
                f"--{name} is for --mode={' or '.join(modes)}: leave it out of --mode={_MODE.value}"
            )
    if flags.FLAGS["lost_after"].present and _DISTRIBUTED.value is None:
        raise UserError("--lost_after is of several processes: leave it out, or give --distributed")
    cache.keep_compiled_programs()
    precision.multiply_in_full()
    if _DISTRIBUTED.value is not None:
        processes.join(_DISTRIBUTED.value, _LOST_AFTER.value)
    config, mode, file = _CONFIG.value, _MODE.value, None
    if config is not None:
        file = config_flags.get_config_filename(flags.FLAGS["config"])
    if _WORKDIR.value == "":
        raise UserError("--workdir=: name a directory, or leave it out for the default")
    if _WORKDIR.value is None and file is None:
        raise UserError(f"--mode={mode} needs --workdir or --config")
    if mode in ("train", "plan") and config is None:
        raise UserError(f"--mode={mode} needs --config, e.g. --config=configs/vae_mnist.py")
    about = mode if _TRIALS.value is None else "search"
    path = default_path(file, about) if _WORKDIR.value is None else Path(_WORKDIR.value)
    workdir, late = Workdir(path), importlib.import_module  # what one mode alone imports
    num = 100 if _NUM.value is None else _NUM.value
    how = (_SWEEP.value, _LAUNCHER.value, _PROGRAM.value, _TRIALS.value)
    {
        "train": lambda: run.train_mode(config, workdir),
        "evaluate": lambda: run.evaluate_mode(workdir, config),
        "sample": lambda: run.sample_mode(workdir, num, _SAMPLE_SEED.value, _CLASSES.value, config),
        "features": lambda: run.features_mode(workdir, config),
        "quality": lambda: late("dgm_jax.judge").quality_mode(
            workdir, _NUM.value, _SAMPLE_SEED.value, _JUDGE.value, config
        ),
        "ais": lambda: run.ais_mode(workdir, num, config),
        "sweep": lambda: late("dgm_jax.sweep.mode").sweep_mode(path, config, file, *how),
        "plan": lambda: late("dgm_jax.plan").plan_mode(config, _DEVICES.value),
        "replay": lambda: late("dgm_jax.replay").replay_mode(workdir, config),
    }[mode]()


def _parse(argv: list[str]) -> list[str]:
    app.define_help_flags()
    argv = configs.check_flags(["--help" if arg == "-h" else arg for arg in argv])
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(f"{error} (--help lists the flags)") from error


# Of a disk that is full, a quota that is used up, a file that grew too large.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interruption.leave)  # but while training, which saves first
    logging.set_verbosity(logging.WARNING)  # Orbax reports every save at INFO; --verbosity=0 shows
    with processes.ending(lambda: _LOST_AFTER.value):
        try:
            app.run(main, flags_parser=_parse)
        except UserError as error:
            sys.exit(f"error: {error}")
        except Interrupted as interrupted:
            if processes.is_first():
                print(interrupted, file=sys.stderr)
            sys.exit(interrupted.status)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            sys.exit(f"error: {error}: make room, and give the same command again")
        except KeyboardInterrupt:
            print("interrupted: give the same command again", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
