"""
n-Musketeers, end to end: a policy learns by reinforcement to listen to frozen experts. Read it top to bottom.

    python train.py                            the embedded pool on its three families: minutes on a laptop
    python train.py --collab single            the same policy without experts, all else equal
    python train.py --task gsm8k               the paper's pool, on a GPU that holds it
    python train.py --task chain_sum --policy FOLDER_OR_HUB_NAME --experts A B C --template plain
    python train.py --resume --out runs/NAME   go on after a stop
    torchrun --nproc_per_node=8 train.py ...   the same on eight GPUs (ranks.py)

Deliberately different from textbook GRPO, each with its reason where it happens: the prompt is run once for
its whole group, sampling and scoring alike; tokens are normalised over the whole step; the rate is constant
after its warm-up. Not here: a value network, top-p, a replay buffer, a trainer class.
"""

import os

# Before torch. To wait without spinning is kind to busy neighbours, who make two threads crawl; but to sleep
# between the thousand small steps of a token costs half of a decode: so spin for some 30 microseconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import contextlib
import signal
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import ranks
from collab import listening, mutual_information, tokens_spent
from eval import finish
from experts import cached
from folders import cache_dir, sweep
from rewards import guessing_floor
from rlvr import HOPELESS, advise, join, make_optimizer, rollout, set_rate, update
from run import (STATISTICS, build, evaluate, excuse, fitting_micro, free_memory, memory_peak, memory_table,
                 trim_memory, used_memory)
from settings import parser, resolve

BETAS = (0.9, 0.98)

# -- what is about to happen
READ_SPEED = dict(cpu=3e11, mps=3e12, cuda=1e14)  # floating-point operations a second, a cautious guess


