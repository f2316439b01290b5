"""The blocks of networks: the gated layer's formula, and what a masked network may not see."""

import functools

import jax
import numpy as np
import pytest
from scipy import special

from dgm_jax.nn import mlp
from dgm_jax.nn.mlp import ACTIVATIONS, MLP, MaskedMLP

# Compiling takes most of the time of these tests: none of it goes into faster code.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _params(module, *inputs):
    """Random numbers everywhere, biases too, each of a size of 0.3 to 1 so that none hides."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    drawn = [rng.uniform(0.3, 1, p.shape) * rng.choice([-1, 1], p.shape) for p in leaves]
    return jax.tree.unflatten(structure, drawn)


def test_a_gated_layer_is_a_value_times_the_sigmoid_of_a_gate():
    """(W h + b) ⊙ sigmoid(V h + c), layer after layer; values are the first half of the outputs."""
    net = MLP((5, 3), "gated")
    x = np.random.default_rng(1).normal(size=(2, 4, 7))
    params = _params(net, x)
    assert {name: p["kernel"].shape for name, p in params.items()} == {
        "Dense_0": (7, 10),
        "Dense_1": (5, 6),
    }
    h = x
    for p in params.values():
        half = len(p["bias"]) // 2
        value = h @ p["kernel"][:, :half] + p["bias"][:half]
        h = value * special.expit(h @ p["kernel"][:, half:] + p["bias"][half:])
    np.testing.assert_allclose(jit(net.apply)({"params": params}, x), h, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("silu", lambda a: a * special.expit(a)),
        ("relu", lambda a: np.maximum(a, 0)),
        ("tanh", np.tanh),
        ("gelu", lambda a: 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))),
    ],
)
def test_a_plain_layer_is_its_activation_of_a_dense_layer(name, formula):
    net = MLP((4, 2), name)
    x = np.random.default_rng(1).normal(size=(6, 3))
    params = _params(net, x)
    h = x
    for p in params.values():
        h = formula(h @ p["kernel"] + p["bias"])
    np.testing.assert_allclose(jit(net.apply)({"params": params}, x), h, rtol=1e-12, atol=1e-14)


def test_all_activations_are_tested():
    assert set(ACTIVATIONS) == {"silu", "relu", "tanh", "gelu"}


def _jacobians(num, hidden, with_context):
    """d out / d x `[D, P, D]` and d out / d context `[D, P, F]` at three random points."""
    net = MaskedMLP(num, hidden, outputs=3, activation="tanh")
    rng = np.random.default_rng(2)
    x, context = rng.normal(size=(3, num)), rng.normal(size=(3, 4))
    inputs = (x, context) if with_context else (x,)
    params = jax.tree.map(lambda p: 0.5 * p, _params(net, *inputs))
    which = (0, 1) if with_context else 0
    jacobian = jax.jacfwd(lambda *inputs: net.apply({"params": params}, *inputs), which)
    return jax.device_get(jit(jax.vmap(jacobian))(*inputs))


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize(
    ("num", "hidden"), [(1, (4,)), (2, (3,)), (3, ()), (5, (4,)), (5, (9, 11)), (6, (13, 7, 10))]
)
def test_the_outputs_for_a_variable_see_all_variables_before_it_and_no_other(
    num, hidden, with_context
):
    jacobian = _jacobians(num, hidden, with_context)
    jacobian = jacobian[0] if with_context else jacobian
    assert jacobian.shape == (3, num, 3, num)
    seen = np.abs(jacobian)
    for j in range(num):
        assert np.all(seen[:, j, :, j:] == 0)
        assert np.all(seen[:, j, :, :j] > 1e-12)


@pytest.mark.parametrize("hidden", [(4,), (4, 5), (5, 20), (20, 4)])
def test_fewer_units_than_variables_still_reach_from_the_first_to_the_last(hidden):
    """D = 12: the last output sees all before it, and each further degree lets one more be seen."""
    seen = np.abs(_jacobians(12, hidden, False)).max(axis=(0, 2)) > 1e-12
    assert not np.triu(seen).any()
    assert seen[-1, :-1].all()
    each = seen.sum(axis=1)  # of each output, how many inputs it sees
    assert set(each) == {0, *np.round(np.linspace(1, 11, min(hidden))).astype(int)}


@pytest.mark.parametrize(("num", "hidden"), [(2, (3,)), (5, (9, 11))])
def test_the_context_is_seen_by_the_variables_after_the_first(num, hidden):
    assert np.abs(_jacobians(num, hidden, True)[1][:, 1:]).min() > 1e-12


@pytest.mark.parametrize(("num", "hidden"), [(1, (4,)), (2, (3,)), (5, (9, 11))])
def test_the_context_is_seen_by_the_first_variable_too(num, hidden):
    """It has no variables to see: without the context its outputs are constants."""
    assert np.abs(_jacobians(num, hidden, True)[1][:, 0]).min() > 1e-12


@pytest.mark.parametrize("bands", [1, 2])
def test_a_masked_network_is_its_formula(bands, monkeypatch):
    """Two hidden layers in NumPy, connections by MADE's rule (Germain et al. 2015, eqs. 12-13)."""
    monkeypatch.setattr(mlp, "_BAND", {1: 128, 2: 3}[bands])
    net = MaskedMLP(4, (5, 7), 2, "tanh")
    x = np.random.default_rng(3).normal(size=(6, 4))
    params = _params(net, x)
    degrees = [[1, 2, 3, 4], [1, 1, 2, 2, 3], [1, 1, 1, 2, 2, 3, 3]]

    def masked(name, h, allowed):
        kernels = [p for other, p in params.items() if other.startswith(f"{name}_kernel")]
        assert len(kernels) == (bands if allowed.shape[1] > 5 else 1)
        # What a band does not hold is what none of its units sees.
        kernel = np.hstack([np.pad(k, ((0, len(allowed) - len(k)), (0, 0))) for k in kernels])
        return h @ np.where(allowed, kernel, 0) + params[f"{name}_bias"]

    h = np.tanh(masked("hidden_0", x, np.less_equal.outer(degrees[0], degrees[1])))
    h = np.tanh(masked("hidden_1", h, np.less_equal.outer(degrees[1], degrees[2])))
    out = masked("out", h, np.less.outer(degrees[2], [1, 1, 2, 2, 3, 3, 4, 4]))
    ours = jit(net.apply)({"params": params}, x)
    np.testing.assert_allclose(ours, out.reshape(6, 4, 2), rtol=1e-12)


def test_a_masked_network_takes_any_number_of_leading_axes():
    net = MaskedMLP(3, (5, 4), 2)
    rng = np.random.default_rng(4)
    x, context = rng.normal(size=(2, 6, 3)), rng.normal(size=(2, 6, 3))
    params = {"params": _params(net, x, context)}
    each = jit(jax.vmap(jax.vmap(net.apply, (None, 0, 0)), (None, 0, 0)))(params, x, context)
    np.testing.assert_allclose(jit(net.apply)(params, x, context), each, rtol=1e-12)


def test_bands_hold_half_of_a_wide_network():
    """Eight of D = 1,024 and as many units: (1 + ... + 8) / 64 of the products, the same zeros."""
    net = MaskedMLP(1024, (1024,), 1)
    shapes = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 1024)))["params"]
    rows = [shapes[f"hidden_0_kernel_{i}"].shape for i in range(8)]
    # 1,024 units of 1,023 degrees: the first degree has two.
    assert rows == [(128 * (i + 1) - 1, 128) for i in range(8)]
