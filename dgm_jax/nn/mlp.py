"""Multi-layer perceptron blocks."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dgm_jax.nn.precision import Dense, product

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "relu": nn.relu,
    "tanh": nn.tanh,
    "gelu": nn.gelu,
}


class MLP(nn.Module):
    """Dense hidden layers with one activation: `[..., D]` -> `[..., hidden[-1]]`.

    Attributes:
      hidden: widths of the layers.
      activation: one of `ACTIVATIONS`, or `"gated"`: (W h + b) ⊙ sigmoid(V h + c) (Dauphin et al.
        2017; the dense layers of Tomczak & Welling 2018).
    """

    hidden: tuple[int, ...]
    activation: str = "silu"

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """Apply the layers to `h` float `[..., D]`."""
        for width in self.hidden:
            if self.activation == "gated":
                value, gate = jnp.split(Dense(2 * width)(h), 2, axis=-1)
                h = value * nn.sigmoid(gate)
            else:
                h = ACTIVATIONS[self.activation](Dense(width)(h))
        return h


# A masked product's bands: of so many columns at least, and so many at most.
_BAND, _MOST_BANDS = 128, 8


class MaskedMLP(nn.Module):
    """A network whose output for variable j sees variables 0, ..., j - 1 alone.

    Units stand in the order of their degrees, so that the masks are staircases, and little of what
    is under them is computed.

    Reference: Germain et al. 2015, "MADE", eqs. 8 to 13, with evenly spread degrees.

    Attributes:
      num: D, number of variables.
      hidden: widths of the hidden layers.
      outputs: P, numbers given for each variable.
      activation: one of `ACTIVATIONS`.
      inputs: I, numbers that make up each variable.
    """

    num: int
    hidden: tuple[int, ...]
    outputs: int
    activation: str = "silu"
    inputs: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """Outputs `[..., D, P]` for `x` float `[..., D·I]`; a context `[..., F]` is seen by all."""
        degrees = np.arange(1, self.num + 1)
        h, before = x, np.repeat(degrees, self.inputs)
        for i, width in enumerate(self.hidden):
            after = _spread(width, max(1, self.num - 1))
            h = self._masked_dense(f"hidden_{i}", h, before[:, None] <= after[None])
            if i == 0 and context is not None:
                h += Dense(width, use_bias=False)(context)
            h, before = ACTIVATIONS[self.activation](h), after
        mask = np.repeat(before[:, None] < degrees[None], self.outputs, axis=1)
        out = self._masked_dense("out", h, mask)
        if context is not None:  # the first variable sees no hidden unit, and must see this
            out += Dense(self.num * self.outputs, use_bias=False)(context)
        return out.reshape(*out.shape[:-1], self.num, self.outputs)

    def _masked_dense(self, name: str, h: jax.Array, mask: np.ndarray) -> jax.Array:
        """A dense layer with the weights outside `mask` bool `[D, F]` held at zero.

        `mask` is a staircase: what a column sees are the first rows, and no fewer than the column
        before it. So a band of columns is a product with those rows alone that its last one sees.
        """
        num = min(_MOST_BANDS, max(1, mask.shape[1] // _BAND))
        outs = []
        for i, band in enumerate(np.array_split(mask, num, axis=1)):
            band = band[: max(1, np.count_nonzero(band[:, -1]))]  # no product is of no rows
            kernel = self.param(f"{name}_kernel_{i}", nn.initializers.lecun_normal(), band.shape)
            outs.append(product(jnp.matmul, h[..., : len(band)], kernel * band))
        bias = self.param(f"{name}_bias", nn.initializers.zeros, mask.shape[1:])
        return jnp.concatenate(outs, axis=-1) + jnp.expand_dims(bias, range(h.ndim - 1))


def _spread(width: int, highest: int) -> np.ndarray:
    """Degrees of `width` units, from 1 to `highest`, in ascending order: int `[width]`.

    Each as often as any other; of fewer units, but at least two, in even steps, so that the last
    output still sees all variables before it, and others may miss those since the last step.
    """
    if width >= highest:
        return np.sort(np.arange(width) % highest + 1)
    return np.round(np.linspace(1, highest, width)).astype(int)
