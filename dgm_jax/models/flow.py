"""Normalising flows: an invertible network between data and noise, with an exact density.

    log p(x) = log p(z) + log |det dz/dx|,  z = f(x)

Real vectors are modelled as they are. Of discrete data, images of V values, a flow models
y = (x + u) / V with noise u in [0, 1) added, on the scale of a logit; then

    log p(x) ≥ E_q(u | x) [log p(x + u) - log q(u | x)]

with q uniform, or a conditional flow that is learned beside. The bound is the ELBO with u as the
latent variable, and more draws of u tighten it.

References: Dinh et al. 2017, "Density estimation using Real NVP" (affine coupling; section 4.1: the
logit); Kingma & Dhariwal 2018, "Glow"; Papamakarios et al. 2017, "Masked autoregressive flow for
density estimation"; Durkan et al. 2019, "Neural spline flows"; Theis et al. 2016, "A note on the
evaluation of generative models" (section 3.1: uniform dequantisation); Ho et al. 2019, "Flow++"
(eq. 12: variational dequantisation).
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import checks, likelihoods
from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.distributions import draw_logistic, standard_gaussian_log_prob
from dgm_jax.nn import bijections, networks, transforms
from dgm_jax.nn.mlp import MaskedMLP
from dgm_jax.rows import sum_event

TRANSFORMS = ("affine", "spline")
STRUCTURES = ("coupling", "autoregressive")
BASES = ("gaussian", "logistic")
DEQUANTISATIONS = ("uniform", "variational")


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields. Real numbers may be traced.

    Attributes:
      transform: of each variable, `affine` or `spline` (monotonic rational-quadratic).
      structure: which variables decide it: `coupling`, one half of them, or `autoregressive`, all
        before it: samples then take a pass for each variable.
      network: `mlp`, which takes images as vectors, or `conv`, with several scales.
      hidden: widths of each network's hidden layers, or its channels: a convolution, and a residual
        block for each further one.
      activation: one of `nn.mlp.ACTIVATIONS`, or for the coupling of an `mlp` also `gated`.
      steps: how many times normalisation, linear map and coupling (or autoregressive map); of
        `conv` at each level, the first at half the sides of the image, the next at half of these.
      bins: K of a spline.
      bound: where the tails of a spline begin, at which it becomes the identity.
      base: distribution of the noise z, `gaussian` or `logistic`.
      margin: α of the logit of α + (1 - 2 α) y, for discrete data. With 0 nothing of the model
        falls outside their range; with more its tails are easier to fit.
      dequantisation: of discrete data, `uniform` or `variational`.
      dequantisation_steps: of the variational one's affine couplings.
    """

    transform: str = "spline"
    structure: str = "coupling"
    network: str = "mlp"
    hidden: tuple[int, ...] = (128, 128)
    activation: str = "silu"
    steps: tuple[int, ...] = (4,)
    bins: int = 8
    bound: float = 4.0
    base: str = "gaussian"
    margin: float = 0.05
    dequantisation: str = "uniform"
    dequantisation_steps: int = 2


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    if spec.support == "tokens":
        raise UserError(
            "model.name='flow' needs numbers, and tokens are in no order: choose images or points "
            "as data.dataset, or another model"
        )
    if spec.num_dims < 2:
        raise UserError("model.name='flow' needs data of at least two dimensions")
    checks.one_of(config, transform=TRANSFORMS, structure=STRUCTURES, base=BASES)
    checks.one_of(config, dequantisation=DEQUANTISATIONS)
    networks.check(config.network, config.activation, spec)
    checks.widths(config, "hidden")
    if not config.steps or not all(isinstance(n, int) and n > 0 for n in config.steps):
        raise UserError(f"model.steps={config.steps}: give whole numbers, each at least 1")
    if config.network == "mlp" and len(config.steps) > 1:
        raise UserError(f"model.steps={config.steps}: model.network='mlp' has one level")
    checks.at_least(config, dequantisation_steps=1)
    if config.structure == "autoregressive":
        if config.network != "mlp":
            raise UserError("model.structure='autoregressive' needs model.network='mlp'")
        if config.activation == "gated":
            raise UserError("model.activation='gated' needs model.structure='coupling'")
    levels = len(config.steps)
    if config.network == "conv" and any(side % 2**levels for side in spec.event_shape[:2]):
        raise UserError(
            f"model.steps={config.steps} halves the sides of images {levels} times, and these are "
            f"{spec.event_shape}: name fewer levels, or choose model.network='mlp'"
        )
    if not 2 <= config.bins <= 100:
        raise UserError(f"model.bins={config.bins}: must be from 2 to 100")
    checks.positive(config, "bound")
    if not 0 <= config.margin < 0.5:
        raise UserError(f"model.margin={config.margin}: must be at least 0 and below 0.5")
    if spec.support == "real" and config.dequantisation != "uniform":
        raise UserError(
            f"model.dequantisation={config.dequantisation!r}: real data need none; leave 'uniform'"
        )


