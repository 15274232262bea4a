"""What is to be run, in which order: worked out from the results that are there, so that it can stop at any moment.

For every setting AdamW is tuned first, on body and tables: half decades of both learning rates, from a first guess
on, until the best pair is better than its four neighbours. Its body rate is everybody's. Then every table optimizer
gets the same treatment: half decades around a first guess until the best has a worse one on either side, with seed 0;
if that is not far behind AdamW, the quarter decade beside it that promises more; then the best rate with other seeds. A
seed is the weights to start from and the order of the data, the same for all optimizers, so that their runs can be
compared in pairs. A first guess says only where a search begins.

A recipe is a body's optimizer with a tables'. Its two rates are searched for together, as AdamW's are above, by half
decades. So each recipe has its own rate of the body. A quarter decade of that rate comes last, for all recipes.
"""

import math
from dataclasses import asdict, dataclass

from body_rules import BODY_RULES
from table_rules import TABLE_RULES
from tasks import SETTINGS, Setting

__all__ = [
    "ADAMW", "BASELINE", "EMBER", "ONE_RATE", "PHASES", "SETTINGS", "TUNING_SEED", "Phase", "Run", "Setting",
    "best_rate", "tuned_rates", "tuned_recipe", "wanted",
]  # fmt: skip

TUNING_SEED = 0
BASELINE = "adamw"  # tunes the body
MOST_RATES = 12  # an optimizer that is best when it does next to nothing would go on for ever
ONE_RATE = "adamw-bf16-mlx"  # this rule on the tables has the body's rate
FAR_BEHIND = 0.1  # nats behind AdamW, where a quarter decade of the rate decides nothing any more


@dataclass(frozen=True)
class Run:
    """One training. Learning rates are powers of sqrt(10): -4 is 0.01, -5 is 0.0032, -4.5 between them."""

    setting: str
    optimizer: str  # of the tables, or "A | B": A on the embedding, B on the head
    rate: float  # of the tables; of the embedding
    body_rate: float
    seed: int
    head_rate: float | None = None  # where it differs
    probe: bool = False  # also measure the steps of rows by the time since they were last seen
    body: str = BASELINE  # its optimizer

    def key(self):
        values = tuple(asdict(self).values())
        return values[:-1] if self.body == BASELINE else values


@dataclass(frozen=True)
class Phase:
    """Settings and optimizers of about the same importance, and the seeds of the reported runs."""

    settings: tuple[str, ...]
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...] = (1, 2, 3)
    apart: bool = False  # also Ember and AdamW on one table each
    bodies: bool = False  # also the body's rate half a decade up and down, with the tuning seed: does the order hold?
    probes: tuple[str, ...] = ()  # optimizers that are run once more, with the probe
    recipes: tuple[tuple[str, str], ...] = ()  # optimizers of body and tables
    finely: bool = True  # of recipes: with a quarter decade of the body's rate
    given: tuple[tuple[str, str, float, float], ...] = ()  # body, tables and their rates (body, tables), not tuned