def introduce(args, items, experts, policy, form, dtype, ask):
    """Say what the run is about to do before any weight is loaded, and refuse it when memory will not do."""
    different = {p.question: p for split in items.values() for p in split}
    wanted, longest, device = len(different), max(map(len, different)), args["device"]
    say = lambda what, *text: print(f"  {what:9}", *text)
    level = "" if args["task"] == "gsm8k" else f", level {args['level']}"
    control = "" if args["control"] == "none" else f" ({args['control']})"
    print(f"n-Musketeers: {args['collab']} collaboration{control} on {args['task']}{level}")
    used = items["train"][:args["steps"] * args["batch"]]
    say("problems", f"train {len(used):,} ({len({p.question for p in used}):,} different), "
        f"val {len(items['val'])}, "
        f"test {len(items['test'])}; no question is in two splits; seed {args['seed']}")
    floor, answer = guessing_floor(items["train"])
    if floor > 0.2:
        say("", f"always answering {answer!r} is right in {floor:.0%}: read every accuracy against that")
    size = lambda e: f"{e.name}: width {e.width}, {e.layers} layers, {e.params / 1e6:.2f} M, {e.template}"
    say("policy", f"{size(policy)}, answers {form}; frozen, {str(dtype)[6:]} on {device}")
    for e in experts:
        missing = wanted - cached(e, [ask(p, e) for p in different.values()], args["cache"])
        seconds = (32 + longest / 4) * 2 * e.params * missing / READ_SPEED[device.split(":")[0]]
        say("expert", f"{size(e)}; of {wanted:,} prompts {wanted - missing:,} are cached"
            + (f", {missing:,} to be read in about {seconds:.0f} s" if missing else ""))
    say("GRPO", f"{args['steps']} steps of {args['batch']} prompts x {args['group']} completions of at most "
        f"{args['max_new']} tokens; temperature {args['temperature']:g}: the ratio is the policy's own; "
        f"KL weight {args['beta']:g} holds it to the plain policy")
    say("rates", f"LoRA {args['lr']:g}, router {args['router_lr']:g}; {args['warmup']} steps of warm-up, "
        "then constant, so that a run can be prolonged")
    tokens = (32 + longest // 3) * (1 + args["shots"])
    tokens += len(experts) * (args["write"] + 8) * (args["collab"] == "text")
    mine = args | dict(batch=-(-args["batch"] // ranks.WORLD))  # memory is that of one rank
    mine["micro"] = args["micro"] = args["micro"] or fitting_micro(mine, policy, experts, dtype, tokens)
    table = memory_table(mine, policy, experts, dtype, tokens)
    for what, size in table:
        say("memory" if what == table[0][0] else "", f"{size / 2**20:8,.0f} MB  {what}")
    need, there = memory_peak(table), free_memory(device)
    say("", f"{need / 2**20:8,.0f} MB  in all at the peak, as sampling, gradient and reading take turns")
    if need > there:
        raise ValueError(f"{need / 2**30:.1f} GB are needed, {there / 2**30:.1f} GB free (table above): "
                         "lower --micro, --batch, --group or --max-new, or choose a smaller policy")


def show_one(run):
    """One problem as everyone sees it."""
    p = run.items["val"][0]
    print(f"  a problem ({p.dataset}), its answer {p.answer!r}")
    print(f"    as the policy reads it: {run.policy_text(p)!r}")
    for e in run.readers:
        print(f"    as {e.name} reads it: {run.expert_text(p, e)!r}")


def baseline(run):
    """Accuracy and well-formed share on val before training: the policy alone, then with the fresh prefix."""
    with run.policy.plain():
        ways = [("the policy alone", None), ("with the fresh prefix", run.router)]
        for who, router in ways[:2 if run.router else 1]:
            verdicts = evaluate(run, run.items["val"], router)[0]
            right = sum(v.strict for v in verdicts) / len(verdicts)
            formed = sum(v.reason in ("right", "wrong") for v in verdicts) / len(verdicts)
            print(f"  before    {who}: {right:.1%} right, {formed:.0%} well-formed (val, greedy)")


# -- what is written down
def shares(attention, names):
    """Mean attention by expert, summing to 1; {} when nobody is listened to. attention (..., N)."""
    return {} if attention is None else dict(zip(names, attention.flatten(0, -2).mean(0).tolist()))


def summary(run, sampled, sums, train_s):
    """One row of metrics.jsonl from one step: shares are 0 to 1, lengths in tokens, times in seconds."""
    verdicts, rewards = [v for row in sampled.verdicts for v in row], sampled.rewards.cpu()
    heard = None if sampled.attention is None else sampled.attention.cpu()
    names, new = [e.name for e in run.experts], int(sampled.mask.sum())
    row = dict(reward=rewards.mean().item(), accuracy=sum(v.strict for v in verdicts) / len(verdicts),
               length=new / len(verdicts), clipped=sampled.truncated.float().mean().item(),
               zero_spread=(rewards.amax(1) == rewards.amin(1)).float().mean().item(), **sums,
               gen_s=sampled.seconds, train_s=train_s, tokens_s=new / sampled.seconds,
               memory_mb=used_memory(run.args["device"]),
               attention=shares(heard, names), reward_by={}, attention_by={},
               reasons=dict(Counter(v.reason for v in verdicts).most_common()))
    for dataset in sorted({p.dataset for p in sampled.problems}):
        of = [i for i, p in enumerate(sampled.problems) if p.dataset == dataset]
        row["reward_by"][dataset] = rewards[of].mean().item()
        row["attention_by"][dataset] = shares(None if heard is None else heard[of], names)
    row |= listening(sampled.problems, heard, names)
    run.window.append(row["choices"])
    return row | dict(mi=mutual_information(run.window), expert_grad=dict(zip(names, sums["expert_grad"])))


def line(row):
    """A step for the reader: reward first, then who is listened to."""
    heard = "".join(f"{name} {share:.2f} " for name, share in row["attention"].items())
    heard = f"hears {heard}| " if heard else ""
    wrong = next((reason for reason in row["reasons"] if reason != "right"), "nothing")
    return (f"step {row['step']:4d} | reward {row['reward']:.3f} | {heard}"
            f"clipped {row['clipped']:.0%} | zero-spread {row['zero_spread']:.0%} | KL {row['kl']:.4f} | "
            f"{row['tokens_s']:,.0f} tokens/s | amiss: {wrong}")


def samples(sampled, step, problems=3):
    """Rows of samples.jsonl: every completion of the step's first few problems, with its verdict."""
    for p, texts, verdicts in list(zip(sampled.problems, sampled.texts, sampled.verdicts))[:problems]:
        for text, v in zip(texts, verdicts):
            yield dict(step=step, question=p.question, answer=p.answer, completion=text, reason=v.reason,
                       reward=v.reward)


def numbers(row, prefix=""):
    """Every number of a row, by its path: ("reward", 0.5), ("attention/logic", 0.3), ..."""
    for k, v in row.items():
        yield from numbers(v, f"{prefix}{k}/") if isinstance(v, dict) else [(prefix + k, v)]


def tracker(args):
    """A function that sends a row of metrics where --log says. Raises ValueError if that is not installed."""
    if args["log"] == "none" or ranks.RANK:
        return lambda row: None
    try:
        if args["log"] == "wandb":
            os.environ.setdefault("WANDB_MODE", "offline")  # no account, no network, nothing to wait for
            import wandb
            logged = wandb.init(project="n-musketeers", config=args)
            return lambda row: logged.log(dict(numbers(row)), step=row["step"])
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ValueError(f"--log {args['log']} needs a package: pip install {args['log']}") from e
    writer = SummaryWriter(args["out"])

    def send(row):
        for name, value in numbers(row):
            writer.add_scalar(name, value, row["step"])
        writer.flush()

    return send


def config(run):
    """config.json: every setting, who took part, versions. A hub model is named with its commit, so that the
    run goes on with the same weights when the hub has others."""
    packages = ("torch", "transformers", "numpy", "reasoning-gym")
    experts = [dict(name=e.name, source=e.source, revision=e.revision, width=e.width, parameters=e.params)
               for e in run.experts]
    policy = dict(source=run.args["policy"], revision=run.policy.revision)
    pin = lambda m: m["source"] + (f"@{m['revision']}" if m["revision"] and "@" not in m["source"] else "")
    pinned = {e["source"]: pin(e) for e in experts}  # not those that --collab text left out
    args = run.args | dict(resume=False, policy=pin(policy),
                           experts=[pinned.get(e, e) for e in run.args["experts"]])
    return dict(args=args, form=run.form, policy=policy, experts=experts, trainable=trainable(run),
                tokens=tokens_spent(run, run.items["train"][:STATISTICS]),
                versions={p: version(p) for p in packages} | dict(python=sys.version.split()[0]))


def trainable(run):
    count = lambda module: sum(p.numel() for p in module.parameters()) if module else 0
    return dict(router=count(run.router), lora=count(run.policy))


# -- the loop
def train(args):
    """Build, look, learn, look again. Returns the exit code."""
    out, log = Path(args["out"]), tracker(args)
    ranks.take(args["device"])
    run = build(args, introduce)
    # Evaluation is greedy. Each rank draws its own samples, so more ranks sample otherwise than one.
    generator = torch.Generator(args["device"]).manual_seed(args["seed"] + 1_000_003 * ranks.RANK)
    optimizer = make_optimizer(run.policy, run.router, args["lr"], args["router_lr"], BETAS,
                               args["weight_decay"])
    state = dict(step=0, best=-1.0, skipped=0)
    if args["resume"]:
        state = checkpoint.load_last(out, run.policy, run.router, optimizer, generator) or state
        print(f"  resumed after step {state['step']} of {args['steps']}" if state["step"] else
              "  no checkpoint was written before the stop: starting again from the beginning")
    if state["step"] >= args["steps"]:
        print(f"  nothing is left to do: raise --steps to go on, or see python eval.py {out}")
        return 0 if (out / "eval.json").exists() else finish(run, out)
    about = config(run)
    print("  trained   {router:,} parameters of the router and {lora:,} of LoRA".format(**about["trainable"]))
    print("  tokens    of a problem: the policy reads {policy_reads:.1f}, prefix included; the experts read "
          "{experts_read:.1f} and write {experts_write:.1f}".format(**about["tokens"]))
    if state["step"] == 0:
        show_one(run)
        baseline(run)
    if ranks.RANK == 0:
        kept = [checkpoint.trim(out / f"{name}.jsonl", state["step"])
                for name in ("metrics", "samples", "skipped")]
        run.window.extend(row.get("choices", {}) for row in kept[0])
        (out / "eval.json").unlink(missing_ok=True)  # of fewer steps
        checkpoint.write_json(out / "config.json", about)
    ranks.same(checkpoint.trainable(run.policy, run.router).values())
    if learn(run, out, optimizer, generator, state, log):
        start = "python" if ranks.WORLD == 1 else "torchrun, as before,"
        print(f"stopped and saved; go on with: {start} train.py --resume --out {out}")
        return 0
    return finish(run, out)


def learn(run, out, optimizer, generator, state, log):
    """Steps state["step"] + 1 to args["steps"], each row of metrics to `log` too. Returns True if it was
    asked to stop before the end."""
    args, B, saved, trimmed, streak = run.args, run.args["batch"], time.monotonic(), 0.0, Counter()
    how = dict(temperature=args["temperature"], beta=args["beta"], clip=(args["clip_low"], args["clip_high"]),
               dr=args["dr"], micro=args["micro"] or B, max_new=args["max_new"])
    with stop_signals() as asked, tqdm(total=args["steps"], initial=state["step"],
                                       disable=True if ranks.RANK else None) as bar:
        for step in range(state["step"] + 1, args["steps"] + 1):
            # listen, sample, verify
            set_rate(optimizer, step - 1, args["warmup"])
            batch = run.batch(ranks.share(run.items["train"][(step - 1) * B:step * B]))
            sampled = rollout(run.policy, run.router, batch, run.tokenizer, run.verify, args["group"],
                              args["max_new"], args["temperature"], generator)
            # score the same tokens with gradient, and step
            start = time.perf_counter()
            sums = update(run.policy, run.router, batch, sampled, optimizer, args["epochs"],
                          args["max_norm"], **how)
            how["micro"] = sums["micro"]
            seconds = time.perf_counter() - start
            if time.monotonic() - trimmed > 10:  # seldom: a trimmed heap has to be paged in again
                trim_memory()
                trimmed = time.monotonic()
            # look
            whole = join([sampled])
            row = dict(step=step) | summary(run, whole, sums, seconds)
            last = step == args["steps"]
            if step % args["eval_every"] == 0 or last:
                row["val"] = validate(run, step, bar)
            if ranks.RANK == 0:
                checkpoint.append(out / "metrics.jsonl", [row])
                log(row)
                if step % 10 == 1 or last:
                    bar.write(line(row))
                    checkpoint.append(out / "samples.jsonl", samples(whole, step))
                if row["skipped"]:
                    questions = [p.question for p in whole.problems]
                    checkpoint.append(out / "skipped.jsonl", [row | dict(questions=questions)])
            bar.update()
            advice = advise(streak, row)
            hopeless = streak["skipped"] == HOPELESS
            if advice and not hopeless:
                bar.write(f"step {step:4d} | {advice}")
            # keep: the best first, as a checkpoint says that it has been kept
            better = row.get("val", -1.0) > state["best"]
            state = dict(step=step, best=max(state["best"], row.get("val", -1.0)),
                         skipped=state["skipped"] + sums["skipped"])
            due = step % args["save_every"] == 0 if args["save_every"] else time.monotonic() - saved > 60
            # Read once, as a signal may come at any moment; and what one rank decides, all do.
            due, stop = map(bool, ranks.total(due, len(asked)))
            if better:
                checkpoint.save(out / "best.safetensors", run.policy, run.router, **state)
            if due or last or stop or hopeless:
                path = out / f"step-{step:06d}.safetensors"
                checkpoint.save(path, run.policy, run.router, optimizer, generator, **state)
                if ranks.RANK == 0:
                    checkpoint.rotate(out, path)
                saved = time.monotonic()
            if hopeless:
                raise ValueError(advice)
            if stop and not last:
                return True
    return False


def validate(run, step, bar):
    """Greedy accuracy on the validation problems; one of the answers is shown."""
    verdicts, texts, _ = evaluate(run, run.items["val"])
    i = step // run.args["eval_every"] % len(texts)
    accuracy, asked = sum(v.strict for v in verdicts) / len(verdicts), run.items["val"][i].question
    bar.write(f"step {step:4d} | val {accuracy:.1%} | asked {asked[-50:]!r}, it said {texts[i][:60]!r}: "
              f"{verdicts[i].reason}")
    return accuracy


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C or SIGTERM fills the list: finish the step, save, stop. The second time it stops at once."""
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@ranks.started()
def main(argv=None):
    """Returns the exit code: 0, or 2 with one sentence when what was asked for cannot be done."""
    try:
        args = resolve(vars(parser(__doc__).parse_args(argv)))
        with contextlib.nullcontext() if ranks.RANK else checkpoint.locked(args["out"]):
            if ranks.RANK == 0:
                sweep(args["out"], age=0)
                sweep(args["cache"] or cache_dir() / "states")
            return train(args)
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        return excuse("train.py", e)
    except SystemExit as e:  # argparse has said what is wrong
        return e.code
    except KeyboardInterrupt:
        print("\ntrain.py: stopped; the last checkpoint and the states read so far are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while reading and evaluating, too
    sys.exit(main())
