"""examples/benchmarks/quality: its search for rates, its plan, its campaign and its tables of results."""

import argparse
import dataclasses
import importlib
import multiprocessing
import re
import threading

import pytest
from quality_benchmark import FOLDER, SETTING, campaigns, draw, plan, recipes, reported


def search(loss, **how):
    losses = {}
    while True:
        best, missing = plan.best_rate(losses, guess=-4, **how)
        if not missing:
            return best, losses
        losses |= {rate: loss(rate) for rate in missing}


def test_the_search_for_a_rate_goes_on_until_the_best_is_not_at_an_edge():
    best, losses = search(lambda rate: float("nan") if rate > 2 else abs(rate - 2.0), finely=False)
    assert (best, {1, 3} <= losses.keys()) == (2, True)


@pytest.mark.parametrize(("least", "quarters"), [(-5.2, []), (-5.3, [-5.5]), (-5.6, [-5.5]), (0.5, [0.5])])
def test_a_quarter_decade_is_tried_where_a_parabola_says_that_it_is_better(least, quarters):
    best, losses = search(lambda rate: (rate - least) ** 2)
    assert [rate for rate in losses if rate != int(rate)] == quarters
    assert best == (quarters or [-5])[0]
    assert min(losses) < best < max(losses)


def test_a_quarter_decade_is_not_tried_far_behind_adamw_nor_beside_a_run_that_blew_up():
    assert plan.best_rate({-6: float("nan"), -5: 1.0, -4: float("inf")}, guess=-5) == (-5, [])
    results, settings = {}, {"a": SETTING}
    while runs := list(plan.wanted(results, [plan.Phase(("a",), ("adamw", "rows", "columns"))], settings)):
        behind = {"adamw": 0, "rows": 0.09, "columns": 0.3}
        results |= {run.key(): behind[run.optimizer] + 0.1 * (run.rate + 4.4) ** 2 + (run.body_rate + 4) ** 2
                    for run in runs}  # fmt: skip
    rates = {name: plan.tuned_rates("a", name, results, settings)[1] for name in ("adamw", "rows", "columns")}
    assert rates == {"adamw": -4.5, "rows": -4.5, "columns": -4}


def test_a_search_begins_where_another_ended():
    """Beside Ember's rate in the same setting, or where it was in the setting like it; AdamW's as far away as ever."""
    results, settings = {}, {"a": SETTING, "b": dataclasses.replace(SETTING, like="a")}
    phases = [plan.Phase((name,), ("adamw", "ember"), seeds=()) for name in ("a", "b")]
    while runs := list(plan.wanted(results, phases[:1], settings)):
        best = {"adamw": -8, "ember": 1}
        results |= {run.key(): (run.rate - best[run.optimizer]) ** 2 + (run.body_rate + 6) ** 2 for run in runs}
    first = plan.wanted(results, phases[1:], settings)
    assert [(run.body_rate, run.rate) for run in first] == [(-6, -8), (-7, -8), (-5, -8), (-6, -9), (-6, -7)]
    for body_rate, rate in ((-6, -8), (-7, -8), (-5, -8), (-6, -9), (-6, -7)):
        results[plan.Run("b", "adamw", rate, body_rate, 0).key()] = abs(rate + 8) + abs(body_rate + 6)
    assert [run.rate for run in plan.wanted(results, phases[1:], settings)] == [1, 0, 2]
    for rate in (2, 3, 4):
        results |= {plan.Run("b", "ember", rate, -6, 0).key(): (rate - 3) ** 2}
    assert [run.rate for run in plan.wanted(results, [plan.Phase(("b",), ("rows",), seeds=())], settings)] == [3, 2, 4]


class Workers:
    """In threads: the first dies with its run, as many runs as ``failures`` fail, all others end well."""

    def __init__(self, failures):
        self.hired, self.failures = 0, failures

    def hire(self, number):
        ours, theirs = multiprocessing.Pipe()
        self.hired += 1
        threading.Thread(target=self.work, args=(theirs, self.hired == 1), daemon=True).start()
        return ours

    def work(self, connection, dies):
        with connection:
            while True:
                try:
                    run, _ = connection.recv()
                except EOFError:
                    return
                if dies:
                    return
                if self.failures:
                    self.failures -= 1
                    connection.send({"error": "an illegal memory access was encountered"})
                    return
                connection.send({"valid_loss": abs(run.rate + 4) + abs(run.body_rate + 4), "seconds": 0.0})