# The rules of one family are one optimizer with other settings; its best is the one with the best tuning run.
ADAMW = ("adamw", "adamw-0.99", "adamw-0.95")
EMBER = ("ember", "ember-growing", "ember-0.99", "ember-clip3", "ember-0.95")
# rule -> the one whose best rate says where its own may be, as far away as their first guesses are
KIN = {rule: BASELINE if rule.startswith("adamw") else "ember" for rule in TABLE_RULES} | {
    "ember": None, BASELINE: None, "sgd": None,
}  # fmt: skip
MAIN = ("ember", "adamw", "adafactor")
RIVALS = ("rows", "adamw-b1=0", "columns", "sgd", "frozen")
IN_BF16 = ("ember-bf16", "ember-bf16-stochastic", "adamw-bf16")
VARIANTS = ("ember-growing", "ember-clip3", "ember-0.99", "adamw-0.95", "ember-0.95", "ember-0.9999", "ember-clip1")
REST = (
    "adamw-0.99", "ember-tableclip", "ember-growing-clip3", "ember-0.99-clip3", "adamw-decay", "ember-decay", *IN_BF16,
)  # fmt: skip
# Body and tables. Those that issue 20 asks for, the most important first.
RECIPES = (
    ("adamw", "adamw"), ("adamw", "ember"), (ONE_RATE, ONE_RATE), ("sinkgd", "ember"),
    ("flash", "ember-bf16-stochastic"), ("adam-mini-int8", "ember"), ("sinkgd-bf16-rest", "ember-bf16-stochastic"),
    ("sinkgd", "sage"), ("adam-mini", "ember"), ("adamw-bf16", "ember-bf16-stochastic"),
    ("adamw-bf16-stochastic", "ember-bf16-stochastic"), ("adamw-bf16-rest", "ember-bf16-stochastic"),
)  # fmt: skip
MORE_RECIPES = (
    ("sinkgd-bf16", "ember-bf16-stochastic"), ("sinkgd", "columns"), ("adamw", "sage"), ("sinkgd", "adamw"),
    ("adam-mini", "adamw"), ("flash", "flash-bf16"), ("sinkgd-bf16-stochastic", "ember-bf16-stochastic"),
)  # fmt: skip
# LoRA's factors are float32, as mlx-lm makes them; what its users would have if tables trained, too, comes second.
LORA_RECIPES = (
    ("adamw", "adamw"), ("adam-mlx", ONE_RATE), ("sinkgd", "ember"), ("flash-float32", "ember-bf16-stochastic"),
    ("adam-mini-int8", "ember"), ("adamw", "ember"), ("sinkgd", "sage"),
)  # fmt: skip
FLOOR_RECIPES = tuple(
    ("adamw", rule) for rule in ("ember-floor3", "columns", "ember-floor10", "ember-floor30", "ember-floor100")
)
PRETRAINING_RECIPES = (
    ("adamw", "adamw"), ("adamw", "ember-growing"), ("sinkgd", "sage"), ("sinkgd", "adamw"), ("lion", "lion"),
    ("adam-mini", "adam-mini"), ("sinkgd", "ember-growing"), ("adamw", "ember"),
)  # fmt: skip
FLOORS = ("ember-floor3", "ember-floor10", "ember-floor1")
PROBES = ("ember", "adamw", "adafactor", "ember-clip3")
SMALL, BIG = ("untied-4k", "tied-4k"), ("untied-16k", "tied-16k")
LARGE = tuple(name for name, setting in SETTINGS.items() if setting.start == "smollm2" and not setting.constant)
CONSTANT = tuple(name for name, setting in SETTINGS.items() if setting.constant)
WHOLE = ("smollm2-wikisql", "smollm2-rasbt", "smollm2-shakespeare")  # all weights train
LORA = tuple(f"{name}-lora" for name in WHOLE)
OWN = ("own-wikisql", "own-shakespeare", "own-rasbt")


def _one_by_one(settings, optimizers, **how):
    """A phase a setting: when the time is over, some settings are complete instead of all of them half done."""
    return [Phase((name,), optimizers, **how) for name in settings]


def _recipe_by_recipe(settings, recipes):
    """A phase a recipe, by half decades: at any moment the first ones are complete, seeds and all."""
    return [Phase((name,), (), recipes=(recipe,), finely=False) for name in settings for recipe in recipes]


# What `ember-mlx train` does by default, and the same with a row floor: tables in bfloat16 at 1e-4 and 3.2e-4, and
# MLX's Adam on the body, at mlx-lm's 1e-5 and at higher rates.
WITHOUT_FLOOR, WITH_FLOOR = "ember-bf16-stochastic", "ember-bf16-stochastic-floor3"
PLAIN, FLOORED, PLAIN_AND_FASTER = (WITHOUT_FLOOR, -8), (WITH_FLOOR, -7), (WITHOUT_FLOOR, -7)


def _at_given_rates(settings, body, body_rate, *tables):
    return Phase(settings, (), given=tuple((body, rule, body_rate, rate) for rule, rate in tables))


