"""
n-Musketeers in one file: a language model learns, from rewards alone, which frozen expert to believe.

Read this file first. It holds the method and nothing else. On two processor cores it runs in less than a
minute, without a GPU and without a download:

    python -m lab.simple

There are three small experts. Each of them can solve one kind of problem: sums, family relations, or counting
primes. A fourth language model, the policy, has to answer all three kinds and can solve hardly any problem.
It reads a few vectors that a router makes from the experts' hidden states. Nobody tells it, or the router,
which expert is good at which kind of problem. The method has seven steps, and `main` below has their numbers:

1. Cache.    Every expert reads every problem once. Its hidden state at the last token is stored, and the
             answer that it would give. After that the experts are not needed any more.

2. Connect.  The router (router.py) attends to the states of all experts and writes the context C, a few
             vectors of the policy's width. They stand before the prompt as if they were tokens. This is
             called a soft prefix. With mean and std of the policy's token embeddings:

                 input of the policy = [mean + std * C ; embeddings of the prompt]

3. Words.    Steps 3 and 4 are stage 0, which has no rewards. One expert, drawn at random, is visible at a
             time. The router learns to write: the first vector of C becomes the policy's embedding of the
             prompt's last token (`main` says why). The next ones become those of the tokens that this
             expert would answer, right or wrong.

4. Reading.  The policy learns to give that answer when it has read C and the problem. Its own weights are
             frozen; LoRA, a small addition to them, is trained. After this step the policy can read every
             expert, and prefers none.

5. Compare.  Now come the rewards: 1 for a right answer, 0 for any other. Two experts are drawn for each
             problem. Half of a group of answers is sampled while only the first expert is visible, the other
             half while only the second one is.

6. Learn.    Inside a half, an answer with a higher reward r than the others becomes likelier, and one with a
             lower reward less likely (GRPO, 2402.03300). Each of its tokens is weighted by

                 advantage = (r - mean of r in the half) / std of r in the half

             Between the halves, the expert whose half earned more gets more attention. With R, the mean
             reward of each half, and p, the attention to the better expert, scaled so that the attention to
             both of them sums to 1:

                 choice loss = - (R of the better half - R of the other half) * log p

7. Test.     All experts are visible. What the policy reads depends on the router's attention alone.

train.py has the same method for large models. It adds a cache on disk, several states of each expert, fast
sampling, a longer formula for step 3, controls, and checkpoints.
"""
import argparse
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch.optim import Adam
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewards import get_problems, render_prompt, verify
from router import Router

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

POOL = Path(__file__).resolve().parents[1] / "tiny"  # the four models, see tiny/README.md
EXPERTS = ["arithmetic", "logic", "algorithmic"]
TASK = "arithmetic+logic+algorithmic"
MAX_NEW = 5  # tokens of the longest answer: a space, a minus, two digits, and the stop token
BATCH, GROUP = 36, 8  # problems in a step of comparing, and answers to each problem


def load(name):
    """A frozen model of the pool, and its tokenizer. Padding is on the left: all prompts end together."""
    model = AutoModelForCausalLM.from_pretrained(POOL / name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(POOL / name, padding_side="left")
    return model.requires_grad_(False).eval(), tokenizer


@torch.no_grad()
def ask_expert(name, prompts):
    """What an expert makes of n prompts: its hidden states (n, width), and its answers, n strings."""
    expert, tokenizer = load(name)
    states, answers = [], []
    for start in range(0, len(prompts), 100):
        batch = tokenizer(prompts[start:start + 100], padding=True, return_tensors="pt")
        output = expert(**batch, output_hidden_states=True)

        # Take the state of the last layer at the last token. In the vocabulary of these experts every answer
        # is one token, so the likeliest next token is the whole answer.
        states.append(output.hidden_states[-1][:, -1])
        answers += tokenizer.batch_decode(output.logits[:, -1:].argmax(-1))
    return torch.cat(states), answers


class LoRA(nn.Module):
    """A frozen linear layer and a trained addition of low rank (2106.09685): y = W x + 2 B A x."""

    def __init__(self, linear, rank=8):
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))  # zero: it adds nothing at the start

    def forward(self, x):
        return self.linear(x) + 2 * (x @ self.A.T @ self.B.T)


def add_lora(policy):
    """Replace every linear layer of the policy's blocks by one with LoRA. Returns the parameters to train."""
    for block in policy.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, LoRA(layer))
    return [p for p in policy.parameters() if p.requires_grad]


def with_prefix(policy, context, tokens):
    """context C (B, L, d), tokens (B, T) -> input of the policy (B, L + T, d), and its mask (B, L + T)."""
    embedding = policy.get_input_embeddings().weight  # (V, d)
    prefix = embedding.mean(0) + embedding.std() * context
    is_token = (tokens != policy.config.pad_token_id).long()
    mask = F.pad(is_token, (context.shape[1], 0), value=1)  # 1 for the prefix, too; 0 for padding
    return torch.cat((prefix, embedding[tokens]), dim=1), mask


