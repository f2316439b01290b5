"""What a conditional model, of p(x | label), is told of labels; others are told nothing."""

import jax
import jax.numpy as jnp

from dgm_jax.core import DataSpec, UserError


def check(conditional: bool, spec: DataSpec) -> None:
    """Refuse a model of p(x | label) where there are no labels.

    Raises:
      UserError: these data have none.
    """
    if conditional and not spec.num_classes:
        raise UserError("model.conditional=True: these data have no labels")


def one_hot(label: jax.Array | None, conditional: bool, spec: DataSpec) -> jax.Array | None:
    """What a network is told of labels int32 `[B]`: `[B, C]`, or None."""
    return jax.nn.one_hot(label, spec.num_classes) if conditional else None


def of_samples(
    num: int, label: jax.Array | None, conditional: bool, spec: DataSpec
) -> dict[str, jax.Array]:
    """The `label` int32 `[num]` of as many samples: the given ones, or each class in turn.

    An empty dict of a model that is told none.
    """
    if not conditional:
        return {}
    return {"label": jnp.arange(num) % spec.num_classes if label is None else label}
