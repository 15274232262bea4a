"""Cases of two ranks, each of them a fork of this process; test_ranks.py starts it and reads the results.

    rank_cases.py FOLDER gloo|nccl

Of each rank FOLDER has CASE<rank>.txt, what it printed, and CASE<rank>.json, what it returned; found.json has the exit
codes. Over gloo all cases run at once.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch_streaming import batch_of, model_of, paired
from torch_tables import bits

from cuda_ref import InputError, StreamedBackward
from cuda_ref.streaming import next_token_loss
from cuda_ref.workers import fingerprint, together

FOLDER, BACKEND = Path(sys.argv[1]), sys.argv[2]
LIMITS = {"backend": BACKEND, "peer_timeout": 2, "join_timeout": 60}
AT_ONCE = {"gloo": 100, "nccl": 3}[BACKEND]  # GPUs take turns between the processes that use them


def case_alike():
    with together(**LIMITS) as workers:
        workers.agree({"--seed": float("nan"), "the model": fingerprint({"w": torch.ones(2)})})
        with workers.one_outcome():
            pass
        return [workers.meet(workers.rank), workers.meet()]


def case_other_data():
    with together(**LIMITS) as workers:
        workers.agree({"--seed": 0, "the data": fingerprint({"rows": torch.tensor([workers.rank])})})


def case_refused_by_one():
    with together(**LIMITS) as workers, workers.one_outcome():
        if workers.rank:
            raise InputError("no such folder")


def case_killed():
    with together(**LIMITS) as workers:
        workers.meet()
        if workers.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        workers.meet()


def case_stands_still():
    with together(**LIMITS) as workers:
        workers.meet()
        time.sleep(60 * workers.rank)
        workers.meet()


def case_never_comes():
    if os.environ["RANK"] == "1":
        return
    with together(**LIMITS | {"join_timeout": 1}):
        pass


def case_bad_labels():
    """On one rank alone."""
    with together(**LIMITS) as workers:
        model = model_of().to(workers.device)
        ids, labels = (each.to(workers.device) for each in batch_of(9))
        StreamedBackward(model, paired(model), group=dist.group.WORLD)(ids, labels + 1000 * workers.rank)


def train(batches_of_step, device, group=None, tied=False, loss=None, gathered=False):
    """Weights and state after steps of these batches, losses, and what was refused."""
    model = model_of(tied=tied).to(device)
    if group is not None and group.rank():
        with torch.no_grad():
            model.model.norm.weight.fill_(3)  # rank 0's weights count
    optimizer = paired(model, rest=partial(torch.optim.SGD, lr=0.05), weight_decay=0.1, eps=1e-5)
    streamed = StreamedBackward(model, optimizer, loss, block_rows=None if loss else 50, group=group)
    losses = []
    for batches in batches_of_step:
        batches = [tuple(each.to(device) for each in batch) for batch in batches]
        losses.append((streamed.accumulate(batches) if gathered else streamed(*batches[0])).item())
    state = [optimizer.state[p][name] for p in model.parameters() for name in sorted(optimizer.state[p])]
    return (
        [x.detach().tolist() for x in model.parameters()],
        bits(*model.parameters(), *state),
        losses,
        streamed.refused,
    )


def rows_of(step):
    """Four rows, of which the last two have few tokens that count; in the last step none."""
    (ids, labels), (more, others) = batch_of(9, step), batch_of(9, step + 10)
    others[:, : 7 + step] = -100
    return torch.cat([ids, more]), torch.cat([labels, others])


def streamed_case(**how):
    """Two ranks with two rows each; rank 0 compares with one rank that has all four."""
    with together(**LIMITS | {"peer_timeout": 60}) as workers:
        whole = [rows_of(step) for step in range(3)]
        part = slice(2 * workers.rank, 2 * workers.rank + 2)
        own = [[(ids[part], labels[part])] for ids, labels in whole]
        weights, found, losses, refused = train(own, workers.device, dist.group.WORLD, **how)
        workers.agree({"weights and state": hashlib.sha256(repr(found).encode()).hexdigest()})
        if workers.rank:
            return None
        expected, _, single, _ = train([[each] for each in whole], workers.device, **how)
        worst = max(
            (torch.tensor(a) - torch.tensor(b)).abs().max().item() for a, b in zip(weights, expected, strict=True)
        )
        return {"worst": worst, "losses": losses, "one rank's": single, "refused": refused}


case_untied = streamed_case
case_tied = partial(streamed_case, tied=True)
case_accumulated = partial(streamed_case, gathered=True)
case_whole_logits = partial(streamed_case, loss=next_token_loss)


def case_not_finite():
    """A NaN on one rank: all refuse the same weights, and stay equal."""
    with together(**LIMITS | {"peer_timeout": 60}) as workers:
        model = model_of().to(workers.device)
        streamed = StreamedBackward(model, paired(model), group=dist.group.WORLD)
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.register_hook(lambda g: g * (torch.nan if workers.rank else 1))
        streamed(*(each.to(workers.device) for each in batch_of(9, workers.rank)))
        workers.agree({"the model": fingerprint(model.state_dict())})
        return streamed.refused


CASES = {name.removeprefix("case_"): case for name, case in globals().items() if name.startswith("case_")}


def be_rank(case, rank, port):
    said = os.open(FOLDER / f"{case}{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1), os.dup2(said, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        (FOLDER / f"{case}{rank}.json").write_text(json.dumps(CASES[case]()))
    except SystemExit as error:
        return error.code or 0
    except BaseException as error:  # a fork must not go on as its parent would
        print(f"{type(error).__name__}: {error}", flush=True)
        return 1
    return 0


def start(case):
    """Process -> case and rank."""
    started = {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(2):
        child = os.fork()
        if not child:
            os._exit(be_rank(case, rank, port))
        started[child] = case, rank
    return started


def main():
    torch.set_num_threads(1)
    sys.argv[0] = "train.py"
    left, running, found = list(CASES), {}, {}
    while left or running:
        while left and len(running) <= 2 * (AT_ONCE - 1):
            running |= start(left.pop(0))
        child, status = os.wait()
        case, rank = running.pop(child)
        found.setdefault(case, [None, None])[rank] = os.waitstatus_to_exitcode(status)
    (FOLDER / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
