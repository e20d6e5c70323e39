"""
A whole run on a device that is not the CPU, where there is none: a simulated one.

    python -m pytest -q lab/test_device.py

It does real arithmetic, but refuses what CUDA would refuse: a tensor of the CPU beside one of its own, and in
a graph a wait of the host or a random number. By itself, as the small run of test_all.py changes rlvr.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import eval as evaluation  # noqa: E402
import model as model_file  # noqa: E402
import rlvr  # noqa: E402
import train  # noqa: E402
from model import Policy  # noqa: E402
from test_all import quick, remembered, rows  # noqa: E402, F401

WAITS = ("aten::_local_scalar_dense", "aten::nonzero")  # the host waits for a number, or for a size

def pretend_device():
    """Changes torch for good: "npu:0" holds its tensors on the CPU and does real arithmetic, but raises where
    a tensor of the CPU meets one of its own. Returns the mode to run in, and the operations so far."""
    _setup_privateuseone_for_python_backend("npu")
    operations, copies = [], ("aten::copy_", "aten::_to_copy", "aten::to")
    tapes = []  # of a capture that is going on: [(operation, its arguments, what it gave)]

    class There(torch.Tensor):  # claims to be on the device
        is_cuda = True
        __torch_function__ = torch._C._disabled_torch_function_impl

        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="npu:0")

        def __init__(self, inner):
            self.inner = inner

        def tolist(self):
            operations.append(WAITS[0])
            return self.inner.tolist()

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return run(function, args, kwargs or {})

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return run(function, args, kwargs or {})

    def run(function, args, kwargs):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        mine = [t for t in tensors if isinstance(t, There)]
        others = [tuple(t.shape) for t in tensors if not isinstance(t, There) and t.dim() > 0]
        target, name = kwargs.get("device"), function._schema.name
        if mine and others and name not in copies:
            raise RuntimeError(f"{name} mixes devices: {others} is on the CPU")
        operations.extend(mine[:1] and [name])
        to_there = torch.device(target).type == "npu" if target is not None else bool(mine)
        args_there, kwargs_there = tree_map(lambda t: t.inner if isinstance(t, There) else t, (args, kwargs))
        if target is not None:
            kwargs_there["device"] = torch.device("cpu")
        out = function(*args_there, **kwargs_there)
        if tapes:
            fine = name not in WAITS and "generator" not in kwargs and (mine or to_there)
            assert fine, f"{name} in a graph"
            tapes[0].append((function, args_there, kwargs_there, out))
        if name.endswith("_") or "out" in kwargs:  # in place: the very tensor that was given
            return kwargs.get("out", args[0])
        return tree_map(lambda t: There(t) if isinstance(t, torch.Tensor) and to_there else t, out)

    def capture(step, device):  # a CUDA graph: the same operations on the same addresses, without Python
        tapes.append([])
        step()
        tape, replays = tapes.pop(), []

        def replay():
            if replays:  # what CUDA only records has run here already: the first replay is done
                with _disable_current_modes():
                    for function, args, kwargs, kept in tape:
                        new = function(*args, **kwargs)
                        for old, fresh in zip(tree_leaves(kept), tree_leaves(new)):
                            if old.data_ptr() != fresh.data_ptr():  # neither a view nor in place
                                old.copy_(fresh)
            replays.append(1)

        return replay

    model_file.capture = capture
    library = torch.library.Library("aten", "IMPL")  # where torch leaves modes out: table[[1, 2]] = True
    for name in ("empty.memory_format", "empty_strided"):
        function = getattr(torch.ops.aten, name.split(".")[0])
        library.impl(name, lambda *args, function=function, device=None, **kwargs: There(
            function(*args, **kwargs)), "PrivateUse1")
    library.impl("_local_scalar_dense", lambda t: t.inner.item(), "PrivateUse1")
    library.impl("_copy_from", lambda source, target, non_blocking=False: run(
        torch.ops.aten.copy_.default, (target, source), {}), "PrivateUse1")
    load = model_file.load_file  # it makes its tensors in threads of its own, where no mode sees them
    model_file.load_file = lambda path, device: {name: t.to(device) for name, t in load(path).items()}
    torch.Generator = type("Generator", (torch.Generator,), dict(
        __new__=lambda cls, device="cpu": super(torch.Generator, cls).__new__(cls)))
    train.pick_device = evaluation.pick_device = lambda name: "npu:0"
    return Watch(), operations, library

def run_on_a_device(out, *quick):
    watch, operations, library = pretend_device()
    rlvr.problems = lambda task, split, n, *rest, **options: remembered(
        task, split, min(n, 16), *rest, **options)
    with watch:
        train.run([*quick, *"--align 2 --align_words 2 --steps 1 --epochs 2 --val 4 --test 4".split(),
                   *"--group 2 --max_new 2 --out".split(), out])
        evaluation.main([out])
        train.run(["--resume", out, "--steps", "2"])
        drawn = {}
        for device in ("cpu", "npu:0"):
            policy = Policy.from_pretrained(f"{train.TINY}/policy", device=device)
            policy.stop_at([1])  # of which it gives none here
            cache = policy.prefill(torch.ones(2, 4, dtype=torch.long, device=device),
                                   torch.full((2,), 4, device=device))
            before = len(operations)
            for temperature in (1.0, 0.0):
                generator = torch.Generator().manual_seed(0)
                tokens, _ = policy.generate(cache, 2, 32, temperature, generator)
                drawn[device, temperature] = tokens.tolist()
    waits = [name for name in operations[before:] if name in WAITS]
    equal = all(drawn["cpu", temperature] == drawn["npu:0", temperature] for temperature in (1.0, 0.0))
    print(before, "operations,", len(waits), "waits in 2 x 32 tokens; the graph's tokens are equal:", equal)

def test_a_run_on_a_device_that_is_not_the_cpu(quick, tmp_path):
    """Reading, stage 0, GRPO, checkpoint, resume, eval.py. While tokens are sampled the host waits once every
    8, at the start and at the end, and a step recorded once and replayed, as a CUDA graph is, gives the
    tokens of a CPU. It does not see cuda:1."""
    code = "import sys, test_device; test_device.run_on_a_device(*sys.argv[1:])"  # anew: it changes torch
    process = subprocess.run([sys.executable, "-c", code, tmp_path / "run", *quick], text=True,
                             env=os.environ | dict(PYTHONPATH=f"{HERE}:{HERE.parent}"),
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.returncode == 0, process.stdout[-3000:]
    operations, waits = map(int, re.search(r"(\d+) operations, (\d+) waits", process.stdout).groups())
    assert operations > 5000 and waits == 16 and "tokens are equal: True" in process.stdout
    assert len(rows(tmp_path / "run")) == 2 and (tmp_path / "run" / "eval-run.json").exists()