@pytest.fixture
def campaign(tmp_path):
    args = argparse.Namespace(data=tmp_path, out=tmp_path / "runs.jsonl", bases=tmp_path, workers=2)
    args.seconds = args.runs = 10**9
    args.first_guess = 60.0
    return campaigns.Campaign(args, {"a": SETTING}, [plan.Phase(("a",), ("ember", "adamw"))], [], {})


def test_a_campaign_goes_on_when_a_worker_dies_and_another_fails(campaign, monkeypatch):
    workers = Workers(failures=1)
    monkeypatch.setattr(campaign, "hire", workers.hire)
    campaign.run()
    assert (workers.hired, campaign.failed) == (2 + 2, 2)
    assert not list(plan.wanted(campaign.losses, campaign.phases, campaign.settings))
    assert campaign.finished == len(campaign.args.out.read_text().splitlines()) == len(campaign.losses)


def test_what_always_fails_is_left_after_a_few_times(campaign, monkeypatch):
    monkeypatch.setattr(campaign, "hire", Workers(failures=10**9).hire)
    campaign.run()
    assert campaign.finished == 0
    assert campaign.failed in (campaigns.MOST_FAILURES, campaigns.MOST_FAILURES + 1)  # one more was under way


@pytest.mark.parametrize(("left", "expected"), [("", [2]), ('{"a": 1}\n', [1, 2]), ('{"a": 1}\n{"a": 9', [1, 2])])
def test_a_campaign_goes_on_after_half_a_line(tmp_path, left, expected):
    path = tmp_path / "runs.jsonl"
    path.write_text(left)
    campaigns.end_last_line(path)
    assert "\n\n" not in f"\n{path.read_text()}"
    with path.open("a") as file:
        file.write('{"a": 2}\n')
    assert [line["a"] for line in campaigns.read_results([path])] == expected


def test_the_body_has_the_rate_of_the_best_adamw_over_both_rates():
    """With one rate for both, the best would be a body at -4 or -5."""
    results, settings = {}, {"a": SETTING}
    phases = [plan.Phase(("a",), ("adamw",), seeds=(1,), bodies=True)]
    while runs := list(plan.wanted(results, phases, settings)):
        results |= {run.key(): abs(run.rate + 2) + abs(run.body_rate + 7) for run in runs}
    assert plan.tuned_rates("a", "adamw", results, settings) == (-7, -2)
    assert {plan.Run("a", "adamw", -2, body, 0).key() for body in (-8, -6)} <= results.keys()


def test_the_plan_reports_other_seeds_at_the_best_rate_and_ends():
    settings = {"a": SETTING}
    phases = [plan.Phase(("a",), ("ember", "frozen"), seeds=(1, 2), probes=("ember",))]
    results = {}
    while runs := list(plan.wanted(results, phases, settings)):
        for run in runs:
            results[run.key()] = abs(run.rate + 6) + 2 * abs(run.body_rate + 3) + run.seed
    reported = sorted((key for key in results if key[4] != plan.TUNING_SEED), key=str)
    assert reported == [
        ("a", "ember", -6, -3, 1, None, False), ("a", "ember", -6, -3, 1, None, True),
        ("a", "ember", -6, -3, 2, None, False),
        ("a", "frozen", 0, -3, 1, None, False), ("a", "frozen", 0, -3, 2, None, False),
    ]  # fmt: skip


