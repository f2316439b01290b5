"""Everything a run needs to go on: arrays only, so that it can be donated, sharded and saved."""

from typing import Any

import flax.struct
import jax
import optax

from dgm_jax.core import Params


class TrainState(flax.struct.PyTreeNode):
    """A Flax train state without functions in it.

    Attributes:
      step: int32 `[]`, number of updates made.
      seed: int32 `[]`; with the step it determines all noise and the data order.
      params: the model's parameters, by player.
      opt_states: the optimizer's state, by player.
      ema: averaged parameters, or None.
    """

    step: jax.Array
    seed: jax.Array
    params: Params
    opt_states: dict[str, optax.OptState]
    ema: Any

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate and sample with."""
        return self.params if self.ema is None else self.ema


def num_parameters(params: Params) -> int:
    """Number of scalars that players train: all of `params` but its entry `"state"`."""
    trained = {name: own for name, own in params.items() if name != "state"}
    return sum(leaf.size for leaf in jax.tree.leaves(trained))
