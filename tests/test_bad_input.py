"""Bad input: one line that names the value and what to do, and nothing written over or lost.

What the command line refuses is tried on the command line, each case a process. The processes
are forked from one that has imported everything slow, and has not started JAX.
"""

import errno
import gc
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from conftest import on_one_device

from dgm_jax import config as configs
from dgm_jax import models, optim, run, sharding, trained_model
from dgm_jax.checkpoint import Checkpoints
from dgm_jax.core import DataSpec, UserError
from dgm_jax.data import dataset as data
from dgm_jax.experiment import abstract_state
from dgm_jax.workdir import Workdir, write

# Orbax leaves coroutines of a failed read to the garbage collector, which complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def _garbage_stays_here():
    """Collected before this file ends, or the complaint meets whichever test runs then."""
    yield
    gc.collect()


REPO = Path(__file__).resolve().parent.parent
SMOKE = "configs/vae_mnist.py:smoke"

_DRIVER = """
import atexit, gc, json, os, runpy, signal, sys
from ml_collections import config_flags
from dgm_jax import models, pictures, run
models.get("vae")
gc.freeze()  # what children share they do not copy
codes = []
for case in json.load(sys.stdin):
    child = os.fork()
    if not child:
        os.environ.update(case["env"])
        for fd, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(case[name], os.O_WRONLY | os.O_CREAT), fd)
        signal.alarm(60)  # what is not refused would train
        sys.argv = ["dgm_jax/main.py", *case["argv"]]
        try:
            runpy.run_module("dgm_jax.main", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()
        os._exit(code or 0)  # to tidy up would take longer than the case
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


class Case(NamedTuple):
    """Flags, and words that the one line must have. `{dir}` is the case's own directory."""

    argv: tuple[str, ...]
    words: tuple[str, ...]
    prepare: Callable[[Path], None] = lambda path: None
    env: dict[str, str] = {}


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str
    before: dict
    after: dict


def smoke(*flags: str) -> tuple[str, ...]:
    return (f"--config={SMOKE}", "--workdir={dir}/run", *flags)


def tfds(directory: str) -> dict:
    return {"env": {"TFDS_DATA_DIR": directory}}


# Work directories that are there already.


def _claim(path: Path) -> Workdir:
    config = configs.load(SMOKE, {"model.latents": 7})
    workdir = Workdir(path / "run")
    dataset = data.load(configs.section(config, "data"))
    with workdir.claimed(config, dataset.card, dataset.spec.mean):
        workdir.metrics.write_text('{"step": 1}\n')  # training has begun
    return workdir


def _foreign(path: Path) -> None:
    (path / "run").mkdir()
    (path / "run" / "thesis.tex").write_text("years of work")


def _a_file(path: Path) -> None:
    (path / "run").write_text("not a directory")


def _truncated_config(path: Path) -> None:
    config = _claim(path).config
    config.write_bytes(config.read_bytes()[:100])


def _config_of_nothing(path: Path) -> None:
    _claim(path).config.write_text("{}")


def _config_is_a_list(path: Path) -> None:
    _claim(path).config.write_text("[]")


def _other_data(path: Path) -> None:
    card = _claim(path).data_card
    card.write_text(card.read_text().replace("4000", "54000"))


def _truncated_card(path: Path) -> None:
    card = _claim(path).data_card
    card.write_bytes(card.read_bytes()[:100])


def _no_card(path: Path) -> None:
    _claim(path).data_card.unlink()


def _empty_tfds(path: Path) -> None:
    (path / "tfds").mkdir()


def _corrupt_tfds(path: Path) -> None:
    version = path / "tfds" / "mnist" / "3.0.1"
    version.mkdir(parents=True)
    (version / "dataset_info.json").write_text('{"name": "mnist", "vers')
    (version / "features.json").write_text("")


def _not_a_config(path: Path) -> None:
    (path / "notes.txt").write_text("get_config")
    (path / "empty.py").write_text("")


_LATENTS_7 = smoke("--config.model.latents=7")

