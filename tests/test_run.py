"""The features mode leaves what the model knows, judged as it says; densities of the plane."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import on_one_device

from dgm_jax import config as configs
from dgm_jax import run, trained_model
from dgm_jax.core import Model, UserError
from dgm_jax.data import dataset as data
from dgm_jax.data import shapes
from dgm_jax.evaluators import disentanglement, features
from dgm_jax.workdir import Workdir

TINY = {
    "model.latents": (4, 2),
    "model.width": (8, 8),
    "data.validation": 40,
    "train.batch_size": 40,
    "train.duration": "20 steps",
    "train.steps_per_dispatch": 10,
    "train.checkpoint_every": "20 steps",
    "train.validate_every": "20 steps",
    "eval.batch_size": 200,
    "eval.num_samples": 2,
    "eval.elbo_samples": 1,
}
SCORES = {
    "mig",
    "dci_disentanglement",
    "dci_completeness",
    "dci_informativeness",
    "factor_vae_score",
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A hierarchy trained for a moment on a few shapes: its data, `features.npz` and scores."""
    path = tmp_path_factory.mktemp("judged") / "run"
    config = configs.override(configs.experiment("hvae"), {"data.dataset": "shapes", **TINY})
    with on_one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "NUM_TRAIN", 640)
        patch.setattr(shapes, "NUM_TEST", 400)
        patch.setattr(features, "LABELS_PER_CLASS", (1,))
        patch.setattr(run, "_draw_pictures", lambda *args: None)
        patch.setattr(run, "_LONG_ENOUGH", 0)
        run.train_mode(config, Workdir(path))
        run.features_mode(Workdir(path))
        dataset = data.load(configs.section(config, "data"))
    trained, result = (
        json.loads((path / f).read_text()) for f in ("results.json", "features.json")
    )
    with np.load(path / "features.npz") as arrays:
        return dataset, dict(arrays), result, trained_model.restore(path), trained["speed"]


def test_the_file_has_features_by_layer_labels_and_factors(judged):
    dataset, arrays, _, restored, _ = judged
    for split, num in (("train", 600), ("test", 400)):
        whole = arrays[f"{split}_features"]
        assert whole.shape == (num, 6)
        np.testing.assert_array_equal(arrays[f"{split}_layer_1"], whole[:, :4])
        np.testing.assert_array_equal(arrays[f"{split}_layer_2"], whole[:, 4:])
        np.testing.assert_array_equal(arrays[f"{split}_labels"], dataset.splits[split].labels)
        np.testing.assert_array_equal(arrays[f"{split}_factors"], dataset.splits[split].factors)
    batch = data.some(dataset, "test", 400)
    codes = restored.model.encode(restored.params, batch, jax.random.key(0))
    np.testing.assert_allclose(arrays["test_features"], codes, atol=1e-5)
    assert len(arrays) == 10


def test_each_representation_is_scored_and_pixels_only_classified(judged):
    _, arrays, result, _, _ = judged
    found = {}
    for name, metric in result["metrics"].items():
        of, _, title = name.partition("/")
        found.setdefault(of, {})[title] = metric["value"]
    names = {"hvae", "layer_1", "layer_2", "untrained", "principal_components"}
    assert set(found) == {*names, "pixels"}
    assert not SCORES & set(found["pixels"])
    assert all(set(found[name]) == SCORES | set(found["pixels"]) for name in names)

    def both(name):
        return {split: arrays[f"{split}_{name}"] for split in ("train", "test")}

    for name, key in (("hvae", "features"), ("layer_2", "layer_2")):
        expected = disentanglement.evaluate(both(key), both("factors"), seed=0)
        for title, metric in expected.items():
            assert found[name][title] == metric.value, (name, title)
    assert (result["split"], result["step"]) == ("test", 20)
    assert result["files"] == ["features.npz", "features.json"]
    assert result["data"]["factors"] == list(shapes.FACTORS)


def test_the_speed_counts_each_product_of_a_step(judged):
    """Three a kernel: forward and both gradients; the first has two, no gradient at the pixels."""
    *_, restored, speed = judged
    kernels = [p for p in jax.tree.leaves(restored.params) if p.ndim == 2]
    (first,) = (kernel for kernel in kernels if kernel.shape[0] == restored.spec.num_dims)
    operations = 2 * (3 * sum(kernel.size for kernel in kernels) - first.size)  # of one image
    expected = operations * speed["examples_per_second"] / 1e9
    np.testing.assert_allclose(speed["gflops"], expected, rtol=1e-6)
    assert 0 < speed["share_of_limit"] < np.inf


