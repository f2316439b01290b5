"""Encoders, decoders and heads: shapes, starting points, and what reaches what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax.core import DataSpec, UserError
from dgm_jax.likelihoods import LIKELIHOODS
from dgm_jax.nn import conv, networks

EVENT = (5, 7, 2)  # no side is a power of two


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _random(module, *inputs):
    """Parameters that hide nothing: every one away from zero."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [rng.normal(size=p.shape) / 3 for p in leaves])


def _spec(likelihood):
    support = LIKELIHOODS[likelihood]().support
    mean = np.random.default_rng(1).uniform(0.1, 0.9, EVENT).astype(np.float32)
    return DataSpec(EVENT, support, mean * (1 if support == "binary" else 255))


@pytest.mark.parametrize("kind", networks.KINDS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_decoder_without_features_says_the_mean_of_the_data(kind, likelihood):
    """With zero weights the outputs are the likelihood's own fair start, in the pixels' order."""
    spec, widths = _spec(likelihood), (4, 3)
    decoder = networks.Decoder(kind, widths, "silu", likelihood, spec)
    z = jnp.ones((2, 3, 6))
    params = decoder.init(jax.random.key(0), z)
    params["params"]["Head_0"]["Dense_0"]["kernel"] *= 0
    initial = LIKELIHOODS[likelihood]().initial(spec.mean.ravel())
    outputs = jax.jit(decoder.apply)(params, z)
    assert outputs.shape == (2, 3, *initial.shape)
    np.testing.assert_allclose(outputs, np.broadcast_to(initial, outputs.shape), rtol=1e-5)


@pytest.mark.parametrize("kind", networks.KINDS)
def test_draws_and_examples_are_decoded_alike(kind):
    """`[K, B, L]` at once is each `[B, L]` alone, with the side input of its row."""
    decoder = networks.Decoder(kind, (4, 3), "silu", "bernoulli", _spec("bernoulli"))
    z = jax.random.normal(jax.random.key(1), (2, 3, 4))
    side = jnp.eye(3)
    params = _random(decoder, z, side)
    decode = jax.jit(decoder.apply)
    whole = decode(params, z, side)
    assert whole.shape == (2, 3, 70, 1)
    for k in range(2):
        np.testing.assert_allclose(decode(params, z[k], side), whole[k], rtol=1e-10)
    joined = decode(params, np.concatenate([z[0], side], axis=-1))
    np.testing.assert_allclose(joined, whole[0], rtol=1e-10)


@pytest.mark.parametrize("kind", networks.KINDS)
def test_every_pixel_and_the_side_reach_the_features(kind):
    encoder = networks.Encoder(kind, (4, 3), "tanh")
    x = jax.random.uniform(jax.random.key(2), (2, *EVENT))
    side = jnp.eye(2)
    params = _random(encoder, x, side)

    def total(x, side):
        return jnp.sum(encoder.apply(params, x, side) ** 2)

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(x, side):
        assert (gradient != 0).all()


def test_a_pixel_of_the_head_is_a_dense_layer_of_its_own_features():
    """Outputs of pixel (h, w) and channel c come from the features of (h, w) alone."""
    spec = _spec("categorical")
    head = networks.Head("categorical", spec, per_pixel=True)
    h = jax.random.normal(jax.random.key(3), (35, 4))
    params = _random(head, h)
    kernel, bias = params["params"]["Dense_0"]["kernel"], params["params"]["bias"]
    expected = np.asarray(h @ kernel).reshape(70, 256) + np.asarray(bias).reshape(70, 256)
    np.testing.assert_allclose(head.apply(params, h), expected, rtol=1e-10)


@pytest.mark.parametrize("kind", networks.KINDS)
def test_a_pixel_sees_those_before_it_in_its_window_and_no_other(kind):
    """By the Jacobian of all outputs in all pixels: rows above, and to the left in its own."""
    decoder = networks.WindowDecoder(kind, (4, 3), "silu", "bernoulli", _spec("bernoulli"), 3)
    z, x = jax.random.normal(jax.random.key(1), (1, 4)), jnp.full((1, *EVENT), 0.3)
    params = _random(decoder, z, None, x)
    slope = jax.jit(jax.jacobian(lambda x: decoder.apply(params, z, None, x)))(x)
    slope = np.abs(np.asarray(slope)).reshape(*EVENT, *EVENT).max(axis=(2, 5))
    for row, column in np.ndindex(EVENT[:2]):
        for other in np.ndindex(EVENT[:2]):
            down, right = other[0] - row, other[1] - column
            seen = (down == -1 and abs(right) <= 1) or (down == 0 and right == -1)
            assert (slope[row, column][other] > 0) == seen, (row, column, other)


@pytest.mark.parametrize("kind", networks.KINDS)
def test_one_pixel_alone_is_what_it_is_among_all(kind):
    """Its window at the image's edges and inside, two channels, a likelihood of many outputs."""
    spec = _spec("discretised_logistic_mixture")
    decoder = networks.WindowDecoder(kind, (4, 3), "silu", "discretised_logistic_mixture", spec, 5)
    z, side = jax.random.normal(jax.random.key(1), (3, 4)), jnp.eye(3)
    x = jax.random.uniform(jax.random.key(2), (3, *EVENT))
    params = _random(decoder, z, side, x)
    net = decoder.bind(params)
    whole = np.asarray(jax.jit(net.__call__)(z, side, x)).reshape(3, 35, 2, 15)
    features, at = jax.jit(net.features)(z, side), jax.jit(net.at)
    for pixel in (0, 6, 17, 28, 34):
        np.testing.assert_allclose(at(features, x, pixel), whole[:, pixel], rtol=1e-10)


def test_a_residual_block_starts_as_the_identity():
    block = conv.ResidualBlock(3)
    h = jax.random.normal(jax.random.key(4), (2, *EVENT))
    params, apply = block.init(jax.random.key(5), h), jax.jit(block.apply)
    np.testing.assert_array_equal(apply(params, h), h)
    changed = apply(_random(block, h), h)
    assert changed.shape == h.shape and not np.allclose(changed, h)


def test_halving_rounds_up_and_upsampling_undoes_it():
    assert conv.halvings((28, 28), 3) == [(28, 28), (14, 14), (7, 7), (4, 4)]
    assert conv.halvings((5, 7), 2) == [(5, 7), (3, 4), (2, 2)]


def test_upsampling_lays_four_pixels_where_one_was():
    """The layer's outputs are (row, column, channel) of each 2 x 2 square, cut at odd sides."""

    h = jax.random.normal(jax.random.key(6), (2, 2, 3, 4))
    layer = conv.Upsample(2)
    shapes = jax.eval_shape(lambda h: layer.init(jax.random.key(0), h, (3, 5)), h)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape), shapes)
    found = np.asarray(layer.apply(params, h, (3, 5)))
    assert found.shape == (2, 3, 5, 2)
    kernel, bias = (np.asarray(params["params"]["Dense_0"][name]) for name in ("kernel", "bias"))
    squares = (np.asarray(h) @ kernel + bias).reshape(2, 2, 3, 2, 2, 2)
    for row in range(3):
        for column in range(5):
            expected = squares[:, row // 2, column // 2, row % 2, column % 2]
            np.testing.assert_allclose(found[:, row, column], expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("kind", "activation", "event", "named"),
    [
        ("dense", "silu", EVENT, "network='dense'"),
        ("conv", "gated", EVENT, "activation='gated'"),
        ("mlp", "sine", EVENT, "activation='sine'"),
        ("conv", "silu", (12,), "network='conv'"),
    ],
)
def test_check_refuses_layers_that_make_no_sense(kind, activation, event, named):
    with pytest.raises(UserError, match=rf"model\.{named}"):
        networks.check(kind, activation, DataSpec(event, "binary", np.zeros(event, np.float32)))


@pytest.mark.parametrize(("side", "event"), [(1, EVENT), (4, EVENT), (-3, EVENT), (3, (12,))])
def test_check_refuses_a_window_that_makes_no_sense(side, event):
    spec = DataSpec(event, "binary", np.zeros(event, np.float32))
    with pytest.raises(UserError, match=rf"model\.window={side}"):
        networks.check("mlp", "silu", spec, side)
