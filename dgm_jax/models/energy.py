"""Energy-based models: p(x) = exp(-E(x)) / Z, with a network for E and nobody knows Z.

    E(x) = -log N(x; μ, s² I) - f(x),   Z = E_N[exp f(x)]

A Gaussian that is tilted by what the network f adds. As f grows no faster than |x|, Z is finite.
μ is the training mean, and s the root mean square deviation from it of the first batch. What is not
known in closed form is estimated: see `log_normaliser`.

References: Hinton 2002, "Training products of experts by minimizing contrastive divergence";
Tieleman 2008, "Training restricted Boltzmann machines using approximations to the likelihood
gradient" (persistent chains); Du & Mordatch 2019, "Implicit generation and modeling with
energy-based models"; Nijkamp et al. 2019, "Learning non-convergent non-persistent short-run MCMC
toward energy-based model"; Vincent 2011, "A connection between score matching and denoising
autoencoders"; Song & Ermon 2019, "Generative modeling by estimating gradients of the data
distribution"; Song et al. 2019, "Sliced score matching"; Salimans & Ho 2021, "Should EBMs model the
energy or the score?"; Song et al. 2021, "Score-based generative modeling through stochastic
differential equations" (predictor and corrector); Karras et al. 2022, "Elucidating the design space
of diffusion-based generative models" (the scales around the network).
"""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import checks, likelihoods, mcmc
from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.distributions import gaussian_log_prob, log_mean_exp, standard_gaussian_log_prob
from dgm_jax.nn import networks
from dgm_jax.nn.mlp import MLP
from dgm_jax.nn.precision import Dense
from dgm_jax.rows import beside, sum_event

OBJECTIVES = ("contrastive_divergence", "denoising_score_matching", "sliced_score_matching")
STARTS = ("persistent", "noise", "data")
SAMPLING = ("rounds",)

