"""A VQ-VAE with few enough codes to enumerate: its bound, its gradients, its sampler."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dgm_jax import sharding
from dgm_jax.core import DataSpec, UserError
from dgm_jax.models import vqvae
from dgm_jax.nn import quantise
from dgm_jax.train_state import num_parameters

PIXELS, ROWS = 4, 16
SPEC = DataSpec((2, 2, 1), "binary", np.linspace(0.2, 0.8, PIXELS).reshape(2, 2, 1))
FIELDS = {
    "encoder": (5,),
    "decoder": (4,),
    "num_codes": 2,
    "codebook_size": 3,
    "code_dim": 2,
    "levels": (3, 2),
    "prior_hidden": (6,),
}
X = np.array(list(itertools.product((0.0, 1.0), repeat=PIXELS))).reshape(ROWS, 2, 2, 1)
BATCH, RNG = {"x": jnp.asarray(X)}, jax.random.key(0)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _build(**fields):
    return vqvae.build(vqvae.Config(**(FIELDS | fields)), SPEC)


def _params(model):
    """Random numbers everywhere, and a count where the codebook keeps one."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(model.init, RNG, BATCH))
    rng = np.random.default_rng(1)
    params = jax.tree.unflatten(
        structure, [jnp.asarray(0.7 * rng.normal(size=leaf.shape)) for leaf in leaves]
    )
    if "state" in params:
        params["state"]["count"] = jnp.asarray(rng.uniform(1, 3, params["state"]["count"].shape))
    return params


def _parts(params, **fields):
    """The network, the prior and the vector of every code, taken from the parameters by hand."""
    config = vqvae.Config(**(FIELDS | fields))
    net = vqvae.Net(config, SPEC).bind({"params": params["vqvae"]["net"]})
    prior = vqvae.make_prior(config, SPEC).bind({"params": params["prior"]})
    codebook = {
        "gradient": lambda: params["vqvae"]["codebook"],
        "ema": lambda: params["state"]["codebook"],
        "fsq": lambda: quantise.fsq_codebook(config.levels),
    }[config.quantiser]()
    return net, prior, np.asarray(codebook)


def _log_joint(params, **fields):
    """log p(x | c) + log p(c) of all codes (rows, `[C, N]` indices beside) and all 16 images."""
    net, prior, codebook = _parts(params, **fields)
    codes = np.array(list(itertools.product(range(len(codebook)), repeat=prior.num)))
    logits = np.asarray(jax.jit(net.outputs)(codebook[codes]))[..., 0]
    x = X.reshape(ROWS, PIXELS)
    log_lik = special.log_expit(logits) @ x.T + special.log_expit(-logits) @ (1 - x).T
    log_prior = np.asarray(jax.jit(prior.log_prob)(np.eye(len(codebook))[codes]))
    np.testing.assert_allclose(special.logsumexp(log_prior), 0, atol=1e-12)
    return codes, log_lik + log_prior[:, None]


CONV = {"network": "conv", "encoder": (3,), "decoder": (4,)}  # a grid of one code
TRANSFORMER = {"prior": "transformer", "prior_width": 8, "prior_depth": 1, "prior_heads": 2}
CASES = [{"quantiser": name} for name in vqvae.QUANTISERS] + [{"quantiser": "fsq", **CONV}]
CASES += [{"quantiser": "ema", **TRANSFORMER}, {"quantiser": "fsq", **CONV, **TRANSFORMER}]


@pytest.mark.parametrize("fields", CASES)
def test_the_elbo_is_the_encoders_term_of_the_sum_over_codes_that_is_p_of_x(fields):
    """Below log p(x) for every image, and the images' probabilities sum to 1."""
    model = _build(**fields)
    params = _params(model)
    codes, log_joint = _log_joint(params, **fields)
    log_p_x = special.logsumexp(log_joint, axis=0)
    np.testing.assert_allclose(special.logsumexp(log_p_x), 0, atol=1e-10)
    net, _, codebook = _parts(params, **fields)
    v = np.asarray(jax.jit(net.vectors)(BATCH["x"]))
    nearest = np.linalg.norm(v[:, :, None] - codebook, axis=-1).argmin(axis=-1)
    assert len(np.unique(nearest)) > 1
    row = (codes[:, None] == nearest[None]).all(axis=-1).argmax(axis=0)

    @jax.jit
    def measure(*at):
        elbo, terms = model.log_likelihood_fns["elbo"](*at), {}
        for player in model.players:
            terms |= player.loss_fn(*at)[1].terms
        return elbo, terms, model.encode(*at), model.reconstruct(*at)

    elbo, terms, encoded, means = measure(params, BATCH, RNG)
    np.testing.assert_allclose(elbo, log_joint[row, np.arange(ROWS)], rtol=1e-10)
    assert np.all(elbo < log_p_x)
    np.testing.assert_allclose(terms["distortion"] + terms["rate"], -elbo, rtol=1e-10)
    np.testing.assert_allclose(encoded, codebook[nearest].reshape(ROWS, -1), rtol=1e-10)
    expected = special.expit(np.asarray(jax.jit(net.outputs)(encoded))[..., 0])
    np.testing.assert_allclose(means, expected.reshape(X.shape), rtol=1e-10)


