"""A classifier of MNIST, whose features judge the samples of other models (`--mode=quality`).

Run:   python -m dgm_jax.main --config=configs/classifier_mnist.py
Gives: docs/quality.md
"""

from dgm_jax.config import ConfigDict, variant
from dgm_jax.judge import classifier_config


def get_config(arg: str | None = None) -> ConfigDict:
    """Of grey values; `:binary` of dynamically binarised images; `:smoke`."""
    config = classifier_config()
    smoke = {"model.hidden": (4, 8)}
    return variant(config, arg, binary={"data.binarisation": "dynamic"}, smoke=smoke)
