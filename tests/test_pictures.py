"""Traversals: the latents that matter are found, and each row moves one of them as promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dgm_jax import pictures
from dgm_jax.core import Model

# Four latents with means 0, 1, 2, 3; a picture shows each as a pixel, the second much enlarged and
# the fourth, which varies most, not at all.
CODES = np.array([[-1, 2, 3, -8], [-1, -2, -3, 8], [1, 2, 3, -8], [1, -2, -3, 8]]) + np.arange(4.0)
GAINS = np.array([1.0, 100.0, 1.0, 0.0])
MODEL = Model(
    init=None,
    players=(),
    log_likelihood_fns={},
    encode=lambda params, batch, rng: batch["x"],
    decode=lambda params, z: (z * jnp.asarray(GAINS)[None]).reshape(-1, 2, 2, 1),
)


@pytest.fixture
def traverse(monkeypatch):
    """What `save_traversals` has drawn: the rows and the title."""
    calls = []
    monkeypatch.setattr(pictures, "save_grid", lambda *args: calls.append(args))

    def run(**options):
        batch = {"x": jnp.asarray(CODES, jnp.float32)}
        pictures.save_traversals("x.png", MODEL, {}, batch, jax.random.key(0), **options)
        ((path, rows, title),) = calls
        assert path == "x.png"
        return rows, title

    return run


def test_a_row_moves_one_latent_over_two_deviations_about_its_mean(traverse):
    rows, title = traverse(columns=5)
    assert rows.shape == (4, 5, 2, 2, 1)
    assert title.startswith("latents 1, 2, 0, 3 ")  # by what they change, not by how they vary
    for latent, row in zip((1, 2, 0, 3), rows.reshape(4, 5, 4), strict=True):
        for other in range(4):
            expected = np.full(5, CODES[0, other])
            if other == latent:
                expected = latent + np.array([-2, -1, 0, 1, 2]) * (latent + 1)
            np.testing.assert_allclose(row[:, other], GAINS[other] * expected, atol=1e-3)


def test_only_so_many_rows_are_drawn(traverse):
    rows, title = traverse(most=2)
    assert rows.shape == (2, 11, 2, 2, 1) and title.startswith("latents 1, 2 ")


def test_colour_pictures_keep_their_colours(tmp_path):
    """Four images side by side, each of one colour; read back from the file."""
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], float)
    rows = np.broadcast_to(colours[None, :, None, None], (1, 4, 8, 8, 3))
    pictures.save_grid(tmp_path / "x.png", rows, "")
    with Image.open(tmp_path / "x.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    middle = pixels[2 * height // 3, ((np.arange(4) + 0.5) * width / 4).astype(int)]
    np.testing.assert_array_equal(middle, 255 * colours)


def test_a_learning_curve_has_what_is_in_nats(tmp_path, monkeypatch):
    """The loss, and what validation has too; no norm, penalty or count, whatever its name."""
    seen = []
    panels = pictures._panels
    monkeypatch.setattr(pictures, "_panels", lambda num: seen.append(panels(num)) or seen[-1])
    row = {"gan/loss": 1.0, "gan/skipped": 3.0, "gan/anything": 2.0, "gan/rate": 4.0}
    rows = [{"step": 1, **row}, {"step": 2, **row}, {"step": 2, "validation/rate": 5.0}]
    pictures.save_learning_curve(tmp_path / "curve.png", rows)
    ((_, axes),) = seen
    assert [each.get_title() for each in axes] == ["loss", "rate"]
    assert [each.get_ylabel() for each in axes] == ["", "nats per example"]


def test_originals_are_as_bright_as_their_reconstructions(monkeypatch):
    """Grey values of a perfect model: each image stands twice, from 0 to 1."""
    calls = []
    monkeypatch.setattr(pictures, "save_grid", lambda *args: calls.append(args))
    x = jnp.arange(16.0).reshape(4, 2, 2, 1) * 17
    model = MODEL._replace(reconstruct=lambda params, batch, rng: batch["x"] / 255)
    pictures.save_reconstructions("x.png", model, {}, {"x": x}, jax.random.key(0), 255.0, columns=2)
    ((_, rows, _),) = calls
    np.testing.assert_allclose(rows[0::2], rows[1::2])
    assert rows.shape == (4, 2, 2, 2, 1) and rows.max() == 1


@pytest.mark.parametrize(("num", "shown"), [(1, (2, 1)), (7, (2, 7)), (15, (2, 10)), (20, (4, 10))])
def test_pictures_of_few_images_have_fewer_of_them(num, shown, monkeypatch):
    calls = []
    monkeypatch.setattr(pictures, "save_grid", lambda *args: calls.append(args[1]))
    model = MODEL._replace(reconstruct=lambda params, batch, rng: batch["x"])
    image = {"x": jnp.arange(4.0 * num).reshape(num, 2, 2, 1)}
    code = {"x": np.arange(4.0 * num).reshape(num, 4)}
    pictures.save_reconstructions("x.png", model, {}, image, jax.random.key(0), 1.0)
    pictures.save_interpolation("x.png", model, {}, code, jax.random.key(0))
    reconstructions, interpolation = calls
    assert reconstructions.shape == (*shown, 2, 2, 1)
    assert interpolation.shape == (num // 2, 10, 2, 2, 1)
    for i, line in enumerate(interpolation):
        np.testing.assert_allclose(
            line[[0, -1]].reshape(2, 4), code["x"][2 * i : 2 * i + 2] * GAINS
        )


@pytest.mark.parametrize(
    ("label", "columns"), [(None, 5), (np.arange(20) % 4, 4), (np.arange(20) % 2, 4)]
)
def test_no_column_of_samples_has_two_classes(monkeypatch, label, columns):
    """Each in turn, in a grid that is otherwise as square as can be."""
    calls = []
    monkeypatch.setattr(pictures, "save_grid", lambda *args: calls.append(args[1]))
    x = np.broadcast_to(np.arange(20.0).reshape(20, 1, 1, 1), (20, 2, 2, 1))
    samples = {"x": x} if label is None else {"x": x, "label": label}
    pictures.save_samples("x.png", samples, "", 1.0)
    (rows,) = calls
    assert rows.shape[:2] == (20 // columns, columns)
    if label is not None:
        of_column = label[rows[..., 0, 0, 0].astype(int)]
        assert (of_column == of_column[0]).all()
