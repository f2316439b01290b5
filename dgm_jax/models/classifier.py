"""A classifier: the features of its last hidden layer are what judges the samples of other models.

    log q(label | x) = log softmax(W f(x) + b);   f(x) the features, |f(x)|² = F

It generates nothing and knows no density of x: of the interface it has `classify` and `encode`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import checks, likelihoods
from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.nn import networks
from dgm_jax.nn.mlp import ACTIVATIONS
from dgm_jax.nn.precision import Dense


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields. Real numbers may be traced.

    Attributes:
      network: `mlp` or `conv`.
      hidden: widths of its hidden layers, or channels of its stages.
      features: F, width of the last hidden layer.
      activation: one of `nn.mlp.ACTIVATIONS`, or for an `mlp` also `gated`.
    """

    network: str = "conv"
    hidden: tuple[int, ...] = (16, 32, 64)
    features: int = 64
    activation: str = "silu"


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    if spec.num_classes < 2:
        raise UserError("model.name='classifier' needs data with labels of two classes or more")
    if spec.support == "tokens":
        raise UserError("model.name='classifier' sees images or vectors, and these are tokens")
    checks.widths(config, "hidden")
    networks.check(config.network, config.activation, spec)
    checks.at_least(config, features=1)


class Net(nn.Module):
    """x as the data hold it, `[B, *event]` -> features `[B, F]` and log q(label | x) `[B, C]`."""

    config: Config
    spec: DataSpec

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both."""
        config = self.config
        encoder = networks.Encoder(config.network, config.hidden, config.activation)
        h = encoder(x / self.spec.scale)
        activation = "silu" if config.activation == "gated" else config.activation
        # Of unit size: distances between features do not grow as the classifier gets surer.
        features = nn.RMSNorm(use_scale=False)(ACTIVATIONS[activation](Dense(config.features)(h)))
        return features, nn.log_softmax(Dense(self.spec.num_classes)(features))


def build(config: Config, spec: DataSpec) -> Model:
    """The classifier as pure functions; see `core.Model` for their contracts."""
    net = Net(config, spec)

    def apply(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return net.apply({"params": params["classifier"]}, x)

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        return {"classifier": net.init(rng, batch["x"][:1])["params"]}

    def loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        del rng
        _, log_q = apply(params, batch["x"])
        cost = -jnp.take_along_axis(log_q, batch["label"][:, None], axis=1)[:, 0]
        return masked_mean(cost, batch), Aux({"cross_entropy": cost})

    return Model(
        init=init,
        players=(Player("classifier", loss_fn),),
        log_likelihood_fns={},
        classify=lambda params, batch: apply(params, batch["x"])[1],
        encode=lambda params, batch, rng: apply(params, batch["x"])[0],
    )
