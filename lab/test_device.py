"""
A whole run on a device that is not the CPU, where there is none: a simulated one.

    python -m pytest -q lab/test_device.py

It does real arithmetic, but refuses what CUDA would refuse: a tensor of the CPU beside one of its own, and,
while a graph is recorded, a wait of the host or a random number. It does not tell cuda:0 from cuda:1. It runs
in a process of its own, because it changes torch for good.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import eval as evaluation
import model as model_file
import rlvr
import train
from model import Policy
from test_all import quick, records, remembered  # noqa: F401  quick is a fixture

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "npu:0"
WAITS = ("aten::_local_scalar_dense", "aten::nonzero")  # the host waits for a number, or for a size
COPIES = ("aten::copy_", "aten::_to_copy", "aten::to")  # these may lead from one device to the other
INDEXING = ("aten::index", "aten::index_put_")  # these also take indices that are on the CPU, as on CUDA


# -- The simulated device

operations = []  # the names of all operations on the device so far
tapes = []  # of a graph that is being recorded: [(operation, its arguments, what it gave)]


class There(torch.Tensor):
    """A tensor that says it is on the device. Its numbers are in `inner`, a tensor of the CPU."""
    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), inner.storage_offset(),
                                                   dtype=inner.dtype, device=DEVICE)

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        operations.append(WAITS[0])
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Watch(TorchDispatchMode):
    """Sees every operation, also those that only make a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def inner(value):
    return value.inner if isinstance(value, There) else value


def compute(function, args, kwargs):
    """Do an operation on the inner tensors. Raises RuntimeError where CUDA would."""
    # Which tensors are on the device, and which are not? Numbers may be on the CPU.
    name, target = function._schema.name, kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    mine = [tensor for tensor in tensors if isinstance(tensor, There)]
    others = [tuple(t.shape) for t in tensors if not isinstance(t, There) and t.dim() > 0]
    if mine and others and name not in (*COPIES, *INDEXING):
        raise RuntimeError(f"{name} mixes devices: {others} is on the CPU")
    if mine:
        operations.append(name)

    # Where is the result?
    to_device = bool(mine)
    args_there, kwargs_there = tree_map(inner, (args, kwargs))
    if target is not None:
        to_device = torch.device(target).type == "npu"
        kwargs_there["device"] = torch.device("cpu")

    result = function(*args_there, **kwargs_there)
    if tapes:
        if name in WAITS or "generator" in kwargs or not (mine or to_device):
            raise RuntimeError(f"{name} cannot be in a graph")
        tapes[0].append((function, args_there, kwargs_there, result))

    if name.endswith("_") or "out" in kwargs:  # in place: the result is the very tensor that was given
        return kwargs.get("out", args[0])

    def on_its_device(value):
        return There(value) if isinstance(value, torch.Tensor) and to_device else value

    return tree_map(on_its_device, result)


def capture(step, device):
    """In place of a CUDA graph: replaying does the same operations on the same addresses, without Python."""
    tapes.append([])
    step()
    tape, replays = tapes.pop(), []

    def replay():
        # CUDA only records the step, but it has run here: the first replay is done already.
        if replays:
            with _disable_current_modes():
                for function, args, kwargs, result in tape:
                    again = function(*args, **kwargs)
                    for old, new in zip(tree_leaves(result), tree_leaves(again)):
                        if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                            old.copy_(new)
        replays.append(1)

    return replay