_FREQUENCIES = 4  # of the noise level, as the network sees it
_TOGETHER = 256  # units that see all features of the convolutional stages
_REACH, _SIDE = 6.0, 513  # of the quadrature's grid: half its side in deviations, and its points
_TEMPERATURES, _CHAINS = 200, 256  # of annealed importance sampling


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields. Real numbers may be traced.

    Attributes:
      network: `mlp`, or `conv`: residual stages that halve the sides of the image.
      hidden: widths of the hidden layers, or channels of the stages.
      activation: a smooth one of `nn.mlp.ACTIVATIONS`, or for an `mlp` also `gated`.
      objective: one of `OBJECTIVES`.
      sigma_min: p(x) is of data with Gaussian noise of this σ, in units of x / scale.
      sigma_max: of `denoising_score_matching`: the largest σ that E(x, σ) is learned at.
      start: of `contrastive_divergence`: where the chains of each update start, one of `STARTS`:
        where they were after the last, at draws from N(μ, s²), or at the data.
      num_chains: of `persistent` chains.
      restart: part of the chains to begin anew at draws from N(μ, s²). Without `metropolis`, of the
        persistent ones of each update; with it, of those of any update or round of sampling, each
        draw accepted or refused, which leaves p(x) alone; where E has noise levels, none.
      step_size: of Langevin dynamics, ε / s²; where E has noise levels, ε / σ².
      langevin_steps: of an update, or of a round of sampling.
      metropolis: whether Langevin steps are accepted or refused (MALA).
      rounds: of sampling; where E has noise levels, as many, falling geometrically.
    """

    network: str = "mlp"
    hidden: tuple[int, ...] = (128, 128, 128)
    activation: str = "silu"
    objective: str = "denoising_score_matching"
    sigma_min: float = 0.03
    sigma_max: float = 3.0
    start: str = "persistent"
    num_chains: int = 256
    restart: float = 0.05
    step_size: float = 0.05
    langevin_steps: int = 1
    metropolis: bool = False
    rounds: int = 100

    @property
    def noise_conditional(self) -> bool:
        """Whether E has noise levels."""
        return self.objective == "denoising_score_matching"

    @property
    def persistent(self) -> bool:
        """Whether there are chains that outlive an update."""
        return self.objective == "contrastive_divergence" and self.start == "persistent"


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    if spec.support not in ("uint8", "real"):
        raise UserError(
            f"model.name='energy' has a density of grey values or real vectors, and these data are "
            f"{spec.support}: set data.binarisation to 'none', or data.dataset to such data"
        )
    checks.widths(config, "hidden")
    networks.check(config.network, config.activation, spec)
    if config.activation == "relu":
        raise UserError(
            "model.activation='relu': the slope of E would be piecewise constant; choose a smooth "
            "one: silu, gelu, tanh"
        )
    checks.one_of(config, objective=OBJECTIVES, start=STARTS)
    checks.at_least(config, num_chains=1, langevin_steps=1, rounds=1)
    if not 0 <= config.restart <= 1:
        raise UserError(f"model.restart={config.restart}: a part, from 0 to 1")
    if config.persistent and config.restart == 1 and not config.metropolis:
        raise UserError(
            "model.restart=1.0: no chain would outlive an update: set it below 1, or "
            "model.start='noise', or model.metropolis=True"
        )
    checks.positive(config, "step_size")
    checks.at_least(config, sigma_min=0)
    if config.sigma_min == 0 and (config.noise_conditional or spec.support == "uint8"):
        raise UserError(
            "model.sigma_min=0.0: must be above 0 for 'denoising_score_matching' and for grey "
            "values, which have no density without noise"
        )
    if config.noise_conditional and config.rounds < 2:
        raise UserError(
            f"model.rounds={config.rounds}: at least 2, from model.sigma_max to model.sigma_min"
        )
    if config.noise_conditional and not config.sigma_min < config.sigma_max < math.inf:
        raise UserError(
            f"model.sigma_max={config.sigma_max}: must be above model.sigma_min="
            f"{config.sigma_min} and finite"
        )


class Network(nn.Module):
    """g(u, level), `[B]`: at most linear in u far out; its last layer has no bias, as Z has it.

    Attributes:
      config: the model's.
    """

    config: Config

    @nn.compact
    def __call__(self, u: jax.Array, level: jax.Array | None) -> jax.Array:
        """g at u `[B, *event]`, about N(0, I), told `level` `[B]` in [0, 1] where there are any."""
        config, side = self.config, None
        if level is not None:
            angle = level[:, None] * (math.pi * jnp.arange(1, _FREQUENCIES + 1))[None]
            side = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)
        # The encoder takes [0, 1] to ±1.
        h = networks.Encoder(config.network, config.hidden, config.activation)((u + 1) / 2, side)
        if config.network == "conv":  # what stands at different places must fit together
            h = MLP((_TOGETHER,), config.activation)(h)
        g = Dense(1, use_bias=False, kernel_init=nn.initializers.zeros)(h)[:, 0]
        return math.sqrt(math.prod(u.shape[1:])) * g  # of the size of its slope, 1 by each of D


def log_normaliser(tilt: mcmc.Energy, num_dims: int) -> jax.Array:
    """log Z = log E[exp f(u)], u ~ N(0, I), `[]`, nats; a function of f alone.

    By the trapezoidal rule on a grid of ±6 in one or two dimensions: its error is below that of
    float32 where f is smooth over the grid's distance of 0.023, and what p has outside is missed.
    NaN where twice the distance gives another log Z, by 0.01 or more: f is too rough for the grid.
    In more dimensions by annealed importance sampling with a key of its own: E[log Z] is then too
    low, never too high, so that log p(x) is too high on the average.

    Args:
      tilt: f, `u [B, D] -> [B]`.
      num_dims: D.
    """

    def log_base(u: jax.Array) -> jax.Array:
        return jnp.sum(standard_gaussian_log_prob(u), axis=1)

    if num_dims <= 2:
        axes = [jnp.linspace(-_REACH, _REACH, _SIDE)] * num_dims
        grid = jnp.stack(jnp.meshgrid(*axes), axis=-1).reshape(-1, _SIDE, num_dims)

        def along(u: jax.Array) -> tuple[jax.Array, jax.Array]:
            values = log_base(u) + tilt(u)
            return jax.nn.logsumexp(values), jax.nn.logsumexp(values[::2])

        fine, coarse = jax.lax.map(along, grid)
        distance = 2 * _REACH / (_SIDE - 1)
        fine = jax.nn.logsumexp(fine) + num_dims * math.log(distance)
        coarse = coarse[::2] if num_dims == 2 else coarse  # one dimension is a single row
        coarse = jax.nn.logsumexp(coarse) + num_dims * math.log(2 * distance)
        return jnp.where(jnp.abs(fine - coarse) < 0.01, fine, jnp.nan)
    keys = jax.random.split(jax.random.key(0), 3)
    target, betas = mcmc.Target(log_base, tilt), mcmc.temperatures(_TEMPERATURES)
    start = jax.random.normal(keys[0], (2, _CHAINS, num_dims))
    step_sizes = mcmc.tune(target, start[0], betas, keys[1])
    log_w = mcmc.forward(target, start[1], betas, step_sizes, keys[2])
    return log_mean_exp(log_w)


def build(config: Config, spec: DataSpec) -> Model:
    """The energy and its dynamics as pure functions; see `core.Model` for their contracts."""
    net = Network(config)
    event = spec.event_shape

    def level(sigma: jax.Array) -> jax.Array | None:
        if not config.noise_conditional:
            return None
        return jnp.log(sigma / config.sigma_min) / jnp.log(config.sigma_max / config.sigma_min)

    def tilt(params: Params, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """f(x, σ) `[B]`, for x `[B, *event]` in units of x / scale and σ `[B]`.

        Of a network g that sees inputs of variance 1 and whose slope should have variance 1: where
        there are noise levels E's denoiser x - σ² ∇E is that of Karras et al. 2022, eq. 7.
        """
        state = params["state"]
        u = (x - state["mean"]) / beside(jnp.sqrt(state["scale"] ** 2 + sigma**2), x)
        g = net.apply({"params": params["energy"]}, u, level(sigma))
        return g * state["scale"] / sigma if config.noise_conditional else g

    def energy(params: Params, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """E(x, σ) `[B]`, nats: E(x) where σ is `sigma_min`."""
        state = params["state"]
        log_scale = beside(jnp.log(state["scale"] ** 2 + sigma**2) / 2, x)
        log_base = gaussian_log_prob(x, state["mean"], log_scale)
        return -sum_event(log_base) - tilt(params, x, sigma)

    def slope(params: Params, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """∇E `[B, *event]`, minus the score."""
        return jax.grad(lambda x: jnp.sum(energy(params, x, sigma)))(x)

    def lowest(num: int) -> jax.Array:
        return jnp.full(num, config.sigma_min)

    def draw_base(params: Params, rng: jax.Array, num: int, sigma: jax.Array) -> jax.Array:
        """N(μ, s² + σ²), what the network tilts, `[num, *event]`."""
        state = params["state"]
        noise = jax.random.normal(rng, (num, *event))
        return state["mean"] + jnp.sqrt(state["scale"] ** 2 + sigma**2) * noise

    def noised(batch: Batch, rng: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x + σ n and n, in units of x / scale."""
        noise = jax.random.normal(rng, batch["x"].shape)
        return batch["x"] / spec.scale + beside(sigma, noise) * noise, noise

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        net_rng, chain_rng = jax.random.split(rng)
        x, mean = batch["x"] / spec.scale, jnp.asarray(spec.unit_mean)[None]
        state = {"mean": mean, "scale": jnp.sqrt(jnp.mean((x - mean) ** 2))}
        params = {"energy": net.init(net_rng, x[:1], level(lowest(1)))["params"], "state": state}
        if config.persistent:
            chains = draw_base(params, chain_rng, config.num_chains, config.sigma_min)
            params["state"] = {**state, "chains": chains}
        return params

    def move(
        params: Params, x: jax.Array, sigma: jax.Array, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """A round of chains towards exp(-E(x, σ)), σ `[]`; where they are, and who accepted."""
        of_rng, jump_rng, part_rng, langevin_rng = jax.random.split(rng, 4)
        sigmas = jnp.full(len(x), sigma)
        if config.metropolis and not config.noise_conditional:
            fresh = draw_base(params, of_rng, len(x), sigma)
            jumped = mcmc.jump(lambda x: tilt(params, x, sigmas), x, fresh, jump_rng)
            part = jax.random.uniform(part_rng, (len(x),)) < config.restart
            x = jnp.where(beside(part, x), jumped, x)
        unit = sigma if config.noise_conditional else params["state"]["scale"]
        return mcmc.langevin(
            lambda x: energy(params, x, sigmas),
            x,
            config.step_size * unit**2,
            config.langevin_steps,
            langevin_rng,
            config.metropolis,
        )

    def start_chains(params: Params, data: jax.Array, rng: jax.Array) -> jax.Array:
        """Where the chains of an update start, `[C, *event]`."""
        if config.start == "data":
            return data
        fresh_rng, part_rng = jax.random.split(rng)
        if config.start == "noise":
            return draw_base(params, fresh_rng, len(data), config.sigma_min)
        chains = params["state"]["chains"]
        if config.metropolis:
            return chains
        fresh = draw_base(params, fresh_rng, len(chains), config.sigma_min)
        part = jax.random.uniform(part_rng, (len(chains),)) < config.restart
        return jnp.where(beside(part, chains), fresh, chains)

    def contrastive_divergence(params: Params, batch: Batch, rng: jax.Array) -> tuple:
        """E(data) - E(chains), whose gradient is that of -log p (Hinton 2002, eq. 3).

        But for what the chains have yet to go to be draws from p.
        """
        noise_rng, start_rng, move_rng = jax.random.split(rng, 3)
        held, num = jax.lax.stop_gradient(params), len(batch["x"])
        x, _ = noised(batch, noise_rng, lowest(num))
        chains = start_chains(held, x, start_rng)
        chains, accepted = move(held, chains, jnp.asarray(config.sigma_min), move_rng)
        chains = jax.lax.stop_gradient(chains)
        of_data, of_chains = (
            energy(params, x, lowest(num)),
            energy(params, chains, lowest(len(chains))),
        )
        rows = batch if config.start == "data" else {}  # a chain of padding is none
        loss = masked_mean(of_data, batch) - masked_mean(of_chains, rows)
        state = None
        if config.persistent:
            state = {**params["state"], "chains": chains}
        return loss, Aux({"energy": of_data}, {"acceptance": masked_mean(accepted, rows)}, state)

    def denoising_score_matching(params: Params, batch: Batch, rng: jax.Array) -> tuple:
        """½ λ ‖∇E(x + σ n, σ) - n / σ‖² with log σ uniform (Vincent 2011, eq. 17).

        λ = σ² (s² + σ²) / s² asks of the network's slope the same at every σ (Karras et al. 2022,
        section 5): at the start, E the Gaussian, Gaussian data cost D / 2 at any.
        """
        level_rng, noise_rng = jax.random.split(rng)
        where = jax.random.uniform(level_rng, (len(batch["x"]),))
        sigma = config.sigma_min * (config.sigma_max / config.sigma_min) ** where
        x, noise = noised(batch, noise_rng, sigma)
        scale = params["state"]["scale"]
        weight = jnp.sqrt(scale**2 + sigma**2) / scale
        residual = beside(weight, x) * (beside(sigma, x) * slope(params, x, sigma) - noise)
        cost = sum_event(residual**2) / 2
        return masked_mean(cost, batch), Aux({"score_matching": cost})

    def sliced_score_matching(params: Params, batch: Batch, rng: jax.Array) -> tuple:
        """½ ‖∇E‖² - vᵀ ∇²E v, v of ±1 (Song et al. 2019, eq. 8)."""
        noise_rng, v_rng = jax.random.split(rng)
        sigma = lowest(len(batch["x"]))
        x, _ = noised(batch, noise_rng, sigma)
        v = jax.random.rademacher(v_rng, x.shape, x.dtype)
        slopes, curved = jax.jvp(lambda x: slope(params, x, sigma), (x,), (v,))
        cost = sum_event(slopes**2 / 2 - v * curved)
        return masked_mean(cost, batch), Aux({"score_matching": cost})

    def log_prob(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        """-E(x) - log Z; Z, the same for all examples, is computed once for a batch."""
        del rng
        deviation = jnp.sqrt(params["state"]["scale"] ** 2 + config.sigma_min**2)

        def of_standard(u: jax.Array) -> jax.Array:
            return tilt(params, params["state"]["mean"] + deviation * u, lowest(len(u)))

        log_z = log_normaliser(of_standard, spec.num_dims)
        return -energy(params, batch["x"], lowest(len(batch["x"]))) - log_z

    def sample(params: Params, rng: jax.Array, num: int) -> dict[str, jax.Array]:
        """From N(μ, s² + σ²) by Langevin dynamics; where E has noise levels, down all of them.

        There with the predictor of Song et al. 2021, section 4.2, without which chains lag behind.
        """
        start_rng, rng = jax.random.split(rng)
        sigmas = jnp.full(config.rounds, config.sigma_min)
        if config.noise_conditional:
            along_rounds = jnp.linspace(1.0, 0.0, config.rounds)
            sigmas = config.sigma_min * (config.sigma_max / config.sigma_min) ** along_rounds

        def one_round(x: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
            """To the next σ along the probability flow, then chains that stay there."""
            before, sigma, key = inputs
            if config.noise_conditional:
                flow = before * slope(params, x, jnp.full(num, before))
                x = x + (sigma - before) * flow
            return move(params, x, sigma, key)[0], None

        x = draw_base(params, start_rng, num, sigmas[0])
        before = jnp.concatenate([sigmas[:1], sigmas[:-1]])
        keys = jax.random.split(rng, config.rounds)
        x, _ = jax.lax.scan(one_round, x, (before, sigmas, keys))
        if spec.support == "real":
            return {"x": x}
        # Without the noise: the mean of the data given x (Tweedie's formula).
        mean = jnp.clip(x - config.sigma_min**2 * slope(params, x, lowest(num)), 0, 1)
        return {"x": jnp.round(spec.scale * mean)}

    objectives: dict[str, Callable] = {
        "contrastive_divergence": contrastive_divergence,
        "denoising_score_matching": denoising_score_matching,
        "sliced_score_matching": sliced_score_matching,
    }
    densities = {}
    if spec.support == "real":
        densities = {"log_prob" if spec.num_dims <= 2 else "log_prob_ais": log_prob}
    return Model(
        init=init,
        players=(Player("energy", objectives[config.objective]),),
        log_likelihood_fns=densities,
        sample=sample,
    )
