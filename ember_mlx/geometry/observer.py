"""The two things that hang into a run: the observer that measures it, and the timer of a run without one."""

import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten

from ember_mlx.finetune.options import Options
from ember_mlx.finetune.watchers import Measurement, StepResult, Watcher
from ember_mlx.geometry import measures, sampling
from ember_mlx.geometry.probe import NAME, Probe, TableSample
from ember_mlx.geometry.recorder import COLD, GradientRows, TableRecord, TokenHistory, WeightPaths
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.units import format_bytes
from ember_mlx.token_tables import TokenTable

__all__ = ["TIMED_UPDATES", "Observer", "Stopwatch", "Timed", "Timer"]

POINTS = 32  # of a path: enough to tell a line from a walk
TIMED_UPDATES = 10  # that are run without measuring too, with the same batches


class Stopwatch:
    """Takes the time of the first updates, each of ``steps_an_update`` steps."""

    def __init__(self, steps_an_update: int):
        self.steps_an_update = steps_an_update
        self.steps = 0
        self.began = []  # when the first updates began, by the clock and in this process's CPU time, seconds
        self.positions = []  # tokens of their batches, padding included
        self.peak_memory = None  # after TIMED_UPDATES

    def before_step(self, batch: tuple[mx.array, mx.array]) -> None:
        """Call it before each step."""
        if len(self.began) <= TIMED_UPDATES:
            if self.steps % self.steps_an_update == 0:
                self.began.append((time.perf_counter(), time.process_time()))
                self.positions.append(0)
                if len(self.began) == TIMED_UPDATES + 1:
                    self.peak_memory = mx.get_peak_memory()
            self.positions[-1] += batch[0].size
        self.steps += 1

    def seconds_a_position(self) -> np.ndarray:
        """Seconds a position by the clock and of CPU time, (updates, 2), of each timed update after the first: that one
        is compiled and evaluates."""
        return np.diff(self.began, axis=0)[1:] / np.array(self.positions[1:-1])[:, None]


class Timed(Exception):
    """The updates that were to be timed are done."""


class Timer(Watcher):
    """A watcher that times TIMED_UPDATES of a run as it is, and ends it with Timed before any save."""

    def __init__(self, steps_an_update: int):
        self.watch = Stopwatch(steps_an_update)

    def before_step(self, step: int, batch: tuple[mx.array, mx.array]) -> None:
        self.watch.before_step(batch)

    def after_step(self, step: int, result: StepResult) -> None:
        if len(self.watch.began) > TIMED_UPDATES:
            raise Timed


