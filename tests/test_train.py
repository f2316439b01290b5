"""The loop: where it starts, which checkpoint it keeps, and how it spreads and cuts its work."""

import dataclasses
import shutil
import signal
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgm_jax import config as configs
from dgm_jax import interruption, sharding, train, train_step, trained_model, writers
from dgm_jax.checkpoint import Checkpoints, abstract
from dgm_jax.core import Aux, Player, UserError
from dgm_jax.data import order
from dgm_jax.experiment import initial_state, prepare
from dgm_jax.interruption import Interrupted
from dgm_jax.models import made
from dgm_jax.train_state import TrainState
from dgm_jax.workdir import Workdir

pytestmark = pytest.mark.usefixtures("programs_kept")
SHORT = {
    "train.batch_size": 16,
    "train.duration": "20 steps",
    "train.steps_per_dispatch": 5,
    "train.validate_every": "5 steps",
    "train.checkpoint_every": "10 steps",
    "eval.batch_size": 8,
    "optimizer.learning_rate": 1e-2,
}
VAE = {"model.latents": 3, "model.encoder": (8,), "model.decoder": (8,)}
MADE = {"model.hidden": (16,)}  # its loss draws no noise


def prepared(dataset, model, num_devices=1, **values):
    fields = {**SHORT, **{"vae": VAE, "made": MADE}[model], **values}
    config = configs.override(configs.experiment(model), fields)
    return prepare(config, dataset, sharding.make_mesh(num_devices))


def run(experiment, path, params=None):
    """The final state, and the rows of metrics."""
    path.mkdir()
    workdir = Workdir(path)
    state, _ = train.train(experiment, workdir, None if params is None else lambda: params)
    return state, writers.read(workdir.metrics)


def run_until(step, experiment, path):
    """The final state, or None where a signal came before step `step` was done."""
    dispatches = iter(range(experiment.num_steps))

    @contextmanager
    def noted():
        yield lambda: signal.SIGTERM if reached(next(dispatches)) else 0

    workdir = Workdir(path)
    first = max(Checkpoints(workdir.checkpoints).steps, default=0)
    reached = lambda dispatch: first + 5 * (dispatch + 1) >= step  # noqa: E731
    if step == experiment.num_steps:
        return train.train(experiment, workdir)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interruption, "noted", noted)
        with pytest.raises(Interrupted):
            train.train(experiment, workdir)


def assert_close(left, right, atol):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def test_a_state_divided_over_the_devices_comes_to_the_same(tiny_dataset, tmp_path):
    """`mesh.fsdp`: parameters, averages and moments lie in eighths, and have the same values."""
    whole, _ = run(prepared(tiny_dataset, "vae"), tmp_path / "whole")
    divided, _ = run(
        prepared(tiny_dataset, "vae", num_devices=8, **{"mesh.fsdp": True}), tmp_path / "divided"
    )
    assert_close(whole.params, divided.params, 2e-6)
    assert_close(whole.ema, divided.ema, 2e-6)
    for tree in (divided.params, divided.ema, divided.opt_states):
        kernels = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 2]
        held = [leaf.addressable_shards[0].data.size / leaf.size for leaf in kernels]
        assert held.count(1 / 8) > len(held) / 2, held


def test_a_divided_state_goes_on_on_other_devices(tiny_dataset, tmp_path):
    """Eight devices, interrupted; then four, and then one without `fsdp`."""
    straight, _ = run(prepared(tiny_dataset, "vae"), tmp_path / "straight")
    path = tmp_path / "moved"
    path.mkdir()
    for steps, num, fsdp in ((10, 8, True), (15, 4, True), (20, 1, False)):
        experiment = prepared(tiny_dataset, "vae", num, **{"mesh.fsdp": fsdp})
        state = run_until(steps, experiment, path)
    assert int(state.step) == 20
    assert_close(straight.params, state.params, 2e-6)


