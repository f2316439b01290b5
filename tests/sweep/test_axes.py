"""What a sweep varies: grids, draws, texts, and what is refused."""

import numpy as np
import pytest

from dgm_jax import config as configs
from dgm_jax.core import UserError
from dgm_jax.sweep import axes

CONFIG = configs.experiment("vae")


def test_a_grid_has_every_combination_once():
    found = axes.grid({"model.beta": (0.5, 1.0), "seed": range(3)})
    assert len(found) == 6
    assert {(m["model.beta"], m["seed"]) for m in found} == {
        (b, s) for b in (0.5, 1.0) for s in range(3)
    }
    assert found[1] == {"model.beta": 0.5, "seed": 1}  # the last varies fastest


def test_draws_repeat_and_lie_where_they_should():
    chosen = {
        "optimizer.learning_rate": axes.log_uniform(1e-4, 1e-2),
        "model.beta": axes.uniform(1.0, 3.0),
        "model.activation": axes.choice("silu", "tanh"),
    }
    found = axes.random(2000, chosen, seed=1)
    assert found == axes.random(2000, chosen, seed=1) != axes.random(2000, chosen, seed=2)
    rates = np.log10([m["optimizer.learning_rate"] for m in found])
    # Uniform on (-4, -2) has mean -3 and standard deviation 2 / √12; five standard errors.
    assert rates.min() >= -4 and rates.max() <= -2
    assert abs(rates.mean() + 3) < 5 * 2 / 12**0.5 / 2000**0.5
    betas = np.array([m["model.beta"] for m in found])
    assert betas.min() >= 1 and betas.max() <= 3
    assert abs(betas.mean() - 2) < 5 * 2 / 12**0.5 / 2000**0.5
    assert {m["model.activation"] for m in found} == {"silu", "tanh"}
    configs.override(CONFIG, found[0])  # values of the right types


def test_a_text_is_read_by_the_types_of_its_fields():
    found = axes.parse("model.beta=0.5,1; model.encoder=(200,),(500, 500) ;seed=2:4", CONFIG)
    assert len(found) == 8
    assert found[0] == {"model.beta": 0.5, "model.encoder": (200,), "seed": 2}
    assert found[-1] == {"model.beta": 1.0, "model.encoder": (500, 500), "seed": 3}
    assert type(found[-1]["model.beta"]) is float
    names = axes.parse("model.objective=elbo,stl;optimizer.learning_rate=1e-3", CONFIG)
    assert [m["model.objective"] for m in names] == ["elbo", "stl"]
    assert axes.parse("model.conditional=True,False", CONFIG)[0] == {"model.conditional": True}


@pytest.mark.parametrize("text", ["seed=0:1000000000", "seed=0:200;data.seed=0:200"])
def test_a_sweep_too_large_is_refused_before_its_members_are_made(text):
    with pytest.raises(UserError, match=r"10,000 members, and this one (1,000,000,000|40,000)"):
        axes.parse(text, CONFIG)


@pytest.mark.parametrize(
    "body",
    ["pass", "return 3", "return {'seed': 1}", "return ['seed']", "yield {'seed': 1}; yield"],
)
def test_a_configs_sweep_of_something_else_is_refused(tmp_path, body):
    path = tmp_path / "mine.py"
    path.write_text(f"def sweep():\n    {body}\n")
    with pytest.raises(UserError, match=r"mine.py: sweep\(\) must give a list of dictionaries"):
        configs.load_sweep(str(path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model.betta=1", "model.betta.*model.beta"),
        ("model.beta=big", "model.beta='big': expected float"),
        ("model.latents=1.5", "model.latents='1.5': expected int"),
        ("model.encoder=200", "model.encoder='200': expected tuple"),
        ("model.beta", "write field=value"),
        ("seed=3:3", "no numbers"),
        ("seed=0:2;seed=3", "twice"),
        ("", "empty"),
        (" ; ", "empty"),
    ],
)
def test_a_text_that_makes_no_sense_is_refused(text, says):
    with pytest.raises(UserError, match=says):
        axes.parse(text, CONFIG)


def test_ranges_are_read_by_the_types_of_their_fields():
    found = axes.parse_search(
        "optimizer.learning_rate=log_uniform(1e-4,1e-2);model.beta=uniform(0, 2);"
        "model.encoder=choice((200,),(500,500));model.objective=choice(elbo,stl)",
        CONFIG,
    )
    assert found == {
        "optimizer.learning_rate": axes.log_uniform(1e-4, 1e-2),
        "model.beta": axes.uniform(0.0, 2.0),
        "model.encoder": axes.choice((200,), (500, 500)),
        "model.objective": axes.choice("elbo", "stl"),
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model.beta=0.5,1", "a search wants"),
        ("model.beta=uniform(2,1)", "the lower first"),
        ("model.beta=uniform(1)", "two real numbers"),
        ("model.latents=uniform(1,2)", "two real numbers"),
        ("model.beta=log_uniform(0,1)", "above 0"),
        ("model.betta=uniform(0,1)", "model.beta"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused(text, says):
    with pytest.raises(UserError, match=says):
        axes.parse_search(text, CONFIG)


def test_a_range_knows_what_lies_in_it():
    rates, sizes = axes.log_uniform(1e-4, 1e-2), axes.choice((200,), (500, 500))
    assert rates.contains(1e-4) and rates.contains(1e-2) and sizes.contains((200,))
    assert not any(rates.contains(value) for value in (9e-5, 0.1, "elbo"))
    assert not any(sizes.contains(value) for value in ((500,), 200))


def test_members_get_the_configs_values_where_they_set_none():
    found = axes.complete(CONFIG, [{"seed": 1}, {"model.beta": 2}])
    assert found == [{"seed": 1, "model.beta": 1.0}, {"seed": 0, "model.beta": 2.0}]
    assert type(found[1]["model.beta"]) is float


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([], "no members"),
        ([{"seed": 1}, {"seed": 1}], "members 0 and 1 .* the same"),
        ([{"seed": 0}, {"model.beta": 1.0}], "the same"),  # both are the config itself
        ([{"sead": 1}], "sead"),
        ([{"seed": "one"}], "expected int"),
    ],
)
def test_members_that_make_no_sense_are_refused(members, says):
    with pytest.raises(UserError, match=says):
        axes.complete(CONFIG, members)


def test_labels_are_short_and_tell_fields_apart():
    assert axes.labels(["model.beta", "seed"]) == {"model.beta": "beta", "seed": "seed"}
    same = ["data.seed", "seed"]
    assert axes.labels(same) == dict(zip(same, same, strict=True))