class Observer(Watcher):
    """A watcher that measures a run while it trains. At the end call :meth:`close`.

    Args:
        args: The run's options.
        folder (Path): A folder on a disk that has room for every table in float32 while the run goes on.
    """

    def __init__(self, args: Options, folder: Path):
        self.args = args
        self.folder = folder
        self.rng = np.random.default_rng(args.seed)  # of its own: the run's numbers stay those of `train`
        self.updates = self.nonfinite = 0
        self.cold_updates = 0  # in which a row could take a step of more than COLD learning rates
        self.bias_correction = 0.0
        self.seconds = 0.0  # spent here between the steps

    def before_training(
        self, model: nn.Module, optimizer: Optimizer, tables: Sequence[TokenTable], rows: Sequence
    ) -> None:
        self.model, self.optimizer = model, optimizer
        parameters = dict(tree_flatten(model.trainable_parameters()))
        vocabulary = max(table.shape[0] for table in tables)
        self.counts = sampling.count_tokens(rows, vocabulary, self.args.max_seq_length)
        self.classes = sampling.frequency_classes(self.counts)
        self.history = TokenHistory(vocabulary)
        self.every = max(self.args.iters // self.args.grad_accumulation_steps // POINTS, 1)
        on_disk = sum(4 * parameters[table.path].size for table in tables)
        # Whatever ends the run, this goes.
        self.kept = tempfile.TemporaryDirectory(prefix="measuring-", dir=self.folder)
        free = shutil.disk_usage(self.kept.name).free
        if on_disk > 0.9 * free:
            raise InputError(
                f"--out {self.folder}: measuring keeps {format_bytes(on_disk)} there during the run, and only "
                f"{format_bytes(free)} are free; make room, or give another folder"
            )
        disk = Path(self.kept.name)
        shared = vocabulary * 5 / len(tables)  # token history and classes
        self.sizes = {
            table.path: sampling.sizes(table.shape, parameters[table.path].nbytes, shared) for table in tables
        }
        samples = {table.path: self._sample(table) for table in tables}
        self.tables = {
            table.path: TableRecord(table, samples[table.path], self.classes, parameters[table.path], disk)
            for table in tables
        }
        hidden = self._choose_hidden(parameters, set(samples))
        self.probe = Probe(optimizer, samples, hidden)
        self.hidden = {
            path: GradientRows(np.zeros(len(rows), int), [path], (len(rows), parameters[path].shape[1]))
            for path, rows in hidden.items()
        }
        each = max(sampling.PATH_ROWS // max(len(hidden), 1), 1)
        self.hidden_paths = {}
        for path in hidden:
            chosen = np.sort(self.rng.choice(len(parameters[path]), min(each, len(parameters[path])), replace=False))
            self.hidden_paths[path] = WeightPaths(disk / f"{path}.paths", chosen.astype(np.int32), parameters[path])
        self.table_bytes = sum(parameters[table.path].nbytes for table in tables)
        self.watch = Stopwatch(self.args.grad_accumulation_steps)

    @property
    def beta2(self) -> float:
        """Ember's, in the last update: it may be on a schedule."""
        tables = self.optimizer.tables
        return tables.state["beta2"].item() if callable(tables.beta2) else tables.beta2

    @property
    def step_limit(self) -> float:
        """About how many learning rates the step of a row may be in a long run; infinite for a schedule of beta2."""
        tables = self.optimizer.tables
        limit = math.inf if callable(tables.beta2) else measures.cold_step(1, tables.beta2)
        return min(limit, tables.row_clip or math.inf)

    def close(self) -> None:
        """Delete what was kept on disk."""
        if hasattr(self, "kept"):
            self.kept.cleanup()

    def memory(self) -> dict[str, float]:
        """Bytes that measuring takes while the run trains, by what they are for."""
        state = sum(array.nbytes for _, array in tree_flatten(self.probe.readings))
        history = self.history.last_seen.nbytes + self.classes.nbytes
        host = sum(record.nbytes for record in self.tables.values()) + history
        host += sum(rows.before.nbytes for rows in self.hidden.values())
        # Old rows, new rows and their difference in a step; between two, a table's rows, squares and directions.
        scratch = max(
            12 * max(len(record.sample.rows), record.sample.batch_tokens) * record.table.shape[1]
            for record in self.tables.values()
        )
        total = state + host + scratch
        return {
            "in_the_compiled_step": state,
            "between_the_steps": host,
            "scratch": scratch,
            "total": total,
            "tables": self.table_bytes,
            "share_of_tables": total / self.table_bytes,
        }

    def _sample(self, table):
        sizes, (vocabulary, columns) = self.sizes[table.path], table.shape
        with_never = table.role != "embedding"
        classes, counts = self.classes[:vocabulary], self.counts[:vocabulary]
        number = max(sizes.block_entries // min(sampling.BLOCK_COLUMNS, columns), 1)
        block_columns = self.rng.choice(columns, min(sampling.BLOCK_COLUMNS, columns), replace=False)
        return TableSample(
            rows=sampling.choose_tokens(classes, counts, sizes.rows, with_never, self.rng),
            block_rows=sampling.choose_tokens(classes, counts, number, with_never, self.rng),
            block_columns=np.sort(block_columns).astype(np.int32),
            path_rows=sampling.choose_tokens(classes, counts, sampling.PATH_ROWS, with_never, self.rng),
            batch_tokens=sizes.batch_tokens,
        )

    def _choose_hidden(self, parameters, tables):
        shapes = {path: array.shape for path, array in parameters.items() if array.ndim == 2 and path not in tables}
        number = next(iter(self.sizes.values())).hidden_rows
        return sampling.choose_hidden(shapes, number, self.rng)

    def before_step(self, step: int, batch: tuple[mx.array, mx.array]) -> Measurement | None:
        self.watch.before_step(batch)
        start = time.perf_counter()
        self.history.add_batch(batch)
        chosen = {path: record.choose_tokens(self.history, self.rng) for path, record in self.tables.items()}
        self.seconds += time.perf_counter() - start
        return self.probe.measurement({path: mx.array(tokens) for path, tokens in chosen.items()})

    def after_step(self, step: int, result: StepResult) -> None:
        if not (result.updated or result.nonfinite):
            return  # its gradients are accumulated: the update is still to come
        start = time.perf_counter()
        self.updates += 1
        self.nonfinite += result.nonfinite
        if result.updated:
            self.probe.readings = result.measurements[NAME]
            self._read()
        self.history.end_update(self.updates)
        self.seconds += time.perf_counter() - start

    def _read(self):
        state, beta2 = self.optimizer.tables.state, self.beta2
        self.bias_correction = beta2 * self.bias_correction + (1 - beta2)
        largest = min(measures.cold_step(self.bias_correction, beta2), self.step_limit)
        self.cold_updates += largest > COLD
        for path, record in self.tables.items():
            record.add(self.probe.readings["tables"][path], state[path]["r"], beta2, self.history, self.updates)
        for path, rows in self.hidden.items():
            rows.add(measures.unit_rows(np.array(self.probe.readings["hidden"][path])))
        if self.updates % self.every == 0:
            weights = dict(tree_flatten(self.model.trainable_parameters()))
            table_paths = {path: record.paths for path, record in self.tables.items()}
            for path, paths in (table_paths | self.hidden_paths).items():
                paths.add(weights[path])
