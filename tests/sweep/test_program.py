"""One program for many members: each is what it would have been alone."""

import json
import shutil
import signal
from typing import NamedTuple

import jax
import numpy as np
import pytest
import tiny
from conftest import on_devices, on_one_device

from dgm_jax import config as configs
from dgm_jax import sharding
from dgm_jax.checkpoint import Checkpoints
from dgm_jax.core import UserError
from dgm_jax.experiment import compile_steps, prepare, training_arrays
from dgm_jax.interruption import Interrupted
from dgm_jax.sweep import program
from dgm_jax.train import train
from dgm_jax.workdir import Workdir, write_json
from dgm_jax.writers import read

pytestmark = pytest.mark.usefixtures("programs_kept")
FIELDS = {
    "train.duration": "200 steps",
    "train.batch_size": 12,  # no device of eight has a share of it
    "train.steps_per_dispatch": 50,
    "train.validate_every": "100 steps",
    "train.checkpoint_every": "100 steps",
    "eval.batch_size": 8,
    "model.latents": 3,
    "model.encoder": (8,),
    "model.decoder": (8,),
}


def _configs(*members):
    base = configs.override(configs.experiment("vae"), FIELDS)
    return [configs.override(base, member) for member in members]


def _workdirs(path, num):
    found = [Workdir(path / str(i)) for i in range(num)]
    for workdir in found:
        workdir.path.mkdir(parents=True)
    return found


def _assert_close(found, expected, tolerance):
    """Every array, relative to its own largest number."""

    def check(a, b):
        scale = np.abs(np.asarray(b, np.float64)).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(scale, 1e-30))

    jax.tree.map(check, found, expected)


def test_each_member_is_its_solo_run(tiny_dataset, tmp_path):
    """After 200 steps; numbers of the model and the optimizer, a ramp, and the seed differ."""
    members = _configs(
        {"seed": 3},
        {"model.beta": 0.25, "optimizer.learning_rate": 3e-3, "optimizer.b1": 0.5},
        {
            "seed": 1,
            "optimizer.weight_decay": 0.1,
            "optimizer.warmup": 0.2,
            "optimizer.ema": 0.9,
            "optimizer.clip_norm": 0.5,
        },
    )
    for i, config in enumerate(members):
        config.train.ramp = f"model.beta over {100 + 50 * i} steps"
    dirs = _workdirs(tmp_path / "sweep", len(members))
    outcomes = program.train(members, tiny_dataset, dirs, tmp_path / "programs", None)
    for i, (config, outcome) in enumerate(zip(members, outcomes, strict=True)):
        (alone,) = _workdirs(tmp_path / f"solo{i}", 1)
        with on_one_device():
            state, _ = train(prepare(config, tiny_dataset), alone)
        assert outcome.failure is None and outcome.state.step == state.step == 200
        _assert_close(outcome.state.params, state.params, 1e-5)
        _assert_close(outcome.state.ema, state.ema, 1e-5)
        rows, expected = read(dirs[i].metrics), read(alone.metrics)
        assert [row["step"] for row in rows] == [row["step"] for row in expected]
        for row, other in zip(rows, expected, strict=True):
            assert row.keys() == other.keys()
            for name in row:
                if name not in ("seconds", "cpu_seconds", "examples_per_second"):
                    assert row[name] == pytest.approx(other[name], rel=1e-4)
    # And they are not all the same.
    first = [jax.tree.leaves(outcome.state.params)[1] for outcome in outcomes]
    assert min(np.abs(a - b).max() for i, a in enumerate(first) for b in first[:i]) > 1e-3


# The field that differs, its values, and what else is not as usual.
KINDS = {
    "two players": ("gan", "model.penalty_weight", (0.1, 0.5), {"model.network": "mlp"}),
    "what no player trains": ("vqvae", "model.commitment", (0.25, 1.0), {}),
    "levels of noise": ("diffusion", "model.gamma_max", (10.0, 6.0), {}),
    "Muon, parts, and 1 - b2 of few digits": (
        "vae",
        "optimizer.b2",
        (0.999, 0.9999),
        {"optimizer.name": "muon", "train.num_parts": 3},
    ),
}
SMALL = {
    **dict.fromkeys(("encoder", "decoder", "generator", "discriminator", "prior_hidden"), (6,)),
    **dict.fromkeys(("latents", "num_codes", "codebook_size", "code_dim", "width"), 4),
    "depth": 1,
}


