"""Mean flows: the average velocity between two times, which one step of a sampler needs.

    u(z_t, r, t) = 1 / (t - r) ∫ v(z_s, s) ds,  s from r to t;   z_r = z_t - (t - r) u(z_t, r, t)

v is the velocity of flow matching, noise at t = 1 and data at t = 0. What u averages is never
integrated: differentiated by t, its definition is an identity that training makes true,

    u = v - (t - r) d/dt u(z_t, r, t),  along dz/dt = v

Reference: Geng et al. 2025, "Mean flows for one-step generative modeling", eqs. 4, 6 and 9 to 11.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dgm_jax import checks, labels, likelihoods
from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.nn import denoisers
from dgm_jax.nn.denoisers import Denoiser
from dgm_jax.nn.noise import precondition_straight
from dgm_jax.rows import beside

SAMPLING = ("sample_steps",)


@dataclasses.dataclass(frozen=True)
class Config(denoisers.Config):
    """The model's fields; those of the network are in `nn.denoisers.Config`. Reals may be traced.

    The guidance of a conditional model is trained in: sampling costs no more for it.

    Attributes:
      sigma_data: standard deviation of the data as the network sees it, images from -1 to 1 less
        their mean.
      interval: how often in training r < t; else r = t, which is flow matching.
      logit_mean: r and t are two draws in order; of log t / (1 - t) these are normal.
      logit_std: of the same: its standard deviation.
      power: an error's weight is its sum of squares to minus this power.
      sample_steps: of the sampler, each asking the network once.
    """

    sigma_data: float = 0.5
    interval: float = 0.5
    logit_mean: float = -0.4
    logit_std: float = 1.0
    power: float = 1.0
    sample_steps: int = 1


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    denoisers.check(config, spec)
    if not 0 <= config.interval <= 1:
        raise UserError(f"model.interval={config.interval}: is a fraction, from 0 to 1")
    checks.finite(config, "logit_mean")
    checks.positive(config, "sigma_data", "logit_std")
    checks.at_least(config, power=0, sample_steps=1)


# (z [B, *event], r [B], t [B]) -> u(z, r, t), like z
Average = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def average_and_target(
    u: Average, z: jax.Array, r: jax.Array, t: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """u(z, r, t) and what the identity says that it is, v - (t - r) du/dt (eqs. 10 and 11).

    Args:
      u: the average velocity.
      z: `[B, *event]`.
      r, t: the two times, `[B]`.
      v: the velocity at z and t, like `z`, or in training one whose mean it is.
    """
    found, change = jax.jvp(u, (z, r, t), (v, jnp.zeros_like(r), jnp.ones_like(t)))
    return found, jax.lax.stop_gradient(v - beside(t - r, z) * change)


def draw(u: Average, noise: jax.Array, steps: int) -> jax.Array:
    """z at t = 0 of noise `[num, *event]`, by steps of equal length (eq. 12)."""

    def step(i: jax.Array, z: jax.Array) -> jax.Array:
        t, r = (jnp.full(len(z), (steps - j) / steps, z.dtype) for j in (i, i + 1))
        return z - u(z, r, t) / steps

    return jax.lax.fori_loop(0, steps, step, noise)


def build(config: Config, spec: DataSpec) -> Model:
    """A mean flow as pure functions; see `core.Model` for their contracts."""
    net, spec = Denoiser(config), denoisers.with_one_mean(spec)

    def average(params: Params, label: jax.Array | None) -> Average:
        def u(z: jax.Array, r: jax.Array, t: jax.Array) -> jax.Array:
            # Those of the velocity at t: from t = 1 one step is what the network says, and no noise
            # passes it by.
            factors = precondition_straight(beside(t, z), config.sigma_data)
            seen, times = factors.scale * z, jnp.stack([t, t - r], axis=1)
            found = net.apply({"params": params["average"]}, seen, times, label)
            return factors.skip * z + factors.out * found

        return u

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        label = labels.one_hot(jnp.zeros(1, jnp.int32), config.conditional, spec)
        x = jnp.zeros((1, *spec.event_shape))
        return {"average": net.init(rng, x, jnp.zeros((1, 2)), label)["params"]}

    def times(rng: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
        """r ≤ t, each `[num]`."""
        time_rng, equal_rng = jax.random.split(rng)
        normal = jax.random.normal(time_rng, (2, num))
        first, second = jax.nn.sigmoid(config.logit_mean + config.logit_std * normal)
        t = jnp.maximum(first, second)
        apart = jax.random.uniform(equal_rng, (num,)) < config.interval
        return jnp.where(apart, jnp.minimum(first, second), t), t

    def squared_error(
        params: Params, batch: Batch, rng: jax.Array, label_dropout: float
    ) -> jax.Array:
        """How far the identity is from true: `[B]`, summed over the dimensions of x."""
        time_rng, noise_rng, label_rng = jax.random.split(rng, 3)
        x = denoisers.scaled(batch["x"], spec)
        noise, (r, t) = jax.random.normal(noise_rng, x.shape), times(time_rng, len(x))
        told = labels.one_hot(batch.get("label"), config.conditional, spec)
        label = denoisers.dropped(told, label_rng, label_dropout)
        along = beside(t, x)
        z, v = (1 - along) * x + along * noise, noise - x
        if denoisers.is_guided(label, config.guidance):  # its velocity (eq. 19), where a label is
            without = jax.lax.stop_gradient(average(params, 0 * label)(z, t, t))
            weight = 1 + (config.guidance - 1) * jnp.sum(label, axis=1)
            v = without + beside(weight, x) * (v - without)
        found, target = average_and_target(average(params, label), z, r, t, v)
        return jnp.sum((found - target) ** 2, axis=range(1, x.ndim))

    def loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Mean squared error of the identity; its gradient is that of the weighted error (eq. 22).

        Its term is half the sum of squares, of unit-variance Gaussians in nats, to a constant.
        """
        error = squared_error(params, batch, rng, config.label_dropout)
        weighted = error * jax.lax.stop_gradient(error + 1e-2) ** -config.power
        loss = masked_mean(weighted, batch)
        loss += jax.lax.stop_gradient(masked_mean(error, batch) / spec.num_dims - loss)
        return loss, Aux({"identity": 0.5 * error})

    def terms(params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """That of the loss, where the network is told every label."""
        return {"identity": 0.5 * squared_error(params, batch, rng, label_dropout=0.0)}

    def sample(
        params: Params, rng: jax.Array, num: int, label: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        told = labels.of_samples(num, label, config.conditional, spec)
        given = labels.one_hot(told.get("label"), config.conditional, spec)
        noise = jax.random.normal(rng, (num, *spec.event_shape))
        x = draw(average(params, given), noise, config.sample_steps)
        return {"x": denoisers.whole(denoisers.unscaled(x, spec), spec)} | told

    return Model(
        init=init,
        players=(Player("average", loss_fn, terms),),
        log_likelihood_fns={},
        sample=sample,
        samples_have_label=config.conditional,
    )
