"""Disentanglement scores: 1 for the factors themselves, chance for noise, and cases between."""

import numpy as np
import pytest
from scipy import integrate, stats

from dgm_jax.evaluators import disentanglement

SIZES = (3, 6, 10, 16)
NUM = 4000


def _draw(seed, num=NUM):
    rng = np.random.default_rng(seed)
    return rng, np.stack([rng.integers(0, size, num) for size in SIZES], axis=1)


RNG, FACTORS = _draw(0)


def _scores(encode):
    """All scores of codes made by `encode(factors, rng)`."""
    codes, factors = {}, {}
    for seed, split in enumerate(("train", "test")):
        rng, factors[split] = _draw(seed)
        codes[split] = encode(factors[split], rng)
    found = disentanglement.evaluate(codes, factors, seed=0)
    assert all(metric.num_examples == NUM for metric in found.values())
    return {name: metric.value for name, metric in found.items()}


def test_the_factors_themselves_have_every_score_1():
    """In another order, on other scales, beside two codes of pure noise that nothing needs."""

    def encode(factors, rng):
        shuffled = factors[:, [2, 0, 3, 1]] * np.array([1.0, -2.0, 0.2, 0.5]) + 3
        return np.concatenate([shuffled, rng.normal(size=(len(factors), 2))], axis=1)

    found = _scores(encode)
    # A noise code shares about (20 - 1)(n - 1) / 2N nats with a factor of n values by chance.
    chance = np.mean([19 * (n - 1) / (2 * NUM) / np.log(n) for n in SIZES])
    assert found["mig"] == pytest.approx(1 - chance, abs=0.01)
    for name in ("dci_disentanglement", "dci_completeness", "dci_informativeness"):
        assert found[name] == pytest.approx(1, abs=0.002), name
    assert found["factor_vae_score"] == 1


def test_noise_has_no_score_and_guesses():
    found = _scores(lambda factors, rng: rng.normal(size=(len(factors), 6)))
    assert 0 <= found["mig"] < 0.02
    assert 0 <= found["dci_disentanglement"] < 0.02
    assert 0 <= found["dci_completeness"] < 0.02
    chance = np.mean([1 / size for size in SIZES])
    assert found["dci_informativeness"] == pytest.approx(chance, abs=0.03)
    # 800 votes, of which the best of four guesses takes somewhat more than a quarter.
    assert found["factor_vae_score"] == pytest.approx(0.25, abs=0.07)


def test_codes_that_mix_all_factors_tell_them_but_are_not_disentangled():
    """A generic rotation: the forests still find much, no code is about one factor."""
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(4, 4)))

    def encode(factors, rng):
        del rng
        return (factors - factors.mean(axis=0)) / factors.std(axis=0) @ rotation

    found = _scores(encode)
    assert found["dci_informativeness"] > 2 * np.mean([1 / size for size in SIZES])
    for name in ("mig", "dci_disentanglement", "dci_completeness"):
        assert found[name] < 0.6, name


def test_constant_codes_are_scored_as_worth_nothing():
    found = _scores(lambda factors, rng: np.zeros((len(factors), 3)))
    assert found["mig"] == found["dci_disentanglement"] == found["dci_completeness"] == 0
    assert found["factor_vae_score"] == 0.25


def test_information_of_a_code_that_is_sometimes_wrong():
    """Of n values, replaced at rate ε by any at random: log n - H(1 - ε + ε/n, ε/n, ...)."""
    size, rate = 10, 0.3
    rng = np.random.default_rng(0)
    factor = rng.integers(0, size, 200_000)
    code = np.where(rng.random(len(factor)) < rate, rng.integers(0, size, len(factor)), factor)
    p = np.full(size, rate / size)
    p[0] += 1 - rate
    expected = np.log(size) - stats.entropy(p)
    assert disentanglement.mutual_information(2.5 * code, factor) == pytest.approx(
        expected, abs=0.005
    )
    assert disentanglement.mutual_information(factor, factor) == pytest.approx(
        np.log(size), abs=1e-3
    )