@pytest.mark.parametrize("kind", KINDS)
def test_members_of_every_kind_are_their_solo_runs(kind):
    """Two dispatches of the second member; the first is at rest after one of them."""
    name, path, values, fields = KINDS[kind]
    base = configs.experiment(name)
    small = {f"model.{field}": few for field, few in SMALL.items() if field in base.model}
    steps = {"train.duration": "8 steps", "train.steps_per_dispatch": 4, "train.batch_size": 12}
    base = configs.override(base, {**small, **steps, "eval.batch_size": 8, **fields})
    members = [
        configs.override(base, {path: value, "seed": seed}) for seed, value in enumerate(values)
    ]
    dataset = tiny.accepted_by(base.model)
    of = lambda state, i: jax.tree.map(lambda a: np.array(a[i]), state)  # noqa: E731
    with on_one_device():
        state, run, inputs = program.compile_members(program.check(members[0], dataset), members)
        alone = of(state, 1)
        state, _, going = run(state, inputs, np.array([True, True]))
        rested = of(state, 0)
        assert going.all()
        state, _, going = run(state, inputs, np.array([False, True]))
        assert going.tolist() == [False, True]
        jax.tree.map(np.testing.assert_array_equal, of(state, 0), rested)
        experiment = prepare(members[1], dataset)
        run, arrays = compile_steps(experiment), training_arrays(experiment)
        for _ in range(2):
            alone = jax.device_put(alone, sharding.replicated(experiment.mesh))
            alone, _ = run(alone, arrays)
        assert alone.step == 8
        _assert_close(of(state, 1), alone, 1e-5)


def test_other_numbers_are_the_same_program_on_as_many_devices_as_members(tiny_dataset):
    """The next round of a search compiles nothing."""
    texts = []
    for scale in (1.0, 3.0):
        members = _configs(
            {"model.beta": scale, "optimizer.b2": 0.9},
            {"model.beta": 2 * scale, "seed": int(scale)},
        )
        experiment = program.check(members[0], tiny_dataset)
        state, run, inputs = program.compile_members(experiment, members)
        texts.append(run.lower(state, inputs).as_text())
    assert texts[0] == texts[1]
    assert len(state.step) == state.step.sharding.mesh.size == 2 < jax.device_count()


def test_a_failure_after_the_checkpoint_has_not_happened_yet(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.load_failure() is None
    write_json(workdir.failure, {"failure": "it broke", "step": 8})
    assert workdir.load_failure(until=4) is None
    assert workdir.load_failure(until=8) == workdir.load_failure() == "it broke"
    assert not workdir.finished  # its parameters are in the program's checkpoint alone
    workdir.checkpoints.mkdir()
    assert not workdir.finished  # they are being saved
    (workdir.checkpoints / "8").mkdir()
    assert workdir.finished


# A learning rate of 1e36 overflows within a dispatch or two.
DIVERGING = ({"seed": 1}, {"optimizer.learning_rate": 1e36}, {"seed": 2})


class Trained(NamedTuple):
    """A sweep's outcomes and the work directories of its members."""

    outcomes: list[program.Outcome]
    dirs: list[Workdir]


@pytest.fixture(scope="module")
def diverged(tiny_dataset, tmp_path_factory):
    """Three members, of which the second diverges; undisturbed."""
    path = tmp_path_factory.mktemp("diverged")
    dirs = _workdirs(path / "members", 3)
    members = _configs(*DIVERGING)
    with on_devices(2):
        return Trained(program.train(members, tiny_dataset, dirs, path / "program", None), dirs)


def test_a_member_that_diverges_is_left_as_it_was_and_the_others_go_on(
    diverged, tiny_dataset, tmp_path
):
    """Its neighbours see nothing."""
    (good, bad, other), dirs = diverged
    assert "not finite" in bad.failure and bad.state.step < 200
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(bad.state.params))
    assert len(read(dirs[1].metrics)) < len(read(dirs[0].metrics))
    alone = program.train(
        _configs(DIVERGING[0]),
        tiny_dataset,
        _workdirs(tmp_path / "solo", 1),
        tmp_path / "program",
        None,
    )[0]
    assert good.failure is other.failure is None and good.state.step == 200
    _assert_close(good.state.params, alone.state.params, 1e-5)


