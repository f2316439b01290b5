"""Autoencoders with quantised codes, and an autoregressive prior over the codes.

The encoder's output is N vectors, each moved to one of C codes: the nearest entry of a codebook
learned by gradient or as a moving average (van den Oord et al. 2017), or a point of a fixed grid
(Mentzer et al. 2023). q(c | x) is certain of one code, so

    log p(x) ≥ log p(x | c(x)) + log p(c(x)),

with p(c) learned beside the autoencoder, by a player of its own that cannot move the codes.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import likelihoods
from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.nn import networks, quantise

QUANTISERS = ("gradient", "ema", "fsq")


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields. Real numbers may be traced.

    Attributes:
      quantiser: `gradient`, `ema` or `fsq`.
      positions: N, codes of one example.
      codebook: C, entries of a learned codebook.
      code_size: numbers of one entry.
      levels: of each number of a code of `fsq`; their product is C.
      commitment: β, weight of the encoder's distance from its codes (eq. 3).
      decay: of the moving average of `ema`.
      network: `mlp` or `conv`.
      encoder: widths of the encoder's hidden layers, or channels of its stages.
      decoder: the same of the decoder.
      activation: one of `nn.mlp.ACTIVATIONS`, or for an `mlp` also `gated`.
      likelihood: one of `likelihoods.LIKELIHOODS`.
    """

    quantiser: str = "gradient"
    positions: int = 16
    codebook: int = 64
    code_size: int = 8
    levels: tuple[int, ...] = (5, 4, 4)
    commitment: float = 0.25
    decay: float = 0.99
    network: str = "mlp"
    encoder: tuple[int, ...] = (200, 200)
    decoder: tuple[int, ...] = (200, 200)
    activation: str = "silu"
    likelihood: str = "bernoulli"

    @property
    def num_codes(self) -> int:
        """C."""
        return math.prod(self.levels) if self.quantiser == "fsq" else self.codebook

    @property
    def size(self) -> int:
        """Numbers of one code."""
        return len(self.levels) if self.quantiser == "fsq" else self.code_size


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    if config.quantiser not in QUANTISERS:
        raise UserError(
            f"model.quantiser={config.quantiser!r}: choose one of {', '.join(QUANTISERS)}"
        )
    for field, least in (("positions", 1), ("codebook", 2), ("code_size", 1)):
        if getattr(config, field) < least:
            raise UserError(f"model.{field}={getattr(config, field)}: must be at least {least}")
    if not config.levels or not all(isinstance(n, int) and n > 1 for n in config.levels):
        raise UserError(f"model.levels={config.levels}: whole numbers, each at least 2")
    if not config.commitment >= 0:
        raise UserError(f"model.commitment={config.commitment}: must be at least 0")
    if not 0 <= config.decay < 1:
        raise UserError(f"model.decay={config.decay}: must be at least 0 and below 1")
    for field in ("encoder", "decoder"):
        networks.check_widths(field, getattr(config, field))
    networks.check(config.network, config.activation, spec)
    likelihoods.check(config.likelihood, spec)


class Net(nn.Module):
    """Encoder, decoder and, learned by gradient, the codebook."""

    config: Config
    spec: DataSpec

    def setup(self) -> None:
        """The networks."""
        config, spec = self.config, self.spec
        self.encoder = networks.Encoder(config.network, config.encoder, config.activation)
        self.vectors = nn.Dense(config.positions * config.size)
        self.decoder = networks.Decoder(
            config.network, config.decoder, config.activation, config.likelihood, spec
        )
        if config.quantiser == "gradient":
            shape = (config.codebook, config.size)
            self.codebook = self.param("codebook", nn.initializers.normal(1.0), shape)

    def __call__(self, x: jax.Array) -> None:
        """Touch every parameter, for initialisation."""
        self.outputs(self.encode(x))

    def encode(self, x: jax.Array) -> jax.Array:
        """`[B, N, E]` before quantisation, for x as the data hold it."""
        z = self.vectors(self.encoder(x / self.spec.scale))
        return z.reshape(len(x), self.config.positions, self.config.size)

    def outputs(self, z: jax.Array) -> jax.Array:
        """The likelihood's parameters `[B, D, P]` of codes `[B, N, E]`."""
        return self.decoder(z.reshape(len(z), -1))