def test_information_of_a_noisy_code_is_that_of_the_mixture():
    """code = factor ± noise: H(mixture) - H(normal) by quadrature; bins lose a little."""
    rng = np.random.default_rng(0)
    factor = rng.integers(0, 2, 400_000)
    code = 4.0 * factor + rng.normal(size=len(factor))

    def density(x):
        return (stats.norm.pdf(x) + stats.norm.pdf(x - 4)) / 2

    entropy = -integrate.quad(lambda x: density(x) * np.log(density(x)), -10, 14)[0]
    expected = entropy - stats.norm.entropy()
    found = disentanglement.mutual_information(code, factor)
    assert expected - 0.02 < found < expected + 0.001


def test_two_codes_for_one_factor_leave_no_gap():
    code = np.repeat(FACTORS[:, :1], 2, axis=1) * np.array([1.0, -3.0])
    assert disentanglement.mutual_information_gap(code, FACTORS[:, :1]) == 0
    assert disentanglement.mutual_information_gap(code[:, :1], FACTORS[:, :1]) == pytest.approx(1)


@pytest.fixture(scope="module")
def pair():
    """All pairs of two bits, 1,000 times."""
    return np.tile(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), (1000, 1))


def test_a_rotated_pair_of_bits_has_the_gap_that_counting_gives(pair):
    """45°: a + b and a - b each know half of either bit. 20°: each code has four values, and knows
    both bits. Codes and factors being even, nothing is left of the gap of 1 at 0° and 90°."""
    for degrees, gap in ((0, 1), (20, 0), (45, 0), (90, 1)):
        angle = np.deg2rad(degrees)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        codes = np.round(pair @ rotation, 9)
        assert disentanglement.mutual_information_gap(codes, pair) == pytest.approx(gap)
    half = disentanglement.mutual_information(pair.sum(axis=1), pair[:, 0])
    assert half == pytest.approx(0.5 * np.log(2))


def test_a_code_that_knows_half_leaves_half_a_gap(pair):
    """The codes a and a + b: of bit a, log 2 and half of it; of bit b, half of it and nothing."""
    codes = np.stack([pair[:, 0], pair.sum(axis=1)], axis=1)
    assert disentanglement.mutual_information_gap(codes, pair) == pytest.approx(0.5)


def test_concentration_is_one_less_the_weighted_entropy_of_rows():
    assert disentanglement.concentration(np.diag([3.0, 1.0, 0.5])) == pytest.approx(1)
    assert disentanglement.concentration(np.ones((4, 3))) == pytest.approx(0)
    # A row about one column, one about two of three alike, and one that nothing uses.
    rows = np.array([[0.5, 0.0, 0.0], [0.0, 0.75, 0.75], [0.0, 0.0, 0.0]])
    expected = 0.25 * 1 + 0.75 * (1 - np.log(2) / np.log(3))
    assert disentanglement.concentration(rows) == pytest.approx(expected)
    # Every column of the transpose is one code's.
    assert disentanglement.concentration(rows.T) == pytest.approx(1)


def test_importance_is_that_of_the_code_a_factor_needs():
    rng = np.random.default_rng(0)
    codes = np.concatenate([FACTORS[:, [1, 0]], rng.normal(size=(NUM, 1))], axis=1)
    importance, accuracy = disentanglement.forests(
        codes[:3000], FACTORS[:3000, :2], codes[3000:], FACTORS[3000:, :2], seed=0
    )
    np.testing.assert_allclose(importance, [[0, 1], [1, 0], [0, 0]], atol=1e-3)
    assert accuracy == 1


def test_votes_of_collapsed_codes_do_not_count():
    """A code of almost no variance, itself a factor's, would vote for it and be right."""
    rng = np.random.default_rng(0)
    codes = FACTORS / FACTORS.std(axis=0)
    codes[:, 0] *= 1e-3
    score = disentanglement.factor_vae_score(codes, FACTORS, rng)
    # A held factor 0 stills nothing that is left: its votes go astray, a quarter of all.
    assert score == pytest.approx(0.75, abs=0.1)
    codes[:, 0] *= 1e3
    assert disentanglement.factor_vae_score(codes, FACTORS, rng) == 1


def test_scores_repeat_with_their_seed():
    rng = np.random.default_rng(0)
    codes = {s: FACTORS + rng.normal(size=FACTORS.shape) for s in ("train", "test")}
    factors = dict.fromkeys(codes, FACTORS)
    first, again, other = (disentanglement.evaluate(codes, factors, s) for s in (0, 0, 1))
    assert first == again != other
