"""The graph of a step: its arrays, and what each is computed from. Layers, loss and update add theirs to it."""

from collections.abc import Iterable
from dataclasses import dataclass

from ember_mlx.planner.architecture import Architecture, Table
from ember_mlx.planner.evaluation import Array, Operation

__all__ = ["FLOAT32", "Graph", "Run"]

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Run:
    """What of a run's options memory depends on.

    Args:
        batch_size, length (int): Rows of one worker, and tokens of each that go through the model.
        fine_tune_type (str): "lora", "dora" or "full".
        layers (int): How many of the last layers train.
        rank (int): Of LoRA.
        lora_keys (tuple, optional): The linears that LoRA is put on; None for all.
        tables (tuple[str]): The token tables that train, by their names.
        optimizer, table_optimizer (str): Names of :data:`ember_mlx.planner.optimizer_state.STATE`.
        stochastic_rounding, grad_checkpoint, chunked_loss (bool): As their options say.
        micro_batches (int): Batches of one update.
        evaluation_length (int): As ``length``, in validation; 0 where its rows are no longer.
        stream (bool): Whether every weight is stepped inside the backward pass (ember_mlx.streaming).
        keep_inputs (int): Then: of how many layers one keeps its input.
        norm_pass (bool): Whether gradients are clipped by their global norm, for which streaming goes backwards twice.
        body_rounding (str): "nearest" or "stochastic", of 16-bit weights that are no table.
        workers (int): How many share a batch.
        shard_optimizer (bool): Whether each of them keeps a part of the state of all but tables under Ember.
        shard_tables (bool): Whether they share the rows of the tables that train, too.
    """

    batch_size: int
    length: int
    fine_tune_type: str
    layers: int
    rank: int
    lora_keys: tuple | None
    tables: tuple
    optimizer: str
    table_optimizer: str
    stochastic_rounding: bool
    grad_checkpoint: bool
    chunked_loss: bool
    micro_batches: int
    evaluation_length: int = 0
    stream: bool = False
    keep_inputs: int = 1
    norm_pass: bool = False
    body_rounding: str = "nearest"
    workers: int = 1
    shard_optimizer: bool = False
    shard_tables: bool = False

    def rows_here(self, table: Table) -> int:
        """How many rows of a table one worker keeps, at most."""
        return -(-table.rows // self.workers) if self.is_sharded(table) else table.rows

    def is_sharded(self, table: Table) -> bool:
        """Whether the workers share its rows."""
        return self.shard_tables and table.role in self.tables


class Graph:
    """Arrays, and what each is computed from.

    Args:
        model (Architecture): Its shapes.
        run (Run): What of the options matters.
        backend (str): "metal", "cuda" or "cpu".

    Attributes:
        losses (list): What validation computes, too.
        parts (list[list]): What validation of a streamed run evaluates one after another, before its losses.
        leaving_head (list): Gradients that are evaluated after the losses, before all others.
        results (list): The arrays that stay after the step.
        evaluations (list[list]): What is evaluated together, in this order.
        waits (list[int]): Of each, how many of the first are done before it begins.
        late (range): The numbers of those in which no memory is free before it has been waited for.
        existing (list): The arrays that exist before the step.
        weights, gradients, shapes (dict): By name; shapes are of what trains.
        role (str): What arrays are made as, until it is changed.
    """

    def __init__(self, model: Architecture, run: Run, backend: str):
        self.model = model
        self.run = run
        self.backend = backend
        self.tokens = run.batch_size * run.length
        self.width = model.width
        self.existing, self.results, self.losses, self.leaving_head, self.parts = [], [], [], [], []
        self.evaluations, self.waits, self.late = [], [], range(0)
        self.weights, self.gradients, self.shapes = {}, {}, {}
        self._cast = {}
        self.role = "activations"

    def make(
        self,
        inputs: list[Array],
        numbers: int,
        width: float | None = None,
        in_place: bool = False,
        role: str | None = None,
    ) -> Array:
        """An array of so many numbers of ``width`` bytes; ``in_place``: it may take the memory of an input."""
        operation = Operation(inputs, in_place)
        array = Array(numbers, width or self.width, role or self.role, operation)
        operation.outputs.append(array)
        return array

    def product(
        self, inputs: list[Array], numbers: int, inner: int, width: float | None = None, role: str | None = None
    ) -> Array:
        """A product of matrices: each of its ``numbers`` is a sum of ``inner`` products."""
        array = self.make(inputs, numbers, width, role=role)
        array.made_by.work = 2 * numbers * inner
        return array

    def view(self, x: Array, after: Iterable[Array] = ()) -> Array:
        """The same numbers in another order or shape, or no sooner than ``after`` exist (mx.depends).

        It costs nothing, but it takes its place in the order.
        """
        operation = Operation([x, *after], in_place=False)
        operation.outputs = [Array(x.numbers, x.width, x.role, operation, base=x)]
        return operation.outputs[0]

    def some_rows(self, table: Array, rows: int, columns: int) -> Array:
        """So many rows of a table, which are a slice of it and no operation in the order."""
        return Array(rows * columns, table.width, table.role, table.made_by, base=table)

    def elementwise(
        self, inputs: list[Array], numbers: int | None = None, width: float | None = None, role: str | None = None
    ) -> Array:
        """A number for each of the first input's, which may take its memory."""
        return self.make(inputs, numbers or inputs[0].numbers, width or inputs[0].width, True, role)

    def several(self, inputs: list[Array], sizes: list[tuple[int, float]]) -> list[Array]:
        """One operation with several results, (numbers, width) of each."""
        operation = Operation(inputs, in_place=False)
        operation.outputs = [Array(numbers, width, self.role, operation) for numbers, width in sizes]
        return operation.outputs

    def exist(self, numbers: int, width: float, role: str) -> Array:
        """An array that exists before the step."""
        array = Array(numbers, width, role)
        self.existing.append(array)
        return array

    def float32(self, x: Array) -> Array:
        """The array in float32: made once, however many ask for it, since MLX sees that they are the same."""
        if x.width == FLOAT32:
            return x
        if x not in self._cast:
            self._cast[x] = self.elementwise([x], width=FLOAT32)
        return self._cast[x]

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        trained: bool,
        width: float | None = None,
        nbytes: int | None = None,
    ) -> Array:
        """The weight of that name, which exists before the step; ``nbytes`` if it is quantized."""
        if name not in self.weights:
            numbers = shape[0] * (shape[1] if len(shape) > 1 else 1)
            array = self.exist(numbers, width or self.width, "weights")
            if nbytes is not None:  # quantized
                array.width = nbytes / numbers
            self.weights[name] = array
            if trained:
                self.shapes[name] = shape
        return self.weights[name]

    def add_gradient(self, name: str, gradient: Array) -> None:
        """Add to the gradient of a weight."""
        gradient.role = "gradients"
        if name in self.gradients:
            gradient = self.elementwise([self.gradients[name], gradient], role="gradients")
        self.gradients[name] = gradient

    def evaluate(self, arrays: list[Array], done: int) -> None:
        """Evaluate these together, once the first so many evaluations are done."""
        self.evaluations.append(arrays)
        self.waits.append(done)

    def sum(self, arrays: list[Array]) -> Array:
        """The sum, one addition after the other."""
        total = arrays[0]
        for array in arrays[1:]:
            total = self.elementwise([total, array])
        return total
