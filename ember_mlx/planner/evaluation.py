"""The order in which MLX computes the arrays of a step, and how much memory they take on the way.

A step is a few lazy graphs, evaluated one after another. MLX walks each from the results back, breadth first but at
most 20 wide, and computes it in the reverse of that order; so what stands near the results, such as the gradients of
weights, is computed late, and what it is made of lives until then. An array's memory is handed on to an elementwise
result of its size if nothing else reads it, and is free once the device has done the batch of operations with the last
that reads it. The program runs ahead of the device by up to ten batches, so memory is free that much later than it
could be: where the device is the slower of the two, which is so with long sequences.

From MLX 0.32: ``eval_impl`` in mlx/transforms.cpp, ``gpu::eval`` and ``CommandEncoder`` in mlx/backend/*.
"""

from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass, replace

__all__ = ["DEVICES", "Array", "Device", "Operation", "Peak", "evaluation_order", "peak_memory", "with_cache"]

WIDTH = 20  # MLX_BFS_MAX_WIDTH
TASKS_AHEAD = 10  # MAX_ACTIVE_TASKS


@dataclass(frozen=True)
class Device:
    """Where a step is computed.

    Args:
        operations, numbers (int): A batch of operations is handed over once it holds more operations, or once they
            read more numbers (MLX says megabytes, and counts numbers).
        ahead (int): How many batches the program may be ahead of the device.
        bytes_a_second, products_a_second (float): How fast it moves memory and multiplies matrices, in floating-point
            operations.
        seconds_to_encode, new_bytes_a_second (float): What the program takes for an operation and the views around it,
            and how fast it gets memory that the step has not had yet, where MLX's cache does not have it.

    The four speeds decide only how far the program runs ahead.
    """

    operations: int
    numbers: float
    ahead: int
    bytes_a_second: float
    products_a_second: float
    seconds_to_encode: float
    new_bytes_a_second: float


# The CPU frees after each operation. A task is 10 dispatches there (DISPATCHES_PER_TASK): 2 for what is computed, 1 for
# a view; counted in the graphs of LoRA and of full layers, that is 3.5 for each operation here.
CPU_OPERATIONS_AHEAD = int(TASKS_AHEAD * 10 / 3.5)
# MLX's limits of a batch (MLX_MAX_OPS_PER_BUFFER, MLX_MAX_MB_PER_BUFFER). The four speeds of CUDA are those that give
# the times, not the peaks, of 26 kinds of steps on an H200 best: off by 9 % in the root mean square. The others are
# guesses, of a large M-series chip and of two cores; Metal's program is thought fast, so that its peak is rather too
# high.
DEVICES = {
    "metal": Device(50, 50 * 2**20, TASKS_AHEAD, 400e9, 15e12, 8e-6, float("inf")),
    "cuda": Device(100, 1000 * 2**20, TASKS_AHEAD, 1.5e12, 400e12, 16e-6, 250e9),
    "cpu": Device(0, float("inf"), CPU_OPERATIONS_AHEAD, 10e9, 50e9, 8e-6, float("inf")),
}


def with_cache(device: Device) -> Device:
    """The same, where MLX's cache has what the step before has let go of, as by default in ``train`` on CUDA."""
    return replace(device, new_bytes_a_second=float("inf"))


class Array:
    """One array of the step.

    Args:
        numbers (int): How many.
        width (int): Bytes of each.
        role (str): What it counts as in the plan.
        made_by (Operation, optional): None for what is there before the step.
        base (Array, optional): The array whose memory it is: of which it is a part, or the transpose.
    """

    __slots__ = ("base", "made_by", "numbers", "role", "width")

    def __init__(
        self, numbers: int, width: float, role: str, made_by: "Operation | None" = None, base: "Array | None" = None
    ):
        self.numbers = numbers
        self.width = width
        self.role = role
        self.made_by = made_by
        self.base = base.base if base else self

    @property
    def nbytes(self) -> float:
        return self.numbers * self.width


class Operation:
    """What makes arrays of others.

    Args:
        inputs (list[Array]): What it reads.
        in_place (bool): Elementwise: it may write into what it reads.
        work (int): Floating-point operations of a product of matrices; 0 for all else.
    """

    __slots__ = ("in_place", "inputs", "outputs", "work")

    def __init__(self, inputs: list[Array], in_place: bool, work: float = 0):
        self.inputs = inputs
        self.in_place = in_place
        self.work = work
        self.outputs = []

    @property
    def is_view(self) -> bool:
        """Whether it computes nothing: what it makes is another view of what is there."""
        return bool(self.outputs) and self.outputs[0].base is not self.outputs[0]

    def seconds(self, device: Device) -> float:
        """What it takes the device."""
        arrays = [*self.inputs, *self.outputs]
        moved = sum(array.nbytes for array in arrays) / device.bytes_a_second
        float32 = max(array.width for array in arrays) > 2  # which takes twice as long
        return max(moved, self.work * (1 + float32) / device.products_a_second)


@dataclass
class Peak:
    """The most memory that a step takes, in bytes.

    Args:
        total (int): At the worst moment.
        parts (Counter): What of it is in arrays of each role.
        most (Counter): The most that each role takes at any moment.
    """

    total: int
    parts: Counter
    most: Counter


