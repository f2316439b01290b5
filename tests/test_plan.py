"""Plans: what a step costs is counted from its program, and predictions follow by hand."""

import dataclasses
import math

import jax
import pytest

from dgm_jax import config as configs
from dgm_jax import plan
from dgm_jax.core import Labelled, UserError
from dgm_jax.train_state import num_parameters

TINY = {"train.batch_size": 16, "model.encoder": (32,), "model.decoder": (32,), "model.latents": 4}


@pytest.fixture(scope="module")
def costs(tiny_dataset):
    config = configs.override(configs.experiment("vae"), TINY)
    return [plan.cost_of(config, tiny_dataset, num) for num in (1, 8)]


def test_the_batch_is_shared_and_the_state_is_not(costs, tiny_dataset):
    one, eight = costs
    assert one.operations == 8 * eight.operations
    # Encoder 16 x 32 and 32 x 8, decoder 4 x 32 and 32 x 16: thrice, but for the first's input.
    assert one.operations == 2 * 16 * (3 * (16 * 32 + 32 * 8 + 4 * 32 + 32 * 16) - 16 * 32)
    assert one.state_bytes == eight.state_bytes and one.data_bytes == eight.data_bytes
    assert one.data_bytes == 128 * 16 + 128 * 4  # bytes of images, labels in 32 bits
    assert eight.temporary_bytes < one.temporary_bytes


def test_a_state_that_is_divided_takes_its_part_of_the_memory(costs, tiny_dataset):
    """Adam and the average: four numbers a parameter, but the odd biases on every device."""
    config = configs.override(configs.experiment("vae"), TINY | {"mesh.fsdp": True})
    cost = plan.cost_of(config, tiny_dataset, 8)
    state = plan.prepare(config, tiny_dataset).abstract_state
    parts = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(state)]
    assert cost.state_bytes == sum(4 * math.prod(part) for part in parts)
    assert cost.state_bytes < costs[1].state_bytes / 6


def test_what_is_exchanged_is_the_gradient(costs, tiny_dataset):
    """And the handful of numbers that are logged."""
    one, eight = costs
    config = configs.override(configs.experiment("vae"), TINY)
    model = plan.prepare(config, tiny_dataset).model
    batch = {"x": jax.numpy.zeros((1, 4, 4, 1))}
    size = num_parameters(jax.eval_shape(model.init, jax.random.key(0), batch))
    assert one.exchanged_bytes == 0
    assert 4 * size <= eight.exchanged_bytes * 8 / 14 < 4 * size + 200


def test_a_share_of_the_labelled_rows_need_be_no_whole_number(tiny_dataset):
    """Two of 16 rows, for each of eight devices a quarter: the products of a step are the same."""
    costs = []
    for share in (0.0, 0.125):
        config = dataclasses.replace(tiny_dataset.config, labelled=20, labelled_share=share)
        spec = tiny_dataset.spec._replace(labelled=Labelled(20, 0.3))
        fields = {"train.batch_size": 16, "model.latents": 4}
        of_m2 = configs.override(configs.experiment("m2"), fields)
        costs.append(plan.cost_of(of_m2, tiny_dataset._replace(config=config, spec=spec), 8))
    assert costs[0].operations == costs[1].operations


def test_collectives_are_read_from_a_programs_text():
    text = """
  %a = f32[10,4]{1,0} all-reduce(f32[10,4]{1,0} %p), replica_groups={}
  %b = (f32[3]{0}, bf16[2,2]{1,0}) all-reduce-start(%q, %r), channel_id=1
  %c = f32[] add(f32[] %all-reduce, f32[] %y)
  %d = f32[8]{0} all-gather(f32[2]{0} %s), dimensions={0}
  %e = f32[2]{0} reduce-scatter(f32[8]{0} %t), dimensions={0}
"""
    assert plan.exchanged(text, 4) == 1.5 * (160 + 12 + 8) + 0.75 * 32 + 3 * 8


def test_a_step_is_bounded_by_arithmetic_memory_and_network():
    hardware = plan.Hardware(flops=100.0, memory_bandwidth=10.0, memory=1.0, network=2.0)
    cost = plan.Cost(4, 1000.0, 50.0, 1.0, 1.0, 1.0, 8.0)
    assert cost.seconds(hardware) == 1000 / 100 + 8 / 2
    assert cost._replace(operations=10.0, exchanged_bytes=0.0).seconds(hardware) == 50 / 10
    assert cost.memory == 3


def test_predictions_say_what_does_not_fit(costs):
    text = plan.predictions([costs[0], costs[1]._replace(state_bytes=100e9)])
    (a100,) = (line for line in text.splitlines() if "A100" in line)
    assert "(100%)" in a100 and "needs 100 GB" in a100
    assert plan.table(costs).count("\n") == 3


@pytest.mark.parametrize("devices", ["", "0", "two", "1,-8"])
def test_numbers_of_devices_that_make_no_sense(devices):
    with pytest.raises(UserError, match=f"--devices={devices}: give whole numbers"):
        plan.plan_mode(configs.experiment("vae"), devices.split(","))


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_compiled():
    config = configs.override(configs.experiment("vae"), {"train.batch_size": 20})
    with pytest.raises(UserError, match=r"train\.batch_size=20.*16 or 24"):
        plan.plan_mode(config, ["1", "8"])