CASES = {
    # What the flags name.
    "config file": Case(
        ("--config=configs/vae_mnits.py", "--workdir={dir}/run"),
        ("configs/vae_mnits.py", "no such file", "configs/vae_mnist.py"),
    ),
    "config by its name": Case(
        ("--config=vae_mnist", "--workdir={dir}/run"), ("did you mean configs/vae_mnist.py",)
    ),
    "config file in a folder that is not there": Case(
        ("--config=nowhere/x.py", "--workdir={dir}/run"), ("nowhere/x.py", "no such file")
    ),
    "config is a directory": Case(("--config=configs", "--workdir={dir}/run"), ("configs",)),
    "config is no Python file": Case(
        ("--config={dir}/notes.txt", "--workdir={dir}/run"), ("notes.txt",), _not_a_config
    ),
    "config without get_config": Case(
        ("--config={dir}/empty.py", "--workdir={dir}/run"),
        ("empty.py", "get_config"),
        _not_a_config,
    ),
    "variant": Case(
        ("--config=configs/vae_mnist.py:smok", "--workdir={dir}/run"), ("'smok'", "smoke")
    ),
    "variant, flag and value apart": Case(
        ("--config", "configs/vae_mnist.py:smok", "--workdir", "{dir}/run"), ("'smok'", "smoke")
    ),
    "field": Case(smoke("--config.sede=1"), ("'sede'", "nearest: seed")),
    "nested field": Case(
        smoke("--config.model.latent=1"), ("'model.latent'", "nearest: model.latents")
    ),
    "field in another section": Case(smoke("--config.latents=1"), ("'latents'", "model.latents")),
    "field, flag and value apart": Case(
        smoke("--config.model.latent", "1"), ("'model.latent'", "nearest: model.latents")
    ),
    "section": Case(smoke("--config.model=3"), ("'model'", "model.")),
    "model": Case(smoke("--config.model.name=vea"), ("model.name='vea'", "did you mean", "vae")),
    "another model": Case(smoke("--config.model.name=gan"), ("'gan'", "another model", "--config")),
    "mode": Case(smoke("--mode=trian"), ("--mode=trian", "train", "evaluate", "sample")),
    "flag": Case(smoke("--workdri=x"), ("workdri", "workdir")),
    "stray argument": Case(smoke("latents=4"), ("'latents=4'", "--flag=value")),
    "a value of two words": Case(
        smoke("--config.train.duration=10", "epochs"), ("'epochs'", "in quotes", "'10 epochs'")
    ),
    "a field without config": Case(smoke("--model.latents=4"), ("set by --config.model.latents",)),
    "a seed without config": Case(smoke("--seed=4"), ("set by --config.seed",)),
    "nothing": Case((), ("--mode=train", "--workdir", "--config")),
    "a work directory of no name": Case(("--mode=sample", "--workdir="), ("--workdir=", "name")),
    "a flag of other modes": Case(
        ("--mode=plan", f"--config={SMOKE}", "--workdir={dir}/run"), ("--workdir is for", "plan")
    ),
    "no time to be lost": Case(smoke("--lost_after=0"), ("lost_after", "0")),
    "nobody to be lost": Case(smoke("--lost_after=9"), ("--lost_after", "--distributed")),
    "no config": Case(("--workdir={dir}/run",), ("--config=configs/vae_mnist.py",)),
    "no config but a field": Case(
        ("--workdir={dir}/run", "--config.model.latents=3"), ("config.model.latents", "--config")
    ),
    "evaluate with a field of the model": Case(
        ("--mode=evaluate", "--workdir={dir}/run", "--config.model.latents=3"),
        ("{dir}/run", "model.latents was 7, is 3", "free to differ: eval, data.path"),
        _claim,
    ),
    "evaluate with a field, nowhere": Case(
        ("--mode=evaluate", "--workdir={dir}/run", "--config.eval.chunk=3"),
        ("{dir}/run", "not a work directory"),
    ),
    "longer than it was": Case(
        (*_LATENTS_7, "--config.train.duration=9 steps"),
        ("train.duration was 200 steps, is 9 steps", "--config.train.init_from={dir}/run"),
        _claim,
    ),
    "a directory that cannot be": Case(
        (f"--config={SMOKE}", "--workdir=/proc/nowhere"), ("/proc/nowhere", "choose another")
    ),
    "evaluate nothing": Case(("--mode=evaluate",), ("--mode=evaluate", "--workdir")),
    "a judge of training": Case(smoke("--judge=x"), ("--judge", "--mode=quality", "--mode=train")),
    "a number of evaluation": Case(
        ("--mode=evaluate", "--num=3", "--workdir={dir}/run"),
        ("--num", "sample", "--mode=evaluate"),
    ),
    "class three": Case(
        ("--mode=sample", "--classes=three", "--workdir={dir}/run"), ("--classes=three", "whole")
    ),
    "classes of training": Case(smoke("--classes=3"), ("--classes", "sample", "--mode=train")),
    "samples by two processes": Case(
        ("--mode=sample", "--distributed=auto", "--workdir={dir}/run"), ("--distributed", "sample")
    ),
    "sample seed -1": Case(
        ("--mode=sample", "--sample_seed=-1", "--workdir={dir}/run"), ("sample_seed", "-1")
    ),
    "evaluate by another config": Case(
        smoke("--mode=evaluate"), ("{dir}/run", "model.latents was 7", "leave out"), _claim
    ),
    # Types.
    "int 3.5": Case(smoke("--config.model.latents=3.5"), ("config.model.latents", "'3.5'", "int")),
    "int abc": Case(smoke("--config.model.latents=abc"), ("config.model.latents", "'abc'", "int")),
    "float abc": Case(smoke("--config.model.beta=abc"), ("config.model.beta", "'abc'", "float")),
    "num abc": Case(("--mode=sample", "--num=abc", "--workdir={dir}/run"), ("--num", "'abc'")),
    "widths abc": Case(smoke("--config.model.encoder=abc"), ("model.encoder", "abc")),
    "widths 3.5": Case(smoke("--config.model.encoder=3.5"), ("model.encoder", "3.5")),
    "widths 32,abc": Case(smoke("--config.model.encoder=32,abc"), ("model.encoder", "abc")),
    # Values; the others are tried from Python, below.
    "negative beta": Case(smoke("--config.model.beta=-0.5"), ("model.beta=-0.5", "at least 0")),
    "batch on eight devices": Case(
        smoke("--config.train.batch_size=100"),
        ("train.batch_size=100", "8 device", "96 or 104"),
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    ),
    "duration": Case(
        smoke("--config.train.duration=3 weeks"), ("train.duration='3 weeks'", "100 epochs")
    ),
    "seed too large": Case(smoke(f"--config.seed={2**40}"), ("seed", str(2**40))),
    "num 0": Case(
        ("--mode=sample", "--num=0", "--workdir={dir}/run"), ("--num=0", "at least one"), _claim
    ),
    # Data.
    "no TFDS directory": Case(
        smoke("--config.data.source=tfds"), ("TFDS_DATA_DIR", "{dir}/tfds"), **tfds("{dir}/tfds")
    ),
    "no TFDS directory, though others would do": Case(
        smoke("--config.data.source=auto"), ("TFDS_DATA_DIR", "{dir}/tfds"), **tfds("{dir}/tfds")
    ),
    "empty TFDS directory": Case(
        smoke("--config.data.source=tfds"),
        ("tfds", "{dir}/tfds"),
        _empty_tfds,
        **tfds("{dir}/tfds"),
    ),
    "corrupt TFDS directory": Case(
        smoke("--config.data.source=tfds"),
        ("damaged", "{dir}/tfds/mnist/3.0.1"),
        _corrupt_tfds,
        **tfds("{dir}/tfds"),
    ),
    # Work directories.
    "another config": Case(
        smoke("--config.model.latents=9", "--config.train.batch_size=50"),
        ("{dir}/run", "model.latents was 7, is 9", "train.batch_size was", "--workdir"),
        _claim,
    ),
    "foreign directory": Case(smoke(), ("{dir}/run", "not empty", "--workdir"), _foreign),
    "work directory is a file": Case(smoke(), ("{dir}/run", "--workdir"), _a_file),
    "work directory below a file": Case(
        (f"--config={SMOKE}", "--workdir={dir}/run/deeper/still"),
        ("{dir}/run", "--workdir"),
        _a_file,
    ),
    "truncated config.json": Case(_LATENTS_7, ("config.json", "damaged"), _truncated_config),
    "config.json of nothing": Case(_LATENTS_7, ("{dir}/run", "config"), _config_of_nothing),
    "config.json is a list": Case(_LATENTS_7, ("config.json",), _config_is_a_list),
    "other data": Case(
        _LATENTS_7, ("{dir}/run", "other data", "54000", "4000", "--workdir"), _other_data
    ),
    "truncated data card": Case(_LATENTS_7, ("data_card.json", "damaged"), _truncated_card),
    # Evaluate and sample with nothing trained.
    **{
        f"{mode}: {name}": Case((f"--mode={mode}", "--workdir={dir}/run"), words, prepare)
        for mode in ("evaluate", "sample")
        for name, words, prepare in (
            ("no work directory", ("{dir}/run", "train"), lambda path: None),
            ("foreign directory", ("{dir}/run", "not a work directory"), _foreign),
            ("a file", ("{dir}/run",), _a_file),
            ("no checkpoint", ("{dir}/run", "no checkpoint", "train first"), _claim),
            ("truncated config.json", ("config.json", "damaged"), _truncated_config),
            ("config.json of nothing", ("config.json",), _config_of_nothing),
            ("no data card", ("data_card.json", "train"), _no_card),
        )
    },
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Outcome]:
    """All cases, run one after the other by one driver."""
    # A warm cache: images read for the first time take seconds.
    data.load(configs.section(configs.load(SMOKE), "data"))
    folders = [tmp_path_factory.mktemp("case") for _ in CASES]
    orders, before = [], []
    for folder, case in zip(folders, CASES.values(), strict=True):
        (folder / "inside").mkdir()
        case.prepare(folder / "inside")
        before.append(_contents(folder / "inside"))
        here = str(folder / "inside")
        orders.append(
            {
                "argv": [word.replace("{dir}", here) for word in case.argv],
                "env": {name: value.replace("{dir}", here) for name, value in case.env.items()},
                "stdout": str(folder / "stdout"),
                "stderr": str(folder / "stderr"),
            }
        )
    driver = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        cwd=REPO,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        input=json.dumps(orders),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert driver.returncode == 0, driver.stderr
    return {
        name: Outcome(
            code,
            (folder / "stdout").read_text(),
            (folder / "stderr").read_text().replace(str(folder / "inside"), "{dir}"),
            there,
            _contents(folder / "inside"),
        )
        for name, code, folder, there in zip(
            CASES, json.loads(driver.stdout), folders, before, strict=True
        )
    }


