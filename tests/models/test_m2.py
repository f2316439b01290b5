"""M2 on images of three binary pixels and two classes, where everything can be integrated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dgm_jax.core import DataSpec, Labelled, UserError
from dgm_jax.models import m2

NUM, CLASSES = 10, 2  # training examples
SHARE = 0.375  # of the rows of a batch that are labelled: three of eight
MEAN = np.full((3, 1, 1), 0.4, np.float32)
SPEC = DataSpec((3, 1, 1), "binary", MEAN, NUM, CLASSES, labelled=Labelled(4, SHARE))
X = np.array([[i >> j & 1 for j in range(3)] for i in range(8)], float).reshape(8, 3, 1, 1)
LABEL = np.arange(8) % 2
BATCH = {"x": jnp.asarray(X), "label": jnp.asarray(LABEL), "id": jnp.arange(8)}
TOLD = np.isin(np.arange(8), (1, 4, 7))
TRAIN_BATCH = {**BATCH, "label": jnp.where(TOLD, BATCH["label"], -1)}
FIELDS = {"latents": 1, "classifier": (3,), "encoder": (4,), "decoder": (4,)}
AXIS = np.linspace(-8, 8, 2001)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _build(spec=SPEC, **fields):
    return m2.build(m2.Config(**(FIELDS | fields)), spec)


def _params():
    shapes = jax.eval_shape(_build().init, jax.random.key(0), BATCH)
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(structure, [0.6 * rng.normal(size=leaf.shape) for leaf in leaves])


def _integrals(params):
    """By class `[C]`: log p(x, y), and the expected distortion and rate of z, each `[C, 8]`."""
    net = m2.Net(m2.Config(**FIELDS), SPEC).bind({"params": params["m2"]})
    log_step, x = np.log(AXIS[1] - AXIS[0]), X.reshape(8, 3)
    log_joint, distortion, rate = [], [], []
    for label in range(CLASSES):
        labels = jnp.full(len(AXIS), label)
        logits = np.asarray(net.outputs(jnp.asarray(AXIS)[:, None], labels))[..., 0]
        log_lik = special.log_expit(logits) @ x.T + special.log_expit(-logits) @ (1 - x).T
        prior = stats.norm.logpdf(AXIS)[:, None]
        log_joint.append(special.logsumexp(log_lik + prior, axis=0) + log_step - np.log(CLASSES))
        mu, log_sigma = (np.asarray(a) for a in net.context(X, jnp.full(8, label)))
        q = stats.norm.logpdf(AXIS[:, None], mu.T, np.exp(log_sigma).T)
        distortion.append(-np.sum(np.exp(q + log_step) * log_lik, axis=0))
        rate.append(np.sum(np.exp(q + log_step) * (q - prior), axis=0))
    return np.array(log_joint), np.array(distortion), np.array(rate)


def _draws(fn, num=4000):
    return np.asarray(jax.jit(jax.vmap(fn))(jax.random.split(jax.random.key(2), num)))


def _assert_mean(draws, exact):
    error = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - exact) < 4.5 * error + 1e-9).all()


def test_the_elbo_sums_over_the_label_and_is_below_the_likelihood():
    """-Σ_y q(y) (distortion + rate + log q(y) - log p(y)), by quadrature over z."""
    params, model = _params(), _build()
    log_joint, distortion, rate = _integrals(params)
    log_q = np.asarray(model.classify(params, BATCH)).T
    np.testing.assert_allclose(np.exp(log_q).sum(axis=0), 1, rtol=1e-12)
    exact = -np.sum(np.exp(log_q) * (distortion + rate + log_q + np.log(CLASSES)), axis=0)
    elbo = model.log_likelihood_fns["elbo"]
    _assert_mean(_draws(lambda key: elbo(params, BATCH, key)), exact)
    assert (exact < special.logsumexp(log_joint, axis=0)).all()


def test_weights_are_unbiased():
    params, model = _params(), _build()
    exact = np.exp(special.logsumexp(_integrals(params)[0], axis=0))
    _assert_mean(np.exp(_draws(lambda key: model.log_weight(params, BATCH, key))), exact)


def _costs(params, beta):
    """Of all eight, `[8]`: with its label told, with y summed over, and -log q(own label | x)."""
    _, distortion, rate = _integrals(params)
    log_q, own = np.asarray(_build().classify(params, BATCH)).T, (LABEL, np.arange(8))
    told = distortion + beta * (rate + np.log(CLASSES))
    summed = np.sum(np.exp(log_q) * (told + beta * log_q), axis=0)
    return told[own], summed, -log_q[own]


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (0.7, 3.0)])
def test_the_loss_is_the_mean_over_the_training_examples_whatever_a_batch_holds(alpha, beta):
    """(Σ_told cost + Σ_others cost) / N + α mean_told -log q(y | x).

    4 of 10 examples are labelled, and 3 of the batch's 8 rows.
    """
    params = _params()
    told, summed, classification = _costs(params, beta)
    exact = 0.4 * told[TOLD].mean() + 0.6 * summed[~TOLD].mean()
    exact += alpha * classification[TOLD].mean()
    model = _build(alpha=alpha, beta=beta)
    _assert_mean(_draws(lambda key: model.loss_fn(params, TRAIN_BATCH, key)[0]), exact)


def test_with_every_label_told_the_loss_is_the_supervised_one():
    params = _params()
    told, _, classification = _costs(params, 1.0)
    model = _build(SPEC._replace(labelled=None), alpha=0.7)
    exact = told.mean() + 0.7 * classification.mean()
    _assert_mean(_draws(lambda key: model.loss_fn(params, BATCH, key)[0]), exact)


def test_classification_is_measured_of_the_labels_that_there_are():
    """Training knows some; of held-out data, which have all, each example has its own."""
    params, model = _params(), _build()
    classification = _costs(params, 1.0)[2]
    _, aux = jax.jit(model.loss_fn)(params, TRAIN_BATCH, jax.random.key(0))
    np.testing.assert_allclose(aux.terms["classification"].mean(), classification[TOLD].mean())
    held_out = jax.jit(model.players[0].terms)(params, BATCH, jax.random.key(0))
    np.testing.assert_allclose(held_out["classification"], classification)
    assert held_out.keys() == aux.terms.keys()
    for name in ("distortion", "rate"):
        np.testing.assert_allclose(held_out[name], aux.terms[name])


def test_samples_of_a_class_have_its_mean():
    params, model = _params(), _build()
    samples = jax.jit(model.sample, static_argnums=2)(params, jax.random.key(3), 20_000)
    log_joint, _, _ = _integrals(params)
    p = np.exp(log_joint)  # [C, 8]
    for label in range(CLASSES):
        x = np.asarray(samples["x"])[np.asarray(samples["label"]) == label].reshape(-1, 3)
        exact = p[label] @ X.reshape(8, 3) / p[label].sum()
        _assert_mean(x, exact)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latents", 0),
        ("alpha", -0.1),
        ("beta", -0.1),
        ("alpha", float("nan")),
        ("classifier", ()),
        ("encoder", (0,)),
        ("network", "resnet"),
        ("activation", "sine"),
        ("likelihood", "categorical"),
    ],
)
def test_check_refuses_a_bad_value_by_its_name(field, value):
    with pytest.raises(UserError, match=rf"model\.{field}="):
        m2.check(m2.Config(**(FIELDS | {field: value})), SPEC)


def test_check_refuses_data_without_labels():
    with pytest.raises(UserError, match="labels"):
        m2.check(m2.Config(), SPEC._replace(num_classes=0))
    m2.check(m2.Config(**FIELDS), SPEC)
