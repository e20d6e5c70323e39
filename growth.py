"""
What a whole step costs and how it grows: by part, in seconds and memory; and TRL's step beside ours.

The measuring of `bench.py` that needs more than two functions in turn. Each step runs in a process of its own
(`python bench.py --child ...`), so that peaks of memory are its own.
"""

import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from bench import HERE, QWEN, alternate, child, load, products, random_model, ratio, resident, spread, texts


def trainer(folder, prompts, group=8, prompt=128, new=64, experts=3, tiny=False):
    """A function that does one step of the training loop and returns its seconds by part. No completion ends
    early; the states of `experts` experts of width 1,024 (tiny: 160) are in the cache."""
    import rlvr
    from experts import Expert
    from rewards import Problem, verify
    from router import Router

    policy = load(folder, torch.float32 if tiny else torch.bfloat16)
    width, tokenizer = 160 if tiny else 1024, Expert(folder).tokenizer
    router = Router([width] * experts, policy.embed.shape[1], dim=64 if tiny else 512)
    optimizer = rlvr.make_optimizer(policy, router, 1e-4, 1e-4, (0.9, 0.98), 0.0)
    states, (tokens, lengths) = torch.randn(4096, experts, width), texts(prompts, prompt)
    problem, generator = Problem("How many?", "18"), torch.Generator().manual_seed(0)
    how = dict(temperature=1.0, beta=0.04, clip=(0.2, 0.2), dr=False, micro=prompts, max_new=new)
    judge = lambda text, p, cut: verify(text, p, truncated=cut)
    plain_reference, spent = rlvr.reference_logprobs, {}

    def reference(*args):
        start = time.perf_counter()
        result = plain_reference(*args)
        spent["reference"] = time.perf_counter() - start
        return result

    def step():
        marks = [time.perf_counter()]
        mark = lambda: marks.append(time.perf_counter())
        rows = torch.randint(0, 4096, (prompts,))
        batch = rlvr.Batch([problem] * prompts, tokens, lengths, states[rows])
        mark()
        sampled = rlvr.rollout(policy, router, batch, tokenizer, judge, group, new, 1.0, generator)
        mark()
        sampled.rewards = torch.randint(0, 2, (prompts, group), generator=generator).float()
        rlvr.reference_logprobs = reference
        try:
            rlvr.update(policy, router, batch, sampled, optimizer, **how)
        finally:
            rlvr.reference_logprobs = plain_reference
        mark()
        cache, rollout, update = (b - a for a, b in zip(marks, marks[1:]))
        return dict(cache=cache, rollout=sampled.seconds, verification=rollout - sampled.seconds,
                    reference=spent["reference"], gradient=update - spent["reference"])

    return step


def measure_steps(rounds=2, **how):
    """Seconds by part of a step (median of `rounds` after one), and MB at the peak above the libraries."""
    before = resident("VmRSS")
    step = trainer(**how)
    found = [step() for _ in range(rounds + 1)][1:]
    return {k: statistics.median(f[k] for f in found) for k in found[0]} | dict(mb=resident() - before)


BASE = dict(prompts=4, group=8, prompt=128, new=64, experts=3)
GROWTH = dict(group=(4, 8, 16), new=(32, 64, 128), prompt=(64, 128, 256), experts=(1, 3, 8))


def bench_growth(folder, size):
    """How a step grows, one thing varied at a time; and with the model."""
    rows, done = [], {}
    for name, values in GROWTH.items():
        for value in values if size["grow"] else ():
            how = BASE | {name: value}
            key = json.dumps(how)
            if key not in done:
                done[key] = child("steps", folder=str(folder), **how)
            rows.append(dict(varied=name, value=value) | done[key])
    tiny, base = str(HERE / "tiny" / "policy"), json.dumps(BASE)
    rows += [dict(varied="model", value="tiny") | child("steps", folder=tiny, tiny=True, **BASE),
             dict(varied="model", value="135M") | (done.get(base) or
                                                   child("steps", folder=str(folder), **BASE))]
    if size["grow"]:
        with tempfile.TemporaryDirectory() as large:
            random_model(large, QWEN)
            rows.append(dict(varied="model", value="0.5B") | child("steps", folder=large, **BASE))
    return dict(growth=rows)