def test_an_interrupted_program_goes_on_to_the_same_end(
    diverged, tiny_dataset, tmp_path, monkeypatch
):
    members, whole = _configs(*DIVERGING), diverged.outcomes
    dirs, folder = _workdirs(tmp_path / "parts", 3), tmp_path / "program"
    save = Checkpoints.save

    def save_once(self, state):
        save(self, state)
        raise KeyboardInterrupt

    with on_devices(2), monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_once)
        with pytest.raises(KeyboardInterrupt):
            program.train(members, tiny_dataset, dirs, folder, None)
    assert read(dirs[0].metrics)[-1]["step"] == 100
    shutil.copytree(tmp_path / "parts", tmp_path / "elsewhere")
    shutil.copytree(folder, tmp_path / "elsewhere_program")
    with on_devices(2):
        resumed = program.train(members, tiny_dataset, dirs, folder, None)
    for one, other in zip(resumed, whole, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one.state, other.state)
    assert resumed[1].failure == whole[1].failure
    assert [row["step"] for row in read(dirs[0].metrics)][-1] == 200
    with on_one_device():  # two shared the members, the last repeated
        dirs = [Workdir(tmp_path / "elsewhere" / str(i)) for i in range(3)]
        rest = program.train(members, tiny_dataset, dirs, tmp_path / "elsewhere_program", None)
    assert [row["step"] for row in read(dirs[0].metrics)][-1] == 200
    for one, other in zip(rest, whole, strict=True):
        assert one.failure == other.failure
        _assert_close(one.state.params, other.state.params, 1e-5)


def test_a_member_not_finite_on_the_validation_split_stays_as_it_was(
    tiny_dataset, tmp_path, monkeypatch
):
    """In one example and once only; the interruption after it does not make it forgotten."""
    members, dirs = _configs({"seed": 1}, {"seed": 2}), _workdirs(tmp_path / "members", 2)
    compile_validation, save = program._compile_validation, Checkpoints.save

    def broken(*args):
        validate = compile_validation(*args)

        def once(*args):
            found = validate(*args)
            found[1]["elbo"] = np.where(np.arange(24) == 3, np.nan, found[1]["elbo"])
            return found

        return once

    def save_once(self, state):
        save(self, state)
        raise KeyboardInterrupt

    with on_one_device():
        with monkeypatch.context() as patch:
            patch.setattr(program, "_compile_validation", broken)
            patch.setattr(Checkpoints, "save", save_once)
            with pytest.raises(KeyboardInterrupt):
                program.train(members, tiny_dataset, dirs, tmp_path / "program", None)
        good, bad = program.train(members, tiny_dataset, dirs, tmp_path / "program", None)
    assert bad.failure.startswith(
        "validation after step 100: elbo is not finite for 1 of 24 examples (first: id 3)"
    )
    assert good.failure is None and (good.state.step, bad.state.step) == (200, 100)
    rows = read(dirs[1].metrics)
    assert rows[-1]["step"] == 100 and all("validation/elbo" not in row for row in rows)


def test_a_failure_is_of_the_step_in_which_it_came(tiny_dataset, tmp_path):
    """However many checkpoints follow: the last of them may be lost."""
    dirs = _workdirs(tmp_path, 2)
    log = program._Log(program.check(_configs({})[0], tiny_dataset), dirs, 0, None)
    log.dispatch(50, {"vae/loss": np.float32([[1.0], [np.nan]])}, np.array([True, True]))
    for _ in range(2):
        log.keep_failures()
    log.close()
    assert dirs[1].load_failure(until=49) is None and dirs[0].load_failure() is None
    again = program._Log(program.check(_configs({})[0], tiny_dataset), dirs, 100, None)
    again.keep_failures()
    again.close()
    assert again.failures == [None, dirs[1].load_failure(until=50)] and again.failures[1]


def test_a_signal_is_obeyed_after_the_dispatch_in_which_it_comes(
    tiny_dataset, tmp_path, monkeypatch
):
    """It comes while the metrics of the first are fetched; the second has been started before."""
    dispatch = program._Log.dispatch

    def interrupted(self, step, *args):
        if step == 50:
            signal.raise_signal(signal.SIGTERM)
        dispatch(self, step, *args)

    monkeypatch.setattr(program._Log, "dispatch", interrupted)
    members, folder = _configs({"seed": 1}, {"seed": 2}), tmp_path / "program"
    with on_one_device():
        with pytest.raises(Interrupted, match="stopped after step 100, which is saved"):
            program.train(members, tiny_dataset, _workdirs(tmp_path / "members", 2), folder, None)
        assert Checkpoints(folder).steps == [100]
        # Also where none is left to train: the next program is not begun.
        members, folder = _configs({"optimizer.learning_rate": 1e36}), tmp_path / "none"
        dirs = _workdirs(tmp_path / "diverging", 1)
        with pytest.raises(Interrupted, match="stopped after step 100, which is saved"):
            program.train(members, tiny_dataset, dirs, folder, None)
        monkeypatch.undo()
        (outcome,) = program.train(members, tiny_dataset, dirs, folder, None)
    assert "not finite at step" in outcome.failure


