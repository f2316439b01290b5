"""Attention against its formula; what a position sees; what a condition does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from dgm_jax.core import UserError
from dgm_jax.nn import attention

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B, T, F, H = 2, 5, 8, 2
C = F // H


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def _bound(module, *inputs):
    """The module with random parameters."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    leaves, structure = jax.tree.flatten(shapes)
    drawn = [0.5 * _normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    return module.bind(jax.tree.unflatten(structure, drawn))


def _angles(*sides):
    return attention.rotary_angles(attention.grid_positions(*sides), C)


def test_positions_of_a_grid_count_row_by_row():
    np.testing.assert_array_equal(attention.grid_positions(3), [[0], [1], [2]])
    np.testing.assert_array_equal(
        attention.grid_positions(2, 3), [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    )


def test_the_angle_falls_from_the_position_itself_by_equal_factors():
    """theta_i = 10,000^(-2 i / C), Su et al. 2021, eq. 15; and each axis has frequencies alike."""
    angles = attention.rotary_angles(jnp.array([[0.0], [3.0]]), 6)
    np.testing.assert_allclose(angles[0], 0)
    np.testing.assert_allclose(angles[1], 3 * 10_000 ** (-np.arange(3) / 3), rtol=1e-6)
    two = attention.rotary_angles(jnp.array([[3.0, 5.0]]), 12)
    np.testing.assert_allclose(two[0, :3], angles[1], rtol=1e-6)
    np.testing.assert_allclose(two[0, 3:], 5 / 3 * angles[1], rtol=1e-6)


@pytest.mark.parametrize("axes", [1, 2])
def test_rotation_keeps_lengths_and_depends_on_differences_alone(axes):
    positions = _normal(T, axes, seed=2)
    query, key = _normal(B, T, H, C), _normal(B, T, H, C, seed=1)

    def scores(positions):
        angles = attention.rotary_angles(positions, C)
        turned = [attention.rotate(x, angles) for x in (query, key)]
        np.testing.assert_allclose(
            jnp.linalg.norm(turned[0], axis=-1), jnp.linalg.norm(query, axis=-1), rtol=1e-12
        )
        return jnp.einsum("bqhc,bkhc->bhqk", *turned)

    here = scores(positions)
    shift = np.linspace(7.0, -3.0, axes)[None]
    np.testing.assert_allclose(scores(positions + shift), here, rtol=1e-9, atol=1e-12)
    assert np.abs(scores(1.1 * positions) - here).max() > 1e-2
    plain = jnp.einsum("bqhc,bkhc->bhqk", query, key)
    diagonal = np.arange(T)
    np.testing.assert_allclose(
        here[:, :, diagonal, diagonal], plain[:, :, diagonal, diagonal], rtol=1e-10
    )


def test_a_normalised_vector_has_a_mean_square_of_one_whatever_its_length():
    h = _normal(3, 7)
    np.testing.assert_allclose(jnp.mean(attention.rms_norm(h) ** 2, axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(attention.rms_norm(100 * h), attention.rms_norm(h), rtol=1e-4)
    assert (attention.rms_norm(jnp.zeros((1, 7))) == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_its_formula(causal):
    """Head by head and position by position, in numpy; one position sees only itself."""
    h, angles = _normal(B, T, F), _angles(T)
    module = _bound(attention.Attention(F, H, causal), h, angles)
    kernels = {k: np.asarray(v["kernel"]) for k, v in module.variables["params"].items()}
    mixed = np.zeros((B, T, H, C))
    heads = {n: (np.asarray(h) @ kernels[n]).reshape(B, T, H, C) for n in ("query", "key", "value")}
    for name in ("query", "key"):
        pairs = heads[name][..., : C // 2] + 1j * heads[name][..., C // 2 :]
        heads[name] = pairs * np.exp(1j * np.asarray(angles))[None, :, None]
    for b, t, n in np.ndindex(B, T, H):
        keys = slice(0, t + 1) if causal else slice(0, T)
        score = (heads["key"][b, keys, n].conj() @ heads["query"][b, t, n]).real / np.sqrt(C)
        mixed[b, t, n] = special.softmax(score) @ heads["value"][b, keys, n]
    expected = mixed.reshape(B, T, F) @ kernels["out"]
    np.testing.assert_allclose(jit(module.__call__)(h, angles), expected, rtol=1e-9)


def test_a_feed_forward_layer_is_its_formula():
    h = _normal(3, F)
    module = _bound(attention.FeedForward(6), h)
    gate, value, out = (
        np.asarray(module.variables["params"][name]["kernel"]) for name in ("gate", "value", "out")
    )
    gated = np.asarray(h) @ gate
    expected = (gated * special.expit(gated) * (np.asarray(h) @ value)) @ out
    np.testing.assert_allclose(jit(module.__call__)(h), expected, rtol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_which_positions_a_block_sees(causal):
    h, angles = _normal(1, T, F), _angles(T)
    block = _bound(attention.Block(F, H, 6, causal), h, angles)
    jacobian = np.abs(jit(jax.jacfwd(lambda h: block(h, angles)))(h)).max(axis=(0, 2, 3, 5))
    assert np.all(jacobian[np.tril_indices(T)] > 1e-6)
    assert np.all((jacobian[np.triu_indices(T, 1)] == 0) == causal)


def test_a_sequence_step_by_step_is_the_sequence_at_once():
    h, angles = _normal(B, T, F), _angles(T)
    block = _bound(attention.Block(F, H, 6, causal=True), h, angles)

    def add(cache, i):
        here = (jax.lax.dynamic_slice_in_dim(a, i, 1, axis) for a, axis in ((h, 1), (angles, 0)))
        out, cache = block.step(*here, cache, i)
        return cache, out[:, 0]

    _, outs = jit(lambda: jax.lax.scan(add, block.empty_cache(B, T), jnp.arange(T)))()
    at_once = jit(block.__call__)(h, angles)
    np.testing.assert_allclose(np.swapaxes(outs, 0, 1), at_once, rtol=1e-9)


@pytest.mark.parametrize("conditional", [False, True])
def test_a_fresh_block_is_the_identity_and_does_not_stay_so(conditional):
    h, angles = _normal(B, T, F), _angles(T)
    condition = _normal(B, 3, seed=1) if conditional else None
    module = attention.Block(F, H, 6, conditional=conditional)
    params = jit(module.init)(jax.random.key(0), h, angles, condition)
    np.testing.assert_array_equal(jit(module.apply)(params, h, angles, condition), h)
    target = _normal(B, T, F, seed=2)

    def cost(params):
        return jnp.sum((module.apply(params, h, angles, condition) - target) ** 2)

    slope = jit(jax.grad(cost))(params)
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(slope))


def test_a_condition_shifts_scales_and_gates_each_half():
    """With its gate shut a half does nothing; a scale of -1 and a shift of v show it v instead."""
    h, angles, condition = _normal(B, T, F), _angles(T), jnp.ones((B, 1))
    block = _bound(attention.Block(F, H, 6, conditional=True), h, angles, condition)

    @jit
    def given(*said):
        """The block where the condition says these six numbers, each of all features."""
        params = dict(block.variables["params"])
        bias = jnp.repeat(jnp.array(said), F)
        params["modulation"] = {"kernel": jnp.zeros((1, 6 * F)), "bias": bias}
        return block.clone(parent=None).apply({"params": params}, h, angles, condition)

    flat = jnp.full((B, T, F), 0.3)
    np.testing.assert_array_equal(given(2.0, 2.0, 0.0, 2.0, 2.0, 0.0), h)
    expected = h + 0.7 * jit(block.attention.__call__)(flat, angles)
    np.testing.assert_allclose(given(0.3, -1.0, 0.7, 1.0, 1.0, 0.0), expected, rtol=1e-10)
    feed_forward = jit(block.feed_forward.__call__)
    expected = h + 0.7 * feed_forward(flat)
    np.testing.assert_allclose(given(1.0, 1.0, 0.0, 0.3, -1.0, 0.7), expected, rtol=1e-10)
    expected = h + feed_forward(2 * attention.rms_norm(h))
    np.testing.assert_allclose(given(1.0, 1.0, 0.0, 0.0, 1.0, 1.0), expected, rtol=1e-10)


def test_rows_of_a_batch_have_each_their_own_condition():
    h, angles, condition = _normal(B, T, F), _angles(T), _normal(B, 3, seed=1)
    block = jit(_bound(attention.Block(F, H, 6, conditional=True), h, angles, condition).__call__)
    both = block(h, angles, condition)
    for b in range(B):
        alone = block(h[b : b + 1], angles, condition[b : b + 1])
        np.testing.assert_allclose(both[b], alone[0], rtol=1e-10)


def test_check_refuses_heads_that_do_not_share_out_the_width():
    attention.check(8, 4)
    attention.check(8, 2, axes=2)
    for width, heads, axes in ((8, 3, 1), (8, 8, 1), (8, 4, 2), (0, 1, 1)):
        with pytest.raises(UserError, match=rf"model\.width={width}: .*model\.heads={heads}"):
            attention.check(width, heads, axes)
    with pytest.raises(UserError, match=r"model\.heads=0"):
        attention.check(8, 0)
