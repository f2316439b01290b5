"""What every model and every config must keep; both are found, not listed."""

import ast
import dataclasses
import functools
import json
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import REPO, on_one_device

from dgm_jax import config as configs
from dgm_jax import models, run, sharding, writers
from dgm_jax.core import Batch, DataSpec, Model, Params, UserError
from dgm_jax.data import dataset as data
from dgm_jax.data import image_sets, shapes, text
from dgm_jax.data.sources import LabelledArrays
from dgm_jax.evaluators import likelihood
from dgm_jax.experiment import abstract_state, prepare
from dgm_jax.train_step import init_state
from dgm_jax.workdir import Workdir

CONFIGS = sorted(REPO.glob("configs/*.py"))
BATCH = 8
# What is said here holds of any number of layers, and each takes its time to compile.
FEWER = {"depth": 1, "prior_depth": 1, "dilations": (1, 2), "steps": (2,)}
FEWER |= {"sample_steps": 2}  # one step of a fresh mean flow draws nothing but the mean


# By model, so that the tests of one follow one another and share what it compiles.
@pytest.fixture(params=models.names(), scope="module")
def fields(request):
    """The default fields of a model, with fewer layers."""
    return _fewer(models.defaults(request.param))


def _fewer(fields):
    return fields | {n: few for n, few in FEWER.items() if isinstance(fields.get(n), type(few))}


@pytest.fixture(scope="module")
def dataset(fields):
    """What the model accepts of the tiny data."""
    return tiny.accepted_by(fields)


class Case(NamedTuple):
    """A model, its parameters and a batch; and of each player, by name, the loss and its slopes.

    `loss_and_grads[name](params, batch, rng) -> ((loss, aux), grads)`.
    """

    model: Model
    params: Params
    batch: Batch
    loss_and_grads: dict[str, Callable]


@pytest.fixture(scope="module")
def case(fields, dataset):
    """Compiled once for all tests of the model."""
    model = models.build(fields, dataset.spec)
    batch = data.some(dataset, "test", BATCH)
    return Case(
        model,
        jax.jit(model.init)(jax.random.key(0), batch),
        batch,
        {p.name: jax.jit(jax.value_and_grad(p.loss_fn, has_aux=True)) for p in model.players},
    )


@pytest.mark.parametrize(
    ("name", "values"),
    [*((name, {}) for name in models.names()), ("vae", {"model.conditional": True})],
)
def test_a_state_is_restored_without_data(name, values):
    """Its shapes are those of the state that training starts from."""
    config = configs.override(configs.experiment(name), {"train.batch_size": BATCH, **values})
    dataset = tiny.accepted_by(config.model)
    made = prepare(config, dataset)
    batch = data.some(dataset, "train", BATCH)
    start = jax.eval_shape(lambda b: init_state(made.model, made.optimizer, 0, b, True), batch)
    known = abstract_state(config, made.model, made.optimizer, dataset.spec, made.mesh)
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), state) for state in (start, known)]
    assert shapes[0] == shapes[1]


def test_loss_is_a_float32_scalar_of_finite_per_example_terms(case):
    for loss_and_grads in case.loss_and_grads.values():
        (loss, aux), _ = loss_and_grads(case.params, case.batch, jax.random.key(1))
        assert loss.shape == () and loss.dtype == jnp.float32 and np.isfinite(loss)
        for term in aux.terms.values():
            assert term.shape == (BATCH,) and term.dtype == jnp.float32
            assert np.isfinite(term).all()


def test_held_out_terms_are_the_losses_where_it_withholds_nothing(case):
    """As by default, without labels."""
    inputs = case.params, case.batch, jax.random.key(1)
    for player in case.model.players:
        if player.terms_fn is None:
            continue
        terms = jax.jit(player.terms)(*inputs)
        (_, aux), _ = case.loss_and_grads[player.name](*inputs)
        assert terms.keys() == aux.terms.keys()
        for name, term in terms.items():
            assert term.shape == (BATCH,) and term.dtype == jnp.float32
            np.testing.assert_allclose(term, aux.terms[name], rtol=1e-5, atol=1e-5)


def test_every_trained_parameter_gets_a_gradient(case):
    """Away from the start, where zero weights may hold the gradient of others back."""
    leaves, structure = jax.tree.flatten(case.params)
    rng = np.random.default_rng(2)
    moved = [p + np.float32(0.1) * rng.normal(size=p.shape).astype(np.float32) for p in leaves]
    params = jax.tree.unflatten(structure, moved)
    for name, loss_and_grads in case.loss_and_grads.items():
        _, grads = loss_and_grads(params, case.batch, jax.random.key(1))
        for path, slope in jax.tree_util.tree_leaves_with_path(grads[name]):
            assert 0 < np.linalg.norm(slope) < np.inf, jax.tree_util.keystr(path)