def bench_memory(folder, size):
    """The peak of train.py above its libraries against what it estimated at its start."""
    common = ["--policy", str(folder), "--level", "tiny", "--task", "arithmetic", "--template", "plain",
              "--experts", *(str(HERE / "tiny" / e) for e in ("arithmetic", "logic"))]
    found = [child("train", argv=[*common, "--batch", b, "--max-new", n])
             for b, n in (("8", "64"), ("4", "128"), ("2", "32"))[:3 if size["grow"] else 1]]
    for estimate, peak in found:
        print(f"  estimate {estimate:,.0f} MB, peak {peak:,.0f} MB")
    return dict(memory_estimate=spread([peak / estimate for estimate, peak in found]))


def measure_train(argv):
    """(MB that train.py says it will need, MB at its peak above its libraries)."""
    import reasoning_gym  # noqa: F401, a library that train.py would load later
    import transformers  # noqa: F401

    import train

    before, said = resident("VmRSS"), io.StringIO()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(said):
        few = "--steps 2 --val 2 --test 2 --eval-every 2".split()
        code = train.main([*argv, *few, "--out", f"{out}/run", "--cache", f"{out}/cache"])
    if code:
        sys.exit(said.getvalue())
    line = next(x for x in said.getvalue().splitlines() if "MB  in all" in x)
    return float(line.split()[0].replace(",", "")), resident() - before


