"""The verdict: what the numbers say of the paper's three claims and of the steps, and whether Ember suits.

Every bound has a reason. They were set with three runs in view, those of README.md here; no run that fails has tried
them.

The claims are of "Token Geometry" (arXiv 2607.01455): the second moment of a token table is of rank one, successive
gradients of a row are uncorrelated, and a token's path has one dimension. Ember rests on the first two. The third
explains why so little state is enough; Ember does not need it.
"""

import math
from typing import Any

from ember_mlx.geometry.sampling import CLASSES
from ember_mlx.shared.units import format_bytes

__all__ = [
    "MATRICES",
    "NO",
    "PARTLY",
    "UNKNOWN",
    "YES",
    "judge",
    "rank_one",
    "rays",
    "step_factor",
    "steps",
    "uncorrelated",
]

# A typical step within a factor 2 of the dense one's is within one point of the usual grid of learning rates, 1, 3, 10;
# at 4 it is beyond the next one.
RANK_ONE_FACTOR, ROUGHLY_RANK_ONE_FACTOR = 2.0, 4.0
# A dense moment of fewer squares than this is itself off by more than a factor 2 either way, most of the time.
LEAST_SQUARES = 4
LEAST_COSINES = 30  # of fewer, the median is itself chance
# A cosine of 0.3 means that the last gradient explains 9 % of the next one's energy: nine tenths are new, which a first
# moment cannot predict. At 0.6 it explains a third.
UNCORRELATED, PARTLY_CORRELATED = 0.3, 0.6
# A ray leaves a tenth beside it, and at most half of what a random walk of the same moves leaves: that one alone has
# about 0.8 on one line.
RAY_SHARE, RAY_AGAINST_WALK = 0.9, 0.5
COLD_SHARE = 0.01  # of the tokens of a batch: one in a hundred moves ten times as far as the rate says

# "Few large steps" is shown by a run that could make such steps in at least half of its updates.
LEAST_COLD_UPDATES = 0.5

YES, PARTLY, NO, UNKNOWN = "yes", "partly", "no", "cannot be told"
TOKENS = {name: f"{name} tokens" for name in CLASSES} | {"never": "tokens that the text never has"}
COMPARE = "The loss decides: compare it with that of ember-mlx train --table-optimizer adamw."
MATRICES = {"hidden": "the hidden matrices", "adapter": "the adapter's matrices"}
NORMAL_10_TO_90 = 2.563  # standard deviations between the two quantiles of a normal distribution


def judge(numbers: dict) -> dict:
    """``{"suits", "words", "findings"}``; a finding is ``{"claim", "answer", "words"}``."""
    tables = numbers["tables"]
    findings = [
        rank_one(tables),
        uncorrelated(tables, numbers["hidden"]),
        rays(tables, numbers["hidden"]),
        steps(tables, numbers["run"]),
    ]
    rank, correlation, _, step = (finding["answer"] for finding in findings)
    saved = sum(2 * math.prod(table["shape"]) - sum(table["shape"]) for table in tables) * 4
    price = (
        f"Against Adam in float32 it saves {format_bytes(saved)} of state; the peak memory of this run was "
        f"{format_bytes(numbers['run']['peak_memory'])}."
    )
    if UNKNOWN in (rank, correlation):
        suits, words = UNKNOWN, "This run cannot tell whether Ember suits: see below what is missing."
    elif rank == NO:
        suits = NO
        words = f"Ember does not suit this run: the second moment of a table is not of rank one here. {price} {COMPARE}"
    elif rank == PARTLY or NO in (correlation, step):
        reasons = {
            "its second moment is only roughly that of a dense one": rank == PARTLY,
            "the gradients of a token are alike each time, and Ember has no first moment to use it": correlation == NO,
            "some steps are far larger than the learning rate": step == NO,
        }
        why = ", and ".join(reason for reason, holds in reasons.items() if holds)
        suits, words = PARTLY, f"Ember may suit this run, but {why}. {price} {COMPARE}"
    else:
        limits = " The run was too short to tell how large the steps of rare tokens get." if step == UNKNOWN else ""
        words = (
            "Ember suits this run, as far as gradients tell. Their second moment is close to rank one, and a token's "
            f"gradients are not very alike from one sighting to the next.{limits} {price} {COMPARE}"
        )
        suits = YES
    return {"suits": suits, "words": words, "findings": findings}


