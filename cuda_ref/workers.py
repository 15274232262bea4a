"""The ranks of a run that ``torch.distributed`` connects: they agree, refuse together, and none waits for ever.

The twin of ``ember_mlx.finetune.workers`` and ``lost_peers``, for a training loop of one's own under ``torchrun``::

    with together("nccl", peer_timeout=300) as workers:
        workers.agree({"--seed": seed, "the model": fingerprint(model.state_dict()), "the data": rows})
        for batch in batches:
            loss = streamed(*batch)
            workers.meet()

Data parallel, FSDP2 and vocabulary-parallel runs need it alike.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from cuda_ref import sharding
from ember_mlx.shared.environment import environment
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.peer_deadline import PeerDeadline, leave

__all__ = ["Workers", "fingerprint", "together"]

REMEDY = "start all ranks again, from the newest checkpoint"
VERSIONS = ("ember-mlx", "torch", "transformers", "triton")  # which must be alike
BACKSTOP = 20  # times the longest limit: torch's own comes after ours, since it ends in many lines and SIGABRT


class Workers:
    """This rank, of ``size`` in all. All ranks call each method at the same point; one alone it costs nothing.

    Attributes:
        rank, size (int): Rank 0 leads: it alone prints.
        device (torch.device): Of this rank.
        deadline (PeerDeadline): Hears of every meeting.
    """

    def __init__(self, rank: int, size: int, device: torch.device, peer_timeout: int):
        self.rank, self.size, self.device = rank, size, device
        limit = f"(peer_timeout={peer_timeout})"
        self.deadline = PeerDeadline(self, peer_timeout, lambda waited: _line(f"{waited} {limit}; {REMEDY}"))

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Refuse facts, and versions of packages, that are not the same on all ranks; the refusal names what differs.

        Args:
            facts: Options, fingerprints of data and model, by the name that a refusal gives.

        Raises:
            InputError: on rank 0.
            SystemExit: with 2 on all other ranks, which print nothing.
        """
        versions = environment()["versions"]
        self._refuse_alike(dict(facts) | {f"the version of {name}": versions[name] for name in VERSIONS})

    @contextmanager
    def one_outcome(self) -> Iterator[None]:
        """What is refused within on one rank is refused on all, as by :meth:`agree`."""
        refused = None
        try:
            yield
        except (InputError, OSError) as error:
            refused = InputError(str(error))
        self._refuse_alike({}, refused)

    def meet(self, number: int = 0) -> int:
        """Between two steps: all ranks are here. Returns the largest of their numbers, such as that of a signal.

        It waits for what the GPU has under way.
        """
        if self.size > 1:
            largest = torch.tensor(number, dtype=torch.int64, device=self.device)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            number = int(largest)
        self.deadline.passed()
        return number

    def _refuse_alike(self, facts, fault=None):
        try:
            sharding.agree(dist.group.WORLD if self.size > 1 else None, "Workers.agree", facts, fault)
        except InputError as error:
            if self.rank:
                raise SystemExit(2) from error
            raise


@contextmanager
def together(backend: str = "nccl", *, peer_timeout: int = 300, join_timeout: int = 300) -> Iterator[Workers]:
    """Join the other ranks that ``torchrun`` has started; within, no wait for them is without a limit.

    A rank that cannot join, loses another or waits for it too long prints one line and exits with 75 at once; nothing
    is saved then. An InputError within is one line and exit code 2. Without ``torchrun`` this rank is alone.

    Args:
        backend (str): Of ``torch.distributed``: "nccl", and each rank has the GPU of its LOCAL_RANK; or "gloo".
        peer_timeout (int): Seconds between two meetings, as ember_mlx.shared.peer_deadline.PeerDeadline has it.
        join_timeout (int): Seconds until all have come.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # which aborts before our deadline, in many lines
    workers = Workers(rank, size, device, peer_timeout)
    with workers.deadline:
        if size > 1:
            _join(workers, backend, join_timeout, timedelta(seconds=BACKSTOP * max(peer_timeout, join_timeout)))
        try:
            yield workers
        except InputError as error:
            print(_line(error), file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except RuntimeError as error:
            if size == 1 or not _is_of_a_peer(error):
                raise
            leave(_line(f"worker {rank}: another worker is lost ({_first_sentence(error)}); {REMEDY}"))
        if size > 1:
            dist.destroy_process_group()


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 of names, shapes, dtypes and every byte of tensors, such as a ``state_dict``, in hex."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = sharding.local_part(tensor).detach()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _join(workers, backend, seconds, backstop):
    print(
        _said(f"worker {workers.rank} waits up to {seconds} s for the others ({workers.size} in all)"), file=sys.stderr
    )
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=backstop)
    except RuntimeError as error:
        leave(_line(f"worker {workers.rank}: the others did not come ({_first_sentence(error)})"))


def _is_of_a_peer(error):
    """Whether a collective failed; gloo raises a plain RuntimeError that begins with a place in its source."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _first_sentence(error):
    """torch's and gloo's errors go on with advice."""
    return str(error).splitlines()[0].split(". ")[0].rstrip(".")


def _line(text):
    return _said(f"error: {text}")


def _said(text):
    return f"{Path(sys.argv[0]).name}: {text}"