@pytest.mark.parametrize("fields", [{}, TRANSFORMER])
def test_samples_have_the_models_distribution(fields):
    model = _build(**fields)
    params = _params(model)
    pairs = jax.jit(jax.vmap(lambda p, key: model.sample(p, key, 2)["x"], (None, 0)))
    x = np.asarray(pairs(params, jax.random.split(jax.random.key(3), 10_000)))
    index = x.reshape(-1, PIXELS).astype(int) @ 2 ** np.arange(PIXELS)[::-1]
    expected = 20_000 * np.exp(special.logsumexp(_log_joint(params, **fields)[1], axis=0))
    assert stats.chisquare(np.bincount(index, minlength=ROWS), expected).pvalue > 1e-4


def _gradient(model, params, which=0):
    player = model.players[which]
    return jax.jit(jax.grad(lambda p: player.loss_fn(p, BATCH, RNG)[0]))(params)


@pytest.mark.parametrize("quantiser", vqvae.QUANTISERS)
def test_the_encoder_gets_the_gradient_at_its_codes_as_if_they_were_its_vectors(quantiser):
    """And β times the pull to the codes, the squares summed over codes and entries, not rounded."""
    model = _build(quantiser=quantiser, commitment=0.3)
    params = _params(model)
    net, _, _ = _parts(params, quantiser=quantiser)
    z = jax.jit(model.encode)(params, BATCH, RNG).reshape(ROWS, 2, 2)

    def distortion(z):
        logits, x = net.outputs(z)[..., 0], X.reshape(ROWS, PIXELS)
        return jnp.mean(jnp.sum(jnp.logaddexp(0, logits) - x * logits, axis=-1))

    def vectors(p):
        return vqvae.Net(net.config, SPEC).apply({"params": p}, BATCH["x"], method="vectors")

    @jax.jit
    def pulled(p):
        v, pull_back = jax.vjp(vectors, p)
        commitment = 0.3 * 2 * (v - z) / ROWS if quantiser != "fsq" else 0
        return pull_back(jax.grad(distortion)(z) + commitment)[0]

    expected = pulled(params["vqvae"]["net"])
    found = _gradient(model, params)["vqvae"]["net"]
    for name in ("encoder", "head"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12),
            found[name],
            expected[name],
        )


def test_the_codebook_is_pulled_to_the_vectors_nearest_to_it():
    """Σ 2 (e_k - v) over the vectors of entry k, by the mean over images; nothing of the rest."""
    model = _build(quantiser="gradient")
    params = _params(model)
    net, _, codebook = _parts(params, quantiser="gradient")
    v = np.asarray(jax.jit(net.vectors)(BATCH["x"])).reshape(-1, 2)
    nearest = np.linalg.norm(v[:, None] - codebook, axis=-1).argmin(axis=-1)
    expected = [2 * (codebook[k] - v[nearest == k]).sum(axis=0) / ROWS for k in range(3)]
    found = _gradient(model, params)["vqvae"]["codebook"]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("quantiser", vqvae.QUANTISERS)
def test_the_prior_moves_nothing_but_itself(quantiser):
    model = _build(quantiser=quantiser)
    grads = _gradient(model, _params(model), which=1)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grads["vqvae"]))
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads["prior"]))


def test_only_a_moving_average_has_a_state_and_padded_rows_do_not_enter_it():
    for quantiser in ("gradient", "fsq"):
        model = _build(quantiser=quantiser)
        params = _params(model)
        assert "state" not in params
        assert jax.eval_shape(model.players[0].loss_fn, params, BATCH, RNG)[1].state is None
    model = _build(ema_decay=0.8)
    params, loss_fn = _params(model), jax.jit(model.players[0].loss_fn)
    counted = [num_parameters({**params, "state": state}) for state in (params["state"], {})]
    assert counted[0] == counted[1]  # no player trains it
    mask = jnp.arange(ROWS) < 11
    _, padded = loss_fn(params, {**BATCH, "mask": mask}, RNG)
    _, alone = loss_fn(params, {"x": BATCH["x"][:11]}, RNG)
    _, whole = loss_fn(params, BATCH, RNG)
    for name in ("codebook", "count"):
        np.testing.assert_allclose(padded.state[name], alone.state[name], rtol=1e-10)
        assert not np.allclose(padded.state[name], whole.state[name])
    np.testing.assert_allclose(
        padded.scalars["perplexity"], alone.scalars["perplexity"], rtol=1e-10
    )
    num = np.bincount(np.asarray(_nearest(params)).ravel(), minlength=3)
    expected = 0.8 * params["state"]["count"] + 0.2 * num
    np.testing.assert_allclose(whole.state["count"], expected, rtol=1e-12)