def flow(config: Config, spec: DataSpec) -> nn.Module:
    """x `[B, *event]`, of vectors `[B, D]`, to z `[B, D]`: the bijection that the config names."""
    if config.transform == "spline":
        transform = transforms.spline(config.bins, config.bound)
    else:
        transform = transforms.affine()

    def layer() -> nn.Module:
        if config.structure == "autoregressive":
            # An affine z_j = (x_j - mu) exp(-alpha), as in Papamakarios et al. 2017, eqs. 3 and 4.
            own = transforms.inverted(transform) if config.transform == "affine" else transform
            shape = (spec.num_dims, config.hidden, own.num_outputs, config.activation)
            return bijections.Autoregressive(own, MaskedMLP(*shape))
        net = bijections.Conditioner(config.network, config.hidden, config.activation)
        return bijections.Coupling(transform, net)

    def chain(num: int) -> nn.Module:
        steps = ((bijections.ActNorm(), bijections.Linear(), layer()) for _ in range(num))
        return bijections.Chain(tuple(part for step in steps for part in step))

    levels = tuple(map(chain, config.steps))
    return levels[0] if config.network == "mlp" else bijections.MultiScale(levels, spec.event_shape)


def base_log_prob(base: str, z: jax.Array) -> jax.Array:
    """log p(z) of noise `[B, D]`: nats, `[B]`."""
    if base == "logistic":
        return jnp.sum(_log_slope_of_sigmoid(z), axis=1)
    return jnp.sum(standard_gaussian_log_prob(z), axis=1)


def _log_slope_of_sigmoid(v: jax.Array) -> jax.Array:
    """log σ'(v), elementwise; also the log-density of a standard logistic at v."""
    return nn.log_sigmoid(v) + nn.log_sigmoid(-v)


def to_line(x: jax.Array, v: jax.Array, num_values: int, margin: float) -> transforms.Mapped:
    """logit(α + (1 - 2 α) y) of y = (x + u) / V, where u = sigmoid(v).

    Args:
      x: float `[B, ...]` in {0, ..., V - 1}.
      v: noise, float of the same shape.
      num_values: V.
      margin: α.

    Returns:
      The logits, same shape, and log |det| of u -> logits, nats, `[B]`.
    """
    # From both ends: V - x - u and 1 - u are lost to rounding where they are small.
    low, high = (x + nn.sigmoid(v)) / num_values, (num_values - 1 - x + nn.sigmoid(-v)) / num_values
    log_low, log_high = (jnp.log(margin + (1 - 2 * margin) * y) for y in (low, high))
    log_slope = jnp.log(1 - 2 * margin) - math.log(num_values) - log_low - log_high
    return log_low - log_high, sum_event(log_slope)


def from_line(logits: jax.Array, num_values: int, margin: float) -> jax.Array:
    """The x in {0, ..., V - 1} of which `to_line` makes these logits; same shape.

    What lies beyond [0, 1], which is possible where the margin is not 0, gives the nearest value.
    """
    y = (nn.sigmoid(logits) - margin) / (1 - 2 * margin)
    return jnp.clip(jnp.floor(num_values * y), 0, num_values - 1)


