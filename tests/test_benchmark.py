"""The benchmark refuses unlike contestants and keeps what it does not measure."""

import functools
import json
import math

import benchmark
import contestants
import pytest
import quality

from dgm_jax import config as configs
from dgm_jax import optim, sharding
from dgm_jax.experiment import prepare

MARKS = "Top.\n<!-- benchmark: start -->\n<!-- benchmark: end -->\nMiddle.\n"
MARKS += "<!-- quality: start -->\nold\n<!-- quality: end -->\nBottom.\n"
MACHINE = {"processor": "a", "cores": 2, "python": "3", "jax": "1", "torch": "2", "pythae": "0"}
MACHINE |= {"date": "2026-01-01"}
CASE = "MLP VAE, batch 20"


def speed(images_per_second, loss=100.0, num_parameters=10, memory=(500, 500)):
    return {
        "images_per_second": images_per_second,
        "loss": loss,
        "num_parameters": num_parameters,
        "memory_mib": list(memory),
    }


def run_of(*history):
    """Evaluations (seconds, -ELBO, NLL)."""
    names = ("seconds", "negative_elbo", "nll")
    return {
        "history": [dict(zip(names, at, strict=True)) for at in history],
        "compilation_seconds": 1.5,
        "num_parameters": 10,
        "memory_mib": [500, 510],
    }


@pytest.fixture
def sections(tmp_path):
    """Those of the benchmark, in files of their own."""
    files = {"record": tmp_path / "benchmark.json", "page": tmp_path / "performance.md"}
    return {name: section._replace(**files) for name, section in benchmark.SECTIONS.items()}


@pytest.fixture
def records():
    """A record of each section."""
    cases = {CASE: {"dgm_jax": [speed(300), speed(100), speed(200)], "PyTorch eager": [speed(50)]}}
    programs = {
        "dgm_jax": [run_of((1, 120, 110), (5, 99, 91), (10, 96, 89))],
        "pythae": [run_of((20, 100, 95), (600, 98, 90.5))],
    }
    return {
        "benchmark": {
            case: {"machine": MACHINE, "rounds": 3, "seconds": 5.0, "programs": programs}
            for case, programs in cases.items()
        },
        "quality": {"machine": MACHINE, "rounds": 1, "limit_seconds": 600, "programs": programs},
    }


def test_a_section_is_kept_and_the_other_left_alone(sections, records):
    speeds, qualities = sections["benchmark"], sections["quality"]
    speeds.page.write_text(MARKS)
    speeds.keep(records["benchmark"])
    assert "-->\nold\n<!--" in speeds.page.read_text()
    for _ in range(2):  # the second time in place of what is there
        qualities.keep(records["quality"])
    assert json.loads(speeds.record.read_text()) == records
    assert qualities.read() == records["quality"]
    tables = {name: each.show(records[name]) for name, each in sections.items()}
    filled = MARKS.replace(
        "-->\n<!-- benchmark: end", f"-->\n{tables['benchmark']}\n<!-- benchmark: end"
    )
    assert speeds.page.read_text() == filled.replace("old", tables["quality"])


def test_tables_say_medians_and_ratios(records):
    first, second = benchmark.speed_table(records["benchmark"]).splitlines()[2:4]
    assert first == f"| {CASE} | dgm_jax | 200 | 1.00 × | 100.0 | 10 | 500 → 500 |"
    assert second.startswith(f"| {CASE} | PyTorch eager | 50 | 4.00 × |")
    first, second = benchmark.quality_table(records["quality"]).splitlines()[2:4]
    assert first.startswith("| dgm_jax | 5.0 s (1.00 ×) | 10.0 s (1.00 ×) | 1.5 s | 10 |")
    assert second.startswith("| pythae | 20.0 s (4.00 ×) | not within 600 s, best 90.5 |")
    programs = records["quality"]["programs"]
    programs["dgm_jax"], programs["pythae"] = programs["pythae"], programs["dgm_jax"]
    _, second = benchmark.quality_table(records["quality"]).splitlines()[2:4]
    assert second.startswith("| pythae | 5.0 s (0.25 ×) | 10.0 s | 1.5 s |")


@pytest.mark.parametrize("page", [None, "", MARKS.replace("end", "And"), MARKS[::-1]])
def test_a_page_without_its_marks_is_an_error(sections, page):
    section = sections["quality"]
    if page is not None:
        section.page.write_text(page)
    with pytest.raises(SystemExit, match=r"performance\.md: needs the lines <!-- quality: start"):
        section.check()


def test_unlike_contestants_are_refused():
    refuse = functools.partial(benchmark.refuse_unlike, tolerance=0.1)
    refuse("MLP", {"dgm_jax": speed(1, 100.0), "PyTorch eager": speed(1, 101.0)})
    refuse("MLP", {"dgm_jax": speed(1, 100.0), "pythae": speed(1, 120.0)})  # other initial draws
    with pytest.raises(SystemExit, match=r"MLP: .* parameters: dgm_jax 10, PyTorch eager 11"):
        refuse("MLP", {"dgm_jax": speed(1), "PyTorch eager": speed(1, num_parameters=11)})
    for loss in (85.0, 115.0, math.nan):
        with pytest.raises(SystemExit, match="MLP: the losses differ"):
            refuse("MLP", {"dgm_jax": speed(1), "PyTorch eager": speed(1, loss)})


@pytest.mark.parametrize("by_step", [False, True])
def test_a_case_is_a_config_that_can_be_trained(tiny_dataset, by_step):
    """A step a dispatch as well, of which a run may not have any number."""
    config = contestants.config_of(contestants.CASES[CASE], by_step)
    experiment = prepare(config, tiny_dataset, sharding.make_mesh(1))
    case = contestants.CASES[CASE]
    assert experiment.steps_per_dispatch == (1 if by_step else case.steps_per_call)
    rate = optim.schedule(configs.section(config, "optimizer"), experiment.num_steps)
    assert rate(0) == rate(90_000) == contestants.LEARNING_RATE


def test_the_clock_counts_training_alone(monkeypatch):
    """A trainer of 3 s to compile and 2 s a call, evaluated for 100 s each time."""
    costs = iter([(120.0, 110.0), (105.0, 95.0), (100.0, 91.0), (97.0, 90.0), (1.0, 1.0)])
    now, calls = [0.0], iter([5.0, *[2.0] * 9])

    def spend(seconds, result):
        now[0] += seconds
        return result

    trainer = quality.Trainer(
        10, lambda: spend(next(calls), None), lambda: spend(100.0, next(costs))
    )
    monkeypatch.setattr(quality.time, "perf_counter", lambda: now[0])
    monkeypatch.setitem(quality.RECIPES, "fake", lambda seed: trainer)
    found = quality.measure_quality("fake", limit=600.0, seed=0)
    assert [at["seconds"] for at in found["history"]] == [5.0, 7.0, 9.0, 11.0]
    assert quality.seconds_to("negative_elbo", found["history"]) == 9.0
    assert quality.seconds_to("nll", found["history"]) == 11.0
    assert found["compilation_seconds"] == 3.0
