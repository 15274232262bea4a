"""What each of several workers does in test_sharded_tables.py, over whatever backend the environment names.

``sharded_checks.py FOLDER WORDS``: WORDS are options of ``train``. FOLDER has ``alone``, a run of one worker with them,
from whose second step these go on, into FOLDER/host0. What is found is written to FOLDER as JSON.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Adam
from mlx.utils import tree_flatten, tree_unflatten
from tiny_models import tiny_llama

from ember_mlx import Ember, find_token_tables
from ember_mlx.finetune import options
from ember_mlx.finetune.batches import own_part, shared_loss
from ember_mlx.finetune.run import run
from ember_mlx.finetune.sharded_tables import ShardedTables
from ember_mlx.finetune.workers import Workers
from ember_mlx.kernels.stochastic_rounding import table_seed
from ember_mlx.optimizers.ember import ember_step
from ember_mlx.optimizers.guarded import global_norm, norm_is_safe, norm_of
from ember_mlx.optimizers.paired import PairedOptimizer
from ember_mlx.optimizers.row_shards import RowShards
from ember_mlx.streaming.mean_loss import mean_loss

VOCABULARY = 263  # a prime: no number of workers divides it


def largest_error(found, expected):
    return (mx.abs(found - expected).max() / mx.abs(expected).max()).item()


def sharded(here, **shape):
    model = tiny_llama(vocabulary=VOCABULARY, **shape)
    tables = find_token_tables(model)
    optimizer = PairedOptimizer(model, tables=Ember(1e-3), rest=Adam(1e-3), skip_nonfinite=True)
    return model, lambda: ShardedTables(model, optimizer, tables, here, mean_loss), optimizer


def loss_and_gradients(here, tied):
    """The errors of loss, norm and all gradients of uneven batches, against whole tables."""
    rows = 2 * here.size
    batch = mx.random.randint(0, VOCABULARY, (rows, 14), key=mx.random.key(3))
    learned = mx.array([[i % 5, 3 + 7 * i % 11] for i in range(rows)])
    model, shard, optimizer = sharded(here, tied=tied)
    (loss, _), gradients = nn.value_and_grad(model, mean_loss)(model, batch, learned)
    mx.eval(loss, gradients)
    tables = shard()
    step = tables.step(model, optimizer, shared_loss(tables.loss))
    own_loss, _, _, own, _ = step._gradients_of(own_part((batch, learned), here), None, True)
    own, squares = step._judged(step._reduce(own, {}).means)
    of_all = tables.shards.gather(own_loss[None]).mean()
    errors = [largest_error(of_all, loss), largest_error(norm_of(squares), global_norm(gradients))]
    own = dict(tree_flatten(own))
    for name, expected in tree_flatten(gradients):
        errors.append(largest_error(own[name], tables.shards.own_rows(expected) if name in tables.paths else expected))
    # An infinity in the last worker's rows alone is seen by all.
    name = min(tables.paths)
    own[name] = mx.full(own[name].shape, mx.inf if here.rank == here.size - 1 else 0)
    norm = norm_of(step._squares_of(tree_unflatten(list(own.items()))))
    return {"errors": errors, "infinity_passes": norm_is_safe(norm).item()}


def rounds_as_the_whole(here, rows):
    """The part of a table whose bits are those of a step on the whole table; stochastic rounding to bfloat16."""
    g = mx.random.randint(-2, 3, (rows, 32), key=mx.random.key(5)).astype(mx.bfloat16)
    w = mx.random.normal((rows, 32), key=mx.random.key(6)).astype(mx.bfloat16)
    how = {"learning_rate": 1e-4, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "seed": table_seed(1, 0)}
    t, c, shards = mx.array(1), mx.zeros(32), RowShards.of(here.rank, here.size, rows)
    whole, _, _ = ember_step(w, g, mx.zeros(rows), c, t, **how)
    own, _, _ = ember_step(shards.own_rows(w), shards.own_rows(g), mx.zeros(shards.rows), c, t, shards=shards, **how)
    return (own == shards.own_rows(whole)).mean().item()


def main():
    here = Workers.join(60)
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    found = {"tied": loss_and_gradients(here, True), "untied": loss_and_gradients(here, False)}
    found["rounding"] = [rounds_as_the_whole(here, rows) for rows in (128 * here.size, VOCABULARY)]
    checkpoint = folder / "alone" / "checkpoints" / "step-0000002"
    words = [*words, "--shard-tables", "--resume", str(checkpoint), "--resume-with-changes"]
    run(options.parse([*words, "--adapter-path", str(folder / f"host{here.rank}")]))
    (folder / f"found{here.rank}.json").write_text(json.dumps(found))


main()
