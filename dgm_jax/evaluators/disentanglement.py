"""Disentanglement scores: does each number of a code stand for one factor of the data?

Codes are float `[N, F]`, factors int `[N, G]`. Every score is 1 for codes that are the factors, in
any order, and low for codes that have nothing to do with them. Scales do not matter but to the
FactorVAE score, which takes a code with a hundredth of the largest variance for collapsed.

References: Chen et al. 2018, "Isolating sources of disentanglement in VAEs" (MIG); Eastwood &
Williams 2018, "A framework for the quantitative evaluation of disentangled representations" (DCI);
Kim & Mnih 2018, "Disentangling by factorising" (FactorVAE score); Locatello et al. 2019,
"Challenging common assumptions in the unsupervised learning of disentangled representations" (how
the scores are estimated from a sample of codes).
"""

import numpy as np
from sklearn.ensemble import RandomForestClassifier

from dgm_jax.metrics import Metric

Codes = dict[str, np.ndarray]  # "train" and "test"

_BINS = 20
_TREES = 10
_LEAF = 20  # examples at least; trees grown to the end would also explain noise, by all codes alike
_MOST = 5_000  # training examples of a forest
_VOTES = 800
_EXAMPLES_PER_VOTE = 100
_COLLAPSED = 0.01  # of the largest variance of a code


def evaluate(codes: Codes, factors: Codes, seed: int) -> dict[str, Metric]:
    """All scores, on the test split; forests are grown on the training split.

    Args:
      codes: float `[N, F]` of both splits.
      factors: int `[N, G]` of both splits, G ≥ 2.
      seed: of the examples, trees and votes.
    """
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(codes["train"]))[:_MOST]
    train = codes["train"][rows], factors["train"][rows]
    test = codes["test"], factors["test"]
    importance, accuracy = forests(*train, *test, seed)
    num = len(codes["test"])
    return {
        "mig": Metric(mutual_information_gap(*test), "score", num_examples=num),
        "dci_disentanglement": Metric(concentration(importance), "score", num_examples=num),
        "dci_completeness": Metric(concentration(importance.T), "score", num_examples=num),
        "dci_informativeness": Metric(accuracy, "accuracy", num_examples=num),
        "factor_vae_score": Metric(factor_vae_score(*test, rng), "accuracy", num_examples=num),
    }


def mutual_information_gap(codes: np.ndarray, factors: np.ndarray) -> float:
    """MIG: how much more of a factor the best code knows than the second best.

    The mean over factors of the difference of their mutual informations with the factor, each
    divided by the entropy of the factor (Chen et al. 2018, section 4.1).
    """
    found = []
    for factor in factors.T:
        information = [mutual_information(code, factor) for code in codes.T]
        second, best = np.sort([0.0, *information])[-2:]
        found.append((best - second) / mutual_information(factor, factor))
    return float(np.mean(found))


def mutual_information(code: np.ndarray, factor: np.ndarray) -> float:
    """I(code; factor) in nats, the code cut into 20 bins of equal width (Locatello et al. 2019).

    Args:
      code: `[N]`.
      factor: int `[N]`, of at most 20 neighbouring values.
    """
    values = np.arange(factor.min(), factor.max() + 2) - 0.5
    joint = np.histogram2d(code, factor, bins=(_BINS, values))[0] / len(code)
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    there = joint > 0
    return float(np.sum(joint[there] * np.log(joint[there] / independent[there])))


def forests(
    codes: np.ndarray,
    factors: np.ndarray,
    test_codes: np.ndarray,
    test_factors: np.ndarray,
    seed: int,
) -> tuple[np.ndarray, float]:
    """One random forest for each factor, which it tells from the codes.

    Returns:
      `importance` `[F, G]`, of each code for each factor, columns summing to 1 (R of Eastwood &
      Williams, section 2), and the accuracy on the test examples, the mean over factors: the
      informativeness, here as a number of which more is better (Locatello et al. 2019).
    """
    importance, accuracy = [], []
    for factor, test_factor in zip(factors.T, test_factors.T, strict=True):
        # Every split may use any code: a code that is not needed then has no importance.
        forest = RandomForestClassifier(
            _TREES, max_features=None, min_samples_leaf=_LEAF, random_state=seed
        )
        forest.fit(codes, factor)
        importance.append(forest.feature_importances_)
        accuracy.append(forest.score(test_codes, test_factor))
    return np.stack(importance, axis=1), float(np.mean(accuracy))


def concentration(importance: np.ndarray) -> float:
    """How much each row is about one column: 1 where it has a single entry, 0 where all are equal.

    Σ_i ρ_i (1 - H(P_i) / log B), P_i the normalised row and ρ_i its part of the total: of R
    `[F, G]` the disentanglement, of its transpose the completeness (Eastwood & Williams 2018,
    section 2; the columns of R having one sum, its factors weigh the same).

    Args:
      importance: float `[A, B]`, at least 0.
    """
    total = importance.sum()
    if not total:  # codes that are constant tell nothing
        return 0.0
    rows = np.broadcast_to(importance.sum(axis=1, keepdims=True), importance.shape)
    there = importance > 0
    entropy = np.sum(importance[there] * np.log(rows[there] / importance[there]))
    return float(1 - entropy / (total * np.log(max(importance.shape[1], 2))))


def factor_vae_score(codes: np.ndarray, factors: np.ndarray, rng: np.random.Generator) -> float:
    """How often the code that varies least tells which factor is held (Kim & Mnih, section 4).

    A vote is a set of examples with one factor at one value, and the code of least variance
    among them, each code scaled to unit variance over all. Every code stands for the factor that
    most of its votes were about; the accuracy of that on new votes is the score, by chance 1 / G.
    Collapsed codes have no vote.
    """
    variance = codes.var(axis=0)
    active = variance > _COLLAPSED * variance.max()
    num_factors = factors.shape[1]
    if not active.any():
        return 1 / num_factors
    scaled = codes[:, active] / np.sqrt(variance[active])

    def votes() -> np.ndarray:
        """How often each code `[F]` was the stillest while each factor `[G]` was held."""
        counts = np.zeros((scaled.shape[1], num_factors))
        for held in rng.integers(num_factors, size=_VOTES):
            factor = factors[:, held]
            alike = np.flatnonzero(factor == rng.choice(factor))
            chosen = scaled[rng.choice(alike, _EXAMPLES_PER_VOTE)]
            counts[np.argmin(chosen.var(axis=0)), held] += 1
        return counts

    stands_for = np.argmax(votes(), axis=1)
    new = votes()
    return float(new[np.arange(len(new)), stands_for].sum() / new.sum())
