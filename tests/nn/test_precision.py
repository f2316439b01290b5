"""Faster products: what is rounded, what is not, and that training agrees with float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from dgm_jax import config as configs
from dgm_jax import limit, main, models
from dgm_jax.core import Aux, DataSpec, Model, Player, UserError
from dgm_jax.nn import precision
from dgm_jax.nn.conv import Conv
from dgm_jax.nn.mlp import MLP

FINE = 1 + 2.0**-9  # bfloat16 has 8 bits: this is 1 in it


def _loss_of(layer):
    """The sum of what `layer` gives, as the loss of a model; in float32, then in bfloat16."""

    def loss_fn(params, batch, rng):
        return jnp.sum(layer.apply(params["net"], batch["x"])), Aux(terms={})

    model = Model(init=None, players=(Player("net", loss_fn),), log_likelihood_fns={})
    return [precision.training_in(model, dtype).loss_fn for dtype in ("float32", "bfloat16")]


def test_factors_are_rounded_and_the_bias_is_not():
    params = {"params": {"kernel": jnp.full((1, 1), FINE), "bias": jnp.full(1, FINE - 1)}}
    batch = {"x": jnp.full((1, 1), FINE)}
    full, rounded = (f({"net": params}, batch, None)[0] for f in _loss_of(precision.Dense(1)))
    np.testing.assert_allclose(full, FINE**2 + FINE - 1, rtol=1e-6)
    assert rounded == 1 + (FINE - 1)


def test_so_are_the_factors_of_the_gradients():
    """d(x w)/dw = x and d(x w)/dx = w, each as bfloat16 has it; and in float32 arrays."""
    params = {"params": {"kernel": jnp.full((1, 1), 3 * FINE), "bias": jnp.zeros(1)}}

    def gradients(loss_fn):
        def of(params, x):
            return loss_fn({"net": params}, {"x": x}, None)[0]

        by_params, by_x = jax.grad(of, (0, 1))(params, jnp.full((1, 1), FINE))
        return by_params["params"]["kernel"], by_x

    full, rounded = map(gradients, _loss_of(precision.Dense(1)))
    np.testing.assert_allclose(np.ravel(full), (FINE, 3 * FINE), rtol=1e-6)
    np.testing.assert_array_equal(np.ravel(rounded), (1.0, 3.0))
    assert all(g.dtype == jnp.float32 for g in rounded)


@pytest.mark.parametrize(
    "layer", [precision.Dense(3), MLP((4, 3)), Conv(3)], ids=["dense", "mlp", "conv"]
)
def test_leading_axes_do_not_change_a_layer(layer):
    """`[K, B, ...]` at once is each of the K alone."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 4, 6))
    params, apply = layer.init(jax.random.key(1), x[0]), jax.jit(layer.apply)
    each = np.stack([apply(params, one) for one in x])
    np.testing.assert_allclose(apply(params, x), each, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("vae", {"model.encoder": (30,), "model.decoder": (30,)}),
        ("vae", {"model.network": "conv", "model.encoder": (4,), "model.decoder": (4,)}),
        ("hvae", {"model.latents": (5, 3), "model.width": (20, 10)}),
    ],
    ids=["mlp", "conv", "hierarchy"],
)
def test_all_products_of_a_step_are_in_bfloat16_and_training_agrees(name, values):
    """Forward and backward; the loss to a thousandth, the gradient's direction to a hundredth."""
    spec = DataSpec((8, 8, 1), "binary", np.full((8, 8, 1), 0.5), num_examples=100)
    model = models.build(configs.override(configs.experiment(name), values).model, spec)
    x = jax.random.bernoulli(jax.random.key(0), 0.5, (16, 8, 8, 1)).astype(jnp.float32)
    params = jax.jit(model.init)(jax.random.key(1), {"x": x})
    found = {}
    for dtype in ("float32", "bfloat16"):
        loss_fn = precision.training_in(model, dtype).loss_fn
        step = jax.value_and_grad(lambda p, f=loss_fn: f(p, {"x": x}, jax.random.key(2))[0])
        made_in = {v.aval.dtype for eqn, _ in limit.products_of(step, params) for v in eqn.invars}
        assert made_in == {jnp.dtype(dtype)}
        loss, grads = jax.jit(step)(params)
        found[dtype] = float(loss), jnp.concatenate([jnp.ravel(g) for g in jax.tree.leaves(grads)])
        assert loss.dtype == found[dtype][1].dtype == jnp.float32
    (loss, grad), (loss_16, grad_16) = found.values()
    assert loss != loss_16
    np.testing.assert_allclose(loss_16, loss, rtol=1e-3)
    cosine = grad @ grad_16 / jnp.linalg.norm(grad) / jnp.linalg.norm(grad_16)
    assert cosine > 0.99


