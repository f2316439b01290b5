"""Diffusion: a network brings back what Gaussian noise has covered, from any amount of noise.

    z_t = α x + σ ε,   x̂(z_t, γ) ≈ E[x | z_t]

with the levels γ(t) of `nn.noise`. One network serves objectives of two kinds: the bound on the
likelihood, and the quality of samples; either has both the bound and the samplers.

References: Kingma et al. 2021, "Variational diffusion models" (VDM); Karras et al. 2022,
"Elucidating the design space of diffusion-based generative models" (EDM); Hang et al. 2023,
"Efficient diffusion training via min-SNR weighting strategy"; Ho et al. 2020, "Denoising diffusion
probabilistic models"; Nichol & Dhariwal 2021, "Improved denoising diffusion probabilistic models"
(cosine); Song et al. 2021, "Denoising diffusion implicit models" (DDIM).
"""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import checks, labels, likelihoods
from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.distributions import (
    bernoulli_log_prob,
    discretised_logistic_log_prob,
    draw_logistic,
    gaussian_kl_to_standard,
    gaussian_log_prob,
)
from dgm_jax.nn import denoisers
from dgm_jax.nn.denoisers import Denoiser
from dgm_jax.nn.noise import SCHEDULES, Schedule, alpha_sigma, noisy, precondition
from dgm_jax.rows import beside

_MOST_GAMMA = 80  # e to this is still a number in float32, and so is 1 / α
_LEAST_GAMMA = -30  # σ / α is still a part of x that float32 holds; that of a bit needs none
OBJECTIVES = ("vdm", "edm", "min_snr")
SAMPLERS = ("ancestral", "ddim", "heun")
SAMPLING = ("guidance", "sample_steps", "sampler")


@dataclasses.dataclass(frozen=True)
class Config(denoisers.Config):
    """The model's fields; those of the network are in `nn.denoisers.Config`. Reals may be traced.

    Attributes:
      objective: `vdm`, the bound; `edm`, errors in units of what the network has to add, at
        log-normal noise; or `min_snr`, errors weighted by the signal-to-noise ratio up to a cap.
      schedule: γ(t), one of `SCHEDULES`: what the bound and the samplers go through. A `vdm` learns
        what lies between the ends of `monotone`.
      gamma_min: γ(0). What is less noisy than that costs `reconstruction`.
      gamma_max: γ(1). What is left of x under that noise costs `prior`.
      steps: of the process whose bound it is; 0 for the limit of infinitely many.
      sigma_data: standard deviation of the data as the network sees it, images from -1 to 1 less
        their mean.
      log_sigma_mean: of `edm`: of log σ/α in training.
      log_sigma_std: of the same: its standard deviation.
      snr_cap: of `min_snr`.
      sampler: one of `SAMPLERS`.
      sample_steps: of the sampler; `heun` asks the network twice in each.
    """

    objective: str = "vdm"
    schedule: str = "monotone"
    gamma_min: float = -12.0
    gamma_max: float = 10.0
    steps: int = 0
    sigma_data: float = 0.5
    log_sigma_mean: float = -1.2
    log_sigma_std: float = 1.2
    snr_cap: float = 5.0
    sampler: str = "ancestral"
    sample_steps: int = 100


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    denoisers.check(config, spec)
    checks.one_of(config, objective=OBJECTIVES, schedule=SCHEDULES, sampler=SAMPLERS)
    if config.schedule == "monotone" and (config.objective != "vdm" or config.steps):
        raise UserError(
            "model.schedule='monotone' is learned with model.objective='vdm' and model.steps=0: "
            "choose another schedule"
        )
    if not -_MOST_GAMMA <= config.gamma_min < config.gamma_max <= _MOST_GAMMA:
        raise UserError(
            f"model.gamma_max={config.gamma_max}: must be above model.gamma_min={config.gamma_min},"
            f" and both within ±{_MOST_GAMMA}"
        )
    if spec.support != "binary" and config.gamma_min < _LEAST_GAMMA:
        raise UserError(
            f"model.gamma_min={config.gamma_min}: so little noise is lost to rounding beside "
            f"{spec.support} data; at least {_LEAST_GAMMA}"
        )
    checks.positive(config, "sigma_data", "log_sigma_std", "snr_cap")
    checks.finite(config, "log_sigma_mean")
    checks.at_least(config, steps=0, sample_steps=1)