PHASES = {
    "defaults": [
        _at_given_rates(CONSTANT[:2], "adam-mlx", -10, PLAIN, FLOORED, PLAIN_AND_FASTER),
        _at_given_rates(CONSTANT[:2], "adam-mlx", -8, PLAIN, FLOORED),
        _at_given_rates(CONSTANT[:2], "adam-mlx", -7, PLAIN, FLOORED),
        _at_given_rates(WHOLE[:2], "adamw-bf16-stochastic", -7, PLAIN, FLOORED),
        _at_given_rates(CONSTANT[2:], "adam-mlx", -10, PLAIN, FLOORED),
        _at_given_rates(CONSTANT[2:], "adam-mlx", -8, PLAIN, FLOORED),
    ],
    "recipes": [  # "frozen": what there was, and what the tables have to win
        Phase(WHOLE, (), seeds=(1,), recipes=(("frozen", "frozen"),)),
        *_recipe_by_recipe(WHOLE[1::-1], (*RECIPES, (BASELINE, "frozen"))),
    ],
    "row-floor": [  # beside what ember-mlx train does by default, then beside a tuned body
        *_one_by_one(CONSTANT[:2], FLOORS[:2]), *_recipe_by_recipe(WHOLE[1::-1], FLOOR_RECIPES[:3]),
        *_one_by_one(CONSTANT[2:], FLOORS[:1]),
    ],
    "shakespeare": _recipe_by_recipe(WHOLE[2:], (*RECIPES, *FLOOR_RECIPES[:3])),
    "pretraining": _recipe_by_recipe(("llama-16k",), PRETRAINING_RECIPES),
    "quarter-decades": _one_by_one(WHOLE, (), recipes=(*RECIPES, *FLOOR_RECIPES)),
    "more-recipes": _recipe_by_recipe(WHOLE, (*MORE_RECIPES, *FLOOR_RECIPES[3:])),
    "lora-recipes": [
        Phase(LORA, (), seeds=(1,), recipes=(("frozen", "frozen"),)), *_one_by_one(LORA, (), recipes=LORA_RECIPES),
    ],
    "core": [*_one_by_one(SMALL, MAIN), *_one_by_one(SMALL, VARIANTS[:3])],
    "smollm2": [  # "frozen": how much there is to win
        *_one_by_one(LARGE, (*MAIN, "frozen")), *_one_by_one(LARGE, ("ember-growing", *IN_BF16[:2])),
    ],
    "rivals": _one_by_one(SMALL, RIVALS, apart=True, probes=PROBES),
    "smollm2-rivals": _one_by_one(LARGE, RIVALS),
    "floors": [*_one_by_one((*LARGE, *CONSTANT), FLOORS), *_one_by_one(SMALL, FLOORS)],
    "constant": _one_by_one(CONSTANT, ("ember", "adamw", "frozen")),  # the schedule that ember-mlx train has
    "16k": _one_by_one(BIG, (*MAIN, "ember-growing")),
    "seeds": [  # with six, intervals are less than half as wide
        Phase(SMALL, (*MAIN, "ember-growing"), seeds=(4, 5, 6)), Phase(LARGE, ("ember", "adamw"), seeds=(4, 5, 6)),
    ],
    "variants": _one_by_one(SMALL, VARIANTS),
    "16k-rivals": [*_one_by_one(BIG, RIVALS), *_one_by_one(BIG, ("adamw-0.95",))],
    "all": [
        Phase(SMALL, MAIN, seeds=(), bodies=True),
        *_one_by_one(LARGE, ("adamw-bf16", "adamw-0.95", "ember-0.99", "ember-clip3")), *_one_by_one(SMALL, REST),
        *_one_by_one(BIG, VARIANTS, apart=True),
        *_one_by_one(OWN, (*MAIN, "ember-growing", *IN_BF16, *RIVALS)),
    ],
}  # fmt: skip


def best_point(losses, guess):
    """Where a search on a grid stands: it goes on until the best point is better than all its neighbours.

    Args:
        losses (dict): Point, a tuple of rates, -> validation loss; infinity or NaN for a run that blew up.
        guess (tuple): The point to begin with.

    Returns:
        The best point, or None while a neighbour is missing, and the points to run next.
    """
    losses = {point: loss if math.isfinite(loss) else math.inf for point, loss in losses.items()}
    best = min(losses, key=losses.get, default=guess)
    near = [(*best[:axis], best[axis] + step, *best[axis + 1 :]) for axis in range(len(best)) for step in (-1, 1)]
    missing = [point for point in (best, *near) if point not in losses]
    if len(losses) >= MOST_RATES * len(guess):
        missing = []
    return (None if missing else best), missing


def best_rate(losses, guess, finely=True):
    """The same for one rate; when the best half decade is known, a quarter decade beside it may be tried too.

    A parabola through it and its neighbours is lower at the quarter decade towards the better neighbour just when the
    other is more than three times as far above the best.

    Args:
        losses (dict): Rate -> validation loss.
        guess (int): The rate to begin with.
        finely (bool): With quarter decades.
    """
    losses = {rate: loss if math.isfinite(loss) else math.inf for rate, loss in losses.items()}
    best, missing = best_point({(rate,): loss for rate, loss in losses.items() if rate == int(rate)}, (guess,))
    if best is None:
        return None, [rate for (rate,) in missing]
    above = {d: losses.get(best[0] + d, math.inf) - losses[best[0]] for d in (-1, 1)}
    better, worse = sorted(above, key=above.get)
    quarter = best[0] + better / 2
    if finely and quarter not in losses and above[worse] > 3 * above[better]:
        return None, [quarter]
    return min(losses, key=losses.get), []


