"""The config of a work directory, as a config file: `--config=.../kept_config.py:<directory>`.

What `--config.eval.num_samples=500` sets where a mode looks at a trained model and no `--config`
is given.
"""

from pathlib import Path

from ml_collections import ConfigDict

from dgm_jax.workdir import Workdir


def get_config(path: str) -> ConfigDict:
    """The config that made the run in the directory `path`.

    Raises:
      UserError: as `Workdir.load_config`.
    """
    return Workdir(Path(path)).load_config()
