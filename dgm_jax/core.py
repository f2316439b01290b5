"""The contract every model keeps, and everything generic relies on.

A model is a few pure functions. Steps, devices, evaluation and checkpoints know these types and
no model by name.

Conventions, used throughout the project:

* `params`: `dict[str, PyTree]`, one entry per player, e.g. `{"vae": ...}`. Variables that no
  player trains (an EMA codebook) live in an entry `"state"`: float arrays, averaged as parameters
  are for what is evaluated.
* `batch`: dict of arrays with a leading axis B. `x` is `[B, *event]`, float32, of tokens int32.
  Optional: `label` int32 `[B]` (-1 where it is not told), `mask` bool `[B]` (the row is real, not
  padding), `id` int32 `[B]` (index in the split).
* `rng`: one typed key. Keys are derived by purpose, step and id (see `rng.py`), never stored.
* A *cost* is lower-is-better, a *log-likelihood* or a bound on one is higher-is-better; both are
  in nats per example.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Params = Mapping[str, Any]
Batch = Mapping[str, jax.Array]


class UserError(Exception):
    """Something the user can mend. Its text is one line: which value is wrong and what to do.

    What a file holds may be quoted in it: a line end or another control character is shown as what
    it is (`\\n`), and a text without end is cut.
    """

    def __init__(self, text: str) -> None:
        """`text` is what to say."""
        super().__init__(one_line(text))


def one_line(text: str) -> str:
    """`text` to be shown: control characters as what they are, and no more than 2,000 of all."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:2000])


class Labelled(NamedTuple):
    """Which training examples a model is told the label of, where it is not told all.

    Attributes:
      num: how many.
      share: of the rows of a training batch, on the average.
    """

    num: int
    share: float


class DataSpec(NamedTuple):
    """What a model may know about the data before it sees any.

    Attributes:
      event_shape: shape of one example: `(28, 28, 1)` of an image, `(T,)` of a text, `(D,)` of a
        vector.
      support: the set each entry of `x` lies in: `"binary"` ({0, 1}), `"uint8"` ({0, ..., 255}),
        `"tokens"` ({0, ..., vocabulary - 1}, in no order) or `"real"`.
      mean: float32 `[*event]`, the training mean of `x`, for initialising output biases.
      num_examples: size of the training split.
      num_classes: labels are 0, ..., num_classes - 1; 0 where there are none.
      vocabulary: number of different tokens; 0 of other data.
      labelled: None where training tells all labels that there are; else those it does not tell
        are -1 in its batches.
    """

    event_shape: tuple[int, ...]
    support: str
    mean: np.ndarray
    num_examples: int = 0
    num_classes: int = 0
    vocabulary: int = 0
    labelled: Labelled | None = None

    @property
    def num_dims(self) -> int:
        """Number of scalar dimensions of one example (the D of bits/dim)."""
        return int(np.prod(self.event_shape))

    @property
    def dtype(self) -> Any:
        """Of `x` in a batch."""
        return jnp.int32 if self.support == "tokens" else jnp.float32

    @property
    def num_values(self) -> int:
        """How many values an entry of `x` can have; 0 where it is real."""
        return {"binary": 2, "uint8": 256, "tokens": self.vocabulary, "real": 0}[self.support]

    @property
    def scale(self) -> float:
        """What networks divide `x` by: the largest grey value, so that they see [0, 1]; else 1."""
        return 255.0 if self.support == "uint8" else 1.0

    @property
    def unit_mean(self) -> np.ndarray:
        """`mean` scaled to [0, 1]."""
        return self.mean / self.scale


class Aux(NamedTuple):
    """What a loss function returns beside the loss.

    Attributes:
      terms: name -> float32 `[B]`, nats per example, unweighted costs.
      scalars: name -> float32 `[]`, batch-level diagnostics.
      state: replaces `params["state"]` after the step; None leaves it alone.
    """

    terms: Mapping[str, jax.Array]
    scalars: Mapping[str, jax.Array] = {}
    state: Any = None


class Player(NamedTuple):
    """One optimised objective: `loss_fn(params, batch, rng) -> (loss, Aux)`.

    Only `params[name]` is differentiated and updated. A VAE is one player, a GAN two.

    Attributes:
      name: of its parameters.
      loss_fn: what is minimised.
      terms_fn: `(params, batch, rng) -> {name: float32 [B]}`, the terms of held-out data, where a
        loss withholds labels, or lets examples of a batch have to do with each other; None where
        they are those of the loss.
    """

    name: str
    loss_fn: Callable[[Params, Batch, jax.Array], tuple[jax.Array, Aux]]
    terms_fn: Callable[[Params, Batch, jax.Array], Mapping[str, jax.Array]] | None = None

    def terms(self, params: Params, batch: Batch, rng: jax.Array) -> Mapping[str, jax.Array]:
        """Costs of held-out data, each float32 `[B]`, nats."""
        if self.terms_fn is None:
            return self.loss_fn(params, batch, rng)[1].terms
        return self.terms_fn(params, batch, rng)


