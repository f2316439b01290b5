"""A short version of scripts/devices.py: families of every kind on one and on eight devices."""

import importlib

import pytest
from conftest import REPO

SMALL = {
    "gan": {"model.generator": (4, 4), "model.discriminator": (4, 4)},
    "vqvae": {"model.encoder": (8,), "model.decoder": (8,), "model.prior_hidden": (8,)},
}


@pytest.mark.parametrize("family", SMALL)
def test_devices_do_not_change_a_run(family, monkeypatch):
    """Two players; a codebook that follows averages over the batch."""
    monkeypatch.syspath_prepend(str(REPO / "scripts"))
    devices = importlib.import_module("devices")
    one, many = (
        devices.measure(family, devices.mesh_of(num), 20, **SMALL[family]) for num in (1, 8)
    )
    found = devices.compare(one, many)
    assert found.batch == found.printed == 0
    assert found.first_loss <= 1e-6 and found.gradient <= 1e-6 and found.losses <= 1e-6
    assert found.params <= 1e-5  # relative to the largest of each array; see docs/reliability.md
    again = devices.measure(family, devices.mesh_of(1), 20, seed=1, **SMALL[family])
    assert devices.compare(one, again).batch > 0.1