@pytest.mark.parametrize("layer", [MLP((4, 3)), Conv(3)], ids=["dense", "conv"])
@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [("float32", "HIGHEST"), ("tensorfloat32", "HIGH"), ("bfloat16", "DEFAULT")],
)
def test_what_accelerators_may_round_is_what_was_asked_for(layer, dtype, wanted):
    """XLA rounds factors on a GPU below HIGHEST: forward and backward, in all that `main` runs."""
    before = jax.config.jax_default_matmul_precision
    try:
        jax.config.update("jax_default_matmul_precision", None)
        precision.multiply_in_full()
        x = jnp.ones((2, 4, 4, 6))
        params = jax.eval_shape(layer.init, jax.random.key(0), x)

        def loss_fn(params, batch, rng):
            return jnp.sum(layer.apply(params["net"], batch["x"])), Aux(terms={})

        model = Model(init=None, players=(Player("net", loss_fn),), log_likelihood_fns={})
        loss_fn = precision.training_in(model, dtype).loss_fn
        step = jax.grad(lambda p, x: loss_fn({"net": p}, {"x": x}, None)[0], (0, 1))
        products = limit.products_of(step, params, x)
        assert len(products) >= 3
        for eqn, _ in products:
            assert {str(of) for of in eqn.params["precision"]} == {wanted}
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def test_the_command_multiplies_in_full(monkeypatch):
    """Before anything is traced."""
    called = []
    monkeypatch.setattr(main.cache, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(main.precision, "multiply_in_full", lambda: called.append("chosen"))
    monkeypatch.setattr(main.run, "evaluate_mode", lambda *args: called.append("evaluated"))
    with flagsaver.flagsaver():
        flags.FLAGS(["dgm_jax", "--mode=evaluate", "--workdir=anywhere"])
        main.main(["dgm_jax"])
    assert called == ["chosen", "evaluated"]


def test_a_user_who_has_chosen_how_to_multiply_is_left_alone():
    with jax.default_matmul_precision("tensorfloat32"):
        precision.multiply_in_full()
        assert jax.config.jax_default_matmul_precision == "tensorfloat32"


def test_measurements_stay_in_float32():
    spec = DataSpec((4, 4, 1), "binary", np.full((4, 4, 1), 0.5), num_examples=10)
    small = {"model.encoder": (5,), "model.decoder": (5,)}
    model = models.build(configs.override(configs.experiment("vae"), small).model, spec)
    batch = {"x": jnp.ones((2, 4, 4, 1))}
    params = jax.jit(model.init)(jax.random.key(0), batch)
    rounded = precision.training_in(model, "bfloat16")
    for measure, same in zip(
        model.log_likelihood_fns.values(), rounded.log_likelihood_fns.values(), strict=True
    ):
        key = jax.random.key(1)
        full, other = (jax.jit(fn)(params, batch, key) for fn in (measure, same))
        np.testing.assert_array_equal(full, other)


def test_another_type_is_refused_by_name():
    with pytest.raises(UserError, match=r"train.compute_dtype='float16': choose .* bfloat16"):
        precision.check("train.compute_dtype", "float16")