def _contents(path: Path) -> dict[str, tuple[int, bytes] | None]:
    """Every file with its time and bytes, every directory."""
    return {
        str(p.relative_to(path)): (p.stat().st_mtime_ns, p.read_bytes()) if p.is_file() else None
        for p in path.rglob("*")
    }


def _bytes(path: Path) -> dict[str, bytes | None]:
    return {name: found and found[1] for name, found in _contents(path).items()}


@pytest.mark.parametrize("name", CASES)
def test_refused_in_one_line_with_nothing_written(outcomes, name):
    outcome = outcomes[name]
    assert outcome.code == 1, outcome.stdout + outcome.stderr
    assert outcome.stderr.startswith("error: "), outcome.stderr[-2000:]
    assert outcome.stderr.count("\n") == 1 and outcome.stderr.endswith("\n"), outcome.stderr
    for word in CASES[name].words:
        assert word in outcome.stderr
    # What a slow step is about may be said before it fails; nothing else.
    assert all(line.startswith("reading ") for line in outcome.stdout.splitlines())
    assert outcome.after == outcome.before


# The same from Python.


@pytest.mark.parametrize(
    ("path", "values", "words"),
    [
        ("configs/vae_mnits.py", {}, ("configs/vae_mnits.py", "no such file")),
        ("configs/vae_mnist.py:big", {}, ("'big'", "smoke")),
        (SMOKE, {"sede": 1}, ("'sede'", "nearest: seed")),
        (SMOKE, {"model.latent": 1}, ("'model.latent'", "nearest: model.latents")),
        (SMOKE, {"model.latents": 3.5}, ("model.latents=3.5", "int")),
        (SMOKE, {"model.latents": "abc"}, ("model.latents='abc'", "int")),
        (SMOKE, {"model.encoder": 32}, ("model.encoder=32", "tuple")),
        (SMOKE, {"train.duration": 100}, ("train.duration=100", "str")),
    ],
)
def test_load_refuses(monkeypatch, path, values, words):
    monkeypatch.chdir(REPO)
    with pytest.raises(UserError) as refused:
        configs.load(path, values)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_configs_are_locked():
    config = configs.load(str(REPO / SMOKE))
    with pytest.raises(AttributeError, match="latents"):
        config.model.latnets = 3
    with pytest.raises(TypeError, match="latents"):
        config.model.latents = "three"
    # What loses nothing is taken: an int where a float is expected.
    assert configs.override(config, {"model.beta": 2}).model.beta == 2


