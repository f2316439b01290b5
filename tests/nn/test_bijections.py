"""Bijections against the autodiff Jacobian and their own inverse, in float64 and in float32.

Parameters are random everywhere: most maps are the identity at the start and would prove nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax.nn import transforms
from dgm_jax.nn.bijections import (
    ActNorm,
    Autoregressive,
    Chain,
    Conditioner,
    Coupling,
    Linear,
    MultiScale,
)
from dgm_jax.nn.mlp import MaskedMLP

# Compiling takes most of the time of these tests: none of it goes into faster code.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
BOUND = 2.0
TRANSFORMS = {
    "affine": transforms.affine(),
    "affine, inverted": transforms.inverted(transforms.affine()),
    "spline": transforms.spline(4, BOUND),
}
AFFINE, SPLINE = TRANSFORMS["affine"], TRANSFORMS["spline"]
DENSE, CONV = Conditioner("mlp", (6,), "silu"), Conditioner("conv", (2, 2), "silu")


def _masked(num, transform):
    return Autoregressive(transform, MaskedMLP(num, (7,), transform.num_outputs, "tanh"))


def _level(transform):
    return Chain((ActNorm(), Linear(), Coupling(transform, CONV.copy())))


IMAGE, VECTOR, BATCH = (4, 4, 1), (5,), 3
CASES = {  # the map, the shape of x and that of the context
    "actnorm": (ActNorm(), VECTOR, None),
    "actnorm of an image": (ActNorm(), IMAGE, None),
    "linear": (Linear(), VECTOR, None),
    "linear of an image": (Linear(), IMAGE, None),
    "affine coupling": (Coupling(AFFINE, DENSE), VECTOR, None),
    "spline coupling": (Coupling(SPLINE, DENSE), VECTOR, None),
    "coupling with a context": (Coupling(AFFINE, DENSE), VECTOR, (3,)),
    "coupling of an image": (Coupling(SPLINE, CONV), (2, 2, 2), (2, 2, 1)),
    "affine autoregressive": (_masked(5, TRANSFORMS["affine, inverted"]), VECTOR, None),
    "spline autoregressive": (_masked(5, SPLINE), VECTOR, None),
    "autoregressive with a context": (_masked(5, AFFINE), VECTOR, (3,)),
    "chain": (Chain((ActNorm(), Linear(), Coupling(SPLINE, DENSE))), VECTOR, None),
    "two scales": (MultiScale((_level(AFFINE), _level(SPLINE)), IMAGE), IMAGE, (4, 4, 1)),
}


class Case:
    """A map with random parameters, as functions of one example."""

    def __init__(self, name):
        self.module, shape, context_shape = CASES[name]
        rng = np.random.default_rng(0)
        self.x = jnp.asarray(rng.normal(size=(BATCH, *shape)))
        self.context = None
        if context_shape is not None:
            self.context = jnp.asarray(rng.normal(size=(BATCH, *context_shape)))
        args = (jax.random.key(0), self.x, self.context)
        leaves, structure = jax.tree.flatten(jax.eval_shape(self.module.init, *args))
        drawn = [jnp.asarray(0.3 * rng.normal(size=leaf.shape)) for leaf in leaves]
        self.variables = jax.tree.unflatten(structure, drawn)
        self._apply = jit(self.module.apply, static_argnums=3)

    def __call__(self, x, inverse=False):
        """Of a whole batch."""
        return self._apply(self.variables, x, self.context, inverse)


@pytest.mark.parametrize("name", CASES)
def test_log_determinants_are_those_of_the_autodiff_jacobian(name):
    """Of a batch, so that a row that depends on another would show; of the inverse too."""
    with jax.enable_x64(True):
        case = Case(name)
        y, log_det = case(case.x)
        assert np.abs(np.ravel(y) - np.ravel(case.x)).max() > 0.1
        assert (np.abs(log_det) > 1e-3).all()

        def flat(x):
            return case.module.apply(case.variables, x, case.context)[0].reshape(BATCH, -1)

        size = y[0].size
        jacobian = jit(jax.jacfwd(flat))(case.x).reshape(BATCH, size, BATCH, size)
        for i in range(BATCH):
            others = np.delete(jacobian[i], i, axis=1)
            np.testing.assert_array_equal(others, 0)
            expected = np.linalg.slogdet(jacobian[i, :, i])[1]
            np.testing.assert_allclose(log_det[i], expected, rtol=1e-10, atol=1e-10)
        back, log_det_back = case(y, inverse=True)
        np.testing.assert_allclose(back, case.x, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(log_det_back, -np.asarray(log_det), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["autoregressive with a context", "two scales"])
def test_the_inverse_is_one_in_32_bits(name):
    case = Case(name)
    y, _ = case(case.x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(case(y, inverse=True)[0], case.x, rtol=1e-4, atol=1e-4)


# One number at a time.


def _random(num_outputs, rows=50, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, num_outputs)))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transforms_slope_is_autodiffs_and_it_is_its_inverse(name):
    with jax.enable_x64(True):
        transform = TRANSFORMS[name]
        x = jnp.linspace(-1.51 * BOUND, 1.5 * BOUND, 97)[:, None]  # never a knot
        parameters = 2 * _random(transform.num_outputs)[None]
        shape = (97, 50)
        x = jnp.broadcast_to(x, shape)
        parameters = jnp.broadcast_to(parameters, (*shape, transform.num_outputs))
        for inverse in (False, True):
            apply = lambda x, way=inverse: transform.apply(x, parameters, way)  # noqa: E731
            y, log_slope = jit(apply)(x)
            slope = jit(jax.grad(lambda x, f=apply: jnp.sum(f(x)[0])))(x)
            np.testing.assert_allclose(np.exp(log_slope), slope, rtol=1e-8)
            back, minus = jit(lambda y, way=inverse: transform.apply(y, parameters, not way))(y)
            np.testing.assert_allclose(back, x, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(minus, -log_slope, rtol=1e-6, atol=1e-7)


def test_a_spline_rises_within_its_bounds_and_is_the_identity_beyond():
    with jax.enable_x64(True):
        parameters = 3 * _random(SPLINE.num_outputs)[:, None]
        x = jnp.linspace(-2 * BOUND, 2 * BOUND, 2001)[None]
        parameters = jnp.broadcast_to(parameters, (50, 2001, SPLINE.num_outputs))
        y, log_slope = jit(SPLINE.apply, static_argnums=2)(
            jnp.broadcast_to(x, (50, 2001)), parameters, False
        )
    assert (np.diff(y, axis=1) > 0).all()
    beyond = np.abs(x[0]) >= BOUND
    np.testing.assert_array_equal(y[:, beyond], np.broadcast_to(x[0, beyond], y[:, beyond].shape))
    np.testing.assert_array_equal(log_slope[:, beyond], 0)
    assert (np.abs(y[:, ~beyond]) < BOUND).all() and np.abs(y - x).max() > 0.5


def test_a_spline_is_smooth_at_its_knots_and_ends():
    """Value and slope, where one bin's formula takes over from another's."""
    with jax.enable_x64(True):
        parameters = _random(SPLINE.num_outputs)
        starts, widths = transforms._bins(parameters[:, :4], BOUND)
        np.testing.assert_allclose(jnp.sum(widths, axis=1), 2 * BOUND, rtol=1e-12)
        knots = jnp.concatenate([starts, jnp.full((50, 1), BOUND)], axis=1)
        apply = jit(lambda x: SPLINE.apply(x, parameters[:, None].repeat(5, axis=1), False))
        near = [apply(knots + step) for step in (-1e-9, 1e-9)]
    np.testing.assert_allclose(near[0][0], near[1][0], atol=1e-7)
    np.testing.assert_allclose(near[0][1], near[1][1], atol=1e-5)


def test_a_spline_goes_through_its_knots():
    """From widths to heights (Durkan et al. 2019, section 3.1), softmaxes over a least share."""
    raw = np.random.default_rng(1).normal(size=11)
    shares = [np.exp(r) / np.exp(r).sum() for r in (raw[:4], raw[4:8])]
    knots = [2 * BOUND * np.cumsum(1e-3 + (1 - 4e-3) * share)[:-1] - BOUND for share in shares]
    with jax.enable_x64(True):
        parameters = jnp.broadcast_to(jnp.asarray(raw), (3, 11))
        y, log_slope = jit(lambda x: SPLINE.apply(x, parameters, False))(jnp.asarray(knots[0]))
    np.testing.assert_allclose(y, knots[1], rtol=1e-12)
    slopes = np.log1p(np.exp(raw[8:] + np.log(np.expm1(1 - 1e-3)))) + 1e-3
    np.testing.assert_allclose(log_slope, np.log(slopes), rtol=1e-10)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_parameters_are_the_identity(name):
    transform = TRANSFORMS[name]
    x, n = jnp.linspace(-3, 3, 61), transform.num_outputs
    y, log_slope = jit(lambda x: transform.apply(x, jnp.zeros((61, n)), False))(x)
    np.testing.assert_allclose(y, x, atol=1e-6)
    np.testing.assert_allclose(log_slope, 0, atol=1e-6)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_parameters_and_values_have_finite_slopes_and_gradients(size, inverse):
    for name in ("affine", "spline"):
        transform = TRANSFORMS[name]
        parameters = size * _random(transform.num_outputs, 200).astype(jnp.float32)
        x = jnp.linspace(-1.2 * BOUND, 1.2 * BOUND, 200)

        def total(x, parameters, transform=transform):
            y, log_slope = transform.apply(x, parameters, inverse)
            return jnp.sum(y) + jnp.sum(log_slope)

        value, gradients = jit(jax.value_and_grad(total, (0, 1)))(x, parameters)
        assert all(np.isfinite(a).all() for a in (value, *gradients))


# Parts.


def test_actnorm_starts_with_mean_0_and_deviation_1_of_each_channel():
    rng = np.random.default_rng(0)
    scale, shift = np.array([0.1, 5.0, 1.0]), np.array([3.0, -2.0, 0.0])
    x = jnp.asarray(scale * rng.normal(size=(20, 4, 4, 3)) + shift, jnp.float32)
    x = x.at[..., 2].set(7.0)  # does not vary: stays as wide as it is
    module = ActNorm()
    y, _ = module.apply(module.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(jnp.mean(y, axis=(0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(jnp.std(y, axis=(0, 1, 2)), [1, 1, 0], atol=1e-4)


def test_a_fresh_linear_map_reverses_the_order():
    x = jnp.arange(12.0).reshape(3, 4)
    y, log_det = Linear().apply(Linear().init(jax.random.key(0), x), x)
    np.testing.assert_array_equal(y, x[:, ::-1])
    np.testing.assert_array_equal(log_det, 0)


def test_a_coupling_keeps_one_half_and_changes_the_other_by_it():
    case = Case("affine coupling")
    y, _ = case(case.x)
    np.testing.assert_array_equal(y[:, :2], case.x[:, :2])
    moved, _ = case(case.x.at[:, 1].add(1.0))
    assert (np.abs(moved - y)[:, 2:] > 1e-4).all()
    other, _ = case(case.x.at[:, 4].add(1.0))
    np.testing.assert_array_equal(other[:, :4], y[:, :4])


@pytest.mark.parametrize("name", ["coupling with a context", "coupling of an image"])
def test_the_context_matters(name):
    case = Case(name)
    y, _ = case(case.x)
    case.context = case.context + 1
    assert np.abs(case(case.x)[0] - y).max() > 1e-3


def test_half_of_the_channels_leave_after_the_first_scale():
    """The second scale changes the last half of z alone."""
    case = Case("two scales")
    z, _ = case(case.x)
    level = case.variables["params"]["levels_1"]
    changed = jax.tree.map(lambda a: a + 1, level)
    case.variables = {"params": {**case.variables["params"], "levels_1": changed}}
    other, _ = case(case.x)
    np.testing.assert_array_equal(other[:, :8], z[:, :8])
    assert (np.abs(other - z)[:, 8:] > 1e-6).any(axis=0).all()
