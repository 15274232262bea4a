"""What a step's arrays are made with: the smallest parts, for the modules, the loss and the update alike."""

from dataclasses import dataclass

from ember_mlx.planner.architecture import Architecture
from ember_mlx.planner.evaluation import Array, Operation

FLOAT32 = 4


@dataclass(frozen=True)
class Run:
    """What of a run's options memory depends on.

    Args:
        batch_size, length (int): Rows, and tokens of each that go through the model.
        fine_tune_type (str): "lora", "dora" or "full".
        layers (int): How many of the last layers train.
        rank (int): Of LoRA.
        lora_keys (tuple, optional): The linears that LoRA is put on; None for all.
        tables (tuple[str]): The token tables that train, by their names.
        optimizer, table_optimizer (str): "adam", "adamw", "adafactor", "sgd", "muon"; "ember" for tables too.
        stochastic_rounding, grad_checkpoint, chunked_loss, accumulate (bool): As their options say.
        evaluation_length (int): As ``length``, in validation; 0 where its rows are no longer.
        tables_must_train (bool): Whether frozen tables are out of the question: they have new rows, or no layer trains.
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
    accumulate: bool
    evaluation_length: int = 0
    tables_must_train: bool = False


class Builder:
    """Arrays that make arrays.

    Args:
        model (Architecture): Its shapes.
        run (Run): What of the options matters.
        backend (str): "metal", "cuda" or "cpu".

    ``results`` are the arrays that a step is computed for, ``there`` those that exist before it; ``weights`` and
    ``gradients`` are by name.
    """

    def __init__(self, model: Architecture, run: Run, backend: str):
        self.model = model
        self.run = run
        self.backend = backend
        self.tokens = run.batch_size * run.length
        self.width = model.width
        self.there, self.results = [], []
        self.weights, self.gradients, self.shapes = {}, {}, {}
        self._cast = {}
        self._role = "activations"

    def make(self, inputs, numbers, width=None, in_place=False, role=None):
        operation = Operation(inputs, in_place)
        array = Array(numbers, width or self.width, role or self._role, operation)
        operation.outputs.append(array)
        return array

    def product(self, inputs, numbers, inner, width=None, role=None):
        """A product of matrices: each of its ``numbers`` is a sum of ``inner`` products."""
        array = self.make(inputs, numbers, width, role=role)
        array.made_by.work = 2 * numbers * inner
        return array

    def view(self, x, after=()):
        """The same numbers in another order or shape, or no sooner than ``after`` are there (mx.depends).

        It costs nothing, but it takes its place in the order.
        """
        operation = Operation([x, *after], in_place=False)
        operation.outputs = [Array(x.numbers, x.width, x.role, operation, base=x)]
        return operation.outputs[0]

    def elementwise(self, inputs, numbers=None, width=None, role=None):
        return self.make(inputs, numbers or inputs[0].numbers, width or inputs[0].width, True, role)

    def several(self, inputs, sizes, role=None):
        """One operation with several results, (numbers, width) of each."""
        operation = Operation(inputs, in_place=False)
        operation.outputs = [Array(numbers, width, role or self._role, operation) for numbers, width in sizes]
        return operation.outputs

    def is_there(self, numbers, width, role):
        array = Array(numbers, width, role)
        self.there.append(array)
        return array

    def float32(self, x):
        """The array in float32: made once, however many ask for it, since MLX sees that they are the same."""
        if x.width == FLOAT32:
            return x
        if x not in self._cast:
            self._cast[x] = self.elementwise([x], width=FLOAT32)
        return self._cast[x]

    def weight(self, name, shape, trained, width=None, nbytes=None):
        if name not in self.weights:
            numbers = shape[0] * (shape[1] if len(shape) > 1 else 1)
            array = self.is_there(numbers, width or self.width, "weights")
            if nbytes is not None:  # quantized
                array.width = nbytes / numbers
            self.weights[name] = array
            if trained:
                self.shapes[name] = shape
        return self.weights[name]

    def add_gradient(self, name, gradient):
        gradient.role = "gradients"
        if name in self.gradients:
            gradient = self.elementwise([self.gradients[name], gradient], role="gradients")
        self.gradients[name] = gradient

    def sum(self, arrays):
        total = arrays[0]
        for array in arrays[1:]:
            total = self.elementwise([total, array])
        return total
