"""Masked autoencoders for distribution estimation: every pixel given those before it, in one pass.

    log p_o(x) = Σ_i log p(x_o(i) | x_o(1), ..., x_o(i-1)),   exact, of pixels in the order o
    log p(x)   = log 1/O Σ_o p_o(x)

The first order is row by row, and most often the only one. Networks of several orders err in
different places, and their mixture is better than any; each is trained by itself.

References: Germain et al. 2015, "MADE: masked autoencoder for distribution estimation"; Uria et al.
2014, "A deep and tractable density estimator" (mixtures over orders, there of one network).
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax import checks, labels, likelihoods
from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.distributions import log_mean_exp
from dgm_jax.nn import networks
from dgm_jax.nn.mlp import ACTIVATIONS, MaskedMLP


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields.

    Attributes:
      hidden: widths of the hidden layers.
      orders: O, networks, each with an order of its own: row by row, then permutations, the same in
        every run.
      activation: one of `nn.mlp.ACTIVATIONS`.
      likelihood: of a pixel, one of `likelihoods.LIKELIHOODS`.
      conditional: a model of p(x | label).
    """

    hidden: tuple[int, ...] = (500,)
    orders: int = 1
    activation: str = "silu"
    likelihood: str = "bernoulli"
    conditional: bool = False


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    checks.widths(config, "hidden")
    checks.at_least(config, orders=1)
    checks.one_of(config, activation=ACTIVATIONS)
    likelihoods.check(config.likelihood, spec, exact=True)
    if spec.num_dims < 2:
        raise UserError(f"model.name='made' needs at least two pixels, and x is {spec.event_shape}")
    if config.orders > (most := math.factorial(min(spec.num_dims, 9))):
        raise UserError(f"model.orders={config.orders}: at most {most:,}, as many as there are")
    labels.check(config.conditional, spec)


class Net(nn.Module):
    """x `[B, D]` in [0, 1], and a one-hot label `[B, C]` or None -> outputs `[B, D, P]`.

    Attributes:
      config: of the model.
      mean: of each variable over the data, `[D]`, in the order in which they are given.
    """

    config: Config
    mean: np.ndarray

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array | None) -> jax.Array:
        """The parameters of each p(x_i | x_<i)."""
        initial = likelihoods.LIKELIHOODS[self.config.likelihood]().initial(self.mean)
        # Flat, as biases are: the optimizer does not decay arrays of one dimension.
        bias = self.param("bias", lambda key: jnp.asarray(initial.ravel(), jnp.float32))
        layers = (self.config.hidden, initial.shape[1], self.config.activation)
        out = MaskedMLP(len(initial), *layers)(networks.centred(x), label)
        return out + bias.reshape(1, *initial.shape)


def build(config: Config, spec: DataSpec) -> Model:
    """MADE as pure functions; see `core.Model` for their contracts."""
    likelihood = likelihoods.LIKELIHOODS[config.likelihood]()
    orders = _orders(config.orders, spec.num_dims)
    nets = [Net(config, spec.mean.ravel()[order]) for order in orders]

    def outputs(i: int, params: Params, x: jax.Array, label: jax.Array | None) -> jax.Array:
        """`[B, D, P]` of the i-th network, for x `[B, D]` of the data's scale, in its order."""
        one_hot = labels.one_hot(label, config.conditional, spec)
        return nets[i].apply({"params": params["made"][f"order_{i}"]}, x / spec.scale, one_hot)

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        x, label = jnp.zeros((1, spec.num_dims)), jnp.zeros(1, jnp.int32)
        one_hot = labels.one_hot(label, config.conditional, spec)
        keys = jax.random.split(rng, config.orders)
        inits = [net.init(key, x, one_hot)["params"] for net, key in zip(nets, keys, strict=True)]
        return {"made": {f"order_{i}": params for i, params in enumerate(inits)}}

    def each_log_prob(params: Params, batch: Batch) -> jax.Array:
        """log p_o(x), or log p_o(x | label), `[O, B]`."""
        x, label = batch["x"].reshape(len(batch["x"]), -1), batch.get("label")
        ordered = [x[:, order] for order in orders]
        return jnp.stack(
            [likelihood.log_prob(outputs(i, params, x, label), x) for i, x in enumerate(ordered)]
        )

    def log_prob(params: Params, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        """log p(x), or log p(x | label), `[B]`."""
        del rng
        return log_mean_exp(each_log_prob(params, batch))

    def loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Mean -log p_o(x) over the orders, which is at least -log p(x)."""
        del rng
        return -masked_mean(jnp.mean(each_log_prob(params, batch), axis=0), batch), Aux({})

    def sample(
        params: Params, rng: jax.Array, num: int, label: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        # As many of each order, at places drawn at random, of which the first `num` are kept.
        each = math.ceil(num / config.orders)
        told = labels.of_samples(num, label, config.conditional, spec)
        every_label = jnp.resize(told["label"], each * config.orders) if told else None
        rng, shuffle = jax.random.split(rng)
        places = jax.random.permutation(shuffle, each * config.orders).reshape(-1, each)
        x = jnp.zeros((each * config.orders, spec.num_dims))
        for i, key in enumerate(jax.random.split(rng, config.orders)):
            given = every_label[places[i]] if told else None
            x = x.at[places[i]].set(sample_in_order(i, params, key, each, given))
        return {"x": x[:num].reshape(num, *spec.event_shape)} | told

    def sample_in_order(
        i: int, params: Params, rng: jax.Array, num: int, label: jax.Array | None
    ) -> jax.Array:
        """`[num, D]` of the i-th network, as the data hold it."""

        def add(x: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            j, key = step
            here = jax.lax.dynamic_slice_in_dim(outputs(i, params, x, label), j, 1, axis=1)
            return x.at[:, j].set(likelihood.draw(key, here)[:, 0]), None

        steps = jnp.arange(spec.num_dims), jax.random.split(rng, spec.num_dims)
        x = jax.lax.scan(add, jnp.zeros((num, spec.num_dims)), steps)[0]
        return x[:, np.argsort(orders[i])]

    return Model(
        init=init,
        players=(Player("made", loss_fn),),
        log_likelihood_fns={"log_prob": log_prob},
        sample=sample,
        samples_have_label=config.conditional,
    )


def _orders(count: int, num: int) -> list[np.ndarray]:
    """`count` orders of `num` pixels, no two alike, the first row by row: each int `[num]`."""
    found, seed = [np.arange(num)], 0
    while len(found) < count:
        seed += 1
        order = np.random.default_rng(seed).permutation(num)
        if not any(np.array_equal(order, other) for other in found):
            found.append(order)
    return found
