"""From posterior draws and an objective to a model: its loss, its bounds and its sampler."""

from collections.abc import Callable
from typing import Any

import jax

from dgm_jax import core
from dgm_jax.core import Aux, Batch, Model, Params, Player, masked_mean
from dgm_jax.draws import Draws, Z
from dgm_jax.objectives import OBJECTIVES, Options, elbo


def latent_variable_model(
    *,
    player: str,
    draw: Callable[[Params, Batch, jax.Array, int], Draws],
    draw_joint: Callable[..., tuple[Z, dict[str, jax.Array]]] | None,
    objective: str,
    num_samples: int,
    options: Options,
    samples_are_exact: bool = True,
    posterior_is_evaluable: bool = True,
    has_latent_rates: bool = False,
    **functions: Any,
) -> Model:
    """The model whose loss and bounds follow from its posterior draws.

    Args:
      player: name of its one player.
      draw: `(params, batch, rng, K) -> Draws`.
      draw_joint: as in `core.Latents`; None where z is discrete, and then `sample` is given.
      objective: one of `OBJECTIVES`.
      num_samples: K, draws per example in the objective.
      options: the objective's numbers.
      samples_are_exact: as in `core.Latents`.
      posterior_is_evaluable: whether its density is known at any z, as `Draws.log_posterior_at`.
      has_latent_rates: whether `Draws.rate` has a column for each latent.
      **functions: the other fields of `core.Model`.
    """

    def loss_fn(params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        draws = draw(params, batch, rng, num_samples)
        loss = masked_mean(OBJECTIVES[objective].cost(draws, options), batch)
        return loss, Aux(terms=terms_of(draws))

    def terms_of(draws: Draws) -> dict[str, jax.Array]:
        return {"distortion": draws.distortion, "rate": draws.total_rate, **draws.layer_rates}

    def terms(params: Params, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Of one draw, whatever K is: the two sum to minus the ELBO of the same draw."""
        return terms_of(draw(params, batch, rng, 1))

    def elbo_of(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        return -elbo(draw(params, batch, rng, 1), Options())

    def log_weight(params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        return draw(params, batch, rng, 1).log_weights()[0]

    def densities(params: Params, batch: Batch) -> Draws:
        """For its functions alone: the draw itself is not used, and so not computed."""
        return draw(params, batch, jax.random.key(0), 1)

    latents = draw_joint and core.Latents(
        draw_joint=draw_joint,
        samples_are_exact=samples_are_exact,
        draw_posterior=lambda params, batch, rng: jax.tree.map(
            lambda a: a[0], draw(params, batch, rng, 1).z
        ),
        log_joint=lambda params, batch, z: densities(params, batch).log_joint_at(z),
        log_posterior=(
            (lambda params, batch, z: densities(params, batch).log_posterior_at(z, False))
            if posterior_is_evaluable
            else None
        ),
    )
    if draw_joint is not None:
        functions["sample"] = lambda *args: draw_joint(*args)[1]
    return Model(
        players=(Player(player, loss_fn, terms),),
        log_likelihood_fns={"elbo": elbo_of},
        log_weight=log_weight,
        latents=latents,
        latent_rates=(
            (lambda params, batch: densities(params, batch).rate) if has_latent_rates else None
        ),
        **functions,
    )