class Latents(NamedTuple):
    """What may be asked of a model's latent variables z, a pytree of float arrays. In nats.

    Attributes:
      draw_joint: of the arguments of `Model.sample`, `(z [num, ...], samples)`: z from the prior,
        and given it what `Model.sample` returns.
      draw_posterior: `(params, batch, rng) -> z [B, ...]`, one draw from q(z | x) for each row.
      log_joint: `(params, batch, z [K, B, ...]) -> (log p(x | z), log p(z))`, each `[K, B]`.
      log_posterior: `(params, batch, z [K, B, ...]) -> log q(z | x) [K, B]`; None where the
        posterior knows only the density of its own draws.
      samples_are_exact: whether `draw_joint` draws from exp(`log_joint`) itself.
    """

    draw_joint: Callable[..., tuple[Any, dict[str, jax.Array]]]
    draw_posterior: Callable[[Params, Batch, jax.Array], Any]
    log_joint: Callable[[Params, Batch, Any], tuple[jax.Array, jax.Array]]
    log_posterior: Callable[[Params, Batch, Any], jax.Array] | None = None
    samples_are_exact: bool = True


class Model(NamedTuple):
    """A generative model. None where a family has no such thing.

    Attributes:
      init: `(rng, batch) -> params`.
      players: what the training step optimises, in order.
      log_likelihood_fns: name -> `(params, batch, rng) -> [B]` nats, higher is better, each under
        its true name: `elbo` is a lower bound, `log_prob` is exact and draws nothing.
      log_weight: `(params, batch, rng) -> [B]`, one draw of log p(x, z) - log q(z | x); its
        log-mean-exp over draws is the importance-weighted bound.
      latents: what may be asked of z.
      latent_rates: `(params, batch) -> [B, L]`, the rate of each latent in closed form, nats.
      classify: `(params, batch) -> [B, num_classes]`, log q(label | x), nats.
      sample: `(params, rng, num) -> dict` with `x` `[num, *event]` drawn from the model, and where
        the decoder has one `mean` = E[x | z] for pictures.
      samples_have_label: whether `sample` takes a fourth argument, the classes int32 `[num]` that
        it is to draw, by default each in turn, and returns them as `label`.
      encode: `(params, batch, rng) -> [B, F]` features; posterior means for a VAE.
      encoder_is_told: whether `encode` looks at the label: its features then tell it.
      layer_sizes: sizes of the consecutive parts that `encode` concatenates, one for each layer
        of a hierarchy, from the data up; empty where there is one part.
      decode: `(params, z [B, F]) -> [B, *event]`, the mean E[x | z].
      reconstruct: `(params, batch, rng) -> [B, *event]`, the mean E[x | z] at z ~ q(z | x), in
        [0, 1]; a draw from p(x | z) where the decoder works pixel by pixel.
    """

    init: Callable[[jax.Array, Batch], Params]
    players: tuple[Player, ...]
    log_likelihood_fns: Mapping[str, Callable[[Params, Batch, jax.Array], jax.Array]]
    log_weight: Callable[[Params, Batch, jax.Array], jax.Array] | None = None
    latents: Latents | None = None
    latent_rates: Callable[[Params, Batch], jax.Array] | None = None
    classify: Callable[[Params, Batch], jax.Array] | None = None
    sample: Callable[..., dict[str, jax.Array]] | None = None
    samples_have_label: bool = False
    encode: Callable[[Params, Batch, jax.Array], jax.Array] | None = None
    encoder_is_told: bool = False
    layer_sizes: tuple[int, ...] = ()
    decode: Callable[[Params, jax.Array], jax.Array] | None = None
    reconstruct: Callable[[Params, Batch, jax.Array], jax.Array] | None = None

    def require(self, name: str) -> Any:
        """The field `name`, for what cannot be done without it.

        Raises:
          UserError: this family has no such thing; names what it has.
        """
        if not (found := getattr(self, name)):
            raise UserError(f"this model has no {name}; it has: {', '.join(self.abilities)}")
        return found

    @property
    def abilities(self) -> list[str]:
        """What it can be asked for: its log-likelihoods by name, and the fields that are there."""
        optional = [field for field, usual in self._field_defaults.items() if usual is None]
        there = [field for field in optional if getattr(self, field) is not None]
        return [*self.log_likelihood_fns, *there]

    @property
    def loss_fn(self) -> Callable[[Params, Batch, jax.Array], tuple[jax.Array, Aux]]:
        """The loss of the only player, for the many models that have one.

        Raises:
          UserError: there are several; names them.
        """
        if len(self.players) != 1:
            names = ", ".join(player.name for player in self.players)
            raise UserError(f"this model has the players {names}: take players[i].loss_fn of one")
        return self.players[0].loss_fn


def disjoint(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of all parts.

    Raises:
      UserError: two of them have one of the same name, of which one would be lost.
    """
    found: dict[str, Any] = {}
    for part in parts:
        if twice := found.keys() & part.keys():
            raise UserError(
                f"the model gives two numbers the name {min(twice)!r}: give each term, scalar and "
                "log-likelihood a name of its own, other than 'loss'"
            )
        found |= part
    return found


def masked_mean(values: jax.Array, batch: Batch) -> jax.Array:
    """Mean of `values` `[B]` over the real rows of `batch` (all rows without a mask) -> `[]`.

    Raises:
      UserError: the mask leaves no row. A traced mask is not looked at: the mean is then NaN.
    """
    if "mask" not in batch:
        return jnp.mean(values)
    mask = batch["mask"]
    if not isinstance(mask, jax.core.Tracer) and not np.any(mask):
        raise UserError(f"batch['mask'] leaves none of the {len(mask)} rows: there is no mean")
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.sum(mask)
