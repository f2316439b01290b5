"""From the `optimizer` section to an optax chain. Every number may be traced."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from dgm_jax.core import Params, UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """AdamW or Muon with global-norm clipping, linear warm-up and a decay to zero.

    Attributes:
      name: `adamw`, or `muon`: arrays of two axes, and of four as matrices from all axes but one to
        the last (of a convolution: from what a pixel sees to what it becomes), move by their
        orthogonalised momentum (Jordan et al. 2024) at the scale of Adam's steps (Liu et al. 2025,
        eq. 4), all else by AdamW. That goes by the axes alone: of a VampPrior's images it is the
        gradient by its norm. A step costs some products of each matrix with itself: little beside
        a large batch or many draws.
      learning_rate: at the end of the warm-up.
      warmup: fraction of training over which the learning rate rises from 0.
      schedule: how it falls afterwards: `linear` or `cosine`, to 0 at the end, or `constant`.
      b1: of AdamW: decay of the first moment.
      b2: of AdamW: decay of the second moment.
      eps: of AdamW: added to the square root of the second moment.
      weight_decay: decoupled (Loshchilov & Hutter 2019), on arrays of two or more dimensions.
      clip_norm: the gradient is scaled down to this global norm where it exceeds it.
      ema: decay of the averaged parameters that evaluation uses; 0 keeps none.
      skip_non_finite: how many updates in a row are skipped, and counted in the metric `skipped`,
        where a gradient is not finite; after one more, or at the first with 0, training stops. A
        loss that is not finite though its gradient is stops it in any case.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup: float = 0.01
    schedule: str = "linear"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 100.0
    ema: float = 0.999
    skip_non_finite: int = 0


NAMES = ("adamw", "muon")

# From the part of the decay that is over, 0 to 1, to what is left of the learning rate.
SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + jnp.cos(jnp.pi * done)) / 2,  # Loshchilov & Hutter 2017, eq. 5
    "constant": jnp.ones_like,
}


def check(config: Config) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and its range.
    """
    for field, allowed in (("name", NAMES), ("schedule", SCHEDULES)):
        if (value := getattr(config, field)) not in allowed:
            raise UserError(f"optimizer.{field}={value!r}: choose one of {', '.join(allowed)}")
    for field, low, high in (
        ("learning_rate", 0, float("inf")),
        ("warmup", 0, 1),
        ("b1", 0, 1),
        ("b2", 0, 1),
        ("weight_decay", 0, float("inf")),
        ("ema", 0, 1),
    ):
        value = getattr(config, field)
        if not low <= value < high:
            raise UserError(f"optimizer.{field}={value}: must be at least {low} and below {high}")
    for field in ("eps", "clip_norm"):
        if not getattr(config, field) > 0:
            raise UserError(f"optimizer.{field}={getattr(config, field)}: must be above 0")
    if config.skip_non_finite < 0:
        raise UserError(f"optimizer.skip_non_finite={config.skip_non_finite}: must be at least 0")


def schedule(config: Config, num_steps: int) -> optax.Schedule:
    """Learning rate as a function of the step: linear warm-up, then the decay.

    Written out because optax's own refuses a traced warm-up length.
    """
    warmup_steps = config.warmup * num_steps

    def learning_rate(step: jax.Array) -> jax.Array:
        rise = jnp.minimum(1.0, (step + 1) / jnp.maximum(warmup_steps, 1.0))
        done = jnp.clip((step - warmup_steps) / jnp.maximum(num_steps - warmup_steps, 1), 0, 1)
        return config.learning_rate * rise * SCHEDULES[config.schedule](done)

    return learning_rate


def build(config: Config, num_steps: int) -> optax.GradientTransformation:
    """The optax chain for a run of `num_steps` steps."""
    rate = schedule(config, num_steps)
    rule = optax.adamw(
        rate,
        # As arrays, so that 1 - b2 is the same number whether b2 is traced or not.
        b1=jnp.asarray(config.b1),
        b2=jnp.asarray(config.b2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
    )
    if config.name == "muon":
        matrices = muon(
            rate,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(_as_matrix, params),
            consistent_rms=0.2,
        )
        rule = optax.partition(
            {"matrix": matrices, "rest": rule},
            lambda params: jax.tree.map(lambda p: "matrix" if _as_matrix(p) else "rest", params),
        )
    rule = optax.chain(clip_by_global_norm(config.clip_norm), rule)
    return skip_non_finite(rule, config.skip_non_finite) if config.skip_non_finite else rule


def _as_matrix(p: jax.Array) -> MuonDimensionNumbers | None:
    """Which axes of a parameter are the inputs of a matrix and which its outputs, if it is one."""
    # A convolution's kernel is [rows, columns, channels, features].
    return MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1) if p.ndim in (2, 4) else None


class SkipState(NamedTuple):
    """The state of `skip_non_finite`.

    Attributes:
      in_a_row: int32 `[]`, updates skipped since the last that was made.
      inner: the state of the optimizer, as the last update that was made has left it.
    """

    in_a_row: jax.Array
    inner: Any


def skip_non_finite(
    optimizer: optax.GradientTransformation, most: int
) -> optax.GradientTransformation:
    """Make no update where the gradient's norm is not finite, but not more than `most` in a row.

    What comes after them is applied whatever it is, so that the end of a burst is never missed, and
    one without an end is seen in the parameters. `optax.apply_if_finite` does the same, but its
    state does not say which update was skipped.
    """

    def init(params: Params) -> SkipState:
        return SkipState(jnp.int32(0), optimizer.init(params))

    def update(grads: Params, state: SkipState, params: Params) -> tuple[Params, SkipState]:
        skip = ~jnp.isfinite(optax.tree.norm(grads)) & (state.in_a_row < most)
        updates, inner = optimizer.update(grads, state.inner, params)
        updates = jax.tree.map(lambda new: jnp.where(skip, 0, new), updates)
        inner = jax.tree.map(lambda old, new: jnp.where(skip, old, new), state.inner, inner)
        return updates, SkipState(jnp.where(skip, state.in_a_row + 1, 0), inner)

    return optax.GradientTransformation(init, update)


def clip_by_global_norm(max_norm: float | jax.Array) -> optax.GradientTransformation:
    """Scale the gradient down to `max_norm` where its global norm exceeds it.

    optax has the same, but divides each array by the norm: a pass over memory that this factor,
    part of the next multiplication, does without.
    """

    def clip(grads: Params, params: Params | None) -> Params:
        del params
        factor = jnp.minimum(1.0, max_norm / optax.tree.norm(grads))
        return jax.tree.map(lambda g: factor * g, grads)

    return optax.stateless(clip)


def update_ema(average: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """One step of the exponential moving average of the parameters.

    The decay is min(decay, (1 + t) / (10 + t)): the average of a short run is not its start.

    Args:
      average, params: pytrees of the same structure.
      step: int32 `[]`, t, from 0.
      decay: the asymptotic decay.
    """
    # 1 - min(decay, (1 + t) / (10 + t)), without the cancellation that the sum would suffer.
    rate = jnp.maximum(1 - jnp.asarray(decay), 9 / (10 + step))
    return jax.tree.map(lambda a, p: a + rate * (p - a), average, params)