def build(config: Config, spec: DataSpec) -> Model:
    """The flow as pure functions; see `core.Model` for their contracts."""
    net = flow(config, spec)
    steps = (config.dequantisation_steps,)
    affine = dataclasses.replace(config, transform="affine", structure="coupling", steps=steps)
    noise_net = flow(affine, spec)
    discrete = spec.support != "real"
    variational = discrete and config.dequantisation == "variational"
    images = config.network == "conv"

    def shaped(x: jax.Array) -> jax.Array:
        """As the networks take it: images `[B, H, W, C]`, or vectors `[B, D]`."""
        return x.reshape(len(x), *spec.event_shape) if images else x.reshape(len(x), -1)

    def init(rng: jax.Array, batch: Batch) -> Params:
        """Normalisations start from the batch, and learned noise as uniform noise."""
        likelihoods.refuse_outside_support(batch["x"], spec)
        x = shaped(batch["x"])
        rngs = jax.random.split(rng, 3)
        v = draw_logistic(rngs[0], x.shape)
        line = to_line(x, v, spec.num_values, config.margin)[0] if discrete else x
        params = {"net": net.init(rngs[1], line)["params"]}
        if variational:
            # From zeros, which do not vary, its normalisations start as the identity.
            params["dequantiser"] = noise_net.init(rngs[2], 0 * v, x / spec.scale)["params"]
        return {"flow": params}

    def bijection(params: Params, x: jax.Array, inverse: bool = False) -> transforms.Mapped:
        return net.apply({"params": params["flow"]["net"]}, x, inverse=inverse)

    def log_prob(params: Params, x: jax.Array) -> jax.Array:
        """Log-density `[B]` of what the flow itself models: real vectors, or logits."""
        z, log_det = bijection(params, x)
        return base_log_prob(config.base, z) + log_det

    def draw_noise(params: Params, x: jax.Array, rng: jax.Array) -> transforms.Mapped:
        """v, logits of the noise u, shaped as `x`; and log q(u | x) `[B]`."""
        if not variational:
            return draw_logistic(rng, x.shape), jnp.zeros(len(x))
        variables = {"params": params["flow"]["dequantiser"]}
        # Logistic, so that both ends of a bin are reached: weights with lighter tails explode.
        epsilon = draw_logistic(rng, (len(x), spec.num_dims))
        v, log_det = noise_net.apply(variables, epsilon, x / spec.scale, inverse=True)
        log_q = base_log_prob("logistic", epsilon) - log_det
        return v, log_q - sum_event(_log_slope_of_sigmoid(v))

    def log_weight(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        """log p(x + u) - log q(u | x) for one draw of u (Ho et al. 2019, eq. 12)."""
        x = shaped(batch["x"])
        v, log_q = draw_noise(params, x, rng)
        line, log_det = to_line(x, v, spec.num_values, config.margin)
        return log_prob(params, line) + log_det - log_q

    def exact(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        del rng
        return log_prob(params, shaped(batch["x"]))

    log_likelihood = log_weight if discrete else exact

    def loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """-log p(x), or minus the bound on it."""
        return -masked_mean(log_likelihood(params, batch, rng), batch), Aux({})

    def encode(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        """z; of discrete data that of the middle of their bin, u = 1/2."""
        del rng
        x = shaped(batch["x"])
        if discrete:
            x, _ = to_line(x, jnp.zeros_like(x), spec.num_values, config.margin)
        return bijection(params, x)[0]

    def data_at(params: Params, z: jax.Array) -> jax.Array:
        """x `[B, *event]` as the data hold it."""
        x, _ = bijection(params, z, inverse=True)
        if discrete:
            x = from_line(x, spec.num_values, config.margin)
        return x.reshape(len(z), *spec.event_shape)

    def sample(params: Params, rng: jax.Array, num: int) -> dict[str, jax.Array]:
        draw = draw_logistic if config.base == "logistic" else jax.random.normal
        return {"x": data_at(params, draw(rng, (num, spec.num_dims)))}

    return Model(
        init=init,
        players=(Player("flow", loss_fn),),
        log_likelihood_fns={"elbo" if discrete else "log_prob": log_likelihood},
        log_weight=log_weight if discrete else None,
        sample=sample,
        encode=encode,
        decode=lambda params, z: data_at(params, z) / spec.scale,
    )