def test_a_recipe_has_a_body_rate_of_its_own_and_mlx_lm_one_rate():
    """Searched for until no neighbour is better; beside AdamW's best, or as far from it as in the setting like it."""
    settings = {"a": SETTING, "b": dataclasses.replace(SETTING, like="a")}
    best = {("adamw", "adamw"): (-6, -4), ("sinkgd", "ember"): (-9, -2), (plan.ONE_RATE, plan.ONE_RATE): (-7, -7)}
    shift, untuned, results, counts = {"a": 0, "b": 2}, [("adamw", "frozen"), ("frozen", "frozen")], {}, {}
    adamw, *others = best
    for name, chosen in ((name, chosen) for name in settings for chosen in ([adamw], [*others, *untuned])):
        phases = [plan.Phase((name,), (), seeds=(1,), recipes=tuple(chosen))]
        while runs := list(plan.wanted(results, phases, settings)):
            for run in runs:
                body, rate = best.get((run.body, run.optimizer), (0, 0))
                results[run.key()] = abs(run.body_rate - body - shift[name]) + abs(run.rate - rate - shift[name])
                counts[name, chosen[0]] = counts.get((name, chosen[0]), 0) + 1
    for name, there in shift.items():
        for recipe, (body, rate) in best.items():
            assert plan.tuned_recipe(name, *recipe, results, settings) == (body + there, rate + there)
            assert plan.Run(name, recipe[1], rate + there, body + there, 1, body=recipe[0]).key() in results
        assert plan.Run(name, "frozen", 0, -6 + there, 1).key() in results
        assert plan.Run(name, "frozen", 0, 0, 1, body="frozen").key() in results
    assert counts["b", others[0]] == (5 + 1 + 1) + (3 + 1 + 1) + 1 + 1  # no search went astray
    assert counts["a", others[0]] > counts["b", others[0]]


def test_the_tables_compare_seed_by_seed_and_choose_by_the_tuning_seed(tmp_path):
    """adamw-0.99 is better than adamw with the reported seeds, which nobody may know when one of them is chosen."""
    losses = {}
    phases = [plan.Phase(("untied-4k",), ("ember", "adamw", "adamw-0.99"))]
    while runs := list(plan.wanted(losses, phases)):
        for run in runs:
            loss = 4 + 0.1 * (run.rate + 5) ** 2 + 0.1 * (run.body_rate + 6) ** 2 + run.seed
            loss -= {"ember": 0.02 + 0.001 * run.seed, "adamw": 0, "adamw-0.99": 0.03 if run.seed else -0.01}[
                run.optimizer
            ]
            losses[run.key()] = loss
    fields = {"gpu": "x", "torch": "x", "seconds": 60, "commit": "x"}
    lines = [{"run": dataclasses.asdict(plan.Run(*key)), "valid_loss": loss, **fields} for key, loss in losses.items()]
    results = reported.Results(lines)
    difference, half, count = reported.against(*(results.reported("untied-4k", name) for name in ("ember", "adamw")))
    assert (difference, count) == (pytest.approx(-0.022), 3)
    assert half == pytest.approx(4.303 * 0.001 / 3**0.5)
    assert results.best_of("untied-4k", plan.ADAMW) == "adamw"
    draw.write_tables(results, tmp_path / "tables.md")
    assert "-0.0220 ± 0.0025 (ember minus adamw)" in (tmp_path / "tables.md").read_text()


def test_recipes_are_compared_seed_by_seed_and_what_they_forget_with_the_untrained_model(tmp_path):
    """Seeds of earlier campaigns, whose losses are 0 here, do not count; their tuning runs do."""
    name, losses, earlier, lines = "smollm2-wikisql", {}, [], []
    frozen = ("adamw", "frozen")
    above = {("adamw", "adamw"): 0.2, ("sinkgd", "ember"): 0.1, frozen: 0.3, ("frozen", "frozen"): 1.0}
    fields = {"gpu": "x", "torch": "x", "seconds": 60, "commit": "x", "decile_counts": [9, 1, *[0] * 8]}
    while runs := list(plan.wanted(losses, [plan.Phase((name,), (), recipes=tuple(above))])):
        for run in (run for run in runs if run.key() not in losses):
            loss = above[run.body, run.optimizer] + 0.1 * abs(run.rate + 8) + 0.1 * abs(run.body_rate + 7)
            loss += run.seed - (0.001 * run.seed if run.body == "sinkgd" else 0)
            if run.optimizer == "frozen":
                loss = above[run.body, run.optimizer] + run.seed
            losses[run.key()] = loss
            line = {"run": dataclasses.asdict(run), "valid_loss": loss, **fields,
                    "decile_losses": [loss, 2 * loss, *[0.0] * 8],
                    "other_losses": {"smollm2_rasbt": 2 + above[run.body, run.optimizer]}}  # fmt: skip
            (lines if run.seed else earlier).append(line)
            if run.seed and run.body == "adamw":
                earlier.append(line | {"valid_loss": 0.0})
    results = recipes.Recipes(earlier, lines)
    recipes.write_tables(results, tmp_path / "recipes.md")
    text = (tmp_path / "recipes.md").read_text()
    half = 4.303 * 0.001 / 3**0.5
    assert f"| SinkGD; Ember | 2.0980 ± 0.9990 | 3 | -0.1020 ± {half:.4f} | 0.00032 0.0001 |" in text
    assert f"| SinkGD; Ember | -0.1020 ± {half:.4f} | -0.2040 ± {2 * half:.4f} | -0.900 ± 0.000 |" in text
    assert "| nothing trained | 3.0000 ± 1.0000 | 3 | +0.8000 ± 0.0000 |" in text


