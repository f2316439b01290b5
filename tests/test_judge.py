"""The quality mode end to end: its own judge, one that is named, and what it refuses."""

import json
import threading
import time
from unittest import mock

import jax
import numpy as np
import pytest
from conftest import on_one_device

from dgm_jax import cache, judge, models, run, trained_model
from dgm_jax import config as configs
from dgm_jax.core import UserError
from dgm_jax.data import dataset as data
from dgm_jax.workdir import Workdir

SHORT = {
    "data.source": "embedded",
    "train.duration": "20 steps",
    "train.steps_per_dispatch": 10,
    "train.checkpoint_every": "20 steps",
    "train.validate_every": "20 steps",
    "eval.elbo_samples": 1,
}
TINY = {"network": "mlp", "hidden": (8,)}
SMALL = {f"model.{field}": value for field, value in TINY.items()}
METRICS = {
    "frechet_distance",
    "kernel_distance",
    "precision",
    "recall",
    "density",
    "coverage",
}


def short(model, **values):
    return configs.override(configs.experiment(model), {**SHORT, **values})


@pytest.fixture(scope="module")
def gan(tmp_path_factory):
    """A conditional GAN of small digits, hardly trained, judged twice; what was written first."""
    path = tmp_path_factory.mktemp("judge") / "gan"
    tiny = {
        "data.binarisation": "none",
        "model.conditional": True,
        "model.network": "mlp",
        "model.generator": (4, 4),
        "model.discriminator": (4, 4),
    }
    recipe = short("classifier", **{"data.binarisation": "none", **SMALL})
    with on_one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_draw_pictures", lambda *args: [])
        patch.setattr(judge, "classifier_config", lambda: recipe)
        run.train_mode(short("gan", **tiny), Workdir(path))
        judge.quality_mode(Workdir(path), 100, 0, None)
        first = json.loads((path / "quality.json").read_text())
        patch.setattr(run, "train_mode", lambda *args: pytest.fail("the judge was trained again"))
        judge.quality_mode(Workdir(path), 100, 0, None)
        return Workdir(path), first


def test_samples_stand_beside_held_out_data_under_the_same_names(gan):
    workdir, result = gan
    for name in METRICS:
        assert {f"samples/{name}", f"test/{name}"} <= set(result["metrics"])
    assert {"samples/copying", "judge/accuracy", "samples/label_accuracy"} <= set(result["metrics"])
    assert result["judge"].startswith("classifier in mnist-")
    assert (workdir.path / "nearest.png").exists()
    assert result["metrics"]["samples/recall"]["num_examples"] == 100


def test_samples_have_each_label_as_often_as_the_data_in_no_order(gan, monkeypatch):
    """Of which three in four are sevens here. In turn, each label would come equally often."""
    dataset = data.load(configs.section(short("gan", **{"data.binarisation": "none"}), "data"))
    train = dataset.splits["train"]
    sevens = np.where(np.arange(len(train)) % 4, 7, 1).astype(np.int32)
    train = data.Split("train", train.x, sevens, train.factors)
    dataset = dataset._replace(splits={**dataset.splits, "train": train})
    drawn = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(run, "data_of", lambda *args: dataset)
    monkeypatch.setattr(judge, "_judge", lambda *args: judge.Judge("nobody", None))
    monkeypatch.setattr(trained_model, "draw", drawn)
    with pytest.raises(KeyboardInterrupt):
        judge.quality_mode(gan[0], 200, 0, None)
    classes = np.array(drawn.call_args.args[3])
    assert len(classes) == 200 and set(classes) == {1, 7}
    assert 0.6 < np.mean(classes == 7) < 0.9 and len(set(np.flatnonzero(classes == 1) % 4)) == 4


def test_held_out_data_are_nearer_to_the_data_than_a_hardly_trained_gan_is(gan):
    found = gan[1]["metrics"]
    for name in ("frechet_distance", "kernel_distance"):
        assert found[f"test/{name}"]["value"] < found[f"samples/{name}"]["value"]
    assert found["test/coverage"]["value"] > 0.8 > found["samples/coverage"]["value"]


def test_the_judge_is_trained_on_one_device_of_many(tmp_path, monkeypatch):
    """Its batch of 100 would not divide over eight, and is not the user's to set."""
    asked = []
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(run, "train_mode", lambda *args: asked.append(args))
    dataset = data.load(configs.section(short("gan", **{"data.binarisation": "none"}), "data"))
    judge._own(dataset)
    ((config, _, mesh),) = asked
    assert jax.device_count() > 1 and mesh.size == 1 and config.train.batch_size == 100