def test_masked_rows_do_not_count(case, dataset):
    """Whatever stands in a padded row, the loss is that of the real rows."""
    x, mask = np.asarray(case.batch["x"]), np.arange(BATCH) < 5
    largest = max(dataset.spec.num_values - 1, 1)
    mask_of_x = mask.reshape(-1, *[1] * (x.ndim - 1))
    junk = np.where(mask_of_x, x, (largest - x).astype(x.dtype))
    for loss_and_grads in case.loss_and_grads.values():
        results = [
            loss_and_grads(case.params, {**case.batch, "x": x, "mask": mask}, jax.random.key(1))
            for x in (x, junk)
        ]
        np.testing.assert_allclose(results[0][0][0], results[1][0][0], rtol=1e-6)


def test_no_key_is_used_twice(case):
    """JAX looks for it where a function is traced."""
    with jax.debug_key_reuse(True):
        for player in case.model.players:
            jax.jit(player.loss_fn).trace(case.params, case.batch, jax.random.key(1))


def test_loss_fn_runs_unchanged_under_pmap(case, dataset):
    """Each device's loss is that of its rows, and the mean of the gradients is the gradient."""
    batch = data.some(dataset, "train", 4 * BATCH)
    shards = jax.tree.map(lambda a: np.asarray(a).reshape(4, BATCH, *a.shape[1:]), batch)
    keys = jax.random.split(jax.random.key(1), 4)
    for player in case.model.players:

        def loss_and_grads(params, shard, key, fn=player.loss_fn):
            (loss, _), grads = jax.value_and_grad(fn, has_aux=True)(params, shard, key)
            return loss, jax.lax.pmean(grads, "data")

        losses, grads = jax.pmap(loss_and_grads, axis_name="data", in_axes=(None, 0, 0))(
            case.params, shards, keys
        )
        each = [
            case.loss_and_grads[player.name](
                case.params, jax.tree.map(lambda a, i=i: a[i], shards), keys[i]
            )
            for i in range(4)
        ]
        np.testing.assert_allclose(losses, [loss for (loss, _), _ in each], rtol=1e-5)
        expected = jax.tree.map(lambda *g: np.mean(g, axis=0), *(g for _, g in each))
        jax.tree.map(
            lambda g, e: np.testing.assert_allclose(g[0], e, rtol=1e-4, atol=1e-5), grads, expected
        )


def test_numbers_in_the_config_may_be_traced(case, fields, dataset):
    numbers = {k: v for k, v in fields.items() if isinstance(v, float)}
    rng = jax.random.key(1)

    @jax.jit
    def losses(numbers, params, batch):
        rebuilt = models.build({**fields, **numbers}, dataset.spec)
        return [p.loss_fn(params, batch, rng)[0] for p in rebuilt.players]

    concrete = [fn(case.params, case.batch, rng)[0][0] for fn in case.loss_and_grads.values()]
    found = losses(numbers, case.params, case.batch)
    np.testing.assert_allclose(found, concrete, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in models.names() if models.of_trained(name)])
def test_no_loss_depends_on_the_fields_of_a_trained_model(name):
    """Samples alone, or likelihoods alone; they may therefore be others once a model is trained."""
    fields = models.defaults(name)
    words = {"sampler": "ddim", "solver": "euler", "divergence": "exact"}
    if "guidance" in models.of_sampling(name):  # which needs the class
        fields["conditional"] = True
    dataset = tiny.accepted_by(fields)
    batch, rng = data.some(dataset, "test", BATCH), jax.random.key(1)

    def programs(**others):
        model = models.build(fields | others, dataset.spec)
        params = jax.eval_shape(model.init, rng, batch)

        def texts(fns):
            return [str(jax.make_jaxpr(fn)(params, batch, rng)) for fn in fns]

        losses, known = (p.loss_fn for p in model.players), model.log_likelihood_fns.values()
        drawn = str(jax.make_jaxpr(model.sample, static_argnums=2)(params, rng, 2))
        return {"losses": texts(losses), "likelihoods": texts(known), "samples": drawn}

    usual = programs()
    for field in models.of_trained(name):
        other = programs(**{field: words.get(field) or 2 * fields[field] + 1})
        changed = "samples" if field in models.of_sampling(name) else "likelihoods"
        assert [part for part in usual if usual[part] != other[part]] == [changed], field