def test_override_leaves_its_argument_alone():
    config = configs.load(str(REPO / SMOKE))
    before = config.to_json()
    configs.override(config, {"model.latents": 3})
    assert config.to_json() == before


VALUES = {
    "model.name='vea'": ("did you mean", "vae"),
    "model.latents=0": ("at least 1",),
    "model.latents=-3": ("at least 1",),
    "model.beta=-1.0": ("at least 0",),
    "model.beta=nan": ("at least 0",),
    "model.encoder=(32, -4)": ("at least 1",),
    "model.decoder=(0,)": ("at least 1",),
    "model.decoder=()": ("at least 1",),
    "model.activation='selu'": ("silu", "relu"),
    "train.batch_size=4008": ("larger", "4,000"),
    "train.batch_size=0": ("8 or 16",),
    "train.batch_size=-8": ("8 or 16",),
    "train.batch_size=100": ("8 device", "96 or 104"),
    "train.steps_per_dispatch=0": ("at least 1",),
    "train.duration='20000001 steps'": ("train.steps_per_dispatch", "at least 201"),
    "train.ramp='model.latents over 3 steps'": ("train.ramp", "real number"),
    "train.ramp='model.beat over 3 steps'": ("train.ramp", "real number"),
    "train.ramp='seed over 3 steps'": ("train.ramp", "real number"),
    "train.ramp='model.beta over 3 weeks'": ("train.ramp", "100 epochs"),
    "train.ramp='model.beta'": ("train.ramp", "100 epochs"),
    "train.ramp='model.beta from x over 3 steps'": ("train.ramp", "from where"),
    "train.ramp='model.beta from inf over 3 steps'": ("train.ramp", "from where"),
    "train.ramp='model.beta over 3 steps,model.beta over 4 steps'": ("twice",),
    "train.duration='100'": ("train.duration", "100 epochs"),
    "train.duration=''": ("train.duration", "100 epochs"),
    "train.duration='-3 epochs'": ("train.duration", "100 epochs"),
    "train.duration='0 steps'": ("train.duration", "100 epochs"),
    "train.duration='nan steps'": ("train.duration", "100 epochs"),
    "train.duration='inf epochs'": ("train.duration", "100 epochs"),
    "train.validate_every='often'": ("100 epochs",),
    "train.checkpoint_every='0 steps'": ("100 epochs",),
    "train.checkpoint_minutes=-1.0": ("at least 0",),
    "optimizer.name='sgd'": ("adamw, muon",),
    "optimizer.learning_rate=-0.001": ("at least 0",),
    "optimizer.learning_rate=nan": ("at least 0",),
    "optimizer.clip_norm=0.0": ("above 0",),
    "optimizer.warmup=1.5": ("below 1",),
    "optimizer.ema=1.0": ("below 1",),
    "eval.num_samples=0": ("at least 1",),
    "eval.chunk=0": ("at least 1",),
    "eval.ais_temperatures=0": ("at least 1",),
    "eval.ais_chains=0": ("at least 1",),
    "data.binarisation='statc'": ("dynamic", "fixed", "none"),
    "data.binarisation='none'": ("bernoulli", "binary", "'dynamic'"),
    "model.objective='iwea'": ("iwae", "elbo"),
    "model.num_samples=0": ("at least 1",),
    "model.prior='vampp'": ("vamp",),
    "model.components=0": ("at least 1",),
    "model.posterior='diag'": ("diagonal",),
    "model.likelihood='categorical'": ("uint8", "'none'"),
    "data.validation=4500": ("4499",),
    "data.validation=-1": ("between 0",),
    "data.labelled=15": ("multiple of the 10 classes",),
    "data.labelled_share=0.5": ("set data.labelled",),
    "data.seed=-1": (),
    "data.path='book.txt'": ("data.dataset='mnist'", "'text'"),
    "data.dataset='mnits'": ("mnist", "shapes", "cifar10"),
    "data.dataset='shapes'": ("embedded", "'auto'"),
    "data.source='tdfs'": ("auto", "tfds", "download", "embedded"),
}


