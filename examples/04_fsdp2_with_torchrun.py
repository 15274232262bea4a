"""FSDP2 with Ember on the token tables and AdamW on the rest, and a checkpoint that any number of ranks can load.

    torchrun --nproc-per-node 2 examples/04_fsdp2_with_torchrun.py
    python examples/04_fsdp2_with_torchrun.py

On GPUs through NCCL where each process can have one, otherwise on the CPU through gloo. Trains a tiny Llama of Hugging
Face's transformers from nothing, on the characters of this file, in less than half a minute on two CPU cores.
"""

import os
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from cuda_ref import Ember, PairedOptimizer

STEPS, BATCH, LENGTH = 40, 8, 32

text = Path(__file__).read_text()
characters = sorted(set(text))
ids = torch.tensor([characters.index(character) for character in text])


def start():
    """Join the other ranks, or be the only one; returns the device of this rank."""
    on_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpus else "gloo"
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def make(device):
    """A model, sharded, and its optimizer: the lines that one's own script needs."""
    torch.manual_seed(0)  # the same weights on all ranks
    config = LlamaConfig(
        vocab_size=len(characters), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # After fully_shard: the parameters are other objects from here on. Ember sees by itself that they are sharded.
    adamw = partial(torch.optim.AdamW, lr=1e-3)
    return model, PairedOptimizer(model, tables=partial(Ember, lr=1e-2), rest=adamw)


def loss_of(model, batch):
    return model(input_ids=batch, labels=batch).loss


def batch_of(step, device):
    """Each rank draws its own."""
    draw = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    starts = torch.randint(0, len(ids) - LENGTH, (BATCH, 1), generator=draw)
    return ids[starts + torch.arange(LENGTH)].to(device)


def sum_over_ranks(value, device):
    total = torch.tensor(float(value), device=device)
    dist.all_reduce(total)
    return total.item()


def checkpoint_of(model, optimizer):
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def main():
    device = start()
    ranks = dist.get_world_size()
    say = print if dist.get_rank() == 0 else lambda *_: None
    model, optimizer = make(device)
    for step in range(1, STEPS + 1):
        loss = loss_of(model, batch_of(step, device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 8 == 0 or step == 1:
            say(f"step {step:2}  loss {sum_over_ranks(loss.item(), device) / ranks:.4f}")

    for side in (optimizer.tables, optimizer.rest):
        tensors = [value for state in side.state.values() for value in state.values()]
        here = sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in tensors)
        kept = sum_over_ranks(here, device)
        say(f"{type(side).__name__} keeps {kept:,.0f} bytes on {ranks} rank{'s' * (ranks > 1)}")

    with tempfile.TemporaryDirectory() as folder:
        folders = [folder]  # that of the first rank, for all
        dist.broadcast_object_list(folders)
        dcp.save(checkpoint_of(model, optimizer), checkpoint_id=folders[0])
        say(f"saved: loss {sum_over_ranks(loss_of(model, batch_of(0, device)).item(), device) / ranks:.6f}")
        model, optimizer = make(device)
        state = checkpoint_of(model, optimizer)  # its tensors are filled in place
        dcp.load(state, checkpoint_id=folders[0])
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        say(f"loaded: loss {sum_over_ranks(loss_of(model, batch_of(0, device)).item(), device) / ranks:.6f}")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