def log_probabilities(policy, context, prompts, answers):
    """Log-probability (B, T) of each token of answers (B, T) after context and prompts; 0 for padding."""
    inputs, mask = with_prefix(policy, context, torch.cat((prompts, answers), dim=1))
    positions = mask.cumsum(1) - 1
    logits = policy(inputs_embeds=inputs, attention_mask=mask, position_ids=positions).logits

    # The logits at one position predict the token at the next one.
    logits = logits[:, -answers.shape[1] - 1:-1]  # (B, T, V)
    return -F.cross_entropy(logits.mT, answers, reduction="none", ignore_index=policy.config.pad_token_id)


def generate(policy, context, prompts, **options):
    """Answers (n, MAX_NEW), with padding after the stop token, to prompts (B, P) after context (B, L, d)."""
    inputs, mask = with_prefix(policy, context, prompts)
    answers = policy.generate(inputs_embeds=inputs, attention_mask=mask, max_new_tokens=MAX_NEW, **options)
    return F.pad(answers, (0, MAX_NEW - answers.shape[1]), value=policy.config.pad_token_id)


def get_rewards(tokenizer, answers, problems):
    """answers (n, MAX_NEW) to n problems -> (n,): 1 for a right answer, 0 for any other."""
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return torch.tensor([verify(text, problem, "plain").reward for text, problem in zip(texts, problems)])


def only(expert):
    """Numbers of experts (B,) -> visible (B, N). Each expert has one state, so expert 1 of 3 is [0, 1, 0]."""
    return F.one_hot(expert, len(EXPERTS)).bool()


