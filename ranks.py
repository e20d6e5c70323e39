"""
More than one device: every rank runs the same program, each step on its own share of the prompts.

    torchrun --nproc_per_node=8 train.py --task gsm8k       eight GPUs of one machine, or eight CPU processes

Every rank holds the whole policy and the router. Between them travel, each step, one sum of the gradients
of LoRA and router and what was sampled (for the metrics), and once what the experts made of each prompt. Sums
are the same on all ranks bit for bit, hence so are the weights. A program started without torchrun is one
rank of one, opens no process group, and nothing in here does anything.

torchrun ends all ranks when one dies; who waits for another longer than $N_MUSKETEERS_TIMEOUT minutes (30)
gives up.
"""
import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world() > 1 else 0


@contextlib.contextmanager
def started():
    """Meet the other ranks and, at a good end, part. Only the first prints: the others say what it says."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    patience = timedelta(minutes=float(os.environ.get("N_MUSKETEERS_TIMEOUT", 30)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
            yield
    dist.destroy_process_group()


@contextlib.contextmanager
def meeting():
    """Around whatever waits for the others: a rank that is gone gives one sentence."""
    try:
        yield
    except RuntimeError as e:       # gloo and nccl raise nothing more precise
        raise ConnectionError("another rank is gone, it may have said why; the last checkpoint is kept: go "
                              f"on with --resume ({str(e).splitlines()[0]})") from e


def take(device):
    """Make "cuda" mean this rank's own GPU. Raises ValueError where a rank cannot have one."""
    if world() > 1 and device not in ("cpu", "cuda"):
        raise ValueError(f"{device} is one device for {world()} ranks: use --device cuda (each takes its own)"
                         " or cpu")
    if world() > 1 and device == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ValueError(f"there are {there} GPUs here: use --nproc_per_node={there}, or --device cpu")
        torch.cuda.set_device(local)


def share(items):
    """This rank's part of a list; the ranks' parts in a row are the list, and differ by one at most."""
    n, r, w = len(items), rank(), world()
    return items[n * r // w:n * (r + 1) // w]


@meeting()
def gather(value):
    """[value of rank 0, value of rank 1, ...] on every rank. Tensors must be on the CPU."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


@meeting()
def total(*numbers):
    """Each number, summed over the ranks: a list of floats."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if world() > 1:
        dist.all_reduce(sums)
    return sums.tolist()


@meeting()
def add_up(parameters, weight):
    """Every gradient becomes the sum over the ranks of weight x gradient: one flat tensor, one all-reduce."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if world() > 1:
        flat = torch.cat([g.flatten() for g in grads]) * weight
        dist.all_reduce(flat)
        for g, new in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(new.view_as(g))


@meeting()
def same(tensors):
    """Every tensor becomes the first rank's."""
    for t in tensors if world() > 1 else ():
        dist.broadcast(t.detach(), src=0)


def first(f, *args):
    """f(*args), called by the first rank alone, on all; what it refuses (ValueError, OSError), it says."""
    answer, refused = None, None
    if rank() == 0:
        try:
            answer = f(*args)
        except (ValueError, OSError) as e:
            refused = e
    answer, failed = gather((answer, refused is not None))[0]
    if refused:
        raise refused
    if failed:
        raise SystemExit(2)
    return answer