def test_functions_return_what_they_promise(case, dataset):
    model, params, batch, _ = case
    rng, event = jax.random.key(2), dataset.spec.event_shape
    for fn in (*model.log_likelihood_fns.values(), model.log_weight):
        if fn is not None:
            assert jax.eval_shape(fn, params, batch, rng).shape == (BATCH,)
    if model.latent_rates is not None:
        rates = jax.jit(model.latent_rates)(params, batch)
        (loss_and_grads,) = case.loss_and_grads.values()
        (_, aux), _ = loss_and_grads(params, batch, rng)
        np.testing.assert_allclose(np.sum(rates, axis=1), aux.terms["rate"], rtol=1e-5, atol=1e-6)
    if model.sample is not None:
        samples = jax.jit(model.sample, static_argnums=2)(params, rng, 5)
        assert samples["x"].shape == (5, *event)
        if dataset.spec.support == "real":
            assert np.isfinite(samples["x"]).all()
        else:
            assert np.isin(samples["x"], np.arange(dataset.spec.num_values)).all()
        assert not np.array_equal(samples["x"][0], samples["x"][1])
    if model.encode is not None:
        codes = jax.eval_shape(model.encode, params, batch, rng)
        assert codes.ndim == 2 and len(codes) == BATCH
        assert sum(model.layer_sizes) in (0, codes.shape[1])
        if model.decode is not None:
            assert jax.eval_shape(model.decode, params, codes).shape == (BATCH, *event)
    if model.reconstruct is not None:
        assert jax.eval_shape(model.reconstruct, params, batch, rng).shape == (BATCH, *event)


CONDITIONAL = [name for name in models.names() if "conditional" in models.defaults(name)]


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_sample_follows_its_label_and_no_other(name):
    """The same draws under other labels are others, and under the same label the same."""
    fields = _fewer(models.defaults(name)) | {"conditional": True}
    dataset = tiny.accepted_by(fields)
    model, batch = models.build(fields, dataset.spec), data.some(dataset, "test", BATCH)
    like = jax.eval_shape(model.init, jax.random.key(0), batch)
    assert model.samples_have_label
    assert model.encoder_is_told == (model.encode is not None)
    untold = models.build(fields | {"conditional": False}, dataset.spec)
    assert not (untold.samples_have_label or untold.encoder_is_told)
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: jnp.float32(0.3 * rng.normal(size=p.shape)), like)

    @jax.jit
    def drawn(label):
        samples = model.sample(params, jax.random.key(1), len(label), label)
        return samples["x"], samples["label"]

    label = np.arange(64) % 4
    (x, told), (of_zero, _) = drawn(label), drawn(0 * label)
    np.testing.assert_array_equal(told, label)
    changed = np.asarray(x != of_zero).reshape(64, -1).any(axis=1)
    share = [changed[label == c].mean() for c in range(4)]
    assert share[0] == 0 and min(share[1:]) > 0


@pytest.mark.parametrize("name", ["vae", "hvae", "two_level", "topdown"])
@pytest.mark.parametrize(
    ("likelihood", "exact"), [("gaussian", False), ("discretised_logistic_mixture", True)]
)
def test_draws_that_are_clipped_are_not_called_exact(name, likelihood, exact):
    spec = DataSpec((8, 8, 1), "uint8", np.full((8, 8, 1), 100.0, np.float32), 100)
    model = models.build(models.defaults(name) | {"likelihood": likelihood}, spec)
    assert model.latents.samples_are_exact == exact


def test_asked_for_what_it_lacks_a_model_says_what_it_has(case):
    model = case.model
    optional = {name for name, usual in Model._field_defaults.items() if usual is None}
    has = {name for name in optional if getattr(model, name) is not None}
    for name in has:
        assert model.require(name) is getattr(model, name)
    for name in optional - has:
        with pytest.raises(UserError) as refused:
            model.require(name)
        missing, _, there = str(refused.value).partition(" it has: ")
        assert name in missing and set(there.split(", ")) == has | {*model.log_likelihood_fns}
    if not model.log_likelihood_fns:
        with pytest.raises(UserError, match="this model has no log_likelihood_fns; it has: "):
            model.require("log_likelihood_fns")