def test_where_leaves_lie():
    """On the longest axis that eight can share; what they cannot share lies on each."""
    leaves = {"wide": np.zeros((3, 8, 16)), "odd": np.zeros((3, 5)), "none": np.zeros(())}
    placed = sharding.of_state(leaves, sharding.make_mesh(8), sharding.Config(fsdp=True))
    assert placed["wide"].spec == jax.sharding.PartitionSpec(None, None, "data")
    assert placed["odd"].spec == placed["none"].spec == jax.sharding.PartitionSpec()


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_batch_in_parts_is_the_whole_batch(tiny_dataset, tmp_path, num_devices):
    """Gradient accumulation: the same updates and metrics, to the rounding of a sum."""
    whole, rows = run(prepared(tiny_dataset, "made"), tmp_path / "whole")
    cut = prepared(tiny_dataset, "made", num_devices, **{"train.num_parts": 4})
    parts, part_rows = run(cut, tmp_path / "parts")
    assert_close(whole.params, parts.params, 2e-6)
    for row, part_row in zip(rows, part_rows, strict=True):
        for name in ("made/loss", "made/grad_norm"):
            if name in row:
                assert row[name] == pytest.approx(part_row[name], rel=1e-5)


def test_each_part_has_noise_of_its_own(tiny_dataset):
    """Were it the same, repeating a batch in two parts would give the same gradient twice."""
    drawn = lambda key: jax.random.normal(key, (4,))  # noqa: E731
    loss_fn = lambda params, batch, rng: (jnp.vdot(params["w"], drawn(rng)), Aux({}))  # noqa: E731
    batch = {"x": np.zeros((4, 1), np.float32)}
    args = Player("w", loss_fn), {"w": np.zeros(4, np.float32)}, batch, jax.random.key(0)
    mean, _, state = train_step._gradient_by_parts(*args, 2)
    ones = [drawn(key) for key in jax.random.split(jax.random.key(0), 2)]
    np.testing.assert_allclose(mean, (ones[0] + ones[1]) / 2, rtol=1e-6)
    assert not np.allclose(ones[0], ones[1]) and state is None


def test_each_part_goes_on_from_the_state_that_the_one_before_it_left():
    """Tenfold and a part's sum each time: of 1, 3 and then 2, 4 it is 46; their mean would be 5."""

    def loss_fn(params, batch, rng):
        return params["w"], Aux({}, state=10 * params["state"] + jnp.sum(batch["x"]))

    params = {"w": np.float32(0), "state": np.float32(0)}
    batch = {"x": np.arange(1.0, 5.0, dtype=np.float32)[:, None]}
    args = Player("w", loss_fn), params, batch, jax.random.key(0)
    assert train_step._gradient_by_parts(*args, 2)[2] == 46


@pytest.mark.parametrize("parts, devices", [(0, 1), (3, 1), (16, 2)])
def test_parts_that_cannot_be_are_refused(tiny_dataset, parts, devices):
    with pytest.raises(UserError, match=f"train.num_parts={parts}: train.batch_size=16"):
        prepared(tiny_dataset, "made", devices, **{"train.num_parts": parts})


def test_training_starts_from_given_parameters(tiny_dataset, tmp_path):
    """With a learning rate of nothing it also ends there, averages included."""
    first, _ = run(prepared(tiny_dataset, "made"), tmp_path / "first")
    still = prepared(tiny_dataset, "made", **{"optimizer.learning_rate": 1e-30, "seed": 1})
    second, _ = run(still, tmp_path / "second", first.params)
    assert int(second.step) == 20
    assert_close(first.params, second.params, 1e-7)
    assert_close(first.params, second.ema, 1e-7)


def test_training_starts_from_markov_chains_and_not_from_their_average(monkeypatch):
    config = configs.override(configs.experiment("energy"), {"train.init_from": "there"})
    averaged, newest = {"energy": 1.0, "state": 2.0}, {"energy": 3.0, "state": 4.0}
    trained = trained_model.Trained(config, None, averaged, None, 9)
    state = TrainState(9, 0, newest, {}, averaged)
    monkeypatch.setattr(trained_model, "_restore", {"there": (trained, state)}.get)
    assert trained_model.start_of(config)() == {"energy": 1.0, "state": 4.0}


