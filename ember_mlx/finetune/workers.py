"""The workers of a run: several processes, on one host or many, that ``mlx.launch`` starts and MLX connects.

This is the one place that knows a worker's rank and their number. The engine is ``mx.distributed``; here is what it
lacks: a limit to every wait, agreement on what is trained, and one outcome of every check on all of them. It chooses
the stream itself: the CPU's, but the GPU's of NCCL, which knows no other.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ember_mlx.optimizers.row_shards import fault_of_sum_scatter
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.sizes_in_memory import GRADIENTS_TOGETHER, sent_together

__all__ = ["ANNOUNCES", "JOIN_SECONDS", "Averages", "Meeting", "Workers", "announced_workers", "as_words"]

JOIN_SECONDS = 300
WORDS = {4: mx.uint32, 2: mx.uint16, 1: mx.uint8}  # by bytes


@dataclass(frozen=True)
class Workers:
    """This worker, of ``size`` in all; rank 0 leads: it alone prints, saves and reads checkpoints.

    Every method but :meth:`join` is called by all workers at the same point of a run, and costs nothing for one alone.
    """

    rank: int
    size: int

    @classmethod
    def join(cls, limit: int = JOIN_SECONDS) -> "Workers":
        """Connect to the others, once a process; after that it returns at once.

        MLX holds Python's lock while it connects, so only a signal's default action can end it: after ``limit``
        seconds the process dies of SIGALRM (a shell shows 142), and the line printed before says for whom it waited.

        Raises:
            InputError: where several workers are announced and MLX finds this one alone, or cannot connect.
        """
        if _JOINED:
            return _JOINED[0]
        announced = announced_workers()
        if announced > 1:
            rank = os.environ.get("MLX_RANK")
            print(
                f"worker {rank} waits up to {limit} s for the others ({announced} in all)", file=sys.stderr, flush=True
            )
            before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(limit)
            try:
                mx.distributed.init()
            except RuntimeError as error:
                raise InputError(
                    f"MLX_RANK={rank}: MLX cannot connect the workers ({error}); start all of them, each with an "
                    f"address in numbers in the hosts' file; entry {rank}, counted from 0, must be this machine's"
                ) from error
            finally:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, before)
        world = mx.distributed.init()
        if announced > world.size():
            named = ", ".join(f"{name}={value}" for name, value in _announcing().items())
            raise InputError(
                f"{named}: at least {announced} workers are announced, but MLX connects {world.size()}: each "
                "would train alone; check the --backend and --hostfile of mlx.launch, or for one alone unset these"
            )
        _JOINED.append(cls(world.rank(), world.size()))
        return _JOINED[0]

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @contextmanager
    def one_outcome(self, number: Callable[[], int] = lambda: 0) -> Iterator["Meeting"]:
        """What is refused within on one worker is refused on all; one of these must not be inside another.

        It is one all_max, and a second collective for the text of a refusal.

        Args:
            number: Asked at the end for a number below 2^63; the largest of all workers' is then ``Meeting.largest``.

        Raises:
            InputError: on rank 0, with the refusing worker in front if it was another.
            SystemExit: with 2 on all other workers, which print nothing.
        """
        meeting, refused = Meeting(), None
        if self.size == 1:
            yield meeting
            meeting.largest = number()
            return
        try:
            yield meeting
        except (InputError, OSError, SystemExit) as error:
            refused = error
        text = "" if refused is None else str(refused) or type(refused).__name__
        own = mx.array([len(text.encode()), number()], mx.int64)
        longest, meeting.largest = mx.distributed.all_max(own).tolist()
        if not longest:
            return
        texts = self._all_texts(text, longest)
        if isinstance(refused, SystemExit):  # argparse has printed its own line
            raise refused
        if self.leads and refused:
            raise refused
        first = next(rank for rank, text in enumerate(texts) if text)
        self._refuse(f"worker {first}: {texts[first]}")

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Refuse what is not the same on all workers.

        Args:
            facts: What is compared, by the name that a refusal gives. Values are compared as JSON, by 8 bytes of their
                SHA-256.

        Raises:
            InputError: on rank 0, with the names of what differs from it and where.
            SystemExit: with 2 on all other workers, which print nothing.
        """
        if self.size == 1:
            return
        names = sorted(facts)
        if self._differing({"names": names}):
            self._refuse("the workers run different releases, or --config has options that are not in every worker's")
        differing = self._differing({name: facts[name] for name in names})
        if differing:
            self._refuse(f"the {self.size} workers do not have the same {'; nor the same '.join(differing)}")

    def _refuse(self, text):
        raise InputError(text) if self.leads else SystemExit(2)

    def _differing(self, facts):
        """The names of the facts that are not those of rank 0, each with the workers that differ."""
        sums = [hashlib.sha256(json.dumps(fact, sort_keys=True, default=str).encode()) for fact in facts.values()]
        own = mx.array([[int.from_bytes(each.digest()[i : i + 4], "big") for i in (0, 4)] for each in sums], mx.uint32)
        every = mx.distributed.all_gather(own[None])
        differs = mx.any(every != every[:1], axis=2).T.tolist()
        return [
            f"{name} (worker {', '.join(str(rank) for rank in range(self.size) if row[rank])} against worker 0)"
            for name, row in zip(facts, differs, strict=True)
            if any(row)
        ]

    def _all_texts(self, text, longest):
        """The texts of all workers, by rank; ``longest`` of them, in bytes, above 0."""
        padded = mx.array([list(text.encode().ljust(longest, b"\0"))], mx.uint8)
        every = mx.distributed.all_gather(padded)
        return [bytes(row).rstrip(b"\0").decode() for row in every.tolist()]

    def text_of_leader(self, text: str) -> str:
        """Rank 0's text, on all."""
        longest = self.all_max(len(text.encode()))
        return self._all_texts(text, longest)[0] if longest else ""

    def array_of_leader(self, array: mx.array) -> mx.array:
        """Rank 0's array, on all, every bit of it: the sum is one of integers, since -0.0 + 0.0 is 0.0."""
        words = as_words(array, (4, 1))  # NCCL has no integers of two bytes
        sent = mx.distributed.all_sum(words if self.leads else mx.zeros_like(words))
        mx.eval(sent)  # one after another: all at once would take twice the memory
        return sent.view(array.dtype).reshape(array.shape)

    def all_max(self, number: int) -> int:
        """The largest of the workers' numbers, each below 2^63."""
        return number if self.size == 1 else mx.distributed.all_max(mx.array(number, mx.int64)).item()

    def all_numbers(self, *numbers: float) -> list[list[float]]:
        """The numbers of all workers, in float64, a row for each rank."""
        if self.size == 1:
            return [list(numbers)]
        words = mx.array(np.array([numbers], np.float64).view(np.uint32))
        return np.array(mx.distributed.all_gather(words)).view(np.float64).tolist()

    def refuse_without_sum_scatter(self, where: str) -> None:
        """Raises InputError, beginning with ``where``, for a worker alone and a backend that lacks it, as the ring."""
        if self.size == 1:
            raise InputError(f"{where}: is for several workers; start them with mlx.launch, or leave it out")
        if fault := fault_of_sum_scatter(self.size):
            raise InputError(
                f"{where}: this backend of MLX has no sum_scatter ({fault}); use mlx.launch --backend jaccl or nccl, "
                "or leave it out"
            ) from fault

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Within, each worker draws its own from MLX's random state, as dropout does; after it all have one state.

        Keys are split as ``mx.random.split`` does: one for each worker, and one to go on with.
        """
        if self.size == 1:
            yield
            return
        keys = mx.random.split(mx.random.state[0], self.size + 1).tolist()
        own, after = (high << 32 | low for high, low in (keys[self.rank], keys[self.size]))
        mx.random.seed(own)  # the state itself cannot be assigned to; a seed is its two halves
        try:
            yield
        finally:
            mx.random.seed(after)


@dataclass
class Meeting:
    """What the workers told each other at the end of :meth:`Workers.one_outcome`."""

    largest: int = 0


_JOINED = []


def as_words(array: mx.array, widths: tuple[int, ...] = tuple(WORDS)) -> mx.array:
    """The bits of an array as a vector of the first unsigned integers, of ``widths`` in bytes, that fill it."""
    width = next(width for width in widths if array.nbytes % width == 0)
    return array.reshape(-1).view(WORDS[width])


class Averages:
    """The means of gradients over all workers, laid out: nothing is sent before the sums are evaluated.

    Small ones of a dtype are joined for the network, as ``mlx.nn.average_gradients`` does where all have one dtype. Of
    two workers the means have its bits; more add in another order.

    Args:
        gradients: By name.
        rows: Of arrays, by name, the rows that are sent: distinct, and the same on all workers. The others become 0.

    Attributes:
        sums (dict): What goes over the wire, by the names of the gradients in it. It is evaluated by itself, and let go
            of then: a GPU command that also divides would wait for the network.
        means (dict): By name.
    """

    def __init__(self, gradients: Mapping[str, mx.array], rows: Mapping[str, mx.array] | None = None):
        rows, workers = rows or {}, mx.distributed.init().size()
        sent = {name: array[rows[name]] if name in rows else array for name, array in gradients.items()}
        self.sums, found = {}, {}
        for names in _together(sent):
            joined = mx.concatenate([sent[name].reshape(-1) for name in names]) if len(names) > 1 else sent[names[0]]
            total = self.sums[names] = mx.distributed.all_sum(joined)
            ends = np.cumsum([sent[name].size for name in names])[:-1].tolist()
            parts = mx.split(total / workers, ends) if ends else [total / workers]
            found |= {name: part.reshape(sent[name].shape) for name, part in zip(names, parts, strict=True)}
        for name, array in gradients.items():
            if name in rows:
                whole = mx.zeros_like(array)
                whole[rows[name]] = found[name]
                found[name] = whole
        self.means = {name: found[name] for name in gradients}


def _together(arrays):
    """The names of arrays that are sent at once, dtype by dtype."""
    by_dtype = {}
    for name, array in arrays.items():
        by_dtype.setdefault(str(array.dtype), {})[name] = array.nbytes
    for _, nbytes in sorted(by_dtype.items()):
        yield from sent_together(nbytes, GRADIENTS_TOGETHER)


def announced_workers() -> int:
    """How many workers the environment promises at least, as ``mlx.launch`` sets it; 1 without it.

    Raises:
        InputError: for a variable that cannot be read.
    """
    announced = [1]
    for name, value in _announcing().items():
        try:
            announced.append(ANNOUNCES[name](value))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{name}={value}: cannot be read ({error}); mlx.launch sets it for two workers or more; "
                "one alone starts without mlx.launch"
            ) from error
    return max(announced)


def _announcing():
    """The environment's variables that tell of other workers."""
    return {name: os.environ[name] for name in ANNOUNCES if os.environ.get(name)}


def _hosts_of_file(path):
    hosts = json.loads(Path(path).read_text())
    are_lists = isinstance(hosts, list) and all(isinstance(each, list | str) for each in hosts)
    if not are_lists or not all(isinstance(address, str) for each in hosts for address in each):
        form = '[["10.0.0.1:5000"], ["10.0.0.2:5000"]]'
        raise ValueError(f'MLX reads {form} from it; a file with "ssh" is for --hostfile of mlx.launch')
    return len(hosts)


ANNOUNCES = {  # what mlx.launch sets -> the number of workers that it tells of
    "MLX_RANK": lambda rank: int(rank) + 1,
    "MLX_WORLD_SIZE": int,
    "MLX_HOSTFILE": _hosts_of_file,
    "MLX_IBV_DEVICES": lambda path: len(json.loads(Path(path).read_text())),
}
