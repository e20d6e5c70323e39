"""
The embedded pool: three small specialists, and a policy that knows what answers look like, but no answer.

    python tiny/make.py                 all four, two at a time: under 15 minutes on two cores
    python tiny/make.py arithmetic      one of them: arithmetic, logic, algorithmic or policy
    python tiny/make.py report          make nothing; measure the four models, and put the table in README.md

All four are made from random weights, with fixed seeds, from training problems of the level "tiny" alone
(rewards.py), and saved as Hugging Face folders.

A specialist is a language model of "<plain prompt> <answer>" for its own family. From its state at the last
token of the prompt it predicts the answer, which is one token. This state is what the router reads.

The policy is a language model of two kinds of text. Questions, each followed by a random answer of the right
kind, teach it what an answer looks like, but never a solution. Lines of random tokens that come twice teach
it what a large language model learns from any text: when a token comes again, to continue as it was continued
before (induction, 2209.11895). In training it never sees a context token or an expert.
"""
import argparse
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from rewards import get_problems, render_prompt

FAMILIES = ("arithmetic", "logic", "algorithmic")
SPECIAL, (UNK_ID, PAD_ID, EOS_ID) = ("<unk>", "<pad>", "<eos>"), range(3)
# Experts: a token is a whole number, some small-letter words, or one sign. So questions are short, and every
# answer is ONE token.
WORDS = r"-?\d+|[a-z]+(?:[- ][a-z]+)*|[A-Z][a-z]*|[^\w\s]"
# Policy: a token is a word, a digit or a sign, with the space before it, as in GPT-2. So decoding gives the
# same text again.
PIECES = r" ?[A-Za-z]+(?:-[A-Za-z]+)*| ?\d|\s| ?[^\w\s]"
# Architectures, widths and depths differ on purpose, because the router has to read all of them. `lm` is the
# weight of also predicting the question. It helps the logic expert to learn that names must be compared.
MADE = {
    "arithmetic": dict(model="llama", width=128, layers=3, mlp=384, items=25_000, steps=1500, lm=0.0),
    "logic": dict(model="mistral", width=160, layers=3, mlp=320, items=50_000, steps=800, lm=0.3),
    "algorithmic": dict(model="qwen3", width=96, layers=2, mlp=192, items=2_500, steps=1000, lm=0.0),
    "policy": dict(model="llama", width=128, layers=4, mlp=256, items=4_000, steps=1200),
}
BATCH, LONGEST = 128, 4  # items a step; tokens of the longest answer: "-", "1", "7", end

def items(family, split, n):
    """Up to n distinct (plain prompt, answer) of a family's split."""
    found = get_problems(family, split, n, level="tiny")
    return list({p.question: (render_prompt(p, "plain"), p.answer) for p in found}.values())