def test_pretraining_has_the_rarest_tokens_and_pairs_in_place_of_other_data_sets(tmp_path):
    lines, above = [], {("adamw", "adamw"): 0.0, ("sinkgd", "adamw"): 0.1, ("sinkgd", "sage"): 0.4}
    for (body, tables), behind in above.items():
        for step, seed in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, 2)):
            for run in (plan.Run("llama-16k", tables, -5, -7 + step, seed, body=body),
                        plan.Run("llama-16k", tables, -5 + step, -7, seed, body=body)):  # fmt: skip
                loss = 4 + seed + abs(step) + behind * (1 + seed / 10)
                lines.append({"run": dataclasses.asdict(run), "valid_loss": loss, "decile_counts": [10] * 10,
                              "decile_losses": [loss, *[2 * loss] * 8, 3 * loss]})  # fmt: skip
    recipes.write_tables(recipes.Recipes([], lines), tmp_path / "recipes.md")
    text, half = (tmp_path / "recipes.md").read_text(), 12.706 * 0.005
    assert "| most frequent tenth of the tokens | the other nine | the rarest |" in text
    assert "other data sets" not in text
    thrice = f"+0.3450 ± {3 * half:.4f} |"
    assert re.search(rf"\| SinkGD; AdamW \| \+0.1150 ± {half:.4f} \| [^|]+ \| {re.escape(thrice)}", text)
    assert f"| SinkGD; SAGE | SinkGD; AdamW | {thrice}" in text
    assert "| Lion" not in text


def test_tables_at_a_constant_rate_are_compared_with_ember_by_seed(tmp_path):
    name, lines = "smollm2-rasbt-lora-constant", []
    for rule, rate, ahead in (("ember", -8, 0.0), ("ember-floor3", -7, 0.1), ("frozen", 0, -0.3)):
        for seed in (0, 1, 2):
            run, loss = plan.Run(name, rule, rate, -7, seed), 1 + seed - ahead * seed
            lines.append({"run": dataclasses.asdict(run), "valid_loss": loss, "decile_losses": [loss, *[2 * loss] * 9],
                          "decile_counts": [10] * 10})  # fmt: skip
    recipes.write_tables(recipes.Recipes(lines, lines), tmp_path / "recipes.md", lines)
    text = (tmp_path / "recipes.md").read_text()
    half = 12.706 * 0.05
    floored = f"| 2.3500 ± 0.6364 | 2 | -0.1500 ± {half:.4f} | -0.3000 ± {2 * half:.4f} |"
    assert f"| AdamW; Ember, row_floor 3 | 0.00032 0.00032 {floored}" in text
    assert "| AdamW; tables not trained | 0.00032 | 2.9500" in text