def build(config: Config, spec: DataSpec) -> Model:
    """The model as pure functions; see `core.Model` for their contracts."""
    net = Net(config, spec)
    prior_net = quantise.AutoregressiveCodes(config.positions, config.num_codes)
    likelihood = likelihoods.LIKELIHOODS[config.likelihood]()

    def bind(params: Params) -> Net:
        return net.bind({"params": params["vqvae"]})

    def bind_prior(params: Params) -> quantise.AutoregressiveCodes:
        return prior_net.bind({"params": params["prior"]})

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        net_rng, prior_rng, codebook_rng = jax.random.split(rng, 3)
        one_hot = jnp.zeros((1, config.positions, config.num_codes))
        params = {
            "vqvae": net.init(net_rng, batch["x"][:1])["params"],
            "prior": prior_net.init(prior_rng, one_hot, method="log_prob")["params"],
        }
        if config.quantiser == "ema":
            total = jax.random.normal(codebook_rng, (config.codebook, config.size))
            params["state"] = quantise.Usage(jnp.ones(config.codebook), total)
        return params

    def codebook(params: Params) -> jax.Array:
        if config.quantiser == "ema":
            return params["state"].codebook
        return bind(params).codebook

    def quantised(params: Params, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Codes `[B, N, E]` of the encoder's vectors, and their indices `[B, N]`.

        The gradient goes straight through to z; a codebook entry gets its own, `fsq` has none.
        """
        if config.quantiser == "fsq":
            codes = quantise.finite_scalars(z, config.levels)
            return codes, quantise.scalars_to_index(codes, config.levels)
        entries = codebook(params)
        index = quantise.nearest(z, entries)
        return entries[index], index

    def codes_of(params: Params, index: jax.Array) -> jax.Array:
        if config.quantiser == "fsq":
            return quantise.index_to_scalars(index, config.levels).astype(jnp.float32)
        return codebook(params)[index]

    def log_prior(params: Params, index: jax.Array) -> jax.Array:
        """log p(c) `[B]`."""
        return bind_prior(params).log_prob(jax.nn.one_hot(index, config.num_codes))

    def distortion(params: Params, z: jax.Array, x: jax.Array) -> jax.Array:
        return -likelihood.log_prob(bind(params).outputs(z), x.reshape(len(x), -1))

    def autoencoder_loss(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """van den Oord et al. 2017, eq. 3; `ema` replaces its second term, `fsq` needs neither."""
        del rng
        z = bind(params).encode(batch["x"])
        codes, index = quantised(params, z)
        terms, scalars, state = {}, {}, None
        rows = jnp.where(batch["mask"], 1.0, 0.0) if "mask" in batch else jnp.ones(len(z))
        weight = jnp.repeat(rows, config.positions)
        scalars["perplexity"] = quantise.perplexity(index.reshape(-1), config.num_codes, weight)
        if config.quantiser == "fsq":
            terms["distortion"] = distortion(params, codes, batch["x"])
            return masked_mean(terms["distortion"], batch), Aux(terms, scalars)
        terms["distortion"] = distortion(params, quantise.straight_through(z, codes), batch["x"])
        held = jax.lax.stop_gradient
        terms["commitment"] = jnp.sum((z - held(codes)) ** 2, axis=(1, 2))
        cost = terms["distortion"] + config.commitment * terms["commitment"]
        if config.quantiser == "gradient":
            cost += jnp.sum((codes - held(z)) ** 2, axis=(1, 2))
        else:
            state = quantise.updated_usage(
                params["state"],
                held(z).reshape(-1, config.size),
                index.reshape(-1),
                weight,
                config.decay,
            )
        return masked_mean(cost, batch), Aux(terms, scalars, state)

    def prior_loss(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        del rng
        _, index = quantised(params, bind(params).encode(batch["x"]))
        rate = -log_prior(params, index)
        return masked_mean(rate, batch), Aux({"rate": rate})

    def elbo(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        del rng
        codes, index = quantised(params, bind(params).encode(batch["x"]))
        return log_prior(params, index) - distortion(params, codes, batch["x"])

    def encode(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        """The codes' own numbers, `[B, N · E]`."""
        del rng
        codes, _ = quantised(params, bind(params).encode(batch["x"]))
        return codes.reshape(len(codes), -1)

    def decode(params: Params, codes: jax.Array) -> jax.Array:
        return likelihoods.picture(likelihood, bind(params).outputs(codes), spec)

    def reconstruct(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        return decode(params, encode(params, batch, rng))

    def sample(params: Params, rng: jax.Array, num: int) -> dict[str, jax.Array]:
        code_rng, x_rng = jax.random.split(rng)
        index = jnp.argmax(bind_prior(params).draw(code_rng, num), axis=-1)
        outputs = bind(params).outputs(codes_of(params, index))
        return likelihoods.draw(likelihood, x_rng, outputs, spec)

    return Model(
        init=init,
        players=(Player("vqvae", autoencoder_loss), Player("prior", prior_loss)),
        log_likelihood_fns={"elbo": elbo},
        sample=sample,
        encode=encode,
        decode=decode,
        reconstruct=reconstruct,
    )