def peak_memory(
    results: list[Array],
    there: list[Array],
    device: Device,
    evaluations: list[list[Array]] | None = None,
    waits: list[int] | None = None,
    late: Collection[int] = (),
) -> Peak:
    """Compute arrays in MLX's order, and say how much memory the step takes.

    Args:
        results: What stays when all is done.
        there: All arrays that exist before; those that no operation reads stay.
        device: Where it is computed.
        evaluations: What is evaluated together, one after another. Default: ``results`` at once.
        waits: Of each of these, how many of the first must be done before it begins. Default: all but the one before.
        late: The numbers of those in which no memory is free before what read it has been waited for, as if the program
            took no time: so it was measured of a GPU's update from the second step on.
    """
    orders, made = [], set()
    for group in [results] if evaluations is None else evaluations:
        orders.append(evaluation_order(group, made))
        made.update(orders[-1])
    readers = Counter(array.base for order in orders for operation in order for array in operation.inputs)
    readers.update(results)  # read by the next step
    live = Counter()
    for array in there:
        live[array.role] += array.nbytes
    total = sum(live.values())
    peak, most = Peak(total, Counter(live), Counter()), Counter(live)
    clock = _Clock(device)
    last_batch_to_read, waiting = {}, deque()  # arrays that are done with, freed when the batch that read them is
    ends = []  # of each evaluation, its number of batches
    for number, order in enumerate(orders):
        done = max(number - 1, 0) if waits is None else waits[number]
        clock.is_late = number in late
        if done:
            clock.wait_for(ends[done - 1])
        for operation in order:
            while waiting and clock.is_done(waiting[0][0]):
                _, array = waiting.popleft()
                live[array.role] -= array.nbytes
                total -= array.nbytes
            free = []
            read = [array.base for array in operation.inputs]
            for array in dict.fromkeys(read):
                readers[array] -= read.count(array)
                if not readers[array]:
                    free.append(array)
            if operation.is_view:
                continue
            for output in operation.outputs:
                donor = None
                if operation.in_place:
                    same = (array for array in free if array.nbytes == output.nbytes)
                    donor = next((array for array in same if clock.is_done(last_batch_to_read.get(array))), None)
                if donor is None:
                    total += output.nbytes
                else:
                    free.remove(donor)
                    live[donor.role] -= donor.nbytes
                live[output.role] += output.nbytes
                most[output.role] = max(most[output.role], live[output.role])
                if not readers[output]:
                    free.append(output)
            if total > peak.total:
                clock.allocate(total - peak.total)
                peak.total, peak.parts = total, Counter(live)
            last_batch_to_read.update(dict.fromkeys(read, clock.batch))
            waiting.extend((clock.batch, array) for array in free)
            clock.encode(operation)
        clock.hand_over()
        ends.append(clock.batch)
    peak.most = most
    return peak


class _Clock:
    """When the device is done with each batch of operations, and where the program is meanwhile."""

    def __init__(self, device):
        self.device = device
        self.now = self.device_free_at = 0.0
        self.done_at = []
        self.waited_for = 0  # so many of the batches
        self.is_late = False
        self._begin()

    @property
    def batch(self):
        """The number of the batch that is being filled."""
        return len(self.done_at)

    def is_done(self, batch):
        if batch is None or batch < self.waited_for:
            return True
        return batch < self.batch and not self.is_late and self.done_at[batch] <= self.now

    def allocate(self, new_bytes):
        self.now += new_bytes / self.device.new_bytes_a_second

    def encode(self, operation):
        self.now += self.device.seconds_to_encode
        self.operations += 1
        self.numbers += sum(array.numbers for array in operation.inputs)
        self.seconds += operation.seconds(self.device)
        if self.operations > self.device.operations or self.numbers > self.device.numbers:
            self.hand_over()

    def wait_for(self, batches):
        """The first so many are done before anything more is encoded."""
        if batches > self.waited_for:
            self.waited_for = batches
            self.now = max(self.now, self.done_at[batches - 1])

    def hand_over(self):
        if self.operations:
            self.device_free_at = max(self.device_free_at, self.now) + self.seconds
            self.done_at.append(self.device_free_at)
            self.wait_for(self.batch - self.device.ahead)
            self._begin()

    def _begin(self):
        self.operations = self.numbers = self.seconds = 0


def evaluation_order(results: list[Array], made: Collection[Operation] = ()) -> list[Operation]:
    """All operations that ``results`` need beside those ``made`` already, in the order of MLX's ``eval``."""
    root = Operation(results, in_place=False)
    degree, pending, seen = Counter(), [root], {root}
    while pending:
        for array in pending.pop().inputs:
            made_by = array.made_by
            if made_by is not None and made_by not in made:
                degree[made_by] += 1
                if made_by not in seen:
                    seen.add(made_by)
                    pending.append(made_by)
    tape, stack, i = [root], [], 0
    while i < len(tape) or stack:
        if i < len(tape):
            operation, first = tape[i], 0
            i += 1
        else:
            operation, first = stack.pop()
        for j in range(first, len(operation.inputs)):
            made_by = operation.inputs[j].made_by
            if made_by is None or made_by in made:
                continue
            if len(tape) - i >= WIDTH:
                stack.append((operation, j))
                break
            degree[made_by] -= 1
            if not degree[made_by]:
                tape.append(made_by)
    return tape[:0:-1]