# (z [B, *event], gamma [B]) -> E[x | z], like z
Denoise = Callable[[jax.Array, jax.Array], jax.Array]
Gamma = Callable[[jax.Array], jax.Array]


def squared_error(denoise: Denoise, x: jax.Array, gamma: jax.Array, noise: jax.Array) -> jax.Array:
    """‖x - x̂‖² `[B]`, of `x` `[B, *event]` under noise of the same shape."""
    error = x - denoise(noisy(x, gamma, noise), gamma)
    return jnp.sum(error**2, axis=range(1, x.ndim))


def diffusion_cost(
    denoise: Denoise, gamma_at: Gamma, x: jax.Array, t: jax.Array, noise: jax.Array, steps: int = 0
) -> jax.Array:
    """What one time t uniform on [0, 1) says of the diffusion term of the bound: `[B]`, nats.

    Kingma et al. 2021, eqs. 14 (`steps` = T) and 17 (0, the limit).
    """
    if steps:
        t = (jnp.floor(t * steps) + 1) / steps
        gamma = gamma_at(t)
        rise = steps * jnp.expm1(gamma - gamma_at(t - 1 / steps))
    else:
        gamma, rise = jax.jvp(gamma_at, (t,), (jnp.ones_like(t),))
    return 0.5 * rise * jnp.exp(-gamma) * squared_error(denoise, x, gamma, noise)


def prior_cost(x: jax.Array, gamma: jax.Array) -> jax.Array:
    """KL(q(z | x) ‖ N(0, I)) `[B]`, nats, at `gamma` `[]`, that of t = 1."""
    mu, log_sigma = alpha_sigma(gamma)[0] * x, 0.5 * jax.nn.log_sigmoid(gamma)
    return jnp.sum(gaussian_kl_to_standard(mu, log_sigma), axis=range(1, x.ndim))


def decoder_log_prob(spec: DataSpec, x: jax.Array, y: jax.Array, gamma: jax.Array) -> jax.Array:
    """log p(x | z) `[B]` at the last noise level, nats.

    Each entry alone, from z / α, which is x and noise of standard deviation σ / α: of bits
    Bayes' rule, of grey values a logistic of the same deviation in bins, of reals a Gaussian.

    Args:
      spec: of the data.
      x: as the data hold it, `[B, *event]`.
      y: z / α, unscaled to the range of x.
      gamma: of z, `[]`.
    """
    log_sigma = gamma / 2
    if spec.support == "binary":
        each = bernoulli_log_prob(_log_odds(y, gamma), x)
    elif spec.support == "uint8":
        log_scale = log_sigma + math.log(math.sqrt(3) / math.pi)
        each = discretised_logistic_log_prob(x, y / 127.5 - 1, log_scale)
    else:
        each = gaussian_log_prob(x, y, log_sigma)
    return jnp.sum(each, axis=range(1, x.ndim))


def decode(spec: DataSpec, rng: jax.Array, y: jax.Array, gamma: jax.Array) -> jax.Array:
    """x drawn from p(x | z); arguments as in `decoder_log_prob`."""
    sigma = jnp.exp(gamma / 2)
    if spec.support == "binary":
        return jax.random.bernoulli(rng, jax.nn.sigmoid(_log_odds(y, gamma))).astype(y.dtype)
    if spec.support == "uint8":
        noise = draw_logistic(rng, y.shape) * (127.5 * sigma * math.sqrt(3) / math.pi)
        return jnp.clip(jnp.round(y + noise), 0, 255)
    return y + sigma * jax.random.normal(rng, y.shape)


def _log_odds(y: jax.Array, gamma: jax.Array) -> jax.Array:
    """Of a bit, by its own noisy value y around 0 or 1, whose deviation is half of σ / α."""
    return (4 * y - 2) * jnp.exp(-gamma)


