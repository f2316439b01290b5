"""Likelihoods p(x | z): what a decoder's outputs mean.

A decoder gives P numbers for each of the D dimensions of x, as one array `[..., D, P]`; a
likelihood turns them into log-probabilities, means and draws. x is as the data hold it: {0, 1},
{0, ..., 255} or real.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax.core import DataSpec, UserError
from dgm_jax.distributions import (
    bernoulli_log_prob,
    discretised_logistic_log_prob,
    draw_logistic,
    gaussian_log_prob,
)


class Likelihood(NamedTuple):
    """One family of p(x | z).

    Attributes:
      num_outputs: P.
      support: of x, as in `DataSpec.support`.
      initial: `mean [D] -> [D, P]`, outputs that give data of this mean a fair start.
      log_prob: `(outputs [..., D, P], x [..., D]) -> [...]`, nats, summed over D.
      mean: `outputs -> [..., D]`, E[x | z], of images scaled to [0, 1], for pictures.
      draw: `(rng, outputs) -> [..., D]`, x as the data hold it.
      draws_what_it_scores: whether `draw` draws from exp(`log_prob`), which then sums to 1.
    """

    num_outputs: int
    support: str
    initial: Callable[[np.ndarray], np.ndarray]
    log_prob: Callable[[jax.Array, jax.Array], jax.Array]
    mean: Callable[[jax.Array], jax.Array]
    draw: Callable[[jax.Array, jax.Array], jax.Array]
    draws_what_it_scores: bool = True


def bernoulli() -> Likelihood:
    """x in {0, 1}, independent given z; P = 1, the logit."""

    def initial(mean: np.ndarray) -> np.ndarray:
        """The best constant model: the logit of the mean (Burda et al. 2016)."""
        mean = np.clip(mean, 1e-3, 1 - 1e-3)
        return np.log(mean / (1 - mean))[:, None]

    def draw(rng: jax.Array, outputs: jax.Array) -> jax.Array:
        return jax.random.bernoulli(rng, jax.nn.sigmoid(outputs[..., 0])).astype(jnp.float32)

    return Likelihood(
        num_outputs=1,
        support="binary",
        initial=initial,
        log_prob=lambda outputs, x: jnp.sum(bernoulli_log_prob(outputs[..., 0], x), axis=-1),
        mean=lambda outputs: jax.nn.sigmoid(outputs[..., 0]),
        draw=draw,
    )


def categorical(num: int = 256) -> Likelihood:
    """x in {0, ..., num - 1}, independent given z; P = num, the logits."""

    def initial(mean: np.ndarray) -> np.ndarray:
        return np.zeros((len(mean), num), np.float32)

    def log_prob(outputs: jax.Array, x: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(outputs, axis=-1)
        index = jnp.broadcast_to(x.astype(jnp.int32), log_probs.shape[:-1])[..., None]
        return jnp.sum(jnp.take_along_axis(log_probs, index, axis=-1)[..., 0], axis=-1)

    return Likelihood(
        num_outputs=num,
        support="uint8",
        initial=initial,
        log_prob=log_prob,
        mean=lambda out: jax.nn.softmax(out, axis=-1) @ jnp.linspace(0.0, 1.0, num),
        draw=lambda rng, out: jax.random.categorical(rng, out).astype(jnp.float32),
    )


def discretised_logistic_mixture(components: int = 5) -> Likelihood:
    """x in {0, ..., 255}: a mixture of logistics, integrated over each value's bin.

    P = 3 · components: logits of the weights, locations and log-scales, on the scale where x runs
    from -1 to 1. Salimans et al. 2017, "PixelCNN++", eq. 2; channels are independent given z.
    """

    def split(outputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits, location, raw = jnp.split(outputs, 3, axis=-1)
        return logits, location, jnp.clip(raw, -7.0, 7.0)

    def initial(mean: np.ndarray) -> np.ndarray:
        centre = (mean / 127.5 - 1)[:, None]
        spread = np.broadcast_to(np.linspace(-0.5, 0.5, components), (len(mean), components))
        return np.concatenate([0 * spread, centre + spread, 0 * spread - 1.5], axis=1)

    def log_prob(outputs: jax.Array, x: jax.Array) -> jax.Array:
        logits, location, log_scale = split(outputs)
        each = discretised_logistic_log_prob(x[..., None], location, log_scale)
        each = each + jax.nn.log_softmax(logits, axis=-1)
        return jnp.sum(jax.nn.logsumexp(each, axis=-1), axis=-1)

    def mean(outputs: jax.Array) -> jax.Array:
        """Of the mixture clipped to the range of x: the integral of its upper tail."""
        logits, location, log_scale = split(outputs)
        scale = jnp.exp(log_scale)
        above = jax.nn.softplus((location + 1) / scale) - jax.nn.softplus((location - 1) / scale)
        return jnp.sum(jax.nn.softmax(logits, axis=-1) * scale * above, axis=-1) / 2

    def draw(rng: jax.Array, outputs: jax.Array) -> jax.Array:
        which_rng, rng = jax.random.split(rng)
        location, log_scale = _choose(which_rng, *split(outputs))
        value = location + jnp.exp(log_scale) * draw_logistic(rng, location.shape)
        return jnp.clip(jnp.round((value + 1) * 127.5), 0, 255)

    return Likelihood(3 * components, "uint8", initial, log_prob, mean, draw)


def _choose(rng: jax.Array, logits: jax.Array, *of: jax.Array) -> list[jax.Array]:
    """One component for each dimension, by logits `[..., D, M]`: its part `[..., D]` of each."""
    which = jax.random.categorical(rng, logits)[..., None]
    return [jnp.take_along_axis(each, which, axis=-1)[..., 0] for each in of]


def gaussian_mixture(components: int = 10) -> Likelihood:
    """A density of real x: a mixture of Gaussians for each dimension, independent given z.

    P = 3 · components: logits of the weights, means and log-deviations.
    """

    def split(outputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits, mu, raw = jnp.split(outputs, 3, axis=-1)
        return logits, mu, jnp.clip(raw, -7.0, 7.0)  # a density has no upper bound

    def initial(mean: np.ndarray) -> np.ndarray:
        spread = np.broadcast_to(np.linspace(-1, 1, components), (len(mean), components))
        return np.concatenate([0 * spread, mean[:, None] + spread, 0 * spread - 0.5], axis=1)

    def log_prob(outputs: jax.Array, x: jax.Array) -> jax.Array:
        logits, mu, log_sigma = split(outputs)
        each = gaussian_log_prob(x[..., None], mu, log_sigma) + jax.nn.log_softmax(logits)
        return jnp.sum(jax.nn.logsumexp(each, axis=-1), axis=-1)

    def mean(outputs: jax.Array) -> jax.Array:
        logits, mu, _ = split(outputs)
        return jnp.sum(jax.nn.softmax(logits) * mu, axis=-1)

    def draw(rng: jax.Array, outputs: jax.Array) -> jax.Array:
        which_rng, rng = jax.random.split(rng)
        mu, log_sigma = _choose(which_rng, *split(outputs))
        return mu + jnp.exp(log_sigma) * jax.random.normal(rng, mu.shape)

    return Likelihood(3 * components, "real", initial, log_prob, mean, draw)


def gaussian(sigma: float = 0.0) -> Likelihood:
    """x in {0, ..., 255}: N(x; 255 mu, (255 sigma)²), P = 1, or of a learned sigma, P = 2.

    Of sigma at least 1 / 255 the density at whole numbers, summed over all of them, is 1 to 1e-8
    (Poisson's summation formula: 2 exp(-2 pi²)): it is a probability of grey values, but for what
    lies beyond 0 and 255.

    Args:
      sigma: of x / 255; 0 for a learned one.
    """

    def split(outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        if sigma:
            return outputs[..., 0], jnp.full((), math.log(sigma))
        # A floor of one grey value: finer than the data's own steps, it is no probability.
        return outputs[..., 0], jnp.log(jax.nn.softplus(outputs[..., 1]) + 1 / 255)

    def initial(mean: np.ndarray) -> np.ndarray:
        return np.stack([mean / 255] + ([] if sigma else [0 * mean - 1.0]), axis=1)

    def draw(rng: jax.Array, outputs: jax.Array) -> jax.Array:
        mu, log_sigma = split(outputs)
        value = mu + jnp.exp(log_sigma) * jax.random.normal(rng, mu.shape)
        return jnp.clip(jnp.round(255 * value), 0, 255)

    def log_prob(outputs: jax.Array, x: jax.Array) -> jax.Array:
        mu, log_sigma = split(outputs)
        return jnp.sum(gaussian_log_prob(x / 255, mu, log_sigma) - math.log(255), axis=-1)

    return Likelihood(
        num_outputs=1 if sigma else 2,
        support="uint8",
        initial=initial,
        log_prob=log_prob,
        mean=lambda outputs: jnp.clip(outputs[..., 0], 0, 1),
        draw=draw,
        draws_what_it_scores=False,  # draws beyond 0 and 255 are moved there, and scored less
    )


LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "bernoulli": bernoulli,
    "categorical": categorical,
    "discretised_logistic_mixture": discretised_logistic_mixture,
    "gaussian": gaussian,
    "gaussian_fixed": lambda: gaussian(0.1),
    "gaussian_mixture": gaussian_mixture,
}


def picture(likelihood: Likelihood, outputs: jax.Array, spec: DataSpec) -> jax.Array:
    """E[x | z], of images in [0, 1], `[B, *event]`, of a decoder's outputs `[B, D, P]`."""
    return likelihood.mean(outputs).reshape(len(outputs), *spec.event_shape)


def draw(
    likelihood: Likelihood, rng: jax.Array, outputs: jax.Array, spec: DataSpec
) -> dict[str, jax.Array]:
    """x drawn from p(x | z), as the data hold it, and its mean; each `[B, *event]`."""
    x = likelihood.draw(rng, outputs).reshape(len(outputs), *spec.event_shape)
    return {"x": x, "mean": picture(likelihood, outputs, spec)}


def draw_in_turn(
    likelihood: Likelihood,
    rng: jax.Array,
    outputs_at: Callable[[jax.Array, jax.Array], jax.Array],
    shape: tuple[int, int, int, int],
) -> jax.Array:
    """x `[B, H, W, C]` drawn pixel by pixel, row by row.

    Args:
      likelihood: of each pixel given those before it.
      rng: of the draws.
      outputs_at: `(x, i) -> [B, C, P]` for pixel number i int32 `[]`, which may look at the pixels
        of x before it.
      shape: of x.
    """
    _, height, width, _ = shape

    def add(x: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        i, key = step
        drawn = likelihood.draw(key, outputs_at(x, i))
        return x.at[:, i // width, i % width].set(drawn), None

    pixels = jnp.arange(height * width), jax.random.split(rng, height * width)
    return jax.lax.scan(add, jnp.zeros(shape), pixels)[0]


def check(name: str, spec: DataSpec, exact: bool = False) -> None:
    """Refuse a likelihood that is none, or whose support is not the data's.

    Args:
      name: of the likelihood.
      spec: of the data.
      exact: whether the model's log p(x) is to be exact, and no bound.

    Raises:
      UserError: names the likelihood and what the data hold.
    """
    if name not in LIKELIHOODS:
        raise UserError(f"model.likelihood={name!r}: choose one of {', '.join(LIKELIHOODS)}")
    chosen = LIKELIHOODS[name]()
    support = chosen.support
    if support == spec.support:
        if exact and not chosen.draws_what_it_scores:
            raise UserError(
                f"model.likelihood={name!r} gives the grey values probabilities that sum to less "
                "than 1, and log p(x) of this model is to be exact: choose categorical or "
                "discretised_logistic_mixture"
            )
        return
    needs = f"model.likelihood={name!r} needs {support} data"
    if {support, spec.support} == {"binary", "uint8"}:
        binary, grey = "'dynamic' or 'fixed'", "'none'"
        given, wanted = (grey, binary) if support == "binary" else (binary, grey)
        raise UserError(
            f"{needs} and data.binarisation={given} gives {spec.support}: set it to {wanted}, or "
            "choose another likelihood"
        )
    fitting = [other for other, make in LIKELIHOODS.items() if make().support == spec.support]
    raise UserError(
        f"{needs}, and these are {spec.support}: choose "
        + (f"{', '.join(fitting)}, or " if fitting else "another model, or ")
        + "another data.dataset"
    )


def refuse_outside_support(x: jax.Array, spec: DataSpec) -> None:
    """Refuse data that no likelihood of their support covers; x being traced, nothing is checked.

    Raises:
      UserError: x has values outside the support, such as grey values to a Bernoulli.
    """
    if isinstance(x, jax.core.Tracer):
        return
    x = np.asarray(x)
    within, allowed = {
        "binary": (np.isin(x, (0, 1)), "x must be in {0, 1}"),
        "uint8": (
            (x >= 0) & (x <= 255) & (x == np.round(x)),
            "x must be whole numbers from 0 to 255",
        ),
        "tokens": (
            (x >= 0) & (x < spec.vocabulary),
            f"tokens must be from 0 to {spec.vocabulary - 1}",
        ),
        "real": (np.isfinite(x), "x must be finite"),
    }[spec.support]
    if not within.all():
        raise UserError(f"{allowed}, and this batch has the value {x[~within][0]}")
