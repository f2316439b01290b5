"""In which type layers multiply: faster products between float32 everything else."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax.core import Aux, Batch, Model, Params, Player, UserError

DTYPES = ("float32", "tensorfloat32", "bfloat16")

_dtype = contextvars.ContextVar("dtype of products", default="float32")


def check(field: str, dtype: str) -> None:
    """Refuse a type that is none of `DTYPES`.

    Raises:
      UserError: names the field and the types there are.
    """
    if dtype not in DTYPES:
        raise UserError(f"{field}={dtype!r}: choose one of {', '.join(DTYPES)}")


def multiply_in_full() -> None:
    """Make float32 mean float32 wherever nothing else is asked for, as on a CPU it always does.

    Left to itself, JAX lets a GPU round the factors of float32 products to 10 bits, and a TPU to 7:
    a likelihood would depend on what it was measured on. A choice that the user has made in
    `JAX_DEFAULT_MATMUL_PRECISION` stands.
    """
    if jax.config.jax_default_matmul_precision is None:
        jax.config.update("jax_default_matmul_precision", "highest")


def product(multiply: Callable[..., jax.Array], *factors: jax.Array) -> jax.Array:
    """`multiply(*factors)` in the type of `training_in`, given back in the factors' own.

    The factors are rounded, and so are the result and, backwards, the derivative that comes to it:
    all products of a step, forward and backward, are in that type. Activations, biases, densities
    and sums over latents, pixels and examples are not.
    """
    dtype = _dtype.get()
    if dtype == "float32":  # whatever the factors are: float64 where tests ask for it
        return multiply(*factors)
    if dtype == "tensorfloat32":  # no type of arrays: a way to multiply float32
        with jax.default_matmul_precision(dtype):
            return multiply(*factors)
    with jax.default_matmul_precision("default"):
        result = multiply(*(factor.astype(dtype) for factor in factors))
    return result.astype(jnp.result_type(*factors))


def _dot_general(x: jax.Array, w: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
    """Of a dense layer: the last axis of `x` with the first of `w`."""
    # One leading axis: backwards, several make XLA's CPU compiler copy x transposed.
    flat = x.reshape(-1, x.shape[-1])
    dimensions = (((1,), (0,)), ((), ()))
    out = product(lambda x, w: jax.lax.dot_general(x, w, dimensions, **options), flat, w)
    return out.reshape(*x.shape[:-1], w.shape[-1])


Dense = functools.partial(nn.Dense, dot_general=_dot_general)


def training_in(model: Model, dtype: str) -> Model:
    """`model` whose losses multiply in `dtype`; its parameters and all measurements are float32.

    Reference: Micikevicius et al. 2018, "Mixed precision training"; bfloat16 has the range of
    float32, so that no loss is scaled.

    Args:
      model: of the training step.
      dtype: one of `DTYPES`.
    """

    def in_dtype(player: Player) -> Player:
        def loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
            with _set(dtype):
                return player.loss_fn(params, batch, rng)

        return player._replace(loss_fn=loss_fn)

    return model._replace(players=tuple(map(in_dtype, model.players)))


@contextlib.contextmanager
def _set(dtype: str) -> Iterator[None]:
    token = _dtype.set(dtype)
    try:
        yield
    finally:
        _dtype.reset(token)