def pretend_device():
    """Change torch and this program for good, so that npu:0 is the device. Returns what must stay alive."""
    _setup_privateuseone_for_python_backend("npu")
    library = torch.library.Library("aten", "IMPL")  # for operations that torch keeps from modes

    def implement(name, function):
        library.impl(name, function, "PrivateUse1")

    def empty(*args, device=None, **kwargs):
        return There(torch.ops.aten.empty(*args, **kwargs))

    def empty_strided(*args, device=None, **kwargs):
        return There(torch.ops.aten.empty_strided(*args, **kwargs))

    def local_scalar(tensor):
        return tensor.inner.item()

    def copy_from(source, target, non_blocking=False):
        return compute(torch.ops.aten.copy_.default, (target, source), {})

    implement("empty.memory_format", empty)
    implement("empty_strided", empty_strided)
    implement("_local_scalar_dense", local_scalar)
    implement("_copy_from", copy_from)

    # Weights are read in threads of their own, where no mode sees them.
    load = model_file.load_file

    def load_there(path, device):
        return {name: tensor.to(device) for name, tensor in load(path).items()}

    model_file.load_file = load_there
    model_file.capture_graph = capture

    # A generator of the device is one of the CPU.
    def new_generator(cls, device="cpu"):
        return super(torch.Generator, cls).__new__(cls)

    torch.Generator = type("Generator", (torch.Generator,), dict(__new__=new_generator))

    def pick_device(name, small=False):
        return DEVICE

    train.pick_device = evaluation.pick_device = rlvr.pick_device = pick_device
    return library


# -- What runs on it

def run_on_the_device(dtype, out, *quick):
    """Training, eval.py and --resume; then the tokens of a graph beside those of the CPU."""
    library = pretend_device()

    def few_problems(task, split, n, *rest, **options):
        return remembered(task, split, min(n, 16), *rest, **options)

    rlvr.get_problems = few_problems
    short = ("--words_steps 2 --reading_steps 2 --steps 1 --val 4 --test 4 --group 4 --max_new 2 "
             f"--dtype {dtype}").split()
    with Watch():
        report = train.run([*quick, *short, "--out", out])
        evaluation.run([out, "--n", "4"])
        train.run(["--resume", out, "--steps", "2"])
        drawn = {}
        for device in ("cpu", DEVICE):
            drawn[device], n_waits = draw_tokens(device, dtype)
    compared = "reward_by_expert" in records(Path(out))[0]
    print(f"{len(operations)} operations, {n_waits} waits in 2 x 32 tokens; tokens are equal: "
          f"{drawn['cpu'] == drawn[DEVICE]}; compared: {compared}; tested: {report['n']}")
    del library


def draw_tokens(device, dtype):
    """Tokens of the embedded policy, sampled and greedy, 32 each: long enough for a graph.

    Also returns how often the host waited for the device.
    """
    policy = Policy.from_pretrained("tiny/policy", dtype=getattr(torch, dtype), device=device)
    policy.stop_at([1])  # of which it gives none here
    tokens = torch.ones(2, 4, dtype=torch.long, device=device)
    prefill = policy.prefill(tokens, torch.full((2,), 4, device=device))
    drawn, before = [], len(operations)
    for temperature in (1.0, 0.0):
        generator = torch.Generator().manual_seed(0)
        new_tokens, _ = policy.generate(prefill, 2, 32, temperature, generator)
        drawn.append(new_tokens.tolist())
    return drawn, sum(name in WAITS for name in operations[before:])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_on_a_device_that_is_not_the_cpu(quick, tmp_path, dtype):  # noqa: F811
    """Reading, stage 0, GRPO with comparing, checkpoint, --resume, eval.py.

    While tokens are sampled, the host waits once for every 8 of them, at the start and at the end. A step
    that is recorded once and replayed, as a CUDA graph is, gives the tokens of a CPU.
    """
    code = "import sys; from lab import test_device; test_device.run_on_the_device(*sys.argv[1:])"
    out = tmp_path / "run"
    process = subprocess.run([sys.executable, "-c", code, dtype, str(out), *quick], text=True, cwd=ROOT,
                             env=os.environ | dict(PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT)
    assert process.returncode == 0, process.stdout[-3000:]
    found = re.search(r"(\d+) operations, (\d+) waits", process.stdout)
    assert int(found[1]) > 5000
    assert int(found[2]) == 16
    assert "tokens are equal: True; compared: True; tested: 4" in process.stdout
    assert len(records(out)) == 2
    assert (out / "eval-step1-n4.json").exists()
