"""Objectives: what a latent-variable model is trained on, as pure functions.

Each takes K posterior draws per example and gives a cost float `[B]` in nats, lower is better,
whose value is minus a bound on log p(x), or a published variation of one, and whose gradient is
the estimator that bears the name. They know log-densities only, so any prior, posterior and
decoder goes with any of them that can use it.

References: Kingma & Welling 2014; Burda et al. 2016 (IWAE); Kingma et al. 2016 (free bits); Li &
Turner 2016 (Rényi); Mnih & Rezende 2016 (VIMCO); Jang et al. 2017, Maddison et al. 2017
(Gumbel-softmax); Roeder et al. 2017 (sticking the landing); Chen et al. 2018 (TCVAE); Tucker et al.
2019 (DReG); Zhao et al. 2019 (InfoVAE).
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgm_jax import checks
from dgm_jax.core import UserError
from dgm_jax.distributions import log_mean_exp
from dgm_jax.draws import Draws


class Options(NamedTuple):
    """Numbers of an objective; each may be traced.

    Attributes:
      beta: weight of the rate (Higgins et al. 2017); 1 gives a bound on log p(x).
      alpha: order of the Rényi bound; 0 is IWAE, 1 would be the ELBO.
      free_nats: λ of free bits, nats per latent.
      mmd_weight: α + λ - 1 of InfoVAE, which is λ - β: of the divergence beside the rate.
    """

    beta: float = 1.0
    alpha: float = 0.0
    free_nats: float = 0.5
    mmd_weight: float = 10.0


def elbo(draws: Draws, options: Options) -> jax.Array:
    """Minus the ELBO, the rate in closed form where there is one (Kingma & Welling 2014, eq. 10).

    The mean over K draws; more draws lower its variance and leave its expectation alone.
    """
    return draws.distortion + options.beta * draws.total_rate


def elbo_monte_carlo(draws: Draws, options: Options) -> jax.Array:
    """Minus the ELBO, all of it by sampling (Kingma & Welling 2014, eq. 6)."""
    return -jnp.mean(draws.log_weights(options.beta), axis=0)


def sticking_the_landing(draws: Draws, options: Options) -> jax.Array:
    """Minus the ELBO, without the score term in its gradient (Roeder et al. 2017, eq. 6).

    The term has mean zero; without it the gradient vanishes, draw by draw, at the exact posterior.
    """
    detached = draws._replace(log_posterior=draws.log_posterior_at(draws.z, True))
    return elbo_monte_carlo(detached, options)


def iwae(draws: Draws, options: Options) -> jax.Array:
    """Minus the importance-weighted bound -log 1/K Σ_k w_k (Burda et al. 2016, eq. 8)."""
    return -log_mean_exp(draws.log_weights(options.beta))


def dreg(draws: Draws, options: Options) -> jax.Array:
    """The importance-weighted bound with the doubly-reparameterised gradient.

    The posterior's gradient is Σ_k w̃_k² ∂log w_k/∂z_k ∂z_k/∂φ, whose signal-to-noise ratio does
    not fall with K (Tucker et al. 2019, eq. 8); the model's is IWAE's, Σ_k w̃_k ∂log w_k/∂θ. With
    a rate weighed by β the score term taken out has that weight, and w̃² becomes
    (1 - β) w̃ + β w̃².
    """
    log_w = jax.lax.stop_gradient(draws.log_weights(options.beta))
    weight = jax.nn.softmax(log_w, axis=0)
    scale = 1 - options.beta + options.beta * weight  # times the weight in the sum below
    # The densities are the same numbers as above. The compiler computes them once, but for those of
    # a mixture or a VampPrior, whose loops over the latents it does not merge.
    scaled = jax.tree.map(lambda z: scale_gradient(z, scale), draws.z)
    surrogate = jnp.sum(weight * draws.log_weights_at(scaled, options.beta, True), axis=0)
    return _with_value(-log_mean_exp(log_w), -surrogate)


def vimco(draws: Draws, options: Options) -> jax.Array:
    """The importance-weighted bound for draws that cannot be reparameterised.

    A score-function gradient whose baseline for draw k is the bound with log w_k replaced by the
    mean of the other log-weights (Mnih & Rezende 2016, eqs. 10 and 11). Needs K ≥ 2.
    """
    z = jax.lax.stop_gradient(draws.z)
    log_w = draws.log_weights_at(z, options.beta, detached=False)
    held = jax.lax.stop_gradient(log_w)
    num = len(held)
    others = (jnp.sum(held, axis=0, keepdims=True) - held) / (num - 1)
    # [K, K, B]: row k has log w_k replaced.
    replaced = jnp.where(jnp.eye(num, dtype=bool)[..., None], others[None], held[None])
    signal = log_mean_exp(held)[None] - log_mean_exp(replaced, axis=1)
    surrogate = log_mean_exp(log_w) + jnp.sum(signal * draws.log_posterior_at(z, False), axis=0)
    return _with_value(-log_mean_exp(held), -surrogate)


def gumbel_softmax(draws: Draws, options: Options) -> jax.Array:
    """Minus the ELBO of discrete latents, at relaxed draws (Jang et al. 2017, section 2).

    A rate in closed form is exact at any temperature. Everything else is the discrete z's formula,
    such as Σ_c z_c log π_c, at a z between the corners: neither its value nor its gradient is that
    of a bound, of the discrete model or of a relaxed one (for that, see Maddison et al. 2017,
    section 3.3). Both tend to the ELBO's as the temperature falls, and the gradient's variance
    rises.
    """
    return elbo(draws.at(draws.relaxed), options)


def straight_through(draws: Draws, options: Options) -> jax.Array:
    """Minus the ELBO of discrete latents, with the gradient through the relaxed draws.

    The value is that of the discrete draws; the gradient is biased at any temperature (Jang et al.
    2017, section 2.2).
    """
    return elbo(draws.at(_with_value(draws.z, draws.relaxed)), options)


def renyi(draws: Draws, options: Options) -> jax.Array:
    """Minus the Rényi bound 1/(1-α) log 1/K Σ_k w_k^(1-α) (Li & Turner 2016, eq. 5), α ≠ 1.

    α = 0 is IWAE; α = -1 is the χ² upper bound CUBO₂ (Dieng et al. 2017), a bound only in
    expectation and in the limit of K.
    """
    power, log_w = 1 - options.alpha, draws.log_weights(options.beta)
    divisor = jnp.where(power == 0, 1.0, power)  # α may pass 1 on its way: the ELBO
    usual = log_mean_exp(power * log_w) / divisor
    # Near α = 1 the bound is the mean of log w and little more, of which a quotient of two small
    # numbers would have lost the digits.
    mean = jnp.mean(log_w, axis=0)
    small = power * (log_w - mean[None])
    near = jnp.max(jnp.abs(small), axis=0) < 0.1
    rest = jnp.log1p(jnp.mean(jnp.expm1(jnp.where(near[None], small, 0.0)), axis=0))
    return -jnp.where(near, mean + rest / divisor, usual)


def free_bits(draws: Draws, options: Options) -> jax.Array:
    """The ELBO with at least λ nats charged for each latent (Kingma et al. 2016, eq. 15).

    The rate of a latent is averaged over the batch before it is compared with λ.
    """
    mean_rate = draws.weight @ draws.rate / jnp.sum(draws.weight)
    charged = jnp.sum(jnp.maximum(mean_rate, options.free_nats))
    return draws.distortion + options.beta * charged


def tcvae(draws: Draws, options: Options) -> jax.Array:
    """The ELBO with its rate taken apart and the total correlation weighed by β.

    rate = mutual information + total correlation + dimension-wise KL (Chen et al. 2018, eq. 2),
    by the minibatch-weighted estimator of log q(z) (eq. S6 there).
    """
    z = draws.z[0]
    pairs = draws.log_posterior_pairs(z) + jnp.log(draws.weight)[None, :, None]
    normaliser = jnp.log(draws.num_examples * jnp.sum(draws.weight))
    log_q = jax.nn.logsumexp(jnp.sum(pairs, axis=-1), axis=1) - normaliser
    log_q_each = jnp.sum(jax.nn.logsumexp(pairs, axis=1) - normaliser, axis=-1)
    mutual_information = draws.log_posterior[0] - log_q
    total_correlation = log_q - log_q_each
    dimension_wise = log_q_each - draws.log_prior[0]
    rate = mutual_information + options.beta * total_correlation + dimension_wise
    return -draws.log_likelihood[0] + rate


def infovae(draws: Draws, options: Options) -> jax.Array:
    """Distortion + β rate + w MMD(q(z), p(z)), w = `mmd_weight` (Zhao et al. 2019, eq. 6).

    β is their 1 - α and w their α + λ - 1: their λ is β + w. The rate may be left out altogether
    (β = 0): the divergence holds q(z) to the prior.
    """
    divergence = mmd(draws.z[0], draws.draw_prior(), draws.weight)
    return elbo(draws, options) + options.mmd_weight * divergence


def mmd(x: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
    """Squared maximum mean discrepancy between two samples, without bias, `[]`.

    Kernel 2L / (2L + |x - y|²), heavy-tailed so that far points still feel a gradient. Its
    expectation is 0 for equal distributions, so single values may be negative. A single row has no
    pair, and no part for the distance within it.

    Args:
      x: float `[B, L]`.
      y: float `[B, L]`.
      weight: float `[B]`, 1 for the rows of `x` that count.

    Reference: Gretton et al. 2012, lemma 6; Tolstikhin et al. 2018, section 4, for the kernel.
    """
    scale = 2.0 * x.shape[-1]
    weight_y = jnp.ones_like(weight)

    def kernel(a: jax.Array, b: jax.Array) -> jax.Array:
        # |a - b|² without a difference for each pair and latent; its rounding is far below 2L.
        lengths = jnp.sum(a**2, axis=-1)[:, None] + jnp.sum(b**2, axis=-1)[None]
        return scale / (scale + jnp.maximum(lengths - 2 * a @ b.T, 0))

    def within(a: jax.Array, w: jax.Array) -> jax.Array:
        pairs = w[:, None] * w[None] * (1 - jnp.eye(len(a)))
        return jnp.sum(pairs * kernel(a, a)) / jnp.maximum(jnp.sum(pairs), 1)

    cross = weight[:, None] * weight_y[None]
    between = jnp.sum(cross * kernel(x, y)) / jnp.sum(cross)
    return within(x, weight) + within(y, weight_y) - 2 * between


class Objective(NamedTuple):
    """An objective, and what it can be used with.

    Attributes:
      cost: `(draws, options) -> [B]`, nats.
      needs: what it needs of its draws: names of `DRAWS_MAY_HAVE`.
      least: the fewest draws per example.
      most: the most.
    """

    cost: Callable[[Draws, Options], jax.Array]
    needs: tuple[str, ...]
    least: int = 1
    most: float = math.inf


# What an objective needs that not every model's draws have.
DRAWS_MAY_HAVE = {
    "reparameterised": "z that can be differentiated in the posterior's parameters",
    "log_posterior_at": "log q(z | x) at given z",
    "relaxed": "discrete latents, as of model.name='discrete_vae'",
    "rate": "the rate of each latent in closed form",
    "log_posterior_pairs": "q(z | x) latent by latent",
    "draw_prior": "one vector z, and draws of its prior that can be differentiated",
}

OBJECTIVES = {
    "elbo": Objective(elbo, ("reparameterised",)),
    "elbo_monte_carlo": Objective(elbo_monte_carlo, ("reparameterised",)),
    "stl": Objective(sticking_the_landing, ("reparameterised", "log_posterior_at")),
    "iwae": Objective(iwae, ("reparameterised",)),
    "dreg": Objective(dreg, ("reparameterised", "log_posterior_at")),
    "vimco": Objective(vimco, ("log_posterior_at",), least=2),  # it compares the draws
    "gumbel_softmax": Objective(gumbel_softmax, ("relaxed",)),
    "straight_through": Objective(straight_through, ("relaxed",)),
    "renyi": Objective(renyi, ("reparameterised",), least=2),
    "free_bits": Objective(free_bits, ("reparameterised", "rate")),
    "tcvae": Objective(tcvae, ("reparameterised", "log_posterior_pairs"), most=1),
    "infovae": Objective(infovae, ("reparameterised", "draw_prior"), most=1),
}

# What the draws of a hierarchy have.
LAYERED = ("reparameterised", "log_posterior_at")


@dataclasses.dataclass(frozen=True)
class Config:
    """The objective of a hierarchy, among the fields of its model. Real numbers may be traced.

    Attributes:
      objective: one of `usable(LAYERED)`, or what the model says.
      num_samples: K, posterior draws per example in the objective.
      beta: weight of the rate; 1 gives a bound on log p(x).
      alpha: order of the Rényi bound.
    """

    objective: str = "elbo"
    num_samples: int = 1
    beta: float = 1.0
    alpha: float = 0.0

    @property
    def options(self) -> Options:
        """The numbers of the objective."""
        return Options(beta=self.beta, alpha=self.alpha)


def usable(provided: Collection[str]) -> list[str]:
    """The objectives of a model whose draws have `provided`: names of `DRAWS_MAY_HAVE`."""
    return [name for name, of in OBJECTIVES.items() if set(of.needs) <= set(provided)]


def check(
    name: str, num_samples: int, options: Options, provided: Collection[str], of: str
) -> None:
    """Refuse an objective, K or numbers that make no sense.

    Args:
      name: of the objective.
      num_samples: K.
      options: its numbers.
      provided: what the model's draws have: names of `DRAWS_MAY_HAVE`.
      of: whose draws they are, to be named in the error.

    Raises:
      UserError: names the field, its value and what is allowed, with the reason.
    """
    allowed = ", ".join(usable(provided))
    if name not in OBJECTIVES:
        raise UserError(f"model.objective={name!r}: choose one of {allowed}")
    chosen = OBJECTIVES[name]
    if missing := [DRAWS_MAY_HAVE[need] for need in chosen.needs if need not in provided]:
        raise UserError(
            f"model.objective={name!r} needs {' and '.join(missing)}, which {of} does not have: "
            f"choose one of {allowed}"
        )
    if num_samples < chosen.least:
        raise UserError(
            f"model.num_samples={num_samples}: {name!r} needs K of at least {chosen.least}"
        )
    if num_samples > chosen.most:
        raise UserError(
            f"model.num_samples={num_samples}: {name!r} takes a K of at most {chosen.most}"
        )
    checks.at_least(options, beta=0, free_nats=0, mmd_weight=0)
    if not math.isfinite(options.alpha) or (name == "renyi" and options.alpha == 1):
        raise UserError(
            f"model.alpha={options.alpha}: give a finite order other than 1, which is the ELBO"
        )


@jax.custom_vjp
def scale_gradient(z: jax.Array, scale: jax.Array) -> jax.Array:
    """The identity in `z` `[K, B, ...]`, whose gradient is multiplied by `scale` `[K, B]`."""
    del scale
    return z


def _scale_gradient_forward(z: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    return z, scale


def _scale_gradient_backward(scale: jax.Array, grad: jax.Array) -> tuple[jax.Array, None]:
    return grad * scale.reshape(scale.shape + (1,) * (grad.ndim - scale.ndim)), None


scale_gradient.defvjp(_scale_gradient_forward, _scale_gradient_backward)


def _with_value(value: jax.Array, surrogate: jax.Array) -> jax.Array:
    """`value`, with the gradient of `surrogate`."""
    return jax.lax.stop_gradient(value) + (surrogate - jax.lax.stop_gradient(surrogate))