def make_tokenizer(texts, pattern, keep_spaces):
    """A word-level tokenizer over all pieces of `texts`; any other piece is <unk>."""
    behaviour = dict(behavior="isolated") if keep_spaces else dict(behavior="removed", invert=True)
    cut = pre_tokenizers.Split(Regex(pattern), **behaviour)
    pieces = [*SPECIAL, *sorted({piece for text in texts for piece, _ in cut.pre_tokenize_str(text)})]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(pieces)}, unk_token=SPECIAL[0]))
    inner.pre_tokenizer, inner.decoder = cut, decoders.Fuse()
    roles = dict(zip(("unk_token", "pad_token", "eos_token"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **roles)

def make_model(made, vocabulary):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(
        made["model"], vocab_size=vocabulary, hidden_size=made["width"], intermediate_size=made["mlp"],
        num_hidden_layers=made["layers"], num_attention_heads=4, num_key_value_heads=4,
        head_dim=made["width"] // 4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, pad_token_id=PAD_ID, eos_token_id=EOS_ID))

def save(model, tokenizer, name):
    model.to(torch.bfloat16).save_pretrained(HERE / name)
    tokenizer.save_pretrained(HERE / name)
    (HERE / name / "model.safetensors").chmod(0o644)
    text, loaded = " ".join(tokenizer.get_vocab()), AutoTokenizer.from_pretrained(HERE / name)
    if loaded(text)["input_ids"] != tokenizer(text)["input_ids"]:  # AutoTokenizer chooses by architecture
        raise ValueError(f"AutoTokenizer ignores {name}/tokenizer.json: choose another architecture for it")

class Optimizer:
    """Muon for the matrices in the layers, as it needs far fewer steps than AdamW here; AdamW for the rest.

    The learning rates rise for 100 steps, and then fall to zero along a cosine.
    """

    def __init__(self, model, steps, lr=3e-3, matrix_lr=0.02):
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        self.parts = [torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.1),
                      torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]
        self.peaks, self.parameters, self.done, self.steps = (matrix_lr, lr), matrices + rest, 0, steps

    def step(self, loss):
        rate = min(1.0, (self.done + 1) / 100) * (1 + math.cos(math.pi * self.done / self.steps)) / 2
        for part, peak in zip(self.parts, self.peaks):
            part.zero_grad()
            part.param_groups[0]["lr"] = peak * rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            part.step()
        self.done += 1

def padded(rows):
    """Lists of ids as one tensor (B, T), padded on the right: a causal model does not look to the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD_ID] * (longest - len(row)) for row in rows])

def expert_loss(model, ids, ends, lm):
    """The cross-entropy of the answer, plus lm times that of all tokens up to and including the answer.

    ids (B, T); ends (B,): the position of the answer in each row.
    """
    h = model.model(input_ids=ids).last_hidden_state  # (B, T, d)
    rows = torch.arange(len(ids))
    loss = F.cross_entropy(model.lm_head(h[rows, ends - 1]), ids[rows, ends])
    if lm:
        target = ids[:, 1:].masked_fill(torch.arange(1, ids.shape[1]) > ends[:, None], -100)
        loss = loss + lm * F.cross_entropy(model.lm_head(h[:, :-1]).flatten(0, 1), target.flatten())
    return loss

def make_expert(name, made):
    rows, held_out = items(name, "train", made["items"]), items(name, "val", 500)
    tokenizer = make_tokenizer([f"{p} {a}" for p, a in rows], WORDS, keep_spaces=False)
    model = make_model(made, len(tokenizer))
    ids = tokenizer([f"{p} {a}" for p, a in rows])["input_ids"]
    ids, ends, order = padded(ids), torch.tensor([len(x) - 1 for x in ids]), []
    optimizer = Optimizer(model, made["steps"])
    for step in range(1, made["steps"] + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(ids)).tolist()
        now, order = order[:BATCH], order[BATCH:]
        lm = made["lm"] * (step <= 0.8 * made["steps"])  # at the end only the answer counts
        loss = expert_loss(model, ids[now, :int(ends[now].max()) + 1], ends[now], lm)
        optimizer.step(loss)
        if step % 100 == 0:
            right = expert_accuracy(model, tokenizer, held_out)
            print(f"{name:11} step {step:4d}  val {right:.1%}", flush=True)
    save(model, tokenizer, name)

@torch.no_grad()
def expert_accuracy(model, tokenizer, rows):
    """The fraction of rows (prompt, answer) whose answer, one token, is the likeliest next token."""
    ids = tokenizer([p for p, _ in rows])["input_ids"]
    gold = torch.tensor([tokenizer(a)["input_ids"][0] for _, a in rows])
    h = model.model(input_ids=padded(ids)).last_hidden_state
    last = h[torch.arange(len(ids)), torch.tensor([len(x) - 1 for x in ids])]
    return ((model.lm_head(last).argmax(-1) == gold) & (gold != UNK_ID)).float().mean().item()

def form_document(questions, answers):
    """A question and a random answer of its kind: token ids, and the weight of each token in the loss."""
    question, answer = random.choice(questions), random.choice(answers)
    return question + answer, [0.1] * len(question) + [1.0] * len(answer)

def copy_document(vocabulary):
    """A line of random tokens, some other tokens, and the same line again: token ids and weights.

    Only what can be predicted counts in the loss: the second line, from its second token on.
    """
    def draw(least, most):
        return random.choices(range(len(SPECIAL), vocabulary), k=random.randint(least, most))

    before, line, between = draw(0, 4), draw(2, 12), draw(0, 24)
    unknown = len(before) + len(line) + len(between) + 1
    return before + line + between + line, [0.0] * unknown + [1.0] * (len(line) - 1)

def language_model_loss(model, documents):
    """The weighted mean of the next token's cross-entropy. documents: a list of (token ids, weights)."""
    ids = padded([ids for ids, _ in documents])  # (B, T)
    weights = torch.zeros(ids.shape)
    for row, (_, weight) in zip(weights, documents):
        row[:len(weight)] = torch.tensor(weight)
    h = model.model(input_ids=ids[:, :-1]).last_hidden_state  # (B, T - 1, d)
    target, weights = ids[:, 1:], weights[:, 1:]
    counts = weights > 0
    losses = F.cross_entropy(model.lm_head(h[counts]), target[counts], reduction="none")
    return (losses * weights[counts]).sum() / weights.sum()

def make_policy(name, made):
    """A language model of questions with random answers, and of lines that come twice."""
    rows = {family: items(family, "train", made["items"]) for family in FAMILIES}
    texts = [f"{question} {answer}" for family in FAMILIES for question, answer in rows[family]]
    tokenizer = make_tokenizer(texts + [f"{n} {n}" for n in range(10)], PIECES, keep_spaces=True)

    def encode(lines):
        return tokenizer(lines)["input_ids"]

    questions = {f: encode([question for question, _ in rows[f]]) for f in FAMILIES}
    answers = {f: encode([f" {answer}" for _, answer in rows[f]]) for f in FAMILIES}
    answers = {f: [ids + [EOS_ID] for ids in answers[f]] for f in FAMILIES}
    model = make_model(made, len(tokenizer))

    # Give all embeddings a common offset. Context tokens are added to the mean of the embeddings
    # (--prefix_origin mean), which then has about the length of an embedding.
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.05).add_(0.05 * torch.randn(made["width"]))
    optimizer = Optimizer(model, made["steps"])
    for step in range(1, made["steps"] + 1):
        documents = [form_document(questions[f], answers[f]) for f in FAMILIES for _ in range(28)]
        documents += [copy_document(len(tokenizer)) for _ in range(60)]
        loss = language_model_loss(model, documents)
        optimizer.step(loss)
        if step % 100 == 0:
            print(f"{name:11} step {step:4d}  loss {loss.item():.3f}", flush=True)
    save(model, tokenizer, name)

@torch.no_grad()
def policy_accuracy(model, tokenizer, rows):
    """The fraction of rows (prompt, answer) that the policy alone answers right, greedily."""
    right = 0
    for text, answer in rows:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST)
        right += tokenizer.decode(output[0, ids.shape[1]:], skip_special_tokens=True).strip() == answer
    return right / len(rows)