def test_runs_at_given_rates_are_compared_where_one_thing_differs_and_what_they_forget_is_told(tmp_path):
    name, lines = "smollm2-rasbt-lora-constant", []
    plain, floored = plan.WITHOUT_FLOOR, plan.WITH_FLOOR
    runs = [plan.Run("smollm2-rasbt", "frozen", 0, 0, 1, body="frozen")]
    runs += [plan.Run(name, "ember", -8, -7, seed) for seed in (1, 2)]
    given = ((plain, -8, -10), (floored, -7, -10), (plain, -8, -8), (floored, -7, -8), (floored, -6, -8))
    runs += [
        plan.Run(name, rule, rate, body, seed, body="adam-mlx") for rule, rate, body in given for seed in (0, 1, 2)
    ]
    for run in runs:  # seed 0 would turn every difference around
        loss = 3 + run.body_rate / 10 - (0.1 * run.seed if run.optimizer == floored else 0) + (run.seed or 9 * run.rate)
        lines.append({"run": dataclasses.asdict(run), "valid_loss": loss, "decile_losses": [3 * loss, *[2 * loss] * 9],
                      "decile_counts": [10] * 10, "other_losses": {"a": -loss, "b": -3 * loss}})  # fmt: skip
    recipes.write_tables(recipes.Recipes([], lines), tmp_path / "recipes.md", lines)
    text = (tmp_path / "recipes.md").read_text()
    rows = [row for row in text.splitlines() if row.startswith(("| 1e-05 |", "| 0.0001 |"))]
    half, low, high = 12.706 * 0.05, "row_floor 3, 0.00032", "no floor, 0.0001"
    gain = (
        f"2 | -0.1500 ± {half:.4f} | -0.4500 ± {3 * half:.4f} | -0.3000 ± {2 * half:.4f} | +0.3000 ± {2 * half:.4f} |"
    )
    slower = "2 | -0.2000 ± 0.0000 | -0.6000 ± 0.0000 | -0.4000 ± 0.0000 | +0.4000 ± 0.0000 |"
    assert rows == [  # not the rates that no phase gives
        f"| 1e-05 | {low} | 1e-05 | {high} | {gain}",
        f"| 1e-05 | {low} | 0.0001 | {low} | {slower}",
        f"| 1e-05 | {high} | 0.0001 | {high} | {slower}",
        f"| 0.0001 | {low} | 0.0001 | {high} | {gain}",
    ]
    assert "| AdamW; Ember | 0.00032 0.0001 | 3.8000 ± 0.7071 | 2 |  |  | +0.400 |" in text


def test_recipes_are_all_compared_at_half_decades_or_all_at_quarters():
    """A campaign may be cut off when some recipes have their quarter decade and others have not."""
    name, both, losses, lines = "smollm2-rasbt", (("adamw", "adamw"), ("sinkgd", "ember")), {}, []
    rates = {recipe: [] for recipe in both}
    for chosen, finely in ((both, False), (both[:1], True), (both, True)):
        phases = [plan.Phase((name,), (), seeds=(1,), recipes=chosen, finely=finely)]
        while runs := [run for run in plan.wanted(losses, phases) if run.key() not in losses]:
            for run in runs:
                losses[run.key()] = abs(run.rate + 8) + abs(run.body_rate + 6.6)
                lines.append({"run": dataclasses.asdict(run), "valid_loss": losses[run.key()]})
        results = recipes.Recipes([], lines)
        for recipe in both:
            rates[recipe].append(results.reported(name, recipe).rate[0])
            assert list(results.reported(name, recipe).by_seed) == [1]
    assert [rates[recipe] for recipe in both] == [[-7, -7, -6.5]] * 2


@pytest.fixture
def grpo(monkeypatch):
    pytest.importorskip("mlx.core")  # which the GPU machines of the benchmark do not have
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("grpo")


def test_grpo_is_tuned_by_the_mean_of_two_seeds_and_reported_with_others(grpo):
    lines = []
    while runs := grpo.wanted(lines, "m"):
        run = runs[0]
        other = run["table_rate" if run["optimizer"] == "sinkgd" else "body_rate"]
        reward = -abs(run["rate"] + 6) - (0 if other is None else abs(other + 6))
        reward += {0: 3 if run["rate"] == -4 else 0, 4: -3 if run["rate"] == -4 else 0}.get(run["seed"], 0)  # luck
        lines.append({"run": run, "reward": reward, "reward_before": 0.0})
    reported = [line["run"] for line in lines if line["run"]["seed"] in grpo.REPORTED_SEEDS]
    assert len(reported) == 4 * len(grpo.REPORTED_SEEDS)
    assert {(run["rate"], run.get("body_rate"), run.get("table_rate")) for run in reported} == {
        (-6, None, None),
        (-6, -6, None),
        (-6, None, -6),
    }
    assert grpo.table_of(lines).count(f"| {len(grpo.REPORTED_SEEDS)} | 0.001 |") == 4


def test_the_reward_counts_a_word_once_and_no_nonsense(grpo):
    said = ["A big, BIG bear!", "Bkk bo bobo.", ""]
    assert grpo.reward_b_words(None, said, None) == [2 / 8, 0.0, 0.0]