def test_parameters_of_another_model_are_refused_by_name(tiny_dataset, tmp_path):
    first, _ = run(prepared(tiny_dataset, "made"), tmp_path / "first")
    other = prepared(tiny_dataset, "made", **{"model.hidden": (8,)})
    with pytest.raises(UserError, match=r"its parameter \['made'\].*is \(16.*this model's is \(8"):
        run(other, tmp_path / "other", first.params)
    with pytest.raises(UserError, match=r"and this model's is absent|is absent, and this"):
        run(prepared(tiny_dataset, "vae"), tmp_path / "vae", first.params)


def best_of(experiment, tmp_path):
    state, rows = run(experiment, tmp_path)
    name = "validation/log_prob"
    return state, {row["step"]: row[name] for row in rows if name in row}


def test_the_checkpoint_that_was_best_is_kept_and_given_back(tiny_dataset, tmp_path):
    """A rate at which a tiny model forgets all that is not in its 128 images: it overfits."""
    values = {
        "train.keep_best": "log_prob",
        "train.duration": "120 steps",
        "optimizer.learning_rate": 3e-2,
        "optimizer.ema": 0.0,
    }
    experiment = prepared(tiny_dataset, "made", **values)
    state, scores = best_of(experiment, tmp_path / "run")
    best = max(scores, key=scores.get)
    assert best < 120 and int(state.step) == best
    workdir = Workdir(tmp_path / "run")
    assert Checkpoints(workdir.best_checkpoint).steps == [best]
    assert Checkpoints(workdir.checkpoints).steps[-1] == 120
    like = jax.eval_shape(lambda: state)
    found = train.best_or_newest(
        workdir, abstract(like, sharding.replicated(sharding.make_mesh(1)))
    )
    assert_close(state, found, 0)


def test_an_interruption_does_not_change_which_is_best(tiny_dataset, tmp_path):
    values = {"train.keep_best": "log_prob", "train.duration": "60 steps"}
    values |= {"optimizer.learning_rate": 3e-2, "optimizer.ema": 0.0}
    experiment = prepared(tiny_dataset, "made", **values)
    straight, scores = best_of(experiment, tmp_path / "straight")
    path = tmp_path / "interrupted"
    path.mkdir()
    for steps in (10, 30, 60):
        state = run_until(steps, experiment, path)
    assert int(state.step) == int(straight.step) == max(scores, key=scores.get)


def test_training_does_not_begin_on_data_outside_their_support(tiny_dataset):
    """Grey values where bits were promised."""
    config = dataclasses.replace(tiny_dataset.config, binarisation="none")
    grey = tiny_dataset._replace(config=config)
    with pytest.raises(UserError, match=r"x must be in \{0, 1\}"):
        initial_state(prepared(grey, "made"))


def test_a_best_that_is_not_measured_is_refused(tiny_dataset):
    values = {"train.keep_best": "beauty"}
    with pytest.raises(UserError, match=r"train.keep_best='beauty': .* has .*log_prob"):
        prepared(tiny_dataset, "made", **values)
    empty = tiny_dataset.splits["validation"].part("validation", np.arange(0))
    dataset = tiny_dataset._replace(splits={**tiny_dataset.splits, "validation": empty})
    with pytest.raises(UserError, match=r"data.validation above 0"):
        prepared(dataset, "made", **values)


def test_a_config_of_an_older_version_is_read_and_one_of_a_newer_is_refused():
    """What came later has its default; what nobody knows is named."""
    config = configs.override(configs.experiment("vae"), {"model.latents": 7})
    old = config.to_dict()
    del old["mesh"], old["train"]["num_parts"]
    assert configs.differences(configs.from_dict(old), config) == []
    new = config.to_dict()
    new["train"]["telepathy"] = True
    with pytest.raises(UserError, match=r"no field train.telepathy"):
        configs.from_dict(new)


@pytest.fixture
def sometimes_nan(monkeypatch):
    """Whatever is given a list of update numbers: MADE's gradient is not finite in these."""
    build = made.build

    def where(updates):
        ids = np.stack([order.batch_ids(0, number - 1, 16, 128)[:2] for number in updates])

        def build_failing(config, spec):
            (player,) = (model := build(config, spec)).players

            def loss_fn(params, batch, rng):
                loss, aux = player.loss_fn(params, batch, rng)
                here = (batch["id"][None, :2] == jnp.asarray(ids)).all(axis=1).any()
                return loss * jnp.where(here, jnp.nan, 1.0), aux

            return model._replace(players=(player._replace(loss_fn=loss_fn),))

        monkeypatch.setattr(made, "build", build_failing)

    return where


