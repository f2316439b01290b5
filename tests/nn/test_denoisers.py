"""Networks that are told the time and the class; guidance; what noise is added to."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dgm_jax.core import DataSpec, UserError
from dgm_jax.nn import denoisers
from dgm_jax.nn.denoisers import Denoiser

CLASSES = 3
SPEC = DataSpec((4, 4, 1), "uint8", np.full((4, 4, 1), 100, np.float32), 100, CLASSES)
PLANE = DataSpec((2,), "real", np.array([1.0, -2.0], np.float32), 100, CLASSES)
CONFIGS = {
    "mlp": denoisers.Config(network="mlp", width=6, depth=1),
    "unet": denoisers.Config(network="unet", channels=(4, 8), heads=2, depth=1),
    "dit": denoisers.Config(network="dit", patch=2, width=8, heads=2, depth=2),
}


def _moved(module, *inputs):
    """Parameters away from the start, where the answer is 0."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, drawn)


def _inputs(rows=3):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(rows, 4, 4, 1)), jnp.float32)
    return x, jnp.linspace(0.1, 0.9, rows), jnp.eye(CLASSES)[jnp.arange(rows) % CLASSES]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_is_answered_by_its_own_time_and_label_alone(name):
    net, (x, time, label) = Denoiser(CONFIGS[name]), _inputs()
    params = _moved(net, x, time, label)
    answer = jax.jit(lambda *inputs: net.apply(params, *inputs))
    before = answer(x, time, label)
    assert before.shape == x.shape
    for changed in (
        answer(x.at[1].add(0.3), time, label),
        answer(x, time.at[1].add(0.3), label),
        answer(x, time, label.at[1].set(0.0)),
    ):
        assert np.abs(changed[1] - before[1]).max() > 1e-3
        np.testing.assert_allclose(changed[::2], before[::2], atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_network_answers_nothing_and_every_pixel_sees_every_other(name):
    net, inputs = Denoiser(CONFIGS[name]), _inputs()
    answer, _ = jax.jit(net.init_with_output)(jax.random.key(0), *inputs)
    np.testing.assert_array_equal(answer, 0)
    params = _moved(net, *inputs)
    corner = jax.jit(jax.grad(lambda x: net.apply(params, x, *inputs[1:])[0, 0, 0, 0]))(inputs[0])
    assert (corner[0] != 0).all()
    np.testing.assert_array_equal(corner[1:], 0)


def test_an_interval_is_two_times():
    net, (x, time, label) = Denoiser(CONFIGS["mlp"]), _inputs()
    ends = jnp.stack([time, time / 2], axis=1)
    params = _moved(net, x, ends, label)
    answer = jax.jit(lambda ends: net.apply(params, x, ends, label))
    assert np.abs(answer(ends) - answer(ends + jnp.array([[0, 1]]))).max() > 1e-3


def test_guidance_by_0_is_blind_to_the_label_and_by_1_follows_it():
    net, (x, time, label) = Denoiser(CONFIGS["mlp"]), _inputs()
    params = _moved(net, x, time, label)
    answer = jax.jit(lambda *inputs: net.apply(params, *inputs))
    told, untold = answer(x, time, label), answer(x, time, 0 * label)
    assert np.abs(told - untold).max() > 1e-2
    for weight in (0.0, 1.0, 2.5):
        found = denoisers.guided(answer, label, weight)(x, time)
        np.testing.assert_allclose(found, untold + weight * (told - untold), rtol=1e-4, atol=1e-5)
    for weight, rows in ((1.0, len(x)), (jnp.float32(1), 2 * len(x)), (2.0, 2 * len(x))):
        asked = lambda x, time, label: jnp.full_like(x, len(x))  # noqa: E731
        seen = denoisers.guided(asked, label, weight)(x, time)
        np.testing.assert_array_equal(seen, rows)  # a weight that is traced may be any
    unconditional = lambda x, time, label: x if label is None else None  # noqa: E731
    assert denoisers.guided(unconditional, None, 7.0)(x, time) is x


def test_what_noise_is_added_to():
    """Images in units of half their range, and everything around its mean."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1)), jnp.float32)
    scaled = denoisers.scaled(x, SPEC)
    np.testing.assert_allclose(scaled, (np.asarray(x) - 100) / 127.5, rtol=1e-6)
    np.testing.assert_allclose(denoisers.unscaled(scaled, SPEC), x, atol=1e-4)
    bits = SPEC._replace(support="binary", mean=np.full((4, 4, 1), 0.25, np.float32))
    np.testing.assert_allclose(denoisers.scaled(jnp.ones((1, 4, 4, 1)), bits), 1.5)
    np.testing.assert_allclose(denoisers.scaled(jnp.zeros((1, 2)), PLANE), [[-1, 2]])


def test_samples_are_what_the_data_could_hold():
    x = jnp.array([-3.0, 0.4, 99.6, 300.0]).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(denoisers.whole(x, SPEC).ravel(), [0, 0, 100, 255])
    bits = denoisers.whole(x, SPEC._replace(support="binary"))
    np.testing.assert_array_equal(bits.ravel(), [0, 0, 1, 1])
    point = jnp.array([[-3.0, 0.25]])
    np.testing.assert_array_equal(denoisers.whole(point, PLANE), point)


def test_times_of_a_batch_are_uniform_and_evenly_apart():
    times = jax.vmap(lambda key: denoisers.spread_times(key, 5))(
        jax.random.split(jax.random.key(0), 2000)
    )
    gaps = np.diff(np.sort(times, axis=1), axis=1)
    np.testing.assert_allclose(gaps, 0.2, atol=1e-5)
    for row in np.asarray(times).T:
        assert stats.kstest(row, "uniform").pvalue > 1e-4


def test_how_often_a_label_is_not_told():
    label = jnp.eye(CLASSES)[jnp.zeros(20_000, int)]
    kept = np.asarray(denoisers.dropped(label, jax.random.key(0), 0.3))
    np.testing.assert_array_equal(kept[:, 1:], 0)
    assert abs(kept[:, 0].mean() - 0.7) < 5 * math.sqrt(0.21 / 20_000)
    assert denoisers.dropped(None, jax.random.key(0), 0.3) is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"network": "resnet"}, ("model.network='resnet'", "mlp, unet, dit")),
        ({"network": "unet", "patch": 3}, ("model.patch=3", "(4, 4)")),
        ({"patch": 0}, ("model.patch=0", "at least 1")),
        ({"depth": -1}, ("model.depth=-1", "at least 0")),
        ({"channels": ()}, ("model.channels=()", "widths")),
        ({"network": "unet", "channels": (4, 6)}, ("model.channels[-1]=6", "multiple of 16")),
        ({"network": "dit", "width": 12}, ("model.width=12", "multiple of 16")),
        ({"label_dropout": 1.0}, ("model.label_dropout=1.0", "below 1")),
        ({"guidance": math.nan}, ("model.guidance=nan", "finite")),
        ({"guidance": 2.0}, ("model.guidance=2.0", "model.conditional=True")),
        (
            {"guidance": 2.0, "conditional": True, "label_dropout": 0.0},
            ("model.guidance=2.0", "model.label_dropout above 0"),
        ),
    ],
)
def test_check_refuses_a_bad_value_by_its_name(values, words):
    denoisers.check(denoisers.Config(), SPEC)
    with pytest.raises(UserError) as refused:
        denoisers.check(replace(denoisers.Config(), **values), SPEC)
    message = str(refused.value)
    assert "\n" not in message and all(word in message for word in words)


def test_without_attention_no_width_has_to_go_with_it():
    config = denoisers.Config(network="unet", channels=(4, 6), depth=0)
    denoisers.check(config, SPEC)
    x, net = jnp.zeros((2, *SPEC.event_shape)), denoisers.Denoiser(config)
    assert net.init_with_output(jax.random.key(0), x, jnp.zeros(2))[0].shape == x.shape


def test_check_refuses_data_that_do_not_fit():
    denoisers.check(denoisers.Config(network="mlp"), PLANE)
    with pytest.raises(UserError, match=r"model\.network='unet' needs images.*\(2,\).*'mlp'"):
        denoisers.check(denoisers.Config(network="unet"), PLANE)
    with pytest.raises(UserError, match=r"tokens.*masked_diffusion"):
        denoisers.check(denoisers.Config(), DataSpec((6,), "tokens", np.zeros(6), vocabulary=5))
    with pytest.raises(UserError, match=r"model\.conditional=True.*no labels"):
        denoisers.check(denoisers.Config(conditional=True), PLANE._replace(num_classes=0))


def test_of_images_a_grey_value_is_the_same_number_at_every_pixel():
    spec = denoisers.with_one_mean(SPEC._replace(mean=np.arange(16.0).reshape(4, 4, 1)))
    seen = np.asarray(denoisers.scaled(jnp.full((1, 4, 4, 1), 30.0), spec))
    np.testing.assert_allclose(seen, (30 - 7.5) / 127.5, rtol=1e-6)
    assert denoisers.with_one_mean(PLANE) is PLANE


def test_vectors_are_seen_beside_waves_of_four_lengths():
    x = np.array([[0.5, -2.0], [3.0, 0.0]], np.float32)
    seen, cosines, sines = np.split(np.asarray(denoisers.place_features(x)), [2, 10], axis=1)
    np.testing.assert_array_equal(seen, x)
    waves = np.exp(1j * x[..., None] * np.array([1, 2, 4, 8])).reshape(2, 8)
    np.testing.assert_allclose(cosines + 1j * sines, waves, atol=1e-5)