HEAD = "| model | what it is | size | arithmetic | logic | algorithmic |\n|---|---|---|---|---|---|\n"

def report():
    """Measure the four models on validation problems, print the table, and put it in README.md."""
    rows, table = {f: items(f, "val", 500) for f in FAMILIES}, HEAD
    for name in MADE:
        tokenizer = AutoTokenizer.from_pretrained(HERE / name)
        model = AutoModelForCausalLM.from_pretrained(HERE / name, dtype=torch.float32)
        accuracy, c = policy_accuracy if name == "policy" else expert_accuracy, model.config
        what = f"{c.model_type}, width {c.hidden_size}, {c.num_hidden_layers} layers, {len(tokenizer)} tokens"
        size = sum(f.stat().st_size for f in (HERE / name).iterdir()) / 1e6
        shares = " | ".join(f"{accuracy(model, tokenizer, rows[f]):.1%}" for f in FAMILIES)
        table += f"| {name} | {what} | {model.num_parameters() / 1e6:.2f} M, {size:.1f} MB | {shares} |\n"
    before, after = (HERE / "README.md").read_text(encoding="utf-8").split(HEAD)
    (HERE / "README.md").write_text(before + table + after[after.index("\n\n") + 1:], encoding="utf-8")
    print(table)

def make(name):
    start = time.time()
    torch.manual_seed(0)
    random.seed(0)
    (make_policy if name == "policy" else make_expert)(name, MADE[name])
    print(f"{name} made in {time.time() - start:.0f} s", flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", default="all", choices=["all", *MADE, "report"])
    what = parser.parse_args().what
    torch.set_num_threads(1)  # two processes use two cores; more threads would only wait for each other
    if "all" in what:
        halves = (("logic", "algorithmic"), ("policy", "arithmetic"))  # about equally long
        processes = [subprocess.Popen([sys.executable, __file__, *half]) for half in halves]
        if any([process.wait() for process in processes]):
            raise SystemExit("not all were made, see above: fix this and start again")
        what = ["report"]
    for name in what:
        report() if name == "report" else make(name)

if __name__ == "__main__":
    main()