def test_updates_that_are_not_finite_are_skipped_and_counted(tiny_dataset, tmp_path, sometimes_nan):
    """One of the first five, a burst of six over all of the second, and then training goes on."""
    sometimes_nan([3, 6, 7, 8, 9, 10, 11])
    state, rows = run(
        prepared(tiny_dataset, "made", **{"optimizer.skip_non_finite": 6}), tmp_path / "a"
    )
    rows = {row["step"]: row for row in rows if "made/skipped" in row}
    assert {step: row["made/skipped"] for step, row in rows.items()} == {5: 1, 10: 5, 15: 1, 20: 0}
    assert [step for step, row in rows.items() if "made/loss" in row] == [5, 15, 20]
    assert all(np.isfinite(value) for row in rows.values() for value in row.values())
    assert int(state.step) == 20 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("most, step", [(0, 3), (1, 7), (2, 8)])
def test_more_in_a_row_than_may_be_skipped_stop_training(
    tiny_dataset, tmp_path, sometimes_nan, most, step
):
    sometimes_nan([3, 6, 7, 8])
    experiment = prepared(tiny_dataset, "made", **{"optimizer.skip_non_finite": most})
    with pytest.raises(train.NonFiniteError, match=rf"made/loss.* step {step}:"):
        run(experiment, tmp_path / "run")


def test_a_checkpoint_of_another_layout_is_not_called_damaged(tiny_dataset, tmp_path, capsys):
    """The first field that differs is named; one that fits is gone on from."""
    path = tmp_path / "run"
    run(prepared(tiny_dataset, "made"), path)
    other = prepared(tiny_dataset, "made", **{"model.hidden": (8,)})
    with pytest.raises(UserError) as refused:
        train.train(other, Workdir(path))
    message = str(refused.value)
    assert "(steps [20, 10]) fits this version" in message and "damaged" not in message
    assert "params.made." in message and "(16,) there and float32 (8,) here" in message
    shutil.rmtree(path / "checkpoints" / "10")
    run(other, tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "10", path / "checkpoints" / "10")
    capsys.readouterr()
    train.train(other, Workdir(path))
    assert "step 20 has another layout (params.made." in capsys.readouterr().out
    kept = Checkpoints(path / "checkpoints").steps
    assert kept == [10, 20] and (path / "damaged_checkpoints" / "20").exists()


def test_a_checkpoint_that_cannot_be_written_says_so(tiny_dataset, tmp_path):
    (tmp_path / "file").touch()
    state = initial_state(prepared(tiny_dataset, "made"))
    with pytest.raises(UserError, match=r"cannot be written .*file.*same command goes on"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(state)


def test_what_unfinished_saves_have_left_is_removed(tiny_dataset, tmp_path):
    path = tmp_path / "run"
    run(prepared(tiny_dataset, "made"), path)
    left = path / "checkpoints" / "25.orbax-checkpoint-tmp"
    shutil.copytree(path / "checkpoints" / "20", left)
    train.train(prepared(tiny_dataset, "made"), Workdir(path))
    assert not left.exists() and Checkpoints(path / "checkpoints").steps == [10, 20]


def test_the_best_is_on_disk_before_a_checkpoint_that_takes_it_for_granted(
    tiny_dataset, tmp_path, monkeypatch
):
    """A run killed between the two would otherwise never see its best again."""
    save, seen = Checkpoints.save, []

    def watched(self, state):
        if self._directory.name == "checkpoints":
            rows = writers.read(tmp_path / "run" / "metrics.jsonl")
            scores = {r["step"]: r[name] for r in rows if (name := "validation/log_prob") in r}
            there = Checkpoints(tmp_path / "run" / "best_checkpoint")
            seen.append(there.steps == [max(scores, key=scores.get)])
        save(self, state)

    monkeypatch.setattr(Checkpoints, "save", watched)
    run(prepared(tiny_dataset, "made", **{"train.keep_best": "log_prob"}), tmp_path / "run")
    assert seen == [True, True]
