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

from dgm_jax import cache, command_line, interruption, processes, run
from dgm_jax.core import UserError
from dgm_jax.interruption import Interrupted
from dgm_jax.nn import precision
from dgm_jax.workdir import Workdir, default_path

flags.adopt_module_key_flags(command_line)  # --help shows them


def main(argv: list[str]) -> None:
    """Do what the flags say."""
    command_line.check(argv)
    given, late = flags.FLAGS, importlib.import_module  # what one mode alone imports
    config, mode, file = given.config, given.mode, None
    cache.keep_compiled_programs()
    precision.multiply_in_full()
    if given.distributed is not None:
        processes.join(given.distributed, given.lost_after)
    if config is not None:
        file = config_flags.get_config_filename(given["config"])
    about = mode if given.trials is None else "search"
    path = default_path(file, about) if given.workdir is None else Path(given.workdir)
    workdir, seed = Workdir(path), given.sample_seed
    num = 100 if given.num is None else given.num
    how = (given.sweep, given.launcher, given.program, given.trials)
    {
        "train": lambda: run.train_mode(config, workdir),
        "evaluate": lambda: run.evaluate_mode(workdir, config),
        "sample": lambda: run.sample_mode(workdir, num, seed, given.classes, config),
        "features": lambda: run.features_mode(workdir, config),
        "quality": lambda: late("dgm_jax.judge").quality_mode(
            workdir, given.num, seed, given.judge, config
        ),
        "ais": lambda: run.ais_mode(workdir, num, config),
        "sweep": lambda: late("dgm_jax.sweep.mode").sweep_mode(path, config, file, *how),
        "plan": lambda: late("dgm_jax.plan").plan_mode(config, given.devices),
        "replay": lambda: late("dgm_jax.replay").replay_mode(workdir, config),
    }[mode]()


# Of a disk that is full, a quota that is used up, a file that grew too large.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interruption.leave)  # but while training, which saves first
    logging.set_verbosity(logging.WARNING)  # Orbax reports every save at INFO; --verbosity=0 shows
    with processes.ending(lambda: flags.FLAGS.lost_after):
        try:
            app.run(main, flags_parser=command_line.parse)
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
