"""Tables and a picture of whole recipes, a body's optimizer with the tables', from the lines of results/recipes.

    python examples/benchmarks/quality/recipes.py

The tuning runs of results/*.jsonl count too; the reported seeds are those of results/recipes alone, of one kind of GPU.
At a constant rate, as `ember-mlx train` has it, tables are compared with those of the earlier campaign, seeds and all.
The phase "defaults" has no search: its runs at given rates are compared pair by pair.
"""

import argparse
import math
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

import plan
from body_rules import BODY_RULES
from draw import in_interval, in_words, rate_in_words
from plan import BASELINE, SETTINGS, TUNING_SEED, Run, tuned_recipe
from reported import Reported, against, paired
from run import loss_of, read_results
from table_rules import TABLE_RULES

from ember_mlx.plots.style import save_light_and_dark

HERE = Path(__file__).parent
ADAMW, UNTRAINED = (BASELINE, BASELINE), ("frozen", "frozen")
ORDER = dict.fromkeys(
    (*plan.RECIPES, *plan.MORE_RECIPES, *plan.LORA_RECIPES, *plan.FLOOR_RECIPES, (BASELINE, "frozen"), UNTRAINED,
     *plan.PRETRAINING_RECIPES)
)  # fmt: skip

# Of pretraining, beside each other: the SAGE paper's claims, Ember beside SinkGD, and what its beta2 is worth.
PAIRS = (
    (("sinkgd", "sage"), ("lion", "lion")), (("sinkgd", "sage"), ("sinkgd", "adamw")),
    (("sinkgd", "ember-growing"), ("sinkgd", "adamw")), (("adamw", "ember-growing"), (BASELINE, "ember")),
)  # fmt: skip


class Recipes:
    """All lines, by recipe: (optimizer of the body, optimizer of the tables)."""

    def __init__(self, tuning, lines):
        lines = [*(line for line in tuning if line["run"]["seed"] == TUNING_SEED), *lines]
        self.by_run = {Run(**line["run"]).key(): line for line in lines}
        self.losses = {key: loss_of(line) for key, line in self.by_run.items()}
        self.runs = [Run(*key) for key in self.by_run]
        self.settings = [name for name in SETTINGS if any(run.setting == name and run.seed for run in self.runs)]
        self.settings = [name for name in self.settings if not SETTINGS[name].constant]
        self.finely = {setting: self._ended_finely(setting) for setting in self.settings}

    def _ended_finely(self, setting):
        """Whether every recipe that is reported has the seeds of its best quarter decade too."""
        reported = [recipe for recipe in ORDER if self._at_best(setting, recipe, finely=False).by_seed]
        return all(self._at_best(setting, recipe, finely=True).by_seed for recipe in reported)

    def reported(self, setting, recipe):
        """The runs by seed at the best rates: of half decades, until every recipe has its quarter decade too."""
        return self._at_best(setting, recipe, self.finely[setting])

    def _at_best(self, setting, recipe, finely):
        rates = tuned_recipe(setting, *recipe, self.losses, finely=finely)
        same = (setting, *recipe, *(rates or ()))
        found = {
            run.seed: self.by_run[run.key()] for run in self.runs
            if (run.setting, run.body, run.optimizer, run.body_rate, run.rate) == same and run.seed != TUNING_SEED
        }  # fmt: skip
        return Reported(rates, dict(sorted(found.items())))

    def ended(self, setting, recipe):
        """Whether the search for its half decades has."""
        return tuned_recipe(setting, *recipe, self.losses, finely=False) is not None

    def tried(self, setting, recipe):
        """{(rate of the body, rate of the tables): loss} of the tuning seed."""
        return {
            (run.body_rate, run.rate): self.losses[run.key()] for run in self.runs
            if (run.setting, run.body, run.optimizer, run.seed, run.probe) == (setting, *recipe, TUNING_SEED, False)
        }  # fmt: skip

    def recipes(self, setting):
        """Those that are reported, the best first."""
        found = [recipe for recipe in ORDER if self.reported(setting, recipe).by_seed]
        return sorted(found, key=lambda recipe: mean(self.reported(setting, recipe).losses()))


