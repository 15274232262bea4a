"""The verdict from numbers that are made up."""

import copy

import pytest

from ember_mlx.geometry import verdict
from ember_mlx.geometry.sampling import CLASSES


def spread(median, width=1.0, **more):
    return {"count": 100, "p10": median - width / 2, "median": median, "p90": median + width / 2} | more


def numbers():
    """A table on which everything is as the paper has it."""
    error = spread(0.0, squares=50.0, noise=spread(0.0, 0.8))
    path = {"share": spread(0.97), "walk_share": spread(0.85)}
    table = {
        "path": "embed",
        "shape": [100, 8],
        "random_cosine": 0.35,
        "second_moment": {name: {"rows": dict(error), "columns": dict(error)} for name in CLASSES},
        "successive_gradients": {name: spread(0.05) for name in CLASSES},
        "gradients_when_seen_again": {name: spread(-0.02) for name in CLASSES},
        "paths": {name: copy.deepcopy(path) for name in CLASSES},
        "steps_above_cold": {"learning_rates": 10, "share": 0.001},
        "largest_steps": [{"learning_rates": 12.0, "text": "' the'"}],
    }
    hidden = {"kind": "hidden", "successive_gradients": spread(0.1), "paths": path}
    run = {"updates": 300, "cold_updates": 195, "step_limit": 31.6, "peak_memory": 10**9}
    return {"tables": [table], "hidden": hidden, "run": run}


def test_what_is_as_the_paper_has_it_suits():
    judged = verdict.judge(numbers())
    assert [finding["answer"] for finding in judged["findings"]] == ["yes"] * 4
    assert judged["suits"] == "yes"
    assert "saves 5.97 kB of state; the peak memory of this run was 1.00 GB" in judged["words"]  # (1600 - 108) x 4


@pytest.mark.parametrize(
    ("name", "change", "answer", "suits", "words"),
    [
        # exp(sqrt((1.4 / 2.563)^2 - noise^2) / 2) is a factor 1.26, of 6.0: 3.19, of 9.0: 5.8
        ("second_moment", spread(0.0, 1.4, squares=50.0, noise=spread(0.0, 0.8)), "yes", "yes", "a factor 1.25"),
        ("second_moment", spread(0.0, 6.0, squares=50.0, noise=spread(0.0, 0.8)), "partly", "partly", "a factor 3.19"),
        ("second_moment", spread(0.0, 9.5, squares=50.0, noise=spread(0.0, 0.8)), "no", "no", "not of rank one here"),
        ("second_moment", spread(2.0, 0.8, squares=50.0, noise=spread(0.0, 0.8)), "partly", "partly", "a factor 2.72"),
        ("gradients_when_seen_again", spread(0.45), "partly", "yes", "+0.45 (embed)"),
        ("gradients_when_seen_again", spread(0.8), "no", "partly", "alike each time"),
        ("gradients_when_seen_again", spread(-0.8), "no", "partly", "lower the table learning rate"),
        ("successive_gradients", spread(0.9), "partly", "yes", "that is drift of the rows"),
        ("paths", {"share": spread(0.91), "walk_share": spread(0.85)}, "partly", "yes", "One line holds 91%"),
        ("steps_above_cold", None, "no", "partly", "2.0% of the steps of tokens in a batch"),
    ],
)  # fmt: skip
def test_what_is_not_is_told_with_its_numbers(name, change, answer, suits, words):
    given = numbers()
    table = given["tables"][0]
    if name == "second_moment":
        table[name]["middle"]["rows"] = change
    elif name == "steps_above_cold":
        table[name]["share"] = 0.02
    else:
        table[name]["middle"] = change
    judged = verdict.judge(given)
    place = ["second_moment", "successive_gradients", "paths", "steps_above_cold"].index(
        name.replace("gradients_when_seen_again", "successive_gradients")
    )
    assert judged["findings"][place]["answer"] == answer
    assert judged["suits"] == suits
    assert words in judged["words"] + judged["findings"][place]["words"]


@pytest.mark.parametrize(
    ("run", "answer"),
    [
        ({"updates": 120, "cold_updates": 15}, "cannot be told"),
        ({"updates": 120, "cold_updates": 0, "step_limit": 9.99}, "yes"),  # beta2 = 0.99 or row_clip allow none
        ({"updates": 120, "cold_updates": 60}, "yes"),
    ],
)
def test_a_run_too_short_for_large_steps_does_not_show_that_there_are_none(run, answer):
    given = numbers()
    given["run"] |= run
    judged = verdict.judge(given)
    assert judged["findings"][3]["answer"] == answer
    assert judged["suits"] == "yes"
    assert ("too short to tell" in judged["words"]) == (answer == "cannot be told")
    given["tables"][0]["steps_above_cold"]["share"] = 0.02  # but those that there are count
    assert verdict.judge(given)["findings"][3]["answer"] == "no"


@pytest.mark.parametrize("name", ["second_moment", "gradients_when_seen_again"])
def test_too_little_is_no_verdict(name):
    given = numbers()
    few = {"count": 3, "p10": 0.0, "median": 0.0, "p90": 0.0, "squares": 1.5}
    for kind in CLASSES:
        given["tables"][0][name][kind] = {"rows": few, "columns": few} if name == "second_moment" else few
    judged = verdict.judge(given)
    assert judged["suits"] == "cannot be told"
    assert any("train longer" in finding["words"] for finding in judged["findings"])