def take_step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main(seed=0, steps=10, split="test"):
    """The method from beginning to end. Returns the report of `evaluate` on 300 problems of the split."""
    torch.manual_seed(seed)
    problems = get_problems(TASK, "train", 2000, level="tiny") + get_problems(TASK, split, 300, level="tiny")
    texts = [render_prompt(problem) for problem in problems]

    # 1. Cache the states and the answers of all experts. Fill narrow states with zeros to one width D.
    states, expert_answers = zip(*[ask_expert(name, texts) for name in EXPERTS])
    widths = [state.shape[1] for state in states]
    H = torch.stack([F.pad(state, (0, max(widths) - state.shape[1])) for state in states], dim=1)  # (n, N, D)

    # 2. Connect. In the router, trust says whom to believe. All other parameters say how to read a state.
    policy, tokenizer = load("policy")
    lora = add_lora(policy)
    router = Router(widths, expert_of_state=[0, 1, 2], d_policy=policy.config.hidden_size,
                    latents=1 + MAX_NEW, dim=64, init_scale=0.02)
    router.fit_standardization(H[:256])  # it reads each dimension with mean 0 and std 1
    trust = [p for name, p in router.named_parameters() if name.startswith("trust")]
    reader = [p for name, p in router.named_parameters() if not name.startswith("trust")]

    # Turn prompts (n, P) and the experts' answers (n, N, MAX_NEW) into tokens of the policy.
    prompts = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    targets = []
    for answers in expert_answers:
        lines = [f" {answer}{tokenizer.eos_token}" for answer in answers]
        batch = tokenizer(lines, max_length=MAX_NEW, padding="max_length", padding_side="right",
                          truncation=True, return_tensors="pt")
        targets.append(batch["input_ids"])
    targets = torch.stack(targets, dim=1)

    # 3. Words: train the router. C begins with the last token of the prompt, and the answer comes after it.
    #    A language model that sees a token again tends to repeat what followed it the first time. At the end
    #    of the prompt the policy sees this token again, so it tends to repeat the answer.
    last = prompts[:, None, -1:].expand(-1, len(EXPERTS), 1)
    words = torch.cat((last, targets), dim=2)  # (n, N, L)
    embedding = policy.get_input_embeddings().weight
    embedding = (embedding - embedding.mean(0)) / embedding.std()  # in the units of C

    optimizer = Adam(reader, lr=3e-3)
    for step in range(400):
        indices = torch.randint(1000, 2000, (256,))
        expert = torch.randint(len(EXPERTS), (256,))
        context, _ = router(H[indices], only(expert))
        word = words[indices, expert]  # (256, L)
        distance = (context - embedding[word]).square().mean(-1)
        loss = distance[word != tokenizer.pad_token_id].mean()
        take_step(optimizer, loss)
    print(f"words: squared distance {loss:.3f}")

    # 4. Reading: train LoRA, and the router slowly. The problems are new to the router, so C has errors, and
    #    the policy learns how far it can rely on C.
    optimizer = Adam([dict(params=lora, lr=3e-3), dict(params=reader, lr=3e-4)])
    for step in range(30):
        indices = torch.randint(500, 1000, (64,))
        expert = torch.randint(len(EXPERTS), (64,))
        context, _ = router(H[indices], only(expert))
        target = targets[indices, expert]
        logp = log_probabilities(policy, context, prompts[indices], target)
        loss = -logp.sum() / (target != tokenizer.pad_token_id).sum()
        take_step(optimizer, loss)
    print(f"reading: loss per token {loss:.3f}")

    test_set = H[2000:], prompts[2000:], problems[2000:]
    print("\nThe policy can read every expert, but nobody has told it whom to believe:")
    evaluate(policy, tokenizer, router, *test_set)

    # Now trust learns fast. All else learns slowly, so that the policy does not forget how to read.
    optimizer = Adam([dict(params=trust, lr=0.1), dict(params=reader + lora, lr=1e-4)])
    for step in range(steps):

        # 5. Compare. Draw the first expert by the router's attention, but in one of five cases at random.
        #    Draw the second one at random from the others.
        indices = torch.arange(step * BATCH, (step + 1) * BATCH) % 500
        _, attention = router(H[indices])  # (B, heads, L, N), all experts are visible
        shares = attention.mean((1, 2))  # (B, N)
        first = torch.multinomial(0.8 * shares + 0.2 / len(EXPERTS), 1)[:, 0]
        second = (first + torch.randint(1, len(EXPERTS), (BATCH,))) % len(EXPERTS)
        pair = torch.stack((first, second), dim=1)  # (B, 2)

        #    Show every problem twice, once with each expert, and sample half of the group each time.
        twice = indices.repeat_interleave(2)
        context, _ = router(H[twice], only(pair.flatten()))  # (2 B, L, d)
        answers = generate(policy, context.detach(), prompts[twice], do_sample=True, top_k=0,
                           num_return_sequences=GROUP // 2)  # (B * G, MAX_NEW)
        asked = indices.repeat_interleave(GROUP)  # (B * G,)
        rewards = get_rewards(tokenizer, answers, [problems[i] for i in asked])
        rewards = rewards.view(2 * BATCH, GROUP // 2)

        # 6. Learn whom to believe, from the difference between the halves. With p = [0.6, 0.4] and
        #    R = [1, 0] the loss is -1 * log 0.6 = 0.51, and it falls when p[0] rises. If both halves are
        #    equally good, it is 0.
        R = rewards.mean(1).view(BATCH, 2)
        p = shares.gather(1, pair)
        p = p / p.sum(1, keepdim=True)
        lead = R - R.flip(1)  # (B, 2): by how much each half is better than the other one
        choice_loss = -(lead.clamp(min=0) * p.log()).sum(1).mean()

        #    Learn how to answer, from the differences inside each half. A half whose answers are all right
        #    or all wrong has advantage 0 and teaches nothing. Every sample is used for one step only, so
        #    GRPO's ratio of new to old probability is 1, and this is REINFORCE.
        mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True, correction=0)
        advantage = ((rewards - mean) / (std + 1e-6)).flatten()  # (B * G,)
        teaches = advantage != 0
        token_loss = 0.0
        if teaches.any():
            context = context.repeat_interleave(GROUP // 2, dim=0)
            logp = log_probabilities(policy, context[teaches], prompts[asked[teaches]], answers[teaches])
            n_tokens = (answers != tokenizer.pad_token_id).sum()
            token_loss = -(advantage[teaches, None] * logp).sum() / n_tokens

        take_step(optimizer, choice_loss + token_loss)

        #    At most about half of the answers are right: no more than one of the two experts can solve it.
        print(f"step {step + 1:2d}: {rewards.mean():4.0%} of the sampled answers are right, "
              f"{(p * R).sum(1).mean():4.0%} if weighted by attention")

    # 7. Test.
    print("\nAfter comparing:")
    return evaluate(policy, tokenizer, router, *test_set)


@torch.no_grad()
def evaluate(policy, tokenizer, router, H, prompts, problems):
    """Print and return the accuracy, and for each dataset its accuracy and the attention to each expert."""
    context, attention = router(H)
    answers = generate(policy, context, prompts, do_sample=False)
    rewards = get_rewards(tokenizer, answers, problems)
    shares = attention.mean((1, 2))  # (n, N)

    report = dict(accuracy=rewards.mean().item(), by_dataset={}, attention={})
    for dataset in sorted({problem.dataset for problem in problems}):
        rows = torch.tensor([problem.dataset == dataset for problem in problems])
        report["by_dataset"][dataset] = rewards[rows].mean().item()
        report["attention"][dataset] = dict(zip(EXPERTS, shares[rows].mean(0).tolist()))
        line = ", ".join(f"{name} {share:.2f}" for name, share in report["attention"][dataset].items())
        print(f"  {dataset:20} {rewards[rows].mean():6.1%} right   attention: {line}")
    print(f"  {'all':20} {rewards.mean():6.1%} right\n")
    return report


def run(argv=None):
    parser = argparse.ArgumentParser(description="The method of n-Musketeers in one file.")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and sampling, default 0")
    parser.add_argument("--steps", type=int, default=10, help="steps of comparing experts, default 10")
    return main(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run()