def test_time_goes_on_from_the_member_that_was_trained_longest(tiny_dataset, tmp_path):
    dirs = _workdirs(tmp_path, 2)
    for workdir, seconds in zip(dirs, (30, 70), strict=True):
        row = {"step": seconds, "examples_per_second": 1.0}
        row |= {"seconds": seconds, "cpu_seconds": 2 * seconds}
        workdir.metrics.write_text(json.dumps(row) + "\n")
    log = program._Log(program.check(_configs({})[0], tiny_dataset), dirs, 100, None)
    log.close()
    assert log.clock.seconds == {"training": 70, "training_cpu": 140}


def test_the_next_dispatch_is_started_before_metrics_are_fetched(
    tiny_dataset, tmp_path, monkeypatch
):
    """But for a validation or a checkpoint, which are of a state that has been found finite."""
    compile_members, order = program.compile_members, []

    def pretended(experiment, members):
        def run(state, inputs, going):
            order.append("run")
            return state, {}, going

        return compile_members(experiment, members)[0], run, None

    monkeypatch.setattr(program, "compile_members", pretended)
    monkeypatch.setattr(program._Log, "dispatch", lambda self, step, *args: order.append(step))
    monkeypatch.setattr(program._Log, "validation", lambda self, step, found: order.append("valid"))
    monkeypatch.setattr(program, "_compile_validation", lambda *args: lambda state, seeds: None)
    monkeypatch.setattr(Checkpoints, "save", lambda self, state: order.append("save"))
    members = _configs({"train.checkpoint_every": "150 steps"})
    program.train(members, tiny_dataset, _workdirs(tmp_path, 1), tmp_path / "program", None)
    expected = ["run", "run", 50, 100, "valid", "run", 150, "save", "run", 200, "valid", "save"]
    assert order == expected


def test_a_checkpoint_is_due_by_the_clock_too(tiny_dataset, tmp_path, monkeypatch):
    clock = {"train.checkpoint_every": "200 steps", "train.checkpoint_minutes": 0.0}
    saved = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, state: saved.append(state.step[0].item()))
    members = _configs({**clock, "seed": 1}, {**clock, "seed": 2})
    program.train(members, tiny_dataset, _workdirs(tmp_path, 2), tmp_path / "program", None)
    assert saved == [50, 100, 150, 200]


def test_members_of_one_shape_share_a_program(tiny_dataset):
    members = _configs(
        {},
        {"seed": 5},
        {"model.latents": 4},
        {"model.beta": 2.0, "optimizer.learning_rate": 0.1},
        {"optimizer.ema": 0.0},  # nothing is kept: another shape
        {"optimizer.ema": 0.5},
        {"train.batch_size": 32},
        {"model.latents": 4, "seed": 1},
        {"eval.num_samples": 7},  # only after training
        {"train.ramp": "model.beta over 3 steps"},
        {"train.ramp": "model.beta over 2 epochs"},
        {"train.ramp": "model.beta from 2 over 3 steps"},
    )
    assert program.group(members) == [[0, 1, 3, 5, 8], [2, 7], [4], [6], [9, 10], [11]]
    experiment = program.check(members[0], tiny_dataset)
    numbers = program.numbers_of(experiment, [members[i] for i in (0, 1, 3, 5)])
    assert numbers.keys() == {"model.beta", "optimizer.learning_rate", "optimizer.ema"}
    np.testing.assert_allclose(numbers["model.beta"], [1, 1, 2, 1])
    experiment = program.check(members[9], tiny_dataset)
    numbers = program.numbers_of(experiment, [members[9], members[10]])
    assert numbers.keys() == {"train.ramp.beta"}
    np.testing.assert_allclose(numbers["train.ramp.beta"], [3, 2 * experiment.steps_per_epoch])


def test_a_program_has_no_more_members_than_it_may():
    members = _configs(*({"seed": i, "train.members_per_program": 2} for i in range(5)))
    assert program.group(members) == [[0, 1], [2, 3], [4]]
    members = _configs(*({"seed": i} for i in range(5)))
    assert program.group(members) == [[0, 1, 2, 3, 4]]


def test_a_value_that_makes_no_sense_is_refused(tiny_dataset):
    for member, says in (
        ({"train.members_per_program": -1}, r"train\.members_per_program=-1"),
        ({"model.beta": -1.0}, r"model\.beta=-1"),
        ({"train.init_from": "runs/a"}, r"train\.init_from='runs/a'"),
    ):
        with pytest.raises(UserError, match=says):
            program.check(*_configs(member), tiny_dataset)