def bench_steps(folder, size):
    """Seconds of `python train.py` to its first step without the evaluation before it, cache warm; and a step
    with eight experts against one, the embedded policy."""
    tiny, found = str(HERE / "tiny" / "policy"), []
    one, eight = (trainer(tiny, 36, 8, 32, 8, n, tiny=True) for n in (1, 8))
    times = alternate(4 * size["rounds"], eight, one)
    with tempfile.TemporaryDirectory() as out:
        for i in range(1 + max(2, size["rounds"] // 2)):
            command = [sys.executable, str(HERE / "train.py"), "--out", f"{out}/{i}", "--cache",
                       f"{out}/cache", "--val", "1", "--test", "1"]
            start, rows = time.perf_counter(), Path(f"{out}/{i}/metrics.jsonl")
            quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            running = subprocess.Popen(command, cwd=HERE, **quiet)
            while not rows.exists() and running.poll() is None:
                time.sleep(0.02)
            found.append(time.perf_counter() - start)
            running.kill()
            running.wait()
    return dict(start_s=spread(found[1:]), experts_8_over_1_step=ratio(*times))


def bench_peers(folder, size):
    """A step of TRL's GRPOTrainer against ours, and the peaks, on 8 prompts x 8 of 96 and 64 tokens."""
    from experts import cache_dir

    venv = cache_dir() / "trl"
    python = str(venv / "bin" / "python")
    if not Path(python).exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        needs = [f"torch=={version('torch').partition('+')[0]}", "trl==1.16.*", "peft", "datasets"]
        subprocess.run([python, "-m", "pip", "install", "-q", *needs], check=True)
    how = dict(folder=str(folder), prompts=8, prompt=96)
    measure = lambda: child("steps", **how)
    ours = [measure()]  # before and after theirs: the machine's speed drifts
    for rows in (64, 32, 16):  # at once; the same step in parts where memory does not hold it whole
        said = subprocess.run([python, "-c", TRL, str(folder), str(rows)], stdout=subprocess.PIPE, text=True)
        if said.returncode == 0:
            break
    else:
        raise ValueError(f"TRL could not do a step, see above: {python} -c 'import trl' should work")
    theirs, ours = json.loads(said.stdout.splitlines()[-1]), [*ours, measure()]
    bare = child("products", **how)
    steps = [sum(v for k, v in one.items() if k != "mb") for one in ours]
    print(f"  TRL {theirs['version']}, {rows} rows at once: {theirs['seconds']} s a step, "
          f"{theirs['mb']:,.0f} MB; ours {steps} s, {[one['mb'] for one in ours]} MB; products {bare} s")
    return dict(trl_step_ratio=spread([t / step for t, step in zip(theirs["seconds"], steps)]),
                trl_memory_share=spread([one["mb"] / theirs["mb"] for one in ours]),
                step_products=(bare / statistics.median(steps), statistics.median(theirs["seconds"]) / bare))


def measure_products(folder, prompts, prompt, group=8, new=64, prefix=8):
    """Seconds of the matrix products with the weights in `trainer`'s step: sampling, the reference, and the
    gradient pass forward and back (the frozen weights have no gradient of their own)."""
    policy = load(folder)
    body, rows = [m.weight for m in policy.adapters()], prompts * group
    back, S = [w.T for w in body], prompts * (prompt + prefix)
    later, chunks = rows * (new - 1), rows * new // 256
    plan = [(S, 1, body), (rows, new, [*body, policy.head]),
            (prompts * prompt, 1, body), (later, 1, body), (256, chunks, [policy.head]),
            (S, 1, body), (later, 1, body), (256, chunks, [policy.head]),
            (S, 1, back), (later, 1, back), (256, chunks, [policy.head.T])]
    (times,) = alternate(2, lambda: products(plan))
    return statistics.median(times)


TRL = """
import json, sys, time
import torch, trl, transformers
from datasets import Dataset
from peft import LoraConfig
folder, rows = sys.argv[1], int(sys.argv[2])
status = lambda field: next(x for x in open("/proc/self/status") if x.startswith(field))
resident = lambda field: int(status(field).split()[1]) / 1024
before, marks = resident("VmRSS"), []
class Clock(transformers.TrainerCallback):
    def on_step_begin(self, *a, **k): marks.append(time.perf_counter())
    def on_step_end(self, *a, **k): marks.append(time.perf_counter())
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
config = trl.GRPOConfig(output_dir=sys.argv[1] + "/trl", per_device_train_batch_size=rows,
    gradient_accumulation_steps=64 // rows, num_generations=8,
    max_completion_length=64, max_steps=3, beta=0.04, learning_rate=1e-4, bf16=True, use_cpu=True,
    report_to=[], save_strategy="no", gradient_checkpointing=False,
    model_init_kwargs=dict(dtype=torch.bfloat16))
trainer = trl.GRPOTrainer(model=folder, args=config, processing_class=tokenizer,
    reward_funcs=lambda completions, **k: [float(i % 2) for i in range(len(completions))],
    train_dataset=Dataset.from_dict(dict(prompt=[" ".join("123456789"[(i + j) % 9] for j in range(96))
                                                 for i in range(64)])),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), callbacks=[Clock()])
trainer.train()
seconds = [b - a for a, b in zip(marks[::2], marks[1::2])][1:]
print(json.dumps(dict(version=trl.__version__, seconds=seconds, mb=resident("VmHWM") - before)))
"""


# -- an estimate
DEVICES = {"H200": (989e12, 4.8e12), "A100 80 GB": (312e12, 2.0e12), "RTX 4090": (165e12, 1.0e12)}


def roofline(compute=0.4, bandwidth=0.7):
    """Seconds of the paper's step (Qwen2.5-3B, 32 prompts of 300 tokens x 8 completions of 128) by part, from
    operation and byte counts: {device: (rollout, reference, gradient)}. Of a device's peak 40% of the
    operations and 70% of the bandwidth are assumed to be had."""
    layers, d, ff, H, K, D, V = 36, 2048, 11008, 16, 2, 128, 151936
    body = layers * (2 * d * (H + K) * D + 3 * d * ff)  # weights that every token meets
    prompt, new = 32 * 308, 32 * 8 * 128
    once = 2 * body * (prompt + new) + 2 * V * d * new  # operations of one forward pass over everything
    seen = layers * 2 * K * D * 2  # bytes of keys and values a position
    result = {}
    for name, (flops, bytes_s) in DEVICES.items():
        flops, bytes_s = compute * flops, bandwidth * bytes_s
        read = 2 * (body + V * d) + seen * 32 * (308 + 8 * 64)  # a decode step, completions half written
        decode = 128 * max(read / bytes_s, 2 * (body + V * d) * 256 / flops)
        result[name] = (2 * body * prompt / flops + decode, once / flops, 2 * once / flops)
    return result
