"""Vector-quantised autoencoders: an image is N codes out of K, and a prior learns which.

    p(x, c) = p(c) p(x | e_c),   q(c | x) a point mass on the codes of the encoder's vectors

so that log p(x) ≥ log p(x | e_c) + log p(c), for the one code c of x. Encoder, codebook and decoder
are one player; the prior is another, which sees their codes and cannot change them.

References: van den Oord et al. 2017, "Neural Discrete Representation Learning"; Mentzer et al.
2023, "Finite Scalar Quantization: VQ-VAE Made Simple".
"""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import checks, likelihoods
from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.nn import attention, networks, quantise
from dgm_jax.nn.autoregressive import AutoregressiveCategorical, AutoregressiveTransformer
from dgm_jax.nn.conv import halvings
from dgm_jax.nn.precision import Dense
from dgm_jax.rows import row_weight

QUANTISERS = ("gradient", "ema", "fsq")
PRIORS = ("masked_mlp", "transformer")


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields. Real numbers may be traced.

    Attributes:
      network: `mlp`, or `conv`: residual stages that halve or double the sides of the image.
      encoder: widths of the encoder's hidden layers, or channels of its stages.
      decoder: the same of the decoder.
      activation: one of `nn.mlp.ACTIVATIONS`, or for an `mlp` also `gated`.
      likelihood: one of `likelihoods.LIKELIHOODS`.
      num_codes: N of an `mlp`; a `conv` has one for each position of its coarsest stage.
      quantiser: `gradient`, a codebook trained on the distance to its vectors; `ema`, one that is
        their moving average; or `fsq`, rounding.
      codebook_size: K of a codebook.
      code_dim: D, length of a vector of a codebook.
      levels: of `fsq`: levels of each entry of a vector; K is their product, D their number.
      commitment: β, weight of the vectors' squared distance to a codebook.
      ema_decay: γ of an `ema` codebook.
      prior: one of `PRIORS`, which see the codes one after the other.
      prior_hidden: of a `masked_mlp`: widths of its hidden layers.
      prior_width: of a `transformer`: width of its blocks; their feed-forward layers have thrice.
      prior_depth: of the same: number of blocks.
      prior_heads: of the same: heads of each block's attention.
    """

    network: str = "mlp"
    encoder: tuple[int, ...] = (500, 500)
    decoder: tuple[int, ...] = (500, 500)
    activation: str = "silu"
    likelihood: str = "bernoulli"
    num_codes: int = 8
    quantiser: str = "ema"
    codebook_size: int = 64
    code_dim: int = 8
    levels: tuple[int, ...] = (4, 4, 4)
    commitment: float = 0.25
    ema_decay: float = 0.99
    prior: str = "masked_mlp"
    prior_hidden: tuple[int, ...] = (500, 500)
    prior_width: int = 128
    prior_depth: int = 4
    prior_heads: int = 4

    @property
    def code_shape(self) -> tuple[int, int]:
        """(K, D)."""
        if self.quantiser == "fsq":
            return math.prod(self.levels), len(self.levels)
        return self.codebook_size, self.code_dim


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    checks.widths(config, "encoder", "decoder", "prior_hidden")
    networks.check(config.network, config.activation, spec)
    if config.network == "conv" and len(config.encoder) != len(config.decoder):
        raise UserError(
            f"model.decoder={config.decoder}: a grid of codes needs as many stages as "
            f"model.encoder={config.encoder}"
        )
    likelihoods.check(config.likelihood, spec)
    checks.one_of(config, quantiser=QUANTISERS, prior=PRIORS)
    checks.at_least(config, num_codes=1, codebook_size=2, code_dim=1, prior_depth=1, commitment=0)
    if config.prior == "transformer":
        axes, fields = len(grid(config, spec)), ("prior_width", "prior_heads")
        attention.check(config.prior_width, config.prior_heads, axes, fields)
    if not config.levels or not all(isinstance(n, int) and n >= 2 for n in config.levels):
        raise UserError(
            f"model.levels={config.levels}: give one or more whole numbers, each at least 2"
        )
    if not 0 <= config.ema_decay < 1:
        raise UserError(f"model.ema_decay={config.ema_decay}: must be at least 0 and below 1")


def grid(config: Config, spec: DataSpec) -> tuple[int, ...]:
    """Sides of what the codes of one example make up: `(N,)` of an `mlp`."""
    if config.network == "mlp":
        return (config.num_codes,)
    return halvings(spec.event_shape[:2], len(config.encoder))[-1]


def make_prior(config: Config, spec: DataSpec) -> nn.Module:
    """p(c), with `log_prob` and `draw` of one-hot codes `[B, N, K]`."""
    sides, size = grid(config, spec), config.code_shape[0]
    if config.prior == "masked_mlp":
        return AutoregressiveCategorical(math.prod(sides), size, config.prior_hidden)
    return AutoregressiveTransformer(
        num=math.prod(sides),
        classes=size,
        width=config.prior_width,
        depth=config.prior_depth,
        heads=config.prior_heads,
        hidden=3 * config.prior_width,
        grid=sides,
    )


class Net(nn.Module):
    """Encoder and decoder."""

    config: Config
    spec: DataSpec

    def setup(self) -> None:
        """A `conv` makes each vector at its position; an `mlp` all of them from all features."""
        config = self.config
        self.grid, self.num = config.network == "conv", math.prod(grid(config, self.spec))
        self.encoder = networks.Encoder(config.network, config.encoder, config.activation)
        self.head = Dense(config.code_shape[1] * (1 if self.grid else self.num))
        self.decoder = networks.Decoder(
            config.network,
            config.decoder,
            config.activation,
            config.likelihood,
            self.spec,
            grid=self.grid,
        )

    def __call__(self, x: jax.Array) -> None:
        """Touch every parameter, for initialisation."""
        self.outputs(self.vectors(x))

    def vectors(self, x: jax.Array) -> jax.Array:
        """What is to be quantised, float `[B, N, D]`, for x `[B, *event]` as the data hold it."""
        h = self.encoder(x / self.spec.scale)
        v = self.head(h.reshape(len(h), self.num, -1) if self.grid else h)
        v = v.reshape(len(h), self.num, -1)
        return jnp.tanh(v) if self.config.quantiser == "fsq" else v

    def outputs(self, z: jax.Array) -> jax.Array:
        """The likelihood's parameters `[B, D, P]` given the codes' vectors `[B, N, D]`."""
        return self.decoder(z.reshape(len(z), -1))


class Codes(NamedTuple):
    """What the encoder and the quantiser make of a batch.

    Attributes:
      v: float `[B, N, D]`, the encoder's vectors.
      index: int32 `[B, N]`, their codes.
      z: float `[B, N, D]`, the codes' vectors, with the gradient of the codebook.
    """

    v: jax.Array
    index: jax.Array
    z: jax.Array


def build(config: Config, spec: DataSpec) -> Model:
    """The autoencoder and its prior as pure functions; see `core.Model` for their contracts."""
    net, (size, dim) = Net(config, spec), config.code_shape
    prior = make_prior(config, spec)
    likelihood = likelihoods.LIKELIHOODS[config.likelihood]()

    def bind(params: Params) -> Net:
        return net.bind({"params": params["vqvae"]["net"]})

    def init(rng: jax.Array, batch: Batch) -> Params:
        """A codebook starts as vectors of the batch: an entry far from all would stay unused.

        So would the second of two that are the same one.
        """
        likelihoods.refuse_outside_support(batch["x"], spec)
        net_rng, prior_rng, code_rng = jax.random.split(rng, 3)
        params = {"vqvae": {"net": net.init(net_rng, batch["x"][:1])["params"]}}
        one_hot = jnp.zeros((1, prior.num, size))
        params["prior"] = prior.init(prior_rng, one_hot, method="log_prob")["params"]
        v = bind(params).vectors(batch["x"]).reshape(-1, dim)
        start = jax.random.choice(code_rng, v, (size,), replace=len(v) < size)
        if config.quantiser == "gradient":
            params["vqvae"]["codebook"] = start
        if config.quantiser == "ema":
            params["state"] = quantise.ema_state(start)
        return params

    def codebook(params: Params) -> jax.Array:
        """The vector of every code, float `[K, D]`."""
        if config.quantiser == "gradient":
            return params["vqvae"]["codebook"]
        if config.quantiser == "ema":
            return params["state"]["codebook"]
        return quantise.fsq_codebook(config.levels)

    def codes_of(params: Params, batch: Batch) -> Codes:
        v = bind(params).vectors(batch["x"])
        if config.quantiser == "fsq":
            index = quantise.fsq_index(v, config.levels)
        else:
            index = quantise.nearest(v, codebook(params))
        return Codes(v, index, codebook(params)[index])

    def log_likelihood(params: Params, batch: Batch, z: jax.Array) -> jax.Array:
        """log p(x | z) `[B]`."""
        x = batch["x"].reshape(len(z), -1)
        return likelihood.log_prob(bind(params).outputs(z), x)

    def log_prior(params: Params, index: jax.Array) -> jax.Array:
        """log p(c) `[B]` of the codes with indices `[B, N]`."""
        one_hot = jax.nn.one_hot(index, size)
        return prior.apply({"params": params["prior"]}, one_hot, method="log_prob")

    def loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """-log p(x | z) + |sg(v) - e|² + β |v - sg(e)|² (van den Oord et al. 2017, eq. 3).

        The squares are summed over the codes as the likelihood is over the dimensions of x. An
        `ema` codebook has no gradient and does without the first; rounding needs neither.
        """
        del rng
        v, index, z = codes_of(params, batch)
        hold = jax.lax.stop_gradient
        distortion = -log_likelihood(params, batch, quantise.straight_through(v, z))
        cost = distortion
        if config.quantiser != "fsq":
            cost += config.commitment * jnp.sum((v - hold(z)) ** 2, axis=(1, 2))
        if config.quantiser == "gradient":
            cost += jnp.sum((hold(v) - z) ** 2, axis=(1, 2))
        weight = row_weight(batch)
        state = None
        if config.quantiser == "ema":
            state = quantise.ema_update(params["state"], v, index, weight, config.ema_decay)
        scalars = {"perplexity": quantise.perplexity(index, size, weight)}
        return masked_mean(cost, batch), Aux({"distortion": distortion}, scalars, state)

    def prior_loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """-log p(c), which is the rate: KL(q ‖ p) where q is a point mass."""
        del rng
        rate = -log_prior(params, codes_of(params, batch).index)
        return masked_mean(rate, batch), Aux(terms={"rate": rate})

    def elbo(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        """log p(x | c) + log p(c), one term of the sum over codes that is p(x).

        There is one code to draw, with probability 1: this is also its importance weight.
        """
        del rng
        codes = codes_of(params, batch)
        return log_likelihood(params, batch, codes.z) + log_prior(params, codes.index)

    def encode(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        """The codes' vectors, one after the other."""
        del rng
        return codes_of(params, batch).z.reshape(len(batch["x"]), -1)

    def reconstruct(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        del rng
        outputs = bind(params).outputs(codes_of(params, batch).z)
        return likelihoods.picture(likelihood, outputs, spec)

    def sample(params: Params, rng: jax.Array, num: int) -> dict[str, jax.Array]:
        code_rng, x_rng = jax.random.split(rng)
        codes = prior.apply({"params": params["prior"]}, code_rng, num, method="draw")
        outputs = bind(params).outputs(codes @ codebook(params))
        return likelihoods.draw(likelihood, x_rng, outputs, spec)

    return Model(
        init=init,
        players=(Player("vqvae", loss_fn), Player("prior", prior_loss_fn)),
        log_likelihood_fns={"elbo": elbo},
        sample=sample,
        encode=encode,
        reconstruct=reconstruct,
    )