def test_the_judge_is_told_all_labels(tmp_path, monkeypatch):
    """Of a model that learned from few it is the same as of any other."""
    asked = []
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(run, "train_mode", lambda *args: asked.append(args))
    for few in ({}, {"data.labelled": 100, "data.labelled_share": 0.1}):
        fields = {"data.binarisation": "none", **few}
        judge._own(data.load(configs.section(short("m2", **fields), "data")))
    (config, workdir, _), (same, there, _) = asked
    assert config == same and workdir == there and config.data.labelled == 0


def test_a_judge_that_another_process_trains_is_waited_for(tmp_path, monkeypatch):
    """Of several jobs that measure the models of one data set, one trains it."""
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    dataset = data.load(configs.section(short("gan", **{"data.binarisation": "none"}), "data"))
    begun, trained = threading.Event(), []

    def train(config, workdir, mesh):
        begun.set()
        for _ in range(3000):
            if "waiting" in "".join(said):
                break
            time.sleep(0.01)
        trained.append(workdir)
        workdir.path.mkdir()
        workdir.results.write_text("{}")

    said = []
    monkeypatch.setattr(judge, "say", said.append)
    monkeypatch.setattr(run, "train_mode", train)
    other = threading.Thread(target=judge._own, args=[dataset], daemon=True)
    other.start()
    assert begun.wait(60)
    assert [judge._own(dataset)] == trained
    other.join()


def test_the_judge_is_trained_once_and_the_numbers_repeat(gan):
    workdir, first = gan
    again = json.loads((workdir.path / "quality.json").read_text())
    assert again["metrics"] == first["metrics"]


@pytest.mark.parametrize("num", [99, 251])
def test_a_number_of_samples_that_cannot_be_judged_is_refused(gan, num):
    with on_one_device(), pytest.raises(UserError, match=rf"--num={num}: .* at most 250"):
        judge.quality_mode(gan[0], num, 0, None)


@pytest.mark.parametrize("num", [None, 10])
def test_few_test_examples_are_not_judged(tiny_dataset, num):
    with pytest.raises(UserError, match="at least 200 test examples, and there are 24"):
        judge._number(num, tiny_dataset)


def test_a_judge_of_other_data_is_refused(gan, tmp_path):
    with on_one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_draw_pictures", lambda *args: [])
        binary = short("classifier", **SMALL)
        run.train_mode(binary, Workdir(tmp_path))
        with pytest.raises(
            UserError, match=r"--judge=.* was trained on binary data .* these are uint8"
        ):
            judge.quality_mode(gan[0], 100, 0, str(tmp_path))
        with pytest.raises(UserError, match="this model has no sample"):
            judge.quality_mode(Workdir(tmp_path), 100, 0, None)


def test_a_network_from_a_file_sees_standardised_pictures_of_its_size(tmp_path):
    """An ONNX file returns its input: of pictures of one grey value, (v - mean) / deviation."""
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "identity.onnx"
    shape = ["n", 3, 8, 8]
    ends = [onnx.helper.make_tensor_value_info(name, 1, shape) for name in ("x", "y")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "identity", ends[:1], ends[1:]
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    values = np.array([0.0, 51.0, 255.0], np.float32)
    x = np.broadcast_to(values[:, None, None, None], (3, 4, 4, 1))
    found = judge._of_onnx(path, 255.0).features(x, "")["codes"].reshape(3, 3, 8, 8)
    expected = (values[:, None] / 255 - judge._MEAN.ravel()) / judge._DEVIATION.ravel()
    np.testing.assert_allclose(found.mean(axis=(2, 3)), expected, atol=1e-5)
    np.testing.assert_allclose(found.std(axis=(2, 3)), 0, atol=1e-5)


@pytest.mark.parametrize("text, what", [(None, "no such file"), ("?", "no network in ONNX")])
def test_a_file_that_is_no_network_is_refused(tmp_path, text, what):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "judge.onnx"
    if text:
        path.write_text(text)
    with pytest.raises(UserError, match=what):
        judge._of_onnx(path, 255.0)


def test_features_of_a_classifier_have_unit_size(tiny_dataset):
    model = models.build({**models.defaults("classifier"), **TINY}, tiny_dataset.spec)
    batch = data.some(tiny_dataset, "train", 5)
    params = model.init(jax.random.key(0), batch)
    codes = model.encode(params, batch, jax.random.key(1))
    np.testing.assert_allclose(np.mean(codes**2, axis=1), 1, rtol=1e-3)
    np.testing.assert_allclose(np.exp(model.classify(params, batch)).sum(axis=1), 1, rtol=1e-5)