def wanted(results, phases, settings=SETTINGS):
    """Runs that are not in ``results`` and can be done now, the most important first.

    Args:
        results (dict): ``Run.key()`` -> validation loss.
        phases (list of Phase): The most important first.
    """
    tuning = _tuning(results)
    for phase in phases:
        reported = []
        for name, recipe in ((name, recipe) for name in phase.settings for recipe in phase.recipes):
            rates, missing = _recipe_rates(name, *recipe, tuning, settings, phase.finely)
            yield from missing
            if rates is not None:
                reported += [Run(name, recipe[1], rates[1], rates[0], seed, body=recipe[0]) for seed in phase.seeds]
        for name in phase.settings if phase.optimizers else ():
            body, missing = _body_rate(name, tuning, settings)
            yield from missing
            rates = {}
            for optimizer in phase.optimizers if body is not None else ():
                rates[optimizer], missing = _table_rate(name, optimizer, body, tuning, settings)
                yield from missing
            for optimizer, rate in rates.items():
                if rate is None:
                    continue
                reported += [Run(name, optimizer, rate, body, seed) for seed in phase.seeds]
                reported += [Run(name, optimizer, rate, body + d, TUNING_SEED) for d in (-1, 1) if phase.bodies]
            if body is not None and phase.apart and not settings[name].shape.tied:
                reported += _apart(name, body, tuning, phase.seeds, settings)
            for optimizer in phase.probes if body is not None else ():
                rate, _ = _table_rate(name, optimizer, body, tuning, settings)
                reported += [Run(name, optimizer, rate, body, 1, probe=True)] * (rate is not None)
        for name, (body, tables, body_rate, rate) in ((name, four) for name in phase.settings for four in phase.given):
            reported += [Run(name, tables, rate, body_rate, seed, body=body) for seed in phase.seeds]
        yield from (run for run in reported if run.key() not in results)


def tuned_rates(name, optimizer, results, settings=SETTINGS):
    """The best rates of the body and of the tables with that optimizer; None for what is not known yet."""
    return _tuned_rates(name, optimizer, _tuning(results), settings)


def _tuned_rates(name, optimizer, tuning, settings):
    body, _ = _body_rate(name, tuning, settings)
    return body, None if body is None else _table_rate(name, optimizer, body, tuning, settings)[0]


def _apart(name, body, tuning, seeds, settings):
    """Runs with Ember on one table and AdamW on the other, each at its best rate, once both are known."""
    ember, adamw = (_table_rate(name, optimizer, body, tuning, settings)[0] for optimizer in ("ember", BASELINE))
    if None not in (ember, adamw):
        for seed in seeds:
            yield Run(name, f"ember | {BASELINE}", ember, body, seed, head_rate=adamw)
            yield Run(name, f"{BASELINE} | ember", adamw, body, seed, head_rate=ember)


def tuned_recipe(name, body, tables, results, settings=SETTINGS, finely=True):
    """The best rates (body, tables) of a recipe, or of its half decades alone; None for what is not known yet."""
    return _recipe_rates(name, body, tables, _tuning(results), settings, finely)[0]


def _tuning(results):
    """(setting, optimizer of the tables, if the body's is not the baseline: that) -> {(rate of the body, rate of the
    tables): loss} of the tuning runs."""
    losses = {}
    for run, loss in ((Run(*key), loss) for key, loss in results.items()):
        if run.seed == TUNING_SEED and not run.probe:
            losses.setdefault(_of(run.setting, run.body, run.optimizer), {})[run.body_rate, run.rate] = loss
    return losses


def _of(name, body, tables):
    return (name, tables) if body == BASELINE else (name, tables, body)