@pytest.mark.parametrize("value", VALUES)
def test_a_value_that_makes_no_sense(tmp_path, capsys, value):
    """On eight devices."""
    field, _, text = value.partition("=")
    config = configs.load(str(REPO / SMOKE), {"train.batch_size": 40, "eval.batch_size": 40})
    config = configs.override(config, {field: eval(text, {"nan": math.nan})})
    with pytest.raises(UserError) as refused:
        run.train_mode(config, Workdir(tmp_path / "run"))
    message = str(refused.value)
    assert "\n" not in message
    for word in (*field.split("."), text, *VALUES[value]):
        assert word in message
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_a_ramp_of_what_cannot_be_zero(tmp_path):
    ramp = {"train.ramp": "model.temperature over 3 steps", "train.batch_size": 40}
    config = configs.override(configs.experiment("discrete_vae"), ramp)
    words = r"train\.ramp: model\.temperature would go from 0, but model\.temperature=0\.0"
    with pytest.raises(UserError, match=words):
        run.train_mode(config, Workdir(tmp_path / "run"))


@pytest.mark.parametrize("there", ["nothing", "an empty directory", "a claimed one"])
def test_a_directory_that_is_not_writable(tmp_path, monkeypatch, there):
    """Permissions do not bind root, so that the answer of the system is replaced."""
    monkeypatch.chdir(REPO)
    config = configs.load(SMOKE, {"model.latents": 7})
    workdir = Workdir(tmp_path / "run")
    if there == "an empty directory":
        workdir.path.mkdir()
    elif there == "a claimed one":
        workdir = _claim(tmp_path)
    before = _contents(tmp_path)
    access = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode, **rest: (
            not (mode & os.W_OK and Path(path).is_relative_to(tmp_path))
            and access(path, mode, **rest)
        ),
    )
    with pytest.raises(UserError, match=r"not writable.*--workdir"):
        run.train_mode(config, workdir)
    assert _contents(tmp_path) == before


