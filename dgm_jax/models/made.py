"""Masked autoencoders for distribution estimation: every pixel given those before it, in one pass.

    log p(x) = Σ_i log p(x_i | x_1, ..., x_{i-1}),   exact, pixels row by row

Reference: Germain et al. 2015, "MADE: masked autoencoder for distribution estimation".
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import labels, likelihoods
from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.nn import networks
from dgm_jax.nn.mlp import ACTIVATIONS, MaskedMLP


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields.

    Attributes:
      hidden: widths of the hidden layers.
      activation: one of `nn.mlp.ACTIVATIONS`.
      likelihood: of a pixel, one of `likelihoods.LIKELIHOODS`.
      conditional: a model of p(x | label).
    """

    hidden: tuple[int, ...] = (500,)
    activation: str = "silu"
    likelihood: str = "bernoulli"
    conditional: bool = False


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    networks.check_widths("hidden", config.hidden)
    if config.activation not in ACTIVATIONS:
        raise UserError(
            f"model.activation={config.activation!r}: choose one of {', '.join(ACTIVATIONS)}"
        )
    likelihoods.check(config.likelihood, spec)
    if spec.num_dims < 2:
        raise UserError(f"model.name='made' needs at least two pixels, and x is {spec.event_shape}")
    labels.check(config.conditional, spec)


class Net(nn.Module):
    """x `[B, D]` in [0, 1], and a one-hot label `[B, C]` or None -> outputs `[B, D, P]`."""

    config: Config
    spec: DataSpec

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array | None) -> jax.Array:
        """The parameters of each p(x_i | x_<i)."""
        initial = likelihoods.LIKELIHOODS[self.config.likelihood]().initial(self.spec.mean.ravel())
        # Flat, as biases are: the optimizer does not decay arrays of one dimension.
        bias = self.param("bias", lambda key: jnp.asarray(initial.ravel(), jnp.float32))
        layers = (self.config.hidden, initial.shape[1], self.config.activation)
        out = MaskedMLP(self.spec.num_dims, *layers)(networks.centred(x), label)
        return out + bias.reshape(1, *initial.shape)


def build(config: Config, spec: DataSpec) -> Model:
    """MADE as pure functions; see `core.Model` for their contracts."""
    net, likelihood = Net(config, spec), likelihoods.LIKELIHOODS[config.likelihood]()

    def outputs(params: Params, x: jax.Array, label: jax.Array | None) -> jax.Array:
        """`[B, D, P]` for x `[B, D]` as the data hold it."""
        one_hot = labels.one_hot(label, config.conditional, spec)
        return net.apply({"params": params["made"]}, x / spec.scale, one_hot)

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        x, label = jnp.zeros((1, spec.num_dims)), jnp.zeros(1, jnp.int32)
        one_hot = labels.one_hot(label, config.conditional, spec)
        return {"made": net.init(rng, x, one_hot)["params"]}

    def log_prob(params: Params, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        """log p(x), or log p(x | label), `[B]`."""
        del rng
        x = batch["x"].reshape(len(batch["x"]), -1)
        return likelihood.log_prob(outputs(params, x, batch.get("label")), x)

    def loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        del rng
        return -masked_mean(log_prob(params, batch), batch), Aux({})

    def sample(params: Params, rng: jax.Array, num: int) -> dict[str, jax.Array]:
        told = labels.in_turn(num, config.conditional, spec)

        def add(x: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            i, key = step
            each = outputs(params, x, told.get("label"))
            here = jax.lax.dynamic_slice_in_dim(each, i, 1, axis=1)
            return x.at[:, i].set(likelihood.draw(key, here)[:, 0]), None

        steps = jnp.arange(spec.num_dims), jax.random.split(rng, spec.num_dims)
        x = jax.lax.scan(add, jnp.zeros((num, spec.num_dims)), steps)[0]
        return {"x": x.reshape(num, *spec.event_shape)} | told

    return Model(
        init=init,
        players=(Player("made", loss_fn),),
        log_likelihood_fns={"log_prob": log_prob},
        sample=sample,
    )
