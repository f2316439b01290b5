"""Gated PixelCNN: every pixel given those above it and to its left within reach, by convolutions.

    log p(x) = Σ_i log p(x_i | x_1, ..., x_{i-1}),   exact, pixels row by row

References: van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders" (the two
streams, `nn/causal.py`); Salimans et al. 2017, "PixelCNN++" (the likelihood of grey values); here
layers reach far by dilation (Yu & Koltun 2016).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dgm_jax import checks, labels, likelihoods
from dgm_jax.core import Aux, Batch, DataSpec, Model, Params, Player, UserError, masked_mean
from dgm_jax.likelihoods import Likelihood
from dgm_jax.nn import networks
from dgm_jax.nn.causal import GatedLayer
from dgm_jax.nn.precision import Dense


@dataclasses.dataclass(frozen=True)
class Config:
    """The model's fields.

    Attributes:
      channels: of either stream.
      window: how many rows above and columns aside the first layer sees.
      dilations: of each further layer.
      likelihood: of a pixel, one of `likelihoods.LIKELIHOODS`.
      conditional: a model of p(x | label).
    """

    channels: int = 32
    window: int = 3
    dilations: tuple[int, ...] = (1, 2, 4, 1, 2, 4)
    likelihood: str = "bernoulli"
    conditional: bool = False


def check(config: Config, spec: DataSpec) -> None:
    """Refuse values that make no sense.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    if len(spec.event_shape) != 3 or spec.event_shape[2] != 1:
        raise UserError(
            f"model.name='pixelcnn' needs images of one channel, and x is {spec.event_shape}: "
            "choose another data.dataset"
        )
    checks.at_least(config, channels=1, window=1)
    checks.widths(config, "dilations")
    likelihoods.check(config.likelihood, spec, exact=True)
    labels.check(config.conditional, spec)


class Net(nn.Module):
    """x `[B, H, W, 1]` in ±1, and a one-hot label `[B, K]` or None -> outputs `[B, D, P]`."""

    config: Config
    spec: DataSpec

    def setup(self) -> None:
        """Layers, what a label says to each, and what comes of the last."""
        size, config = self.config.channels, self.config
        further = [GatedLayer(size, reach) for reach in config.dilations]
        self.layers = [GatedLayer(size, config.window, first=True), *further]
        if config.conditional:
            self.told = [Dense(4 * size, use_bias=False) for _ in self.layers]
        self.hidden = Dense(2 * size)
        self.head = networks.Head(config.likelihood, self.spec, per_pixel=True)

    def __call__(self, x: jax.Array, label: jax.Array | None) -> jax.Array:
        """The parameters of each p(x_i | x_<i)."""
        v = h = x
        for layer, (to_v, to_h) in zip(self.layers, self._told(label), strict=True):
            seen = layer.horizontal(h)
            v, said = layer.down(v, layer.vertical(v), to_v[:, None, None])
            h = layer.right(h, seen, said, to_h[:, None, None])
        return self._outputs(h.reshape(len(x), -1, h.shape[-1]))

    def draw(
        self, rng: jax.Array, num: int, label: jax.Array | None, likelihood: Likelihood
    ) -> jax.Array:
        """x `[num, H, W, 1]` as the data hold it: of each row first what is above, then its pixels.

        Arguments as elsewhere; every pixel of every layer is computed once.
        """
        height, width, _ = self.spec.event_shape
        told, size = self._told(label), self.config.channels

        def draw_row(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            images, streams = carry  # what the vertical layers read: [num, H, W, ·] each
            i, key = inputs
            v, streams, said = images, list(streams), []
            for n, (layer, (to_v, _)) in enumerate(zip(self.layers, told, strict=True)):
                seen, before = layer.vertical.at_row(v, i), None if layer.first else v[:, i]
                row, says = layer.down(before, seen, to_v[:, None])
                streams[n] = streams[n].at[:, i].set(row)
                v, said = streams[n], [*said, says]

            def draw_pixel(rows: tuple, inputs: tuple) -> tuple[tuple, None]:
                j, key = inputs
                rows = list(rows)
                for n, (layer, (_, to_h)) in enumerate(zip(self.layers, told, strict=True)):
                    seen, before = layer.horizontal.at_pixel(rows[n], j), rows[n][:, j]
                    h = layer.right(before, seen, said[n][:, j], to_h)
                    rows[n + 1] = rows[n + 1].at[:, j].set(h)
                outputs = self._outputs(h, i * width + j)
                drawn = likelihood.draw(key, outputs)
                rows[0] = rows[0].at[:, j].set(networks.centred(drawn / self.spec.scale))
                return tuple(rows), drawn

            start = (
                jnp.zeros((num, width, 1)),
                *([jnp.zeros((num, width, size))] * len(self.layers)),
            )
            steps = jnp.arange(width), jax.random.split(key, width)
            (row, *_), drawn = jax.lax.scan(draw_pixel, start, steps)
            return (images.at[:, i].set(row), tuple(streams)), jnp.moveaxis(drawn, 0, 1)

        streams = tuple(jnp.zeros((num, height, width, size)) for _ in self.layers)
        start = jnp.zeros((num, height, width, 1)), streams
        steps = jnp.arange(height), jax.random.split(rng, height)
        _, drawn = jax.lax.scan(draw_row, start, steps)
        return jnp.moveaxis(drawn, 0, 1)

    def _told(self, label: jax.Array | None) -> list[tuple[jax.Array, jax.Array]]:
        """What each layer's streams are told of the label, `[B or 1, 2 C]` each."""
        if label is None:
            return [(jnp.zeros((1, 1)),) * 2] * len(self.layers)
        return [tuple(jnp.split(told(label), 2, axis=-1)) for told in self.told]

    def _outputs(self, h: jax.Array, pixel: jax.Array | None = None) -> jax.Array:
        return self.head(nn.silu(self.hidden(nn.silu(h))), pixel)


def build(config: Config, spec: DataSpec) -> Model:
    """The PixelCNN as pure functions; see `core.Model` for their contracts."""
    net, likelihood = Net(config, spec), likelihoods.LIKELIHOODS[config.likelihood]()

    def one_hot(label: jax.Array | None) -> jax.Array | None:
        return labels.one_hot(label, config.conditional, spec)

    def init(rng: jax.Array, batch: Batch) -> Params:
        likelihoods.refuse_outside_support(batch["x"], spec)
        x, label = jnp.zeros((1, *spec.event_shape)), one_hot(jnp.zeros(1, jnp.int32))
        return {"pixelcnn": net.init(rng, x, label)["params"]}

    def log_prob(params: Params, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        """log p(x), or log p(x | label), `[B]`."""
        del rng
        x = batch["x"]
        inputs = networks.centred(x / spec.scale), one_hot(batch.get("label"))
        outputs = net.apply({"params": params["pixelcnn"]}, *inputs)
        return likelihood.log_prob(outputs, x.reshape(len(x), -1))

    def loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        del rng
        return -masked_mean(log_prob(params, batch), batch), Aux({})

    def sample(
        params: Params, rng: jax.Array, num: int, label: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        told = labels.of_samples(num, label, config.conditional, spec)
        args = rng, num, one_hot(told.get("label")), likelihood
        return {"x": net.apply({"params": params["pixelcnn"]}, *args, method="draw")} | told

    return Model(
        init=init,
        players=(Player("pixelcnn", loss_fn),),
        log_likelihood_fns={"log_prob": log_prob},
        sample=sample,
        samples_have_label=config.conditional,
    )
