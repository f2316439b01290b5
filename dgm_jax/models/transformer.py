"""A decoder-only Transformer over tokens: text, or the pixels of an image row by row.

    log p(x) = Σ_i log p(x_i | x_1, ..., x_{i-1}),   exact

Binary pixels are tokens of a vocabulary of 2, grey values of 256. See `nn/autoregressive.py` for
the network and its references.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import checks, labels, likelihoods
from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.nn import attention
from dgm_jax.nn.autoregressive import AutoregressiveTransformer

SAMPLING = ("temperature", "top_p")


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields. Real numbers may be traced.

    Attributes:
      width: of embeddings and blocks.
      depth: number of blocks.
      heads: of each block's attention.
      hidden: width of each block's feed-forward layer.
      conditional: a model of p(x | label).
      temperature: of samples: logits are divided by it. No likelihood knows of it.
      top_p: of samples: each token is one of the fewest that have this probability between them.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    hidden: int = 384
    conditional: bool = False
    temperature: float = 1.0
    top_p: float = 1.0


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    if not spec.num_values:
        raise UserError(
            "model.name='transformer' needs tokens or images, and these data are real vectors"
        )
    attention.check(config.width, config.heads, max(1, len(_grid(spec))))
    checks.at_least(config, depth=1, hidden=1)
    checks.positive(config, "temperature")
    if not 0 < config.top_p <= 1:
        raise UserError(f"model.top_p={config.top_p}: must be above 0 and at most 1")
    labels.check(config.conditional, spec)


def _grid(spec: DataSpec) -> tuple[int, ...]:
    """Sides of an image, or none."""
    return spec.event_shape[:2] if len(spec.event_shape) == 3 else ()


def build(config: Config, spec: DataSpec) -> Model:
    """The Transformer as pure functions; see `core.Model` for their contracts."""
    net = AutoregressiveTransformer(
        num=spec.num_dims,
        classes=spec.num_values,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        hidden=config.hidden,
        grid=_grid(spec),
        absolute=spec.support != "tokens",  # a text may be cut anywhere
        labels=spec.num_classes if config.conditional else 0,
    )

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        codes = jnp.zeros((1, net.num, net.classes))
        return {"transformer": net.init(rng, codes, method="log_prob")["params"]}

    def log_prob(params: Params, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        """log p(x), or log p(x | label), `[B]`."""
        del rng
        tokens = batch["x"].reshape(len(batch["x"]), -1).astype(jnp.int32)
        codes = nn.one_hot(tokens, net.classes)
        label = batch["label"] if config.conditional else None
        return net.apply({"params": params["transformer"]}, codes, label, method="log_prob")

    def loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        del rng
        return -masked_mean(log_prob(params, batch), batch), Aux({})

    def sample(
        params: Params, rng: jax.Array, num: int, label: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        told = labels.of_samples(num, label, config.conditional, spec)
        how = (told.get("label"), config.temperature, config.top_p)
        codes = net.apply({"params": params["transformer"]}, rng, num, *how, method="draw")
        tokens = jnp.argmax(codes, axis=-1).reshape(num, *spec.event_shape)
        x = tokens.astype(jnp.int32 if spec.support == "tokens" else jnp.float32)
        return {"x": x} | told

    return Model(
        init=init,
        players=(Player("transformer", loss_fn),),
        log_likelihood_fns={"log_prob": log_prob},
        sample=sample,
        samples_have_label=config.conditional,
    )