def test_a_sequence_of_ones_own_tokens_is_learned_and_drawn(tmp_path):
    """Each token is the one before it, plus one modulo five: samples are numbers, and follow it."""
    tokens = (np.random.default_rng(0).integers(0, 5, (600, 1)) + np.arange(6)) % 5
    np.savez(tmp_path / "codes.npz", train_x=tokens, test_x=tokens[:100])
    config = configs.override(
        configs.experiment("transformer"),
        {
            "model.depth": 1,
            "model.width": 16,
            "model.heads": 2,
            "data.dataset": "arrays",
            "data.path": str(tmp_path / "codes.npz"),
            "data.binarisation": "none",
            "data.validation": 100,
            "train.batch_size": 50,
            "train.duration": "200 steps",
            "train.steps_per_dispatch": 100,
            "train.checkpoint_every": "200 steps",
            "train.validate_every": "200 steps",
            "optimizer.learning_rate": 1e-2,
        },
    )
    with on_one_device():
        run.train_mode(config, Workdir(tmp_path / "run"))
    result = json.loads((tmp_path / "run/results.json").read_text())
    assert result["data"]["vocabulary"] == 5
    # The first of the six is drawn from five, and all others follow.
    np.testing.assert_allclose(result["metrics"]["log_prob"]["value"], -np.log(5), atol=0.1)
    samples = (tmp_path / "run/prior_samples.txt").read_text().split(f"\n{run._RULE}\n")
    rows = np.array([sample.split() for sample in samples], int)
    assert rows.shape == (100, 6) and np.mean(np.diff(rows) % 5 == 1) > 0.95


def test_a_density_is_taken_in_parts_of_one_size():
    """Of seven points by fours, the last filled up: each point's own."""
    sizes = []

    def log_prob(params, batch, rng):
        sizes.append(len(batch["x"]))
        return -params * jnp.sum(batch["x"] ** 2, axis=1)

    config = configs.override(configs.experiment("flow"), {"eval.batch_size": 4})
    model = Model((), (), {"log_prob": log_prob})
    x = np.arange(14, dtype=np.float32).reshape(7, 2)
    found = trained_model.density(trained_model.Trained(config, model, jnp.float32(2), None, 0))(x)
    np.testing.assert_allclose(found, -2 * np.sum(x**2, axis=1))
    assert sizes == [4]


def test_a_model_that_is_told_the_label_has_no_density_of_x_and_no_features_to_judge():
    model = Model((), (), {"log_prob": "log_prob"}, encode="encode")
    told = model._replace(samples_have_label=True, encoder_is_told=True)
    told = trained_model.Trained(configs.experiment("vae"), told, None, None, 0)
    assert trained_model.density(told) is None
    with pytest.raises(UserError, match=r"model\.conditional=True: the encoder is told the label"):
        trained_model.encoder(told)
    with pytest.raises(UserError, match="no encode"):
        trained_model.encoder(told._replace(model=Model((), (), {})))
    assert trained_model.encoder(told._replace(model=model)) == "encode"


def _sampler(asked, conditional):
    """A model of three classes that writes down how many samples it is asked for."""

    def sample(params, rng, num, *label):
        asked.append(num)
        return {"label": label[0] if conditional else jnp.arange(num) % 3}

    model = Model((), (), {}, sample=sample, samples_have_label=conditional)
    config = configs.ConfigDict({"model": {"name": "gan"}})
    return trained_model.Trained(config, model, {}, SimpleNamespace(num_classes=3), 0)


@pytest.mark.parametrize("conditional", [False, True])
def test_samples_have_each_class_in_turn(conditional):
    """Three of them, where the model is told which; as many are asked for at once of any model."""
    asked = []
    drawn = trained_model.draw(_sampler(asked, conditional), 204, seed=0)["label"]
    assert asked == [100] and len(drawn) == 204
    assert (drawn == np.arange(204) % 3).all() == conditional


def test_the_classes_of_samples_can_be_chosen():
    asked = []
    drawn = trained_model.draw(_sampler(asked, True), 103, 0, classes=[2, 0])["label"]
    assert asked == [100]
    np.testing.assert_array_equal(drawn, [2, 0] * 51 + [2])


@pytest.mark.parametrize(
    ("conditional", "label", "why"),
    [
        (True, 3, "there is no class 3: choose from 0 to 2"),
        (False, 1, "gan was trained without labels"),
    ],
)
def test_a_class_that_cannot_be_drawn_is_refused(conditional, label, why):
    with pytest.raises(UserError, match=why):
        trained_model.draw(_sampler([], conditional), 10, 0, classes=[0, label])