def test_a_bound_never_exceeds_the_tighter_one(case):
    """The mean over draws of log w is the ELBO; more draws in the logarithm can only raise it."""
    model, params, batch, _ = case
    if model.log_weight is None:
        pytest.skip("has no importance weights")
    keys = jax.random.split(jax.random.key(3), BATCH)
    elbo = jax.jit(likelihood.elbo_terms(model, 500))(params, batch, keys)["elbo"]
    bound = jax.jit(likelihood.importance_weighted(model, 100, chunk=100))(params, batch, keys)
    assert np.mean(elbo) <= np.mean(bound["importance_weighted_bound"]) + 0.5
    fn = jax.jit(jax.vmap(model.log_weight, in_axes=(None, None, 0)))
    draws = fn(params, batch, jax.random.split(jax.random.key(4), 1000))
    draws = np.asarray(draws, np.float64)  # equal draws must have their own value as their mean
    error = draws.std(axis=0) * np.sqrt(1 / 1000 + 1 / 500)
    assert (np.abs(draws.mean(axis=0) - elbo) < 5 * error + 1e-4).all()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_is_short_and_says_how_to_run_it(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 80
    assert f"--config=configs/{path.name}" in ast.get_docstring(ast.parse(text))


def _variants(path):
    """A config's own name, and those of all the variants that it says it has."""
    with pytest.raises(UserError) as refused:
        configs.load(f"{path}:?")
    _, _, there = str(refused.value).partition(" it has: ")
    return [path.name, *(f"{path.name}:{variant}" for variant in there.split(", "))]


@functools.cache
def _data_of(section):
    """What a config's data section names, with blank images: of these nothing is read or drawn."""
    if section.dataset in text.NAMES:
        section = dataclasses.replace(section, source="embedded")
    shape = (32, 32, 3) if section.dataset == "cifar10" else (28, 28, 1)
    x, label = np.zeros((10_000, *shape), np.uint8), np.arange(10_000) % 10
    blank = LabelledArrays(x, label, x, label, "blank", "0" * 64)
    with (
        mock.patch.object(image_sets, "load", lambda *_, **__: blank),
        mock.patch.object(shapes, "render", lambda of: np.zeros((len(of), *shape), np.uint8)),
    ):
        return data.load(section)


@pytest.mark.parametrize("name", [name for path in CONFIGS for name in _variants(path)])
def test_every_variant_is_legal_and_its_parameters_have_shapes(name):
    config = configs.load(f"{REPO}/configs/{name}")
    dataset = _data_of(configs.section(config, "data"))
    experiment = prepare(config, dataset, sharding.make_mesh(1))
    if not name.endswith(":smoke"):  # those are trained, below
        x = jax.ShapeDtypeStruct((1, *dataset.spec.event_shape), dataset.spec.dtype)
        batch = {"x": x, "label": jax.ShapeDtypeStruct((1,), jnp.int32)}
        assert jax.eval_shape(experiment.model.init, jax.random.key(0), batch)


def _by_duration(path):
    """Points, text and two players are among the usual tests; of images test_main.py has one."""
    quick = ("gan_grid", "flow_toy", "transformer_shakespeare")
    marks = () if path.stem in quick else pytest.mark.long
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", [_by_duration(path) for path in CONFIGS])
def test_smoke_variant_trains_evaluates_and_draws(path, tmp_path, capsys):
    quick = {"train.duration": "100 steps", "eval.num_samples": 5, "eval.elbo_samples": 1}
    config = configs.load(f"{path}:smoke", quick)
    with on_one_device():
        run.train_mode(config, Workdir(tmp_path / "run"))
    result = Workdir(tmp_path / "run").results.read_text()
    assert "NaN" not in result and "Infinity" not in result
    assert (tmp_path / "run" / "learning_curve.png").exists()
    spec = data.load(configs.section(config, "data")).spec
    model, said = models.build(config.model, spec), capsys.readouterr().out
    if model.sample:
        assert list((tmp_path / "run").glob("prior_samples.*"))
    none = f"{config.model.name} has no likelihood: its costs are measured. It has: "
    assert (none in said) == (not model.log_likelihood_fns)
    if spec.support == "tokens":
        texts = (tmp_path / "run" / "prior_samples.txt").read_text().split(f"\n{'-' * 40}\n")
        assert json.loads(result)["samples"] == texts[:3] and texts[0] in said
    rows = [r for r in writers.read(Workdir(tmp_path / "run").metrics) if "seconds" in r]
    losses = [name for name in rows[0] if name.endswith("/loss")]
    if len(losses) == 1:  # where players play against each other, no loss need fall
        assert rows[-1][losses[0]] < rows[0][losses[0]]