def _recipe_rates(name, body, tables, tuning, settings, finely=True):
    """The best pair of rates of a recipe, and the runs to do next.

    When the best half decades are known, the body's quarter decade towards the better neighbour is tried too, if
    ``finely``.
    """
    if tables == "frozen":  # beside a frozen body too: the model as it was
        adamw, missing = (0, 0), []
        if body == BASELINE:
            adamw, missing = _recipe_rates(name, BASELINE, BASELINE, tuning, settings, finely)
        return adamw and (adamw[0], 0), missing
    losses, step = tuning.get(_of(name, body, tables), {}), (0.5, 0.5 if tables == ONE_RATE else 0)
    best, missing = _recipe_half_decades(name, body, tables, tuning, settings)
    if best and finely:
        quarters = [tuple(rate + side * part for rate, part in zip(best, step, strict=True)) for side in (-1, 1)]
        beside = [
            losses.get(tuple(2 * q - b for q, b in zip(quarter, best, strict=True)), math.inf) for quarter in quarters
        ]
        quarter = quarters[beside[1] < beside[0]]
        missing = [] if quarter in losses else [quarter]
        best = None if missing else min((best, quarter), key=losses.get)
    return best, [Run(name, tables, rate, of_body, TUNING_SEED, body=body) for of_body, rate in missing]


def _recipe_half_decades(name, body, tables, tuning, settings):
    """The best pair of half decades, and the pairs to try next; one optimizer in all has one rate, as mlx-lm's."""
    losses = _half_decades(tuning.get(_of(name, body, tables), {}))
    guess = _recipe_guess(name, body, tables, tuning, settings) if not losses else (0, 0)
    if tables == ONE_RATE:
        best, missing = best_point({pair[:1]: loss for pair, loss in losses.items()}, guess[:1])
        return best and best * 2, [point * 2 for point in missing]
    return best_point(losses, guess)


def _recipe_guess(name, body, tables, tuning, settings):
    """Where a recipe's search begins: as far from AdamW's best as in the setting like it, or as the rules guess."""
    adamw, like, best = (BASELINE,) * 2, settings[name].like, None
    if (body, tables) != adamw:
        best = _recipe_half_decades(name, *adamw, tuning, settings)[0]
    if like and best:
        there = [_recipe_half_decades(like, *recipe, tuning, settings)[0] for recipe in ((body, tables), adamw)]
        if None not in there:
            return tuple(here + ours - theirs for here, ours, theirs in zip(best, *there, strict=True))
    of_body = (best[0] if best else settings[name].body_guess) + BODY_RULES[body].guess
    found = _tuned_rates(name, tables, tuning, settings)[1]
    return of_body, _first_guess(name, tables, tuning, settings) if found is None else round(found)


def _body_rate(name, tuning, settings):
    """The body's rate at the best pair of AdamW's two, in half decades."""
    like = settings[name].like
    found = _body_rate(like, tuning, settings)[0] if like else None
    body_guess = settings[name].body_guess if found is None else found
    guess = body_guess, _first_guess(name, BASELINE, tuning, settings)
    best, missing = best_point(_half_decades(tuning.get((name, BASELINE), {})), guess)
    return best and best[0], [Run(name, BASELINE, rate, body, TUNING_SEED) for body, rate in missing]


def _half_decades(losses):
    """Without the quarter decades, which come later and must not move where the search stands."""
    return {pair: loss for pair, loss in losses.items() if all(rate == int(rate) for rate in pair)}


def _table_rate(name, optimizer, body, tuning, settings):
    if optimizer == "frozen":
        return 0, []
    losses = {rate: loss for (b, rate), loss in tuning.get((name, optimizer), {}).items() if b == body}
    guess = 0 if losses else _first_guess(name, optimizer, tuning, settings)
    adamw = _half_decades(tuning.get((name, BASELINE), {}))
    close = min(losses.values(), default=0) <= min(adamw.values(), default=0) + FAR_BEHIND
    best, missing = best_rate(losses, guess, finely=close)
    return best, [Run(name, optimizer, rate, body, TUNING_SEED) for rate in missing]


def _first_guess(name, optimizer, tuning, settings):
    """Where the search for the tables' rate begins: beside its kin's in this setting, or as in the setting like it."""
    kin, like = KIN[optimizer], settings[name].like
    if kin and (found := _tuned_rates(name, kin, tuning, settings)[1]) is not None:
        return round(found) + TABLE_RULES[optimizer][1] - TABLE_RULES[kin][1]
    if like and (found := _tuned_rates(like, optimizer, tuning, settings)[1]) is not None:
        return round(found)
    return TABLE_RULES[optimizer][1] + settings[name].tables_guess
