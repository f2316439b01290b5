"""A short version of scripts/devices.py."""

import devices
import pytest

from dgm_jax import sharding

SMALL = {"model.encoder": (8,), "model.decoder": (8,), "model.prior_hidden": (8,)}


def test_devices_do_not_change_a_run():
    """Two players, and a codebook that follows averages over the batch; on one and on eight."""
    one, many = (devices.measure("vqvae", sharding.make_mesh(n), 20, **SMALL) for n in (1, 8))
    found = devices.compare(one, many)
    assert found.batch == found.printed == 0
    assert max(found.first_loss, found.losses) <= 1e-6
    # Relative to the largest of each array, however small; see docs/reliability.md.
    assert max(found.gradient, found.params) <= 1e-5
    other = {**one, "losses": [1.01 * values for values in one["losses"]]}
    assert devices.compare(one, other).losses == pytest.approx(0.01, rel=1e-5)
