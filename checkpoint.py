"""
Checkpoints: everything a run needs to go on as if it had never stopped, in one file that cannot run code.

A checkpoint is one safetensors file: weights of router and LoRA, optimiser moments and random generator as
tensors, the rest (step, counters, the checksum of the tensors) as JSON in its header. It is written aside,
synced and renamed, so a reader finds either the old file or the new one, never half of one. No pickle is read
or written anywhere.
"""

import contextlib
import hashlib
import json
import os
import warnings
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump

import ranks
from folders import write_whole


def digest(tensors, state):
    """sha256 over the state and names, shapes and bytes: a flipped bit is found before it trains on."""
    h = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(
            f"{name} {tuple(t.shape)} {t.dtype}".encode() + t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def write_json(path, value):
    write_whole(Path(path), (json.dumps(value, indent=1) + "\n").encode())


def trainable(policy, router):
    """Name -> parameter or buffer of everything that training changes or fixes: LoRA and the router."""
    named = {f"policy.{k}": p for k, p in policy.named_parameters()}
    if router is not None:
        named |= {f"router.{k}": t for k, t in router.state_dict(keep_vars=True).items()}
    return named


def save(path, policy, router, optimizer=None, generator=None, **state):
    """Write a checkpoint; `state` is anything JSON can hold (step, best, ...). All ranks call, one writes."""
    generators = [] if generator is None else ranks.gather(generator.get_state())
    if ranks.RANK:
        return
    tensors = {k: t.detach().cpu().contiguous() for k, t in trainable(policy, router).items()}
    if optimizer is not None:
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": t.detach().cpu().contiguous() for k, t in moments.items()}
    if generators:
        tensors["generator"] = torch.cat(generators)  # the ranks' own, one behind the other
    header = dict(state=json.dumps(state), sha256=digest(tensors, json.dumps(state)))
    write_whole(Path(path), dump(tensors, metadata=header))


def load(path, policy, router, optimizer=None, generator=None):
    """Put a checkpoint's contents in place and return its state dict.

    Raises ValueError, changing nothing, if the file is damaged or was made for other models or another
    router.
    """
    try:
        with safe_open(path, framework="pt") as f:
            header = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is no readable checkpoint ({e})") from e
    if header.get("sha256") != digest(tensors, header.get("state", "")):
        raise ValueError(f"{path} is damaged: its checksum does not match")
    target = trainable(policy, router)
    for name, t in target.items():
        if name not in tensors or tensors[name].shape != t.shape:
            raise ValueError(f"{path} was made for other models: {name} is missing or of another shape")
    with torch.no_grad():
        for name, t in target.items():
            t.copy_(tensors[name])
    if optimizer is not None:
        state = {}
        for name in tensors:
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = tensors[name]
        optimizer.load_state_dict(dict(state=state, param_groups=optimizer.state_dict()["param_groups"]))
    if generator is not None:
        generator.set_state(ranks.share(tensors["generator"]).clone())
    return json.loads(header["state"])


def append(path, rows):
    with open(path, "a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def trim(path, step):
    """Drop the rows of a .jsonl beyond `step`: they tell of work that was lost and will be done again.
    Returns those that stay."""
    kept = []
    if path.exists():
        for text in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # the last one may have been torn
                kept += [row] if (row := json.loads(text))["step"] <= step else []
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    return kept


@contextlib.contextmanager
def locked(folder):
    """One process at a time trains in `folder`, which is made: ValueError for the second. The kernel drops
    the lock with its process, however that ends: a file `lock` that lies there means nothing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process trains in {folder}: wait, or choose another --out") from None
        except OSError as e:
            warnings.warn(f"{folder} lies where nothing can be locked ({e}): start no second run in it")
        try:
            yield
        finally:
            if os.listdir(folder) == ["lock"]:  # nothing came of it
                os.unlink(file.name)
                folder.rmdir()


def last(folder):
    """The checkpoints of a run, newest first."""
    return sorted(Path(folder).glob("step-*.safetensors"), reverse=True)


def rotate(folder, newest, keep=2):
    """Delete all but `newest` and those before it, `keep` in all. What lies beyond it was found damaged."""
    older = [path for path in last(folder) if path < newest]
    for path in set(last(folder)) - {newest, *older[:keep - 1]}:
        path.unlink()


def load_last(folder, *where):
    """Load the newest checkpoint that is whole, saying so when one had to be passed over. None when there is
    none; ValueError when there are some and none can be loaded."""
    for path in last(folder):
        try:
            return load(path, *where)
        except ValueError as e:
            warnings.warn(f"{e}; falling back to the checkpoint before it")
    if last(folder):
        raise ValueError(f"no checkpoint in {folder} can be loaded, see above: start anew with another --out")
    return None