def draw(
    denoise: Denoise, gammas: jax.Array, sampler: str, rng: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """z / α at the last of falling levels `[K + 1]`, from noise at the first.

    In terms of y = z / α and s = σ / α, the deviation of its noise: `ddim` is Euler's step of the
    probability flow dy/ds = (y - x̂) / s, `heun` its second-order step (Karras et al. 2022,
    algorithm 1), and `ancestral` draws from q(z_s | z_t, x = x̂) (Kingma et al. 2021, eq. 26).

    Args:
      denoise: x̂.
      gammas: γ of each level.
      sampler: one of `SAMPLERS`.
      rng: of all noise.
      shape: of the result, `[num, *event]`.
    """
    start_rng, rng = jax.random.split(rng)

    def at(y: jax.Array, gamma: jax.Array) -> jax.Array:
        return denoise(alpha_sigma(gamma)[0] * y, jnp.full(len(y), gamma))

    def step(y: jax.Array, given: tuple) -> tuple[jax.Array, None]:
        before, after, key = given
        s, new = jnp.exp(before / 2), jnp.exp(after / 2)
        slope = (y - at(y, before)) / s
        if sampler == "ancestral":
            kept = -jnp.expm1(after - before)
            noise = jax.random.normal(key, y.shape)
            return y - kept * s * slope + new * jnp.sqrt(kept) * noise, None
        there = y + (new - s) * slope
        if sampler == "heun":
            there = y + (new - s) * (slope + (there - at(there, after)) / new) / 2
        return there, None

    start = jax.random.normal(start_rng, shape) / alpha_sigma(gammas[0])[0]
    keys = jax.random.split(rng, len(gammas) - 1)
    return jax.lax.scan(step, start, (gammas[:-1], gammas[1:], keys))[0]


def build(config: Config, spec: DataSpec) -> Model:
    """Diffusion as pure functions; see `core.Model` for their contracts."""
    net, is_vdm = Denoiser(config), config.objective == "vdm"
    if spec.support != "binary":  # Bayes' rule makes use of what each bit is on the average
        spec = denoisers.with_one_mean(spec)
    schedule = Schedule(config.schedule, (config.gamma_min, config.gamma_max))

    def gamma_of(params: Params) -> Gamma:
        own = {"params": params["diffusion"].get("schedule", {})}
        return lambda t: schedule.apply(own, t)

    def denoiser(params: Params, label: jax.Array | None, guidance: float = 1.0) -> Denoise:
        def answer(x: jax.Array, time: jax.Array, label: jax.Array | None) -> jax.Array:
            return net.apply({"params": params["diffusion"]["net"]}, x, time, label)

        ask = denoisers.guided(answer, label, guidance)

        def denoise(z: jax.Array, gamma: jax.Array) -> jax.Array:
            """Of bits, by Bayes' rule: what the network says of each, and its own noisy value."""
            factors = precondition(beside(gamma, z), config.sigma_data)
            out = ask(factors.scale * z, gamma / 8)
            if spec.support != "binary":
                return factors.skip * z + factors.out * out
            gamma = beside(gamma, z)
            y = denoisers.unscaled(z / alpha_sigma(gamma)[0], spec)
            usual = likelihoods.bernoulli().initial(spec.mean.ravel()).reshape(1, *spec.event_shape)
            return denoisers.scaled(nn.sigmoid(out + usual + _log_odds(y, gamma)), spec)

        return denoise

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        net_rng, schedule_rng = jax.random.split(rng)
        x, time = jnp.zeros((1, *spec.event_shape)), jnp.zeros(1)
        label = labels.one_hot(jnp.zeros(1, jnp.int32), config.conditional, spec)
        params = {"net": net.init(net_rng, x, time, label)["params"]}
        if config.schedule == "monotone":
            params["schedule"] = schedule.init(schedule_rng, time)["params"]
        return {"diffusion": params}

    def costs(
        params: Params, batch: Batch, times: jax.Array, label: jax.Array | None, rng: jax.Array
    ) -> dict[str, jax.Array]:
        """The three terms of the bound (Kingma et al. 2021, eq. 11)."""
        x, gamma_at = denoisers.scaled(batch["x"], spec), gamma_of(params)
        first, last = gamma_at(jnp.zeros(1))[0], gamma_at(jnp.ones(1))[0]
        noise, end_noise = (jax.random.normal(key, x.shape) for key in jax.random.split(rng))
        y = denoisers.unscaled(x + jnp.exp(first / 2) * end_noise, spec)
        return {
            "prior": prior_cost(x, last),
            "reconstruction": -decoder_log_prob(spec, batch["x"], y, first),
            "diffusion": diffusion_cost(
                denoiser(params, label), gamma_at, x, times, noise, config.steps
            ),
        }

    def bound(params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Its terms, where the network is told every label."""
        time_rng, _, rng = jax.random.split(rng, 3)  # the same draws as the loss
        t = denoisers.spread_times(time_rng, len(batch["x"]))
        label = labels.one_hot(batch.get("label"), config.conditional, spec)
        return costs(params, batch, t, label, rng)

    def elbo(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        return -sum(bound(params, batch, rng).values())

    def likelihood_loss(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Minus the bound. A monotone schedule is moved by the cost's square, and not the value."""
        time_rng, label_rng, rng = jax.random.split(rng, 3)
        t = denoisers.spread_times(time_rng, len(batch["x"]))
        label = labels.one_hot(batch.get("label"), config.conditional, spec)
        label = denoisers.dropped(label, label_rng, config.label_dropout)
        terms = costs(params, batch, t, label, rng)
        loss = masked_mean(sum(terms.values()), batch)
        if config.schedule == "monotone":
            square = jax.lax.stop_gradient(terms["diffusion"] ** 2)
            own = {"params": params["diffusion"]["schedule"]}
            log_share = schedule.apply(own, t, method="log_share")
            # Of bits that are certain the cost is 0, and asks for no other schedule.
            total = jnp.maximum(masked_mean(square, batch), jnp.finfo(square.dtype).tiny)
            surrogate = -masked_mean(square * log_share, batch) / total
            loss += surrogate - jax.lax.stop_gradient(surrogate)
        return loss, Aux(terms)

    def quality_loss(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Weighted squared error, a mean over the dimensions of x, without unit."""
        time_rng, label_rng, noise_rng = jax.random.split(rng, 3)
        x = denoisers.scaled(batch["x"], spec)
        label = labels.one_hot(batch.get("label"), config.conditional, spec)
        label = denoisers.dropped(label, label_rng, config.label_dropout)
        if config.objective == "edm":
            normal = denoisers.spread_normal(time_rng, len(x))
            gamma = 2 * (config.log_sigma_mean + config.log_sigma_std * normal)
            weight = precondition(gamma, config.sigma_data).out ** -2.0
        else:
            gamma = gamma_of(params)(denoisers.spread_times(time_rng, len(x)))
            weight = jnp.minimum(jnp.exp(-gamma), config.snr_cap)
        noise = jax.random.normal(noise_rng, x.shape)
        error = squared_error(denoiser(params, label), x, gamma, noise)
        return masked_mean(weight * error, batch) / spec.num_dims, Aux({})

    def sample(
        params: Params, rng: jax.Array, num: int, label: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        draw_rng, decode_rng = jax.random.split(rng)
        told = labels.of_samples(num, label, config.conditional, spec)
        given = labels.one_hot(told.get("label"), config.conditional, spec)
        denoise = denoiser(params, given, config.guidance)
        gammas = gamma_of(params)(jnp.linspace(1.0, 0.0, config.sample_steps + 1))
        y = draw(denoise, gammas, config.sampler, draw_rng, (num, *spec.event_shape))
        y = denoisers.unscaled(y, spec)
        return {"x": decode(spec, decode_rng, y, gammas[-1])} | told

    player = Player("diffusion", quality_loss)
    if is_vdm:
        player = Player("diffusion", likelihood_loss, bound)
    return Model(
        init=init,
        players=(player,),
        log_likelihood_fns={"elbo": elbo},
        sample=sample,
        samples_have_label=config.conditional,
    )