def rank_one(tables: list[dict[str, Any]]) -> dict[str, str]:
    """By how much a typical step differs from the dense moment's, beyond that one's noise, in the worst class."""
    claim, factors, unknown = "The second moment is of rank one", [], []
    for table in tables:
        for name in CLASSES[:3]:
            of_class = [(step_factor(found), found) for found in table["second_moment"][name].values()]
            known = [(factor, table["path"], name, found) for factor, found in of_class if factor is not None]
            factors += known
            if not known:
                unknown.append(f"the {TOKENS[name]} of {table['path']}")
    if not factors:
        words = (
            f"No sampled row of the text has {LEAST_SQUARES} gradients of like size, so the dense moment is noise: "
            "train longer."
        )
        return {"claim": claim, "answer": UNKNOWN, "words": words}
    factor, path, name, found = max(factors, key=lambda one: one[0])
    words = (
        f"A typical step is within a factor {factor:.2f} of that of a dense second moment, beyond that one's noise. "
        f"The worst class of rows: the {TOKENS[name]} of {path}. Their log error is {found['p10']:+.2f} to "
        f"{found['p90']:+.2f} (10 % to 90 %); noise alone makes {found['noise']['p10']:+.2f} to "
        f"{found['noise']['p90']:+.2f}. Up to {RANK_ONE_FACTOR:g} counts as rank one."
    )
    if unknown:
        words += f" Not judged, too few gradients: {', '.join(unknown)}."
    return {"claim": claim, "answer": _answer(factor, RANK_ONE_FACTOR, ROUGHLY_RANK_ONE_FACTOR), "words": words}


def step_factor(found: dict[str, Any]) -> float | None:
    """The factor between the two steps that a typical log error makes, noise taken off; None if there is too little.

    Spread and median of the error, e, add up as squares; a step goes with exp(-e / 2).
    """
    if not found["count"] or found["squares"] < LEAST_SQUARES:
        return None
    noise = found["noise"]
    spread, noise_spread = ((one["p90"] - one["p10"]) / NORMAL_10_TO_90 for one in (found, noise))
    beyond = max(spread**2 - noise_spread**2, 0) + (found["median"] - noise["median"]) ** 2
    return math.exp(math.sqrt(beyond) / 2)


def uncorrelated(tables: list[dict[str, Any]], hidden: dict[str, Any]) -> dict[str, str]:
    """The median cosines of successive gradients: from one sighting of a token to the next, and from step to step.

    In an embedding the two are the same. In a head and in a tied table the steps in which a token is not in the batch
    push its row away from the average hidden state, all alike: that is drift, of small steps, and no reason for a first
    moment. So correlation between sightings alone decides.
    """
    claim = "Successive gradients of a row are uncorrelated"
    sightings, steps_ = (
        [
            (found["median"], table["path"])
            for table in tables
            for found in (table[kind][name] for name in CLASSES[:3])
            if found["count"] >= LEAST_COSINES
        ]
        for kind in ("gradients_when_seen_again", "successive_gradients")
    )
    if not sightings:
        words = f"No class of rows was seen again {LEAST_COSINES} times: train longer."
        return {"claim": claim, "answer": UNKNOWN, "words": words}
    furthest = max((median for median, _ in sightings), key=abs)
    furthest_step = max((median for median, _ in steps_), key=abs, default=furthest)
    beside, matrices = hidden["successive_gradients"], MATRICES[hidden["kind"]]
    words = (
        "Median cosine of a token's gradient with that of its last sighting, by class of tokens: "
        f"{_ranges(sightings)}. With that of the last step: {_ranges(steps_) or 'too few'}. Chance alone makes "
        f"±{max(table['random_cosine'] for table in tables):.2f}. "
        + (f"Rows of {matrices}, from step to step: {beside['median']:+.2f}. " if beside["count"] else "")
        + f"Up to {UNCORRELATED:g} counts as uncorrelated."
    )
    if abs(furthest) <= UNCORRELATED < furthest_step:
        words += " Steps in which the token is not in the batch are alike, hence partly: that is drift of the rows."
    if furthest < -UNCORRELATED:
        words += " Below 0, each step undoes part of the last one: lower the table learning rate."
    answer = _answer(abs(furthest), UNCORRELATED, PARTLY_CORRELATED)
    if answer == YES and abs(furthest_step) > UNCORRELATED:
        answer = PARTLY
    return {"claim": claim, "answer": answer, "words": words}