def _nearest(params):
    net, _, codebook = _parts(params)
    return jax.jit(lambda x: quantise.nearest(net.vectors(x), jnp.asarray(codebook)))(BATCH["x"])


def test_loss_gradient_and_codebook_are_the_same_on_one_device_and_on_eight():
    """The codebook follows the vectors of all devices: sums over the batch are over all of it."""
    model, mesh = _build(), sharding.make_mesh()
    assert mesh.size == 8
    params, loss_fn = _params(model), model.players[0].loss_fn
    both = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    one, eight = (
        both(params, batch, RNG)
        for batch in (BATCH, jax.device_put(BATCH, sharding.split_batch(mesh)))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), one, eight)
    moved = one[0][1].state["codebook"] - params["state"]["codebook"]
    assert np.abs(moved).max() > 1e-3


def test_a_codebook_starts_as_vectors_of_the_batch():
    for quantiser in ("gradient", "ema"):
        model = _build(quantiser=quantiser)
        params = model.init(RNG, BATCH)
        net, _, codebook = _parts(params, quantiser=quantiser)
        v = np.asarray(jax.jit(net.vectors)(BATCH["x"])).reshape(-1, 2)
        gaps = np.linalg.norm(v[:, None] - codebook, axis=-1)
        np.testing.assert_allclose(gaps.min(axis=0), 0, atol=1e-7)


def test_no_vector_of_the_batch_starts_two_entries_where_there_are_enough():
    """As many entries as vectors, 16 images of two: each of them is one. More repeat some."""
    for quantiser, where in (("gradient", "vqvae"), ("ema", "state")):
        for size in (2 * ROWS, 2 * ROWS + 1):
            params = _build(quantiser=quantiser, codebook_size=size).init(RNG, BATCH)
            num = len(np.unique(np.asarray(params[where]["codebook"]), axis=0))
            assert (num == size) == (size == 2 * ROWS)


def test_a_code_of_a_grid_stands_for_its_part_of_the_image():
    """Two stages on 8x8 pixels, their fresh blocks the identity: each code has a quarter."""
    spec = DataSpec((8, 8, 1), "binary", np.full((8, 8, 1), 0.5))
    config = vqvae.Config(**(FIELDS | {"network": "conv", "encoder": (3, 3), "decoder": (3, 3)}))
    assert vqvae.grid(config, spec) == (2, 2)
    net = vqvae.Net(config, spec)

    @jax.jit
    def fresh(z):
        variables = net.init(RNG, jnp.zeros((1, 8, 8, 1)))
        return jax.jacfwd(lambda z: net.apply(variables, z, method="outputs")[0, :, 0])(z)

    jacobian = fresh(np.random.default_rng(0).normal(size=(1, 4, 2)))
    seen = np.abs(jacobian).max(axis=-1).reshape(8, 8, 4)
    corners = seen[[0, 0, 7, 7], [0, 7, 0, 7]]  # [corner, code]
    np.testing.assert_array_equal(corners > 0, np.eye(4, dtype=bool))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoder", ()),
        ("decoder", (3, 0)),
        ("prior_hidden", (0,)),
        ("prior", "vamp"),
        ("prior_width", 13),
        ("prior_depth", 0),
        ("prior_heads", 0),
        ("network", "transformer"),
        ("activation", "swisch"),
        ("likelihood", "poisson"),
        ("quantiser", "rounding"),
        ("num_codes", 0),
        ("codebook_size", 1),
        ("code_dim", 0),
        ("levels", ()),
        ("levels", (5, 1)),
        ("levels", (2.5,)),
        ("commitment", -0.1),
        ("commitment", float("nan")),
        ("ema_decay", 1.0),
        ("ema_decay", -0.5),
    ],
)
def test_check_refuses_a_bad_field_by_its_name(field, value):
    fields = FIELDS | (TRANSFORMER if field.startswith("prior_") else {}) | {field: value}
    with pytest.raises(UserError, match=rf"model\.{field}="):
        vqvae.check(vqvae.Config(**fields), SPEC)


def test_a_prior_is_asked_for_its_own_fields_alone():
    vqvae.check(vqvae.Config(**(FIELDS | {"prior": "masked_mlp", "prior_width": 13})), SPEC)


def test_check_refuses_a_grid_that_encoder_and_decoder_do_not_share():
    fields = FIELDS | {"network": "conv", "encoder": (3, 3), "decoder": (4,)}
    with pytest.raises(UserError, match=r"model\.decoder=\(4,\): .*model\.encoder=\(3, 3\)"):
        vqvae.check(vqvae.Config(**fields), SPEC)
