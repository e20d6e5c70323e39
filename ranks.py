"""
More than one device: every rank runs the same program, each step on its own share of the prompts.

    torchrun --nproc_per_node=8 train.py --task gsm8k       eight GPUs of one machine, or eight CPU processes

Every rank holds the whole policy and the router. Between them travel, each step, one sum of the gradients
of LoRA and router and what was sampled (for the metrics), and once what the experts made of each prompt. Sums
are the same on all ranks bit for bit, hence so are the weights. Started without torchrun a program is rank 0
of 1: no process group is opened, and nothing in here does anything.

torchrun ends all ranks when one dies; who waits for another longer than $N_MUSKETEERS_TIMEOUT minutes (30)
gives up.
"""
import contextlib
import importlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

RANK, WORLD = (int(os.environ.get(name, usual)) for name, usual in (("RANK", 0), ("WORLD_SIZE", 1)))


@contextlib.contextmanager
def started():
    """Meet the other ranks, and part at the end. Only rank 0 prints: the others would say the same."""
    if WORLD == 1:
        yield
        return
    # Whoever imports this once the group is there keeps the group in default arguments: its threads would
    # outlive `destroy_process_group` and could abort the process as it ends.
    importlib.import_module("torch.distributed.nn")
    patience = timedelta(minutes=float(os.environ.get("N_MUSKETEERS_TIMEOUT", 30)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if RANK else sys.stdout):
        yield
    dist.destroy_process_group()


def take(device):
    """Make "cuda" mean this rank's own GPU. Raises ValueError where it cannot have one."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if WORLD > 1 and device != "cpu" and (device != "cuda" or local >= torch.cuda.device_count()):
        raise ValueError(f"{device} is not a device for each of {WORLD} ranks: use a lower --nproc_per_node, "
                         "with --device cuda every rank takes one GPU; or --device cpu")
    if WORLD > 1 and device == "cuda":
        torch.cuda.set_device(local)


def share(items):
    """This rank's part of a list; the ranks' parts in a row are the list, and differ by one at most."""
    return items[len(items) * RANK // WORLD:len(items) * (RANK + 1) // WORLD]


def meet(collective, *args, **how):
    """Do what all ranks do together. Raises ConnectionError where one of them does not come."""
    try:
        if WORLD > 1:
            collective(*args, **how)
    except RuntimeError as e:  # gloo and nccl have no kind of their own for this
        raise ConnectionError(f"another rank is gone, see what it said ({str(e).splitlines()[0]})") from e


def gather(value):
    """[value of rank 0, value of rank 1, ...] on every rank; its tensors must be on the CPU."""
    values = [value] * WORLD
    meet(dist.all_gather_object, values, value)
    return values


def total(*numbers):
    """Each number summed over the ranks, a list of floats."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    meet(dist.all_reduce, sums)
    return sums.tolist()


def add_up(parameters, weight):
    """Every gradient becomes the sum over the ranks of weight x gradient: one flat tensor, one all-reduce."""
    grads = [p.grad for p in parameters if WORLD > 1 and p.grad is not None]
    if grads:
        flat = torch.cat([g.flatten() for g in grads]) * weight
        meet(dist.all_reduce, flat)
        for g, new in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(new.view_as(g))


def same(tensors):
    """Every tensor becomes that of rank 0."""
    for t in tensors:
        meet(dist.broadcast, t.detach(), src=0)
