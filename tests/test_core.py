"""What all models have in common, by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax.core import Aux, Model, Player, UserError, disjoint, masked_mean


def test_masked_mean():
    values = jnp.array([1.0, 3.0, np.nan])
    assert masked_mean(values, {"mask": jnp.array([True, True, False])}) == 2.0
    assert masked_mean(values[:2], {}) == 2.0


def test_one_of_several_players_is_to_be_named():
    players = Player("generator", "loss of one"), Player("discriminator", "loss of the other")
    assert Model(None, players[:1], {}).loss_fn == "loss of one"
    with pytest.raises(UserError, match="the players generator, discriminator: take players"):
        _ = Model(None, players, {}).loss_fn


def test_a_mask_that_leaves_no_row_is_refused():
    batch = {"x": jnp.ones(3), "mask": jnp.zeros(3, bool)}

    def loss_fn(scale, batch):
        cost = scale * batch["x"]
        return masked_mean(cost, batch), Aux({"cost": cost})

    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    with pytest.raises(UserError, match=r"batch\['mask'\] leaves none of the 3 rows"):
        gradient(2.0, batch)
    (loss, _), _ = jax.jit(gradient)(2.0, batch)  # where nobody can look at it
    assert np.isnan(loss)


def test_two_numbers_of_one_name_are_refused():
    assert disjoint({"a": 1}, {}, {"b": 2}) == {"a": 1, "b": 2}
    with pytest.raises(UserError, match="two numbers the name 'a'"):
        disjoint({"a": 1}, {"b": 2}, {"a": 3})