def _ranges(medians):
    """For each table the smallest and the largest."""
    ranges = {path: [median for median, other in medians if other == path] for _, path in medians}
    return "; ".join(f"{min(found):+.2f} to {max(found):+.2f} ({path})" for path, found in ranges.items())


def rays(tables: list[dict[str, Any]], hidden: dict[str, Any]) -> dict[str, str]:
    """What share of the moves lies on one line, against a random walk of the same moves."""
    claim, medians = "A token's path has one dimension", []
    for table in tables:
        for name in CLASSES:
            found = table["paths"][name]
            if found["share"]["count"]:
                medians.append((found["share"]["median"], found["walk_share"]["median"], name, table["path"]))
    if not medians:
        words = "No followed row moved three times: train longer."
        return {"claim": claim, "answer": UNKNOWN, "words": words}
    holds = [share >= RAY_SHARE and 1 - share <= RAY_AGAINST_WALK * (1 - walk) for share, walk, _, _ in medians]
    share, walk, name, path = min(medians)
    high = max(medians)
    beside = hidden["paths"]["share"]
    words = (
        f"One line holds {share:.0%} of the path (median of the {TOKENS[name]}, {path}). A random walk with the same "
        f"moves has {walk:.0%}. At best it holds {high[0]:.0%} (the {TOKENS[high[2]]}, {high[3]}; random walk "
        f"{high[1]:.0%}). "
        + (f"Rows of {MATRICES[hidden['kind']]}: {beside['median']:.0%}. " if beside["count"] else "")
        + f"A ray has {RAY_SHARE:.0%} or more, and leaves half of what the walk leaves. Ember does not need this."
    )
    return {"claim": claim, "answer": YES if all(holds) else PARTLY if any(holds) else NO, "words": words}


def steps(tables: list[dict[str, Any]], run: dict[str, Any]) -> dict[str, str]:
    """How many steps are far larger than the learning rate, and whether the run was long enough to make any."""
    worst = max(tables, key=lambda table: table["steps_above_cold"]["share"])
    cold, size = worst["steps_above_cold"], worst["largest_steps"]
    largest = f"; the largest was {size[0]['learning_rates']:.1f}, token {size[0]['text']}" if size else ""
    words = (
        f"{cold['share']:.1%} of the steps of tokens in a batch moved their row of {worst['path']} by more than "
        f"{cold['learning_rates']} learning rates{largest}. Over {COLD_SHARE:.0%}, compare with a run "
        f"with --table-row-clip {cold['learning_rates']}."
    )
    answer = YES if cold["share"] <= COLD_SHARE else NO
    could = run["cold_updates"]
    if answer == YES and run["step_limit"] > cold["learning_rates"] and could < LEAST_COLD_UPDATES * run["updates"]:
        answer = UNKNOWN
        words += (
            f" But {run['updates'] - could} of the {run['updates']} updates came too early for such steps. A step "
            "grows about as the square root of the updates since its token was last seen. Train longer."
        )
    return {"claim": "Few steps are far larger than the learning rate", "answer": answer, "words": words}


def _answer(value, yes, partly):
    return YES if value <= yes else PARTLY if value <= partly else NO
