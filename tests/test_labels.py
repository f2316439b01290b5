"""What conditional models are told of labels, and that no other model is told anything."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dgm_jax import labels, models
from dgm_jax.core import DataSpec, Labelled, UserError

SPEC = DataSpec((2,), "real", np.zeros(2, np.float32), 100, num_classes=3)


def test_a_conditional_model_is_told_classes_one_hot_and_draws_them_in_turn():
    told = labels.of_samples(5, None, True, SPEC)
    np.testing.assert_array_equal(told["label"], [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(
        labels.one_hot(told["label"], True, SPEC), np.eye(3)[[0, 1, 2, 0, 1]]
    )


def test_a_conditional_model_draws_the_classes_that_it_is_told():
    np.testing.assert_array_equal(
        labels.of_samples(3, jnp.array([2, 0, 2]), True, SPEC)["label"], [2, 0, 2]
    )


def test_another_model_is_told_nothing_whether_there_are_labels_or_not():
    assert labels.of_samples(5, None, False, SPEC) == {}
    assert labels.one_hot(jnp.array([0, 2]), False, SPEC) is None
    assert labels.one_hot(None, False, SPEC) is None


def test_a_conditional_model_is_refused_where_there_are_no_labels():
    without = SPEC._replace(num_classes=0)
    labels.check(True, SPEC)
    labels.check(False, without)
    with pytest.raises(UserError, match=r"model\.conditional=True: .*no labels"):
        labels.check(True, without)


@pytest.mark.parametrize("name", models.names())
def test_few_labels_are_for_models_that_learn_from_them(name):
    """Batches with a share of labelled examples would bias the loss of any other."""
    spec = tiny.accepted_by(models.defaults(name)).spec._replace(labelled=Labelled(20, 0.5))
    if name == "m2":
        models.check(models.defaults(name), spec)
    else:
        with pytest.raises(UserError, match=rf"data\.labelled=20: model\.name='{name}' does not"):
            models.check(models.defaults(name), spec)