def name_of(recipe):
    body, tables = recipe
    if recipe == UNTRAINED:
        return "nothing trained"
    if body == tables and body in (plan.ONE_RATE, "lion", "adam-mini"):
        return f"{BODY_RULES[body].words}, on everything"
    return f"{BODY_RULES[body].words}; {TABLE_RULES[tables][2].replace('tables in bf16,', 'bf16')}"


def rarer_loss(line):
    """Mean loss of the tokens outside the most frequent tenth of the vocabulary."""
    pairs = list(zip(line["decile_losses"], line["decile_counts"], strict=True))[1:]
    return sum(loss * count for loss, count in pairs) / sum(count for _, count in pairs)


def forgotten(line, untrained):
    """How much the loss on the other data sets rose, on average."""
    others = line.get("other_losses") or {}
    rises = [loss - untrained["other_losses"][name] for name, loss in others.items()]
    return mean(rises) if rises else math.nan


def others_loss(line):
    return mean(line["other_losses"].values())


def losses_table(results, setting):
    """Markdown: a row a recipe."""
    baseline = results.reported(setting, ADAMW)
    lines = [
        "| body; tables | validation loss | runs | minus AdamW | rates of body, tables | tried |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for recipe in results.recipes(setting):
        reported = results.reported(setting, recipe)
        losses = reported.losses()
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        interval = "" if recipe == ADAMW else in_interval(*against(reported, baseline))
        trained = [rate for rate, rule in zip(reported.rate, recipe, strict=True) if rule != "frozen"]
        rates = " ".join(map(rate_in_words, trained))
        lines.append(
            f"| {name_of(recipe)} | {mean(losses):.4f}{spread} | {len(losses)} | {interval} | {rates} "
            f"| {len(results.tried(setting, recipe))} |"
        )
    return "\n".join(lines)


def forgetting_table(results, setting):
    """Markdown: what a recipe does to tokens, and in fine-tuning to texts, that the data hardly has."""
    untrained = results.reported(setting, UNTRAINED).by_seed.get(1)
    adamw = results.reported(setting, ADAMW)
    if not adamw.by_seed:
        return ""
    numbers = {"most frequent tenth of the tokens": lambda line: line["decile_losses"][0], "the other nine": rarer_loss}
    if not untrained:  # pretraining, whose texts have some thousand tokens of the rarest tenth
        numbers["the rarest"] = lambda line: line["decile_losses"][-1]
    heads = ["body; tables", *numbers, *(["other data sets"] if untrained else [])]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    for recipe in (recipe for recipe in results.recipes(setting) if recipe != UNTRAINED):
        reported = results.reported(setting, recipe)
        cells = ["" if recipe == ADAMW else in_interval(*paired(reported, adamw, of)) for of in numbers.values()]
        if untrained:
            rises = [forgotten(line, untrained) for line in reported.by_seed.values()]
            cells.append(f"{mean(rises):+.3f}" + (f" ± {stdev(rises):.3f}" if len(rises) > 1 else ""))
        lines.append(f"| {name_of(recipe)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pairs_table(results, setting):
    """Markdown: the pairs of PAIRS of which both have runs."""
    found = ((pair, against(*(results.reported(setting, recipe) for recipe in pair))) for pair in PAIRS)
    rows = [f"| {name_of(a)} | {name_of(b)} | {in_interval(*how)} |" for (a, b), how in found if how[2]]
    return "\n".join(["| body; tables | minus: body; tables | validation loss |", "| --- | --- | --- |", *rows])


def tuning_table(results, setting):
    """Markdown: every pair of rates that was tried with the tuning seed, the best first."""
    lines = ["| body; tables | loss by rates of body, tables |", "| --- | --- |"]
    for recipe in ORDER:
        tried = sorted(results.tried(setting, recipe).items(), key=lambda item: item[1])
        if tried:
            words = "; ".join(f"{rate_in_words(b)} {rate_in_words(t)}: {loss:.4f}" for (b, t), loss in tried[:6])
            ended = "" if results.ended(setting, recipe) else " (search not ended)"
            lines.append(f"| {name_of(recipe)}{ended} | {words} |")
    return "\n".join(lines)


def by_rates(lines, setting):
    """{(body, tables, rate of the body, of the tables): its runs by seed}, the tuning seed left out."""
    groups = {}
    for line in lines:
        run = Run(**line["run"])
        if run.setting == setting and run.seed != TUNING_SEED and not run.probe:
            groups.setdefault((run.body, run.optimizer, run.body_rate, run.rate), {})[run.seed] = line
    return {group: Reported(None, dict(sorted(by_seed.items()))) for group, by_seed in groups.items()}


def constant_table(lines, setting, untrained):
    """Markdown: a row for each pair of optimizers and rates that has several seeds, the best first."""
    several = {group: runs for group, runs in by_rates(lines, setting).items() if len(runs.by_seed) > 1}
    ember = next((reported for group, reported in several.items() if group[:2] == (BASELINE, "ember")), None)
    if ember is None:
        return ""
    table = [
        "| body; tables | rates of body, tables | validation loss | runs | minus Ember | the nine rarer tenths "
        "| rise on other data sets |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for group, reported in sorted(several.items(), key=lambda item: mean(item[1].losses())):
        body, rule, *rates = group
        rates = " ".join(rate_in_words(rate) for rate in (rates[:1] if rule == "frozen" else rates))
        losses = reported.losses()
        differences = ["", ""]
        if reported is not ember:
            differences = [in_interval(*against(reported, ember)), in_interval(*paired(reported, ember, rarer_loss))]
        rise = mean(forgotten(line, untrained) for line in reported.by_seed.values()) if untrained else math.nan
        table.append(
            f"| {name_of((body, rule))} | {rates} | {mean(losses):.4f} ± {stdev(losses):.4f} | {len(losses)} "
            f"| {' | '.join(differences)} | {'' if math.isnan(rise) else f'{rise:+.3f}'} |"
        )
    return "\n".join(table)


def defaults_table(lines, setting):
    """Markdown: of the runs at given rates, each two that differ in the tables alone or in the body's rate alone."""
    given = {four for phase in plan.PHASES["defaults"] if setting in phase.settings for four in phase.given}
    found = {four: runs for four, runs in by_rates(lines, setting).items() if four in given}
    table = [
        "| body at | tables | minus: body at | tables | runs | validation loss | most frequent tenth | the other nine "
        "| other data sets |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    # With a floor before without, high rates of the tables before low ones, low rates of the body before high ones.
    in_order = sorted(found.items(), key=lambda item: (item[0][2], item[0][1] != plan.WITH_FLOOR, -item[0][3]))
    numbers = (loss_of, lambda line: line["decile_losses"][0], rarer_loss, others_loss)
    for (one, ours), (other, theirs) in combinations(in_order, 2):
        if one[2] == other[2] or one[1::2] == other[1::2]:
            words = (
                f"{rate_in_words(body_rate)} | {'row_floor 3' if rule == plan.WITH_FLOOR else 'no floor'}, "
                f"{rate_in_words(rate)}" for _, rule, body_rate, rate in (one, other)
            )  # fmt: skip
            cells = (in_interval(*paired(ours, theirs, number)) for number in numbers)
            table.append(f"| {' | '.join(words)} | {against(ours, theirs)[2]} | {' | '.join(cells)} |")
    return "\n".join(table) if len(table) > 2 else ""


def defaults_part(lines, setting):
    table = defaults_table(lines, setting)
    words = "Phase `defaults`: bf16 tables rounded stochastically, rates as given, differences by seed"
    return [f"{words}:\n\n{table}\n"] if table else []


def draw_differences(results, shown, figure, theme):
    """A panel a setting: each recipe's distance to AdamW."""
    shared = sorted({r for s in shown for r in results.recipes(s)} - {UNTRAINED, ADAMW, (BASELINE, "frozen")},
                    key=list(ORDER).index)  # fmt: skip
    many_axes = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, setting in zip(many_axes, shown, strict=True):
        baseline = results.reported(setting, ADAMW)
        for y, recipe in enumerate(shared):
            difference, half, count = against(results.reported(setting, recipe), baseline)
            if count and math.isfinite(difference):
                axes.errorbar([difference], [y], xerr=[0 if math.isnan(half) else half], marker="o", capsize=3,
                              color=theme.lines[0], linestyle="none", markevery=1)  # fmt: skip
        axes.axvline(0, color=theme.text, linewidth=1, linestyle="-", marker="")
        axes.set_title(SETTINGS[setting].data.removeprefix("smollm2_") if SETTINGS[setting].start else setting)
        axes.set_yticks(range(len(shared)), [name_of(recipe) for recipe in shared])
        axes.set_ylim(len(shared) - 0.5, -0.5)
        axes.grid(False, axis="y")
    figure.supxlabel("validation loss minus AdamW's, all float32: left is better (95 % interval)", fontsize=11)


def write_tables(results, path, constant=()):
    """``constant`` are the lines of all campaigns, for the settings with a constant rate."""
    parts = [
        "# Whole recipes\n\nWritten by recipes.py from results/recipes/*.jsonl; do not edit. Loss in nats a token; "
        "mean ± standard deviation over seeds. Differences are paired by seed: mean ± half of the 95 % interval of "
        "Student's t. Negative is better.\n"
    ]
    for setting in results.settings:
        parts.append(f"## {setting}\n\n{in_words(setting)}.\n\n{losses_table(results, setting)}\n")
        if table := forgetting_table(results, setting):
            rise = "; then how much the loss on the other data sets rose above that of the untrained model"
            words = "Loss minus AdamW's, by how frequent tokens are in the training text"
            parts.append(f"{words}{rise if SETTINGS[setting].start else ''}:\n\n{table}\n")
        if not SETTINGS[setting].start:
            parts.append(f"Beside each other:\n\n{pairs_table(results, setting)}\n")
        parts.append(f"Tuning, seed {TUNING_SEED}:\n\n{tuning_table(results, setting)}\n")
        parts += defaults_part(constant, setting)
    untrained = {SETTINGS[name].data: results.reported(name, UNTRAINED).by_seed.get(1) for name in results.settings}
    for setting in (name for name in SETTINGS if SETTINGS[name].constant):
        if table := constant_table(constant, setting, untrained.get(SETTINGS[setting].data)):
            parts.append(f"## {setting}\n\n{in_words(setting)}. Of several campaigns.\n\n{table}\n")
            parts += defaults_part(constant, setting)
            parts.append(f"Tuning, seed {TUNING_SEED}:\n\n{tuning_table(results, setting)}\n")
    path.write_text("\n".join(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for recipes.md and pictures/")
    args = parser.parse_args()
    lines = read_results(sorted((args.results / "recipes").glob("*.jsonl")))
    if not lines:
        raise SystemExit(f"{args.results / 'recipes'}: no results in *.jsonl; run.py --phases recipes makes them")
    earlier = read_results(sorted(args.results.glob("*.jsonl")))
    results = Recipes(earlier, lines)
    (args.out / "pictures").mkdir(parents=True, exist_ok=True)
    write_tables(results, args.out / "recipes.md", [*earlier, *lines])
    compared = [s for s in results.settings if results.reported(s, ADAMW).by_seed]
    from_scratch = [s for s in compared if not SETTINGS[s].start]
    for name, chosen in (("recipes", plan.WHOLE), ("lora_recipes", plan.LORA), ("pretraining_recipes", from_scratch)):
        shown = [s for s in compared if s in chosen]
        if shown:
            rows = len({recipe for s in shown for recipe in results.recipes(s)})
            save_light_and_dark(
                args.out / "pictures" / f"{name}.png",
                lambda figure, theme, shown=shown: draw_differences(results, shown, figure, theme),
                5 + 3 * len(shown), 1.2 + 0.32 * rows,
            )  # fmt: skip
    print(f"This is {args.out / 'recipes.md'}; the pictures are in {args.out / 'pictures'}")


if __name__ == "__main__":
    main()