def test_what_could_not_be_written_is_not_computed(unfinished, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr(run, "evaluate", lambda *args: pytest.fail("it was computed"))
    with pytest.raises(UserError, match=r"not writable.*--workdir"):
        run.evaluate_mode(Workdir(unfinished))


def test_a_given_config_may_evaluate_in_another_way_and_no_more(unfinished):
    run.evaluate_mode(Workdir(unfinished), _tiny(**{"eval.num_samples": 3}))
    found = _read(unfinished / "evaluation.json")
    assert found["metrics"]["importance_weighted_bound"]["num_samples"] == 3
    assert found["config"]["eval"]["num_samples"] == 3
    with pytest.raises(UserError, match=r"another config .seed was 0, is 1"):
        run.evaluate_mode(Workdir(unfinished), _tiny(seed=1))


def test_what_is_given_and_wrong_does_not_damage_the_run(tmp_path):
    """Nobody need train again."""
    workdir, dataset = Workdir(tmp_path), tiny.accepted_by(models.defaults("mean_flow"))
    with workdir.claimed(configs.experiment("mean_flow"), dataset.card, dataset.spec.mean):
        pass
    with pytest.raises(UserError, match=r"^model\.sample_steps=0: must be at least 1$"):
        trained_model.restore(tmp_path, {"model.sample_steps": 0})


def test_a_given_config_may_draw_in_another_way_and_no_more(tmp_path):
    workdir, trained = Workdir(tmp_path), configs.experiment("mean_flow")
    workdir.config.write_text(configs.to_json(trained))
    faster = configs.override(trained, {"model.sample_steps": 4})
    assert workdir.load_config(faster).model.sample_steps == 4
    other = configs.override(faster, {"model.sigma_data": 0.7})
    with pytest.raises(UserError, match=r"sigma_data was 0\.5, is 0\.7.*free.*model\.sample_steps"):
        workdir.load_config(other)


def test_a_folder_in_which_nothing_was_trained_is_nobodys(trained, tmp_path):
    """A wrong value that is found late is put right by the same command."""
    wrong, workdir = _tiny(**{"train.init_from": str(tmp_path / "none")}), Workdir(tmp_path / "run")
    with pytest.raises(UserError, match="none is not a work directory"):
        run.train_mode(wrong, workdir)
    assert workdir.config.exists()
    run.train_mode(_tiny(**{"train.init_from": str(trained)}), workdir)
    assert workdir.load_config().train.init_from == str(trained)
    with pytest.raises(UserError, match=r"another config .train\.init_from"):
        run.train_mode(wrong, workdir)


def test_a_first_save_that_was_cut_short_does_not_lose_where_training_starts(trained, tmp_path):
    config = _tiny(**{"train.init_from": str(trained), "optimizer.learning_rate": 1e-30, "seed": 1})
    workdir, dataset = Workdir(tmp_path / "run"), data.load(configs.section(config, "data"))
    with workdir.claimed(config, dataset.card, dataset.spec.mean):
        (workdir.checkpoints / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    run.train_mode(config, workdir)
    params = [trained_model.restore(path).params for path in (workdir.path, trained)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), *params)


# Damaged checkpoints, and losses that are not finite: one device, tiny networks, few steps.

TINY = {
    "model.encoder": (8,),
    "model.decoder": (8,),
    "model.latents": 2,
    "model.prior": "standard",
    "model.objective": "elbo",
    "train.batch_size": 40,
    "train.duration": "8 steps",
    "train.steps_per_dispatch": 2,
    "train.checkpoint_every": "2 steps",
    "train.validate_every": "4 steps",
    "eval.batch_size": 250,
    "eval.num_samples": 2,
    "eval.elbo_samples": 1,
    "eval.chunk": 2,
    "eval.aggregate_examples": 0,
}
TIMING = {"seconds", "cpu_seconds", "examples_per_second"}


@pytest.fixture(scope="module")
def quick(programs_kept):
    """One device and no pictures."""
    with on_one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_draw_pictures", lambda *args: None)
        yield


def _tiny(**values) -> configs.ConfigDict:
    return configs.load(str(REPO / SMOKE), TINY | values)


@pytest.fixture(scope="module")
def trained(quick, tmp_path_factory) -> Path:
    """A finished run with checkpoints of steps 6 and 8."""
    path = tmp_path_factory.mktemp("trained") / "run"
    run.train_mode(_tiny(), Workdir(path))
    assert _steps(path) == [6, 8]
    return path


@pytest.fixture
def unfinished(trained, tmp_path) -> Iterator[Path]:
    """The same as if it had been interrupted after its last checkpoint."""
    path = tmp_path / "run"
    shutil.copytree(trained, path)
    (path / "results.json").unlink()
    yield path
    gc.collect()


def _steps(path: Path) -> list[int]:
    return sorted(int(p.name) for p in (path / "checkpoints").iterdir())


def _rows(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{n: value for n, value in row.items() if n not in TIMING} for row in rows]


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def _restore_all(path: Path) -> tuple[object, list[str]]:
    """The newest whole train state, and what was said."""
    said: list[str] = []
    config, card = _tiny(), _read(path / "data_card.json")
    spec = DataSpec(tuple(card["event_shape"]), card["support"], np.full((28, 28, 1), 0.5))
    optimizer = optim.build(configs.section(config, "optimizer"), num_steps=1)
    model = models.build(config.model, spec)
    shapes = abstract_state(config, model, optimizer, spec, sharding.make_mesh())
    checkpoints = Checkpoints(path / "checkpoints")
    try:
        return checkpoints.restore(shapes, said.append), said
    finally:
        checkpoints.close()


def _largest(step: Path) -> Path:
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


DAMAGES = {"truncated": _truncate, "flipped": _flip, "deleted": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_training_falls_back_to_the_checkpoint_before(trained, unfinished, damage, capsys):
    newest = unfinished / "checkpoints" / "8"
    DAMAGES[damage](_largest(newest))
    damaged = _bytes(newest)
    run.train_mode(_tiny(), Workdir(unfinished))
    printed = capsys.readouterr().out
    (warning,) = (line for line in printed.splitlines() if "WARNING" in line)
    assert "step 8" in warning and "damaged" in warning and "falling back" in warning
    assert "from the checkpoint of step 6" in printed
    # The same end as if nothing had happened.
    metrics = _read(trained / "results.json")["metrics"]
    assert _read(unfinished / "results.json")["metrics"] == metrics
    assert _rows(unfinished) == _rows(trained)
    assert _steps(unfinished) == [6, 8]
    (ours, said), (theirs, _) = _restore_all(unfinished), _restore_all(trained)
    assert said == []
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    # Aside, not gone.
    assert _bytes(unfinished / "damaged_checkpoints" / "8") == damaged


@pytest.mark.parametrize("name", ["metrics", "commit_timestamp_nsecs"])
def test_a_checkpoint_that_says_nonsense_of_itself_is_passed_over(trained, unfinished, name):
    """It is of another type. Who only reads moves nothing."""
    for step in (8, 6):
        about = unfinished / "checkpoints" / f"{step}" / "_CHECKPOINT_METADATA"
        about.write_text(json.dumps({**_read(about), name: "damaged"}))
        if step == 8:
            restored, said = _restore_all(unfinished)
            assert int(restored.step) == 6
            assert len(said) == 1 and "step 8" in said[0] and "damaged" in said[0]
    with pytest.raises(UserError, match="every checkpoint"):
        _restore_all(unfinished)
    assert _steps(unfinished) == [6, 8] and not (unfinished / "damaged_checkpoints").exists()


def test_checkpoints_of_somebody_else_are_not_called_damaged(unfinished, monkeypatch):
    own = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "checkpoints/8" not in f"{path}" and own(path, mode)
    )
    with pytest.raises(UserError, match=r"checkpoints/8 may not be read by this user"):
        _restore_all(unfinished)


def test_a_checkpoint_that_has_no_room_here_is_not_called_damaged(unfinished, monkeypatch):
    def restore(self, *args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    with pytest.raises(MemoryError):
        _restore_all(unfinished)


def test_checkpoints_that_a_run_replaces_meanwhile_are_looked_for_again(unfinished, monkeypatch):
    read, folder = Checkpoints._read, unfinished / "checkpoints"

    def replaced(self, step, like):
        if step == 8 and (folder / "8").exists():
            shutil.move(folder / "8", folder / "9")
            shutil.rmtree(folder / "6")
        return read(self, step, like)

    monkeypatch.setattr(Checkpoints, "_read", replaced)
    restored, _ = _restore_all(unfinished)
    assert int(restored.step) == 8 and _steps(unfinished) == [9]


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path):
    def fail(file):
        file.write(b"the first half")
        raise OSError(errno.ENOSPC, "no room")

    (tmp_path / "x.json").write_text("before")
    before = _contents(tmp_path)
    with pytest.raises(OSError, match="no room"):
        write(tmp_path / "x.json", fail)
    assert _contents(tmp_path) == before


def test_without_any_checkpoint_it_starts_again(trained, unfinished):
    """As after an end before the first checkpoint; the rows written until then come once."""
    shutil.rmtree(unfinished / "checkpoints")
    run.train_mode(_tiny(), Workdir(unfinished))
    assert _rows(unfinished) == _rows(trained)
    metrics = _read(trained / "results.json")["metrics"]
    assert _read(unfinished / "results.json")["metrics"] == metrics


def test_any_damage_to_any_file_is_noticed_or_does_no_harm(trained, tmp_path):
    """Every file of the newest checkpoint in turn: what is restored is exactly 8, or 6."""
    shutil.copytree(trained, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "8"
    good, _ = _restore_all(trained)
    shutil.move(newest, tmp_path / "whole")
    before, _ = _restore_all(tmp_path / "run")
    assert (int(good.step), int(before.step)) == (8, 6)
    names = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*"))
    for name in (name for name in names if (tmp_path / "whole" / name).is_file()):
        for damage in ("flipped", "deleted"):
            shutil.copytree(tmp_path / "whole", newest)
            DAMAGES[damage](newest / name)
            restored, said = _restore_all(tmp_path / "run")
            expected = good if int(restored.step) == 8 else before
            jax.tree.map(np.testing.assert_array_equal, restored, expected)
            assert bool(said) == (int(restored.step) == 6), f"silent: {name} {damage}"
            shutil.rmtree(newest)
    gc.collect()


def test_the_same_step_damaged_again_and_again_is_kept_each_time(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "8"
    for _ in range(3):
        if not newest.exists():
            shutil.copytree(trained / "checkpoints" / "8", newest)
        checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
        checkpoints.tidy(6)
        checkpoints.close()
        assert not newest.exists()
    kept = list((tmp_path / "run" / "damaged_checkpoints").rglob("_CHECKPOINT_METADATA"))
    assert len(kept) == 3


def test_evaluate_falls_back_and_leaves_the_checkpoints_alone(trained, unfinished, capsys):
    _flip(_largest(unfinished / "checkpoints" / "8"))
    before = _contents(unfinished)
    run.evaluate_mode(Workdir(unfinished))
    assert "WARNING: the checkpoint of step 8 is damaged" in capsys.readouterr().out
    assert _read(unfinished / "evaluation.json")["step"] == 6
    after = _contents(unfinished)
    del after["evaluation.json"], after["evaluation.npz"]
    assert after == before


def test_all_checkpoints_damaged(unfinished):
    for step in (6, 8):
        _truncate(_largest(unfinished / "checkpoints" / str(step)))
    before = _bytes(unfinished)
    for attempt in (
        lambda: run.train_mode(_tiny(), Workdir(unfinished)),
        lambda: run.evaluate_mode(Workdir(unfinished)),
        lambda: run.sample_mode(Workdir(unfinished), 1, 0),
    ):
        with pytest.raises(UserError, match=r"every checkpoint .* is damaged .*6.*move"):
            attempt()
        assert _bytes(unfinished) == before


def _explode_at(monkeypatch, step: int, rate: float) -> None:
    """Make the learning rate of update number `step` (from 1) absurd."""
    monkeypatch.setattr(
        optim,
        "schedule",
        lambda config, num_steps: lambda count: jnp.where(count == step - 1, rate, 1e-3),
    )


def _assert_last_good_checkpoint_stays(path: Path, last: int) -> None:
    restored = trained_model.restore(path)
    assert restored.step == last
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.params))
    rows = _rows(path)
    assert rows
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert not (path / "results.json").exists()


def test_a_loss_that_is_not_finite(quick, tmp_path, monkeypatch):
    """Update 5 explodes: the loss of step 6 is the first that is not finite."""
    _explode_at(monkeypatch, 5, 1e30)
    path = tmp_path / "run"
    with pytest.raises(UserError) as refused:
        run.train_mode(_tiny(), Workdir(path))
    message = str(refused.value)
    assert "vae/loss" in message and "not finite" in message and "step 6" in message
    assert "optimizer.learning_rate" in message
    assert "\n" not in message
    _assert_last_good_checkpoint_stays(path, 4)
    # Again: the same, from the last good checkpoint, which is still there.
    with pytest.raises(UserError, match="step 6"):
        run.train_mode(_tiny(), Workdir(path))
    _assert_last_good_checkpoint_stays(path, 4)
    assert _read(path / "replay.json")["step"] == 6


def test_a_loss_that_is_not_finite_in_validation(quick, tmp_path, monkeypatch):
    """The last update before a validation explodes; the error names step and term all the same."""
    _explode_at(monkeypatch, 4, 1e30)
    path = tmp_path / "run"
    with pytest.raises(UserError) as refused:
        run.train_mode(_tiny(), Workdir(path))
    message = str(refused.value)
    assert "distortion" in message and "not finite" in message
    assert "step 4" in message and "validation" in message
    _assert_last_good_checkpoint_stays(path, 2)


def test_no_checkpoint_of_parameters_that_are_not_finite(quick, tmp_path, monkeypatch):
    """Update 6, the last before a checkpoint, ends in infinity, while its loss was finite."""
    _explode_at(monkeypatch, 6, math.inf)
    path = tmp_path / "run"
    with pytest.raises(UserError, match="not finite"):
        run.train_mode(_tiny(), Workdir(path))
    assert _steps(path)[-1] == 4
    restored = trained_model.restore(path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.params))
