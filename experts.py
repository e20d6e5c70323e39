"""
The frozen experts: Hugging Face models that read each problem once.

An expert turns a prompt into T tokens, and its layers turn every token into a vector of D numbers, the
*hidden state* of that token. By default we use one state of each prompt: that of the last token, after the
last layer. In a causal model every token sees the tokens before it, and the last one sees the whole prompt:
its state sums up what the expert makes of the problem.

    prompt -> token ids (T,) -> frozen model, no gradient -> hidden states (T, D) -> the last one (D,)

These states are H in the paper's C = g(H): the router (router.py) turns them into the policy's context C.
An expert that generates text can also *write* its own answer, a few greedy tokens. Stage 0 uses these answers
as targets, and --router text puts them into the policy's prompt. With --think it first writes a *thought*,
some sentences of reasoning, and then the answer:

    prompt -> thought -> cue ("The answer is:") -> answer

In this file a *text* is the answer that an expert writes. An *input* is what it reads: the prompt, and behind
it perhaps its thought, the cue and its own answer.

The weights of an expert and the prompt of a problem never change, so its state never changes either. We
compute it once and store it on disk. While the policy trains, no expert is in memory.

What is easy to get wrong:
- A state must not depend on the other inputs in its batch. We pad inputs on the right when we read them: a
  causal model does not look to the right, and an encoder's attention mask hides the padding.
- Matrix products of different shapes round differently. All batches of one length have the same shape, so
  the cache holds the same bits, whichever inputs were read together. (Thoughts are an exception, see
  `batches`: there the first one that is stored counts.)
- Nothing is cut. An input that is longer than the model's window is refused.
- A model's folder holds data, not programs. Only safetensors are read, and no code in the folder is run.
"""
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
import uuid
import warnings
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load, save
from tqdm import tqdm

from rewards import cache_dir, render_prompt

THOUGHTS, TEXTS, STATES = "thoughts", "texts", "states"  # the kinds of results that the cache stores
THINK = "Reason step by step, briefly."  # what an expert with --think is asked, after the question
FORMAT = "n-musketeers 3"  # change this when the code gives other results: then the stored ones are not used
SMALL = 50_000_000  # parameters. A smaller model runs in float32, a larger one in bfloat16 to save memory.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # tokens in a batch, padding included; other devices: as "cpu"
THOUGHT_BATCH_TOKENS = {"cpu": 20480, "cuda": 65536}  # the same for thoughts: prompts and what is written
SECONDS_BETWEEN_SAVES = 20  # a process that is killed loses the work of this time, and of one batch


class Expert:
    """One frozen model: its tokenizer and its sizes. Its weights are in memory only while it reads or writes.

    source       a folder, or a model of the hub: "org/model" or "org/model@revision"
    states       which tokens' states are used:
                 "last"      that of the prompt's last token (of a BERT: its [SEP])
                 "last:4"    those of its last 4 tokens, the last one first
                 "first"     that of its first token
                 "mean"      the mean of all tokens that are read
                 "answer:6"  the expert first writes its answer, then reads prompt and answer together, so
                             that its states are those it had while it answered: 6 states, of which state k is
                             the one from which it chose token k of the answer. After a shorter answer the
                             last one is repeated. An expert that cannot write gives those of "last:6"
    layers       the layers whose states are used: 0 is the embedding, k is block k, -1 is the last layer with
                 the final norm
    max_new      the most tokens of an answer that it may write
    cue          words that stand before the answer, on a line of their own, such as "The answer is:"
    think        the most tokens of a thought that it writes before cue and answer; 0: it does not think. The
                 cue then follows the thought, and "the prompt's last token" above means the cue's.
    untrained    the same architecture with random weights, the same ones every time (a control experiment)

    One problem gives K = `states_per_problem` states of `width` numbers each. Example: layers=(1, -1) and
    states="last:3" give K = 6 states in this order: layer 1 at the last, second last and third last token,
    then layer -1.

    For an expert of your own, make a subclass, and set rlvr.Expert to it (README.md, Fork it). It may choose
    states in another way (override `choose_tokens`, which is called once for each layer; set
    `states_per_problem` in __init__ if their number changes). Or override `states_of` and `texts_of`, whose
    model comes from `load`. Then extend `fingerprint`, too (super().fingerprint(kind) + "-mine"), or the
    cache returns what was computed in the old way. A changed `prompt` needs nothing: the cache looks results
    up by the text of the prompt.

    Raises ValueError for a model that is missing or damaged or that cannot be an expert.
    """

    def __init__(self, source, states="last", layers=(-1,), max_new=16, cue="", think=0, device="cpu",
                 untrained=False):
        self.source = source
        self.where, self.n_tokens = which_states(states)
        self.max_new = max_new
        self.cue = cue
        self.device = torch.device(device)
        self.untrained = untrained

        # Find the folder, on this computer or on the hub.
        self.folder, self.revision = find_model(source)
        self.pinned = pinned_source(source, self.folder, self.revision)
        self.name = self.folder.resolve().name
        if self.revision:
            self.name = Path(source.partition("@")[0]).name

        # Find out how large the model is. A vision-language model has a config of its own for its language
        # model: use that one.
        self.params = check_weight_headers(weight_files(self.folder))
        self.dtype = torch.float32
        if self.params >= SMALL and computes_in_bfloat16(self.device):
            self.dtype = torch.bfloat16
        self.config = read_config(self.folder, source)
        text_config = self.config.get_text_config()
        self.n_layers = text_config.num_hidden_layers
        self.width = output_width(text_config)

        # Check the layers, and count the states. A negative layer counts from the end.
        for layer in layers:
            if not -self.n_layers - 1 <= layer <= self.n_layers:
                raise ValueError(f"{self.name} has layers 0 to {self.n_layers} (-1 is the last one), but not "
                                 f"{layer}: choose other --layers")
        self.layers = [layer % (self.n_layers + 1) for layer in layers]
        self.states_per_problem = len(self.layers) * self.n_tokens

        # Load the tokenizer. Config and tokenizer both name a window; the smaller one counts, because
        # RoBERTa's config has two positions too many.
        self.tokenizer = read_tokenizer(self.folder, source)
        self.prompt_format = "chat" if self.tokenizer.chat_template else "plain"
        window = getattr(text_config, "max_position_embeddings", None) or math.inf
        self.window = min(window, self.tokenizer.model_max_length)

        # Only a model that generates text has stop tokens and can write.
        self.writes = generates_text(self.config)
        self.reads_own_answer = self.where == "answer" and self.writes
        self.think = think if self.writes else 0
        self.stop_ids = stop_tokens(self.folder, self.config) if self.writes else []

    def prompt(self, problem):
        """The text that the expert reads: the problem, without an instruction for the answer, and the cue.

        An expert that thinks is asked to reason. The cue then comes later, after the thought.
        """
        if not self.think:
            prompt = render_prompt(problem, self.prompt_format, self.tokenizer, instruct=False)
            if self.cue and not prompt.endswith("\n"):
                prompt += "\n"
            return prompt + self.cue

        question = f"{problem.question.strip()}\n{THINK}"
        if self.prompt_format == "plain":
            return question + "\n"  # without the "Answer:" of a plain prompt
        problem = dataclasses.replace(problem, question=question)
        return render_prompt(problem, self.prompt_format, self.tokenizer, instruct=False)

    def cue_after_thought(self):
        """Token ids of the cue on a line of its own, as it follows a thought."""
        return self.tokenizer("\n" + self.cue, add_special_tokens=False)["input_ids"]

    def new_tokens(self, kind):
        """The most tokens that are written when this kind of result is made."""
        return {STATES: 0, TEXTS: self.max_new, THOUGHTS: self.think}[kind]

    def room(self, kind):
        """How many tokens of the window must be free when this kind of result is made.

        Behind a thought there must still be room for the cue and the answer.
        """
        room = self.new_tokens(kind)
        if kind == THOUGHTS:
            room += len(self.cue_after_thought()) + self.max_new
        return room

    def room_for_a_run(self, writes):
        """How many tokens of the window must be free behind a prompt in a run.

        writes: whether the run needs the expert's text.
        """
        if self.think:
            return self.room(THOUGHTS)
        if writes or self.reads_own_answer:
            return self.room(TEXTS)
        return self.room(STATES)

    def tokenize(self, prompts, room=0):
        """Token ids of each prompt, a list of lists.

        Raises ValueError for a prompt that is empty, or that leaves less than `room` of the window free.
        """
        ids = prompt_ids(self.tokenizer, prompts, self.prompt_format, self.stop_ids)
        self.check_room(ids, room)
        return ids

    def check_room(self, ids, room):
        """Raises ValueError for an input without tokens, or that leaves less than `room` tokens free."""
        for row in ids:
            if not 1 <= len(row) <= self.window - room:
                write_less = ""
                if room or self.think:
                    write_less = ", a lower --write or --think"
                raise ValueError(f"an input has {len(row)} tokens for {self.name}, which has room for 1 to "
                                 f"{self.window - room}: use shorter problems (an easier --level)"
                                 f"{write_less}, or another expert")

    @torch.no_grad()
    def states_of(self, model, ids, length, before_answer):
        """Read B inputs, given as lists of token ids. Returns their states (B, K, width).

        length: the number of tokens T to which every input is padded. before_answer: B numbers, how many
        tokens of each input come before the expert's own answer (prompt, thought and cue). Raises
        ValueError for a model whose output has another shape than its config says, or is not finite.
        """
        B = len(ids)
        lengths = torch.tensor([len(row) for row in ids])  # (B,)

        # Pad on the right. The mask is True where a real token is.
        tokens = torch.zeros(B, length, dtype=torch.long)
        for b, row in enumerate(ids):
            tokens[b, :len(row)] = torch.tensor(row)
        mask = torch.arange(length) < lengths[:, None]  # (B, T)

        # Run the model. Ask for the states of inner layers only if one of them is used.
        needs_inner_layers = any(layer < self.n_layers for layer in self.layers)
        output = model(input_ids=tokens.to(self.device), attention_mask=mask.long().to(self.device),
                       output_hidden_states=needs_inner_layers)

        # Choose tokens in each layer.
        states = []
        for layer in self.layers:
            hidden = self.hidden_states(output, layer, B, length)  # (B, T, width)
            states += self.choose_tokens(hidden, mask, before_answer)

        states = torch.stack(states, dim=1).to(self.dtype)
        if not states.isfinite().all():
            raise ValueError(f"{self.name} gives states that are not finite: leave this expert out")
        return states

    def choose_tokens(self, hidden, mask, before_answer):
        """The states that are used of hidden (B, T, width): a list of tensors (B, width).

        mask (B, T) is False where there is padding; before_answer: see `states_of`.
        """
        lengths = mask.sum(1)  # (B,)
        if self.where == "mean":
            total = (hidden.float() * mask[..., None]).sum(1)
            return [total / lengths[:, None]]
        if self.where == "first":
            return [hidden[:, 0]]

        # Start at the last token before the answer. Go back, or go forward into the answer. Where an input is
        # too short, stay at its first or last token.
        start = torch.tensor(before_answer) - 1  # (B,)
        direction = 1 if self.reads_own_answer else -1
        chosen = []
        for k in range(self.n_tokens):
            position = (start + k * direction).clamp(min=0).minimum(lengths - 1)
            chosen.append(hidden[torch.arange(len(hidden)), position])
        return chosen

    def hidden_states(self, output, layer, B, length):
        """The states of one layer in a model's output, on the CPU: (B, T, width)."""
        if layer == self.n_layers:
            hidden = output.last_hidden_state
        else:
            hidden = output.hidden_states[layer]
        if hidden.shape != (B, length, self.width):
            raise ValueError(f"layer {layer} of {self.name} gives states of shape {tuple(hidden.shape)}, but "
                             f"{(B, length, self.width)} was expected: use --layers -1 or another expert")
        return hidden.cpu()

    @torch.no_grad()
    def texts_of(self, model, ids, length, kind=TEXTS):
        """Continue B inputs, given as lists of token ids. Returns the new ids (B, n_new), -1 after the end.

        The model stops at a stop token or at the end of a line. The stop token is left out, and so is a token
        that is only a line end. A token like "]\\n" stays, because its "]" is part of the answer. The tokens
        returned here are those that `write_texts` decodes and that the expert reads for its "answer" states.
        length: the number of tokens to which every input is padded. kind: "texts", with n_new = max_new, or
        "thoughts", with n_new = think, which may have several lines.
        """
        n_new = self.new_tokens(kind)
        ends = {*self.stop_ids}
        if kind == TEXTS:
            ends |= {*line_ends(self.tokenizer)}

        # Padding has to be some token; which one does not matter. The mask hides padding before an input, and
        # what follows an end is dropped. Take one that every model has.
        padding = min(ends)

        # Pad on the left, so that all inputs go on at the same position. The mask is 1 where a real token is.
        tokens = torch.full((len(ids), length), padding)
        mask = torch.zeros(len(ids), length, dtype=torch.long)
        for b, row in enumerate(ids):
            tokens[b, length - len(row):] = torch.tensor(row)
            mask[b, length - len(row):] = 1

        # Always take the most likely token. The model's own settings may contain penalties: replace them.
        greedy = transformers.GenerationConfig(max_new_tokens=n_new, do_sample=False,
                                               eos_token_id=sorted(ends), pad_token_id=padding)
        model.generation_config = greedy
        output = model.generate(input_ids=tokens.to(self.device), attention_mask=mask.to(self.device),
                                generation_config=greedy)
        new_tokens = output[:, length:].tolist()

        # Keep the tokens before the end, and the token at the end if it holds a part of the answer.
        written = torch.full((len(ids), n_new), -1, dtype=torch.int32)
        for b, row in enumerate(new_tokens):
            n = 0
            while n < len(row) and row[n] not in ends:
                n += 1
            if n < len(row) and self.holds_text(row[n]):
                n += 1
            written[b, :n] = torch.tensor(row[:n])
        return written

    def holds_text(self, token):
        """True for a token with text before its line end, such as "]\\n"; False for a stop token or "\\n"."""
        if token in self.stop_ids:
            return False
        text = self.tokenizer.decode([token]).partition("\n")[0]
        return text.strip() != ""

    @torch.no_grad()
    def reads_padding(self, model):
        """True for a model that reads padding on the left although the mask hides it, as RWKV does.

        We run the same input twice, after padding of two different tokens. A model that obeys the mask gives
        the same logits to the last bit. A model that does not has to write its texts one by one. (The RWKV of
        transformers 5.23 needs that for a second reason: it mixes the rows of a batch when it generates.)
        """
        ids, n_padding = [2, 3, 4], 13  # any tokens, and any number

        # Choose two tokens as padding.
        vocab_size = self.config.get_text_config().vocab_size
        one = self.stop_ids[0]
        another = (one + 1) % vocab_size

        # Run the input after each of them, with the same mask.
        mask = torch.tensor([[0] * n_padding + [1] * len(ids)]).to(self.device)
        logits = []
        for padding in (one, another):
            tokens = torch.tensor([[padding] * n_padding + ids]).to(self.device)
            output = model(input_ids=tokens, attention_mask=mask)
            logits.append(output.logits[0, -1])
        return not torch.equal(logits[0], logits[1])

    def load(self, kind):
        """The model with its weights, on the expert's device; for "states" without the head that writes.

        Raises ValueError if weights are missing, or stored in a form that the model does not understand.
        """
        auto = transformers.AutoModel if kind == STATES else transformers.AutoModelForCausalLM

        # The control: random weights, the same ones every time, without disturbing other random numbers.
        if self.untrained:
            with loading("model", self.source), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = auto.from_config(self.config, dtype=self.dtype, trust_remote_code=False)
            return model.to(self.device).eval()

        # Load the weights from the files of `weight_files`, whatever else is in the folder.
        config = copy.deepcopy(self.config)
        files = weight_files(self.folder)
        has_index = (self.folder / INDEX).is_file()
        if not has_index and len(files) > 1:
            raise ValueError(f"{self.source} has several weight files but no {INDEX}: fetch that file too")
        config.transformers_weights = INDEX if has_index else files[0].name
        if kind == STATES:
            config.get_text_config().use_cache = False  # an input is read once: keep no keys and values
        with loading("model", self.source):
            model, report = auto.from_pretrained(self.folder, config=config, dtype=self.dtype,
                                                 use_safetensors=True, trust_remote_code=False,
                                                 output_loading_info=True)

        # A missing tensor was filled with random numbers. Only BERT's pooler may be missing: it is not used.
        missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
        if missing:
            raise ValueError(f"{self.source} is not complete, {len(missing)} tensors are not in its files, "
                             f"among them {missing[0]}: fetch it again or name another model")

        # A scale that the model does not use means that the weights are quantized: they are wrong without it.
        scales = sorted(key for key in report["unexpected_keys"] if key.endswith(SCALES))
        if scales:
            raise ValueError(f"{self.source} seems to be quantized, as it has {scales[0]}, which its model "
                             "does not use: name a version of it that is not quantized")
        return model.to(self.device).eval()

    def fingerprint(self, kind):
        """sha256 (hex) of all that decides a result, except the prompt. It names the folder in the cache."""
        settings = []
        if kind == STATES:
            settings += [self.where, self.layers, self.n_tokens]
        if kind == TEXTS or (kind == STATES and self.reads_own_answer):
            settings += [self.max_new]
        if self.think:
            settings += ["thinks", self.think]
        if self.device.type != "cpu":  # another processor rounds differently
            settings += [self.device.type]

        # The commit identifies the weights of a hub model. The weights of a local folder are hashed.
        files = tokenizer_and_config_files(self.folder)
        if self.revision is None:
            files += weight_files(self.folder)

        cue = "" if kind == THOUGHTS else self.cue  # a thought is written before the cue
        parts = [FORMAT, kind, settings, self.dtype, self.prompt_format, cue, self.revision,
                 self.untrained, *named_digests(files)]
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def which_states(states):
    """Where states are read, and how many for each problem: "last:4" -> ("last", 4), "mean" -> ("mean", 1).

    Raises ValueError for what `Expert` does not know.
    """
    # "answer:1" would be the state before the first token of the answer: that of the prompt, "last".
    least = {"last": 1, "answer": 2}
    where, _, number = states.partition(":")
    if states in ("last", "first", "mean"):
        return where, 1
    if where in least and number.isdecimal() and least[where] <= int(number) <= 64:
        return where, int(number)
    raise ValueError(f"--states {states} is unknown: choose last, first, mean, last:4 (1 to 64 tokens) or "
                     "answer:6 (2 to 64 tokens)")


# -- What all experts read, and what they write

def read_states(experts, all_prompts, progress=True):
    """H, the states of all E experts for n problems: (n, E * K, D), D the width of the widest expert.

    all_prompts: E lists of n strings; all_prompts[e][i] is the prompt of problem i for expert e. Narrower
    states are padded with zeros. Example: an expert of width 64 that gives 4 states and one of width 96 that
    gives 1 state make H (n, 5, 96), and H[:, :4, 64:] is zero. H has the experts' dtype, or float32 if they
    differ.
    """
    widest = max(expert.width for expert in experts)
    columns = []
    for expert, prompts in zip(experts, all_prompts):

        # Let the expert think, and write its answer if states of it are wanted. It then reads all together.
        thoughts = thought_ids(expert, prompts, progress)
        answers = None
        if expert.reads_own_answer:
            answers = written_ids(expert, prompts, progress)

        states = cached_rows(expert, STATES, prompts, thoughts, answers, progress)  # (n, K, width)
        columns.append(F.pad(states, (0, widest - expert.width)))
    return torch.cat(columns, dim=1)


def write_texts(experts, all_prompts, progress=True):
    """The answer of each of E experts to n problems: E lists of n lines of text. "" if it cannot write.

    all_prompts: E lists of n strings; all_prompts[e][i] is the prompt of problem i for expert e.
    """
    columns = []
    for expert, prompts in zip(experts, all_prompts):
        if not expert.writes:
            columns.append([""] * len(prompts))
            continue

        # Decode all tokens, then cut at the end of the first line. (One token can hold "]" and a line end.)
        lines = []
        for ids in written_ids(expert, prompts, progress):
            text = expert.tokenizer.decode(ids, skip_special_tokens=True)
            line = text.partition("\n")[0]
            lines.append(" ".join(line.split()))
        columns.append(lines)
    return columns


def written_ids(expert, prompts, progress=True):
    """The token ids of the expert's answer to each prompt: n lists, see `Expert.texts_of`."""
    thoughts = thought_ids(expert, prompts, progress)
    rows = cached_rows(expert, TEXTS, prompts, thoughts, progress=progress)
    return [row[row >= 0].tolist() for row in rows]


def thought_ids(expert, prompts, progress=True):
    """The token ids between each prompt and its answer: the expert's thought and the cue. n lists.

    They are empty for an expert that does not think; the cue is then a part of the prompt.
    """
    if not expert.think:
        return [[] for _ in prompts]
    rows = cached_rows(expert, THOUGHTS, prompts, progress=progress)
    cue = expert.cue_after_thought()
    return [row[row >= 0].tolist() + cue for row in rows]


# -- The cache on disk. Its files, the shards, are <cache_dir>/<kind>/<fingerprint>/<checksum>.safetensors. A
# shard holds `keys` (n, 32) uint8, the sha256 of n prompts, and `rows`, one result for each. Several
# processes may use the cache at once: at worst a prompt is read twice.

def cached_rows(expert, kind, prompts, thoughts=None, answers=None, progress=True):
    """The result ("row") of each prompt, stacked: from the cache, or computed now and stored.

    kind      "states": rows (K, width). "texts" and "thoughts": rows (max_new,) and (think,) of token ids, -1
              after the end
    thoughts  n lists of token ids that follow each prompt, see `thought_ids`; None when the thoughts
              themselves are written
    answers   for "answer" states: n lists of token ids that follow the thoughts; else None

    A row is stored under its prompt alone, even if it depends on a thought or an answer: these are in the
    cache, too, and are not written a second time. Whoever deletes the folder "thoughts" must delete "texts"
    and "states" with it.
    """
    folder = cache_dir() / kind / expert.fingerprint(kind)

    # 1. Look up every prompt by the sha256 of its text.
    keys = [text_key(prompt) for prompt in prompts]
    rows = stored_rows(folder)

    # 2. Collect the prompts that are not there. A prompt that occurs twice is computed once.
    missing = {}  # {key: index of the prompt}
    for index, key in enumerate(keys):
        if key not in rows and key not in missing:
            missing[key] = index

    # 3. Compute and store them.
    if missing:
        indices = list(missing.values())
        ids = expert.tokenize([prompts[i] for i in indices], expert.room(kind))

        # Append thoughts and answers.
        if thoughts is not None:
            ids = [row + thoughts[i] for row, i in zip(ids, indices)]
        before_answer = [len(row) for row in ids]
        if answers is not None:
            ids = [row + answers[i] for row, i in zip(ids, indices)]

        # Check the room once more: cached thoughts may come from a run with a shorter cue.
        expert.check_room(ids, expert.room(kind))
        rows |= compute_rows(expert, kind, list(missing), ids, before_answer, folder, progress)
        torch.cuda.empty_cache()  # give back the memory of the weights; does nothing without a GPU

    return torch.stack([rows[key] for key in keys])


def text_key(text):
    """sha256 (32 bytes) of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def compute_rows(expert, kind, keys, ids, before_answer, folder, progress=True):
    """{key: row} for n lists of token ids, one for each key. Only here are an expert's weights in memory.

    before_answer: how many of the tokens come before the expert's answer, see `states_of`.
    Rows are stored every SECONDS_BETWEEN_SAVES seconds, at the end, and when something interrupts the work.
    """
    with progress_bar(len(ids), f"{expert.name}: loading weights", "text", show=progress) as bar:
        # Load the model, and choose what it does.
        model = expert.load(kind)
        one_by_one = kind != STATES and expert.reads_padding(model)
        verb = {STATES: "reads", TEXTS: "writes", THOUGHTS: "thinks"}[kind]
        if one_by_one:
            verb += " one by one"

        # From here on the bar shows how fast the expert reads or writes. Loading does not count.
        bar.set_description(f"{expert.name} {verb}", refresh=False)
        bar.unpause()

        rows, unsaved = {}, {}
        last_save = time.monotonic()
        try:
            for indices, length, size in batches(expert, kind, ids, one_by_one):
                # All batches of a length must have one shape: fill up the last one with copies of its first
                # input.
                copies = [indices[0]] * (size - len(indices))
                batch = [ids[i] for i in indices + copies]
                if kind == STATES:
                    results = expert.states_of(model, batch, length,
                                               [before_answer[i] for i in indices + copies])
                else:
                    results = expert.texts_of(model, batch, length, kind)

                # The results of the copies are at the end, where zip leaves them out.
                for index, row in zip(indices, results):
                    unsaved[keys[index]] = row
                bar.update(len(indices))

                # Store what is new from time to time.
                if time.monotonic() - last_save > SECONDS_BETWEEN_SAVES:
                    write_shard(folder, unsaved)
                    rows |= unsaved
                    unsaved = {}
                    last_save = time.monotonic()
        finally:
            if unsaved:
                write_shard(folder, unsaved)
    return rows | unsaved


def batches(expert, kind, ids, one_by_one=False):
    """Yield (indices into ids, padded length, number of rows) for each batch.

    Lengths are rounded up to a multiple of 16, so that inputs of similar length share a batch. The longest
    come first: if there is too little memory for them, that shows at once. A thought is written token
    by token, which is fast only with many rows: such a batch is larger, and its lengths are rounded more
    coarsely. To fill up the last batch with copies would take minutes there, so it has fewer rows; rounding
    may then make another thought of the same prompt, until the cache holds it.
    one_by_one: every input is a batch of its own, without padding.
    """
    if one_by_one:
        for index, row in enumerate(ids):
            yield [index], len(row), 1
        return

    step = 64 if kind == THOUGHTS else 16
    lengths = []
    for row in ids:
        rounded_up = math.ceil(len(row) / step) * step
        lengths.append(min(rounded_up, expert.window - expert.new_tokens(kind)))

    for length in sorted(set(lengths), reverse=True):
        if kind == THOUGHTS:
            size = batch_tokens(expert.device.type, THOUGHT_BATCH_TOKENS) // (length + expert.think)
        else:
            size = batch_tokens(expert.device.type, BATCH_TOKENS) // length
        size = max(1, size)
        indices = [i for i in range(len(ids)) if lengths[i] == length]
        for start in range(0, len(indices), size):
            batch = indices[start:start + size]
            rows = size
            if kind == THOUGHTS:
                rows = min(size, math.ceil(len(batch) / 16) * 16)
            yield batch, length, rows


def batch_tokens(device_type, tokens):
    """The tokens of a batch on a device of this type, from BATCH_TOKENS or THOUGHT_BATCH_TOKENS."""
    return tokens.get(device_type, tokens["cpu"])


def stored_rows(folder):
    """{key: row} of all shards in a folder. A damaged shard is deleted, with a warning."""
    rows = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            shard = read_tensors(path)
        except OSError as error:  # it cannot be read now, for example from a network disk: keep it
            warnings.warn(f"{path} cannot be read ({error}); its rows are computed again", stacklevel=2)
            continue
        except ValueError as error:  # its content does not match its checksum
            warnings.warn(f"{error}; its rows are computed again", stacklevel=2)
            path.unlink(missing_ok=True)
            continue
        for key, row in zip(shard["keys"].numpy(), shard["rows"]):
            rows[key.tobytes()] = row
    return rows


def write_shard(folder, rows):
    """Store {key: row} in a new file. If the disk is full: warn, and continue without storing."""
    keys = torch.tensor([list(key) for key in rows], dtype=torch.uint8)  # (n, 32)
    try:
        write_tensors(folder, {"keys": keys, "rows": torch.stack(list(rows.values()))})
    except OSError as error:
        warnings.warn(f"states and texts cannot be stored in {folder} and will be computed again: free space "
                      f"on the disk or set N_MUSKETEERS_CACHE ({error})", stacklevel=2)


# -- Plumbing. Nothing below is about the method; skip it at first reading.

# -- Tokens

def prompt_ids(tokenizer, prompts, prompt_format, stop_ids):
    """Token ids of each prompt, a list of lists.

    In the chat format the prompt has its special tokens already. In the plain format the tokenizer adds its
    own. Some tokenizers append an end-of-text token, after which a model has nothing more to say: trailing
    tokens in `stop_ids` are removed. An encoder has no stop_ids, so it keeps its [SEP].
    """
    plain = prompt_format == "plain"
    ids = tokenizer(list(prompts), add_special_tokens=plain)["input_ids"]
    if plain:
        for row in ids:
            while row and row[-1] in stop_ids:
                row.pop()
    return ids


def stop_tokens(folder, config):
    """The ids of the tokens that end a text, from generation_config.json, or else from config.json.

    Raises ValueError if neither names a token of the vocabulary.
    """
    config = config.get_text_config()  # of a vision-language model: the config of its language model
    ids = getattr(config, "eos_token_id", None)
    path = folder / "generation_config.json"
    if path.is_file():
        with loading("generation_config.json", folder):
            generation_ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        if generation_ids is not None:
            ids = generation_ids

    if not isinstance(ids, list):
        ids = [ids]
    if not ids or not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
        raise ValueError(f"{folder} names no eos_token_id in its vocabulary ({ids}), so no text ends: add it "
                         "to its config.json")
    return ids


def line_ends(tokenizer):
    """The ids of all tokens that contain a line end, as "\\n", "]\\n" and " \\n\\n" do."""
    marks = (
        "\n",      # itself, in vocabularies of plain text
        "Ċ",       # as byte-level vocabularies write it (GPT-2, Llama 3, Qwen)
        "<0x0A>",  # as SentencePiece writes a byte that has no token of its own (Llama 2, Gemma)
    )
    ids = []
    for token, i in tokenizer.get_vocab().items():
        if any(mark in token for mark in marks):
            ids.append(i)
    return ids


# -- A model's folder, on this computer or on the hub. Its content is checked and never trusted.

REPOSITORY = Path(__file__).resolve().parent
INDEX = "model.safetensors.index.json"  # of a model in several files: {"weight_map": {tensor: file name}}
META_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]  # config and tokenizer
HUB_FILES = [*META_FILES, "model*.safetensors", "README.md"]

WEIGHT_DTYPES = ("F32", "BF16", "F16")  # float32, bfloat16 and float16, as safetensors call them
BUFFERS = ("position_ids", "token_type_ids", "attn.bias", "attention.bias", "masked_bias", "causal_mask",
           "inv_freq", "num_batches_tracked")  # no parameters: they may have any dtype
SCALES = ("scale", "scales", "scale_inv")  # of quantized weights, as in q_proj.weight_scale_inv

# `Expert.load` checks the report of loading, so transformers need not print it, nor a bar for each model. But
# its switch for bars also hides the hub's bars for downloads: show those again.
transformers.logging.set_verbosity_error()
hub_bars_are_hidden = huggingface_hub.utils.are_progress_bars_disabled()
transformers.logging.disable_progress_bar()
if not hub_bars_are_hidden:
    huggingface_hub.utils.enable_progress_bars()


def find_model(source):
    """The folder of a model, and its commit if it comes from the hub, else None.

    source: a folder (~ is the home folder); a folder in this repository, such as tiny/logic; or a model of
    the Hugging Face hub, "org/name" or "org/name@revision", which is downloaded if it is not here yet.
    Raises ValueError if there is no such model.
    """
    folder = local_folder(source)
    if folder is not None:
        return folder, None

    try:
        folder = Path(hub_snapshot(source))
    except Exception as error:  # the errors of the hub's client have no common class
        raise ValueError(f"{source} is no folder and cannot be fetched from the Hugging Face hub: name the "
                         "folder where it lies with --policy or --experts, or check name, network and "
                         "HF_HUB_OFFLINE "
                         f"({first_line(error)})") from error
    return folder, folder.name


def local_folder(source):
    """The folder that a source names, as a Path, or None if it is not on this computer."""
    if not source:
        raise ValueError("the name of a model is empty: give --policy and --experts a folder or a hub name")
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        return folder
    if (REPOSITORY / folder).is_dir():
        return REPOSITORY / folder
    return None


def hub_snapshot(source, dry_run=False):
    """Download a model of the hub. Returns its folder; in a dry run, a list of its files with their sizes."""
    repo, _, revision = source.partition("@")
    return huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=HUB_FILES,
                                             ignore_patterns=["*/*"], dry_run=dry_run)


def to_fetch(sources):
    """[(hub name, bytes)] of the models that have to be downloaded. Without a network it is not known: []."""
    downloads = []
    for source in dict.fromkeys(sources):
        if local_folder(source) is not None:
            continue
        try:
            files = hub_snapshot(source, dry_run=True)
        except Exception:  # find_model will say what is wrong
            continue
        size = sum(file.file_size or 0 for file in files if file.will_download)
        if size:
            downloads.append((source.partition("@")[0], size))
    return downloads


def portable(source):
    """The name under which config.json stores a model, so that it is found from any folder.

    A folder in this repository is stored relative to it ("tiny/logic"), as the repository may move; any other
    folder as an absolute path; a model of the hub with its commit ("org/name@commit").
    """
    return pinned_source(source, *find_model(source))


def pinned_source(source, folder, revision):
    """What `portable` returns, for a model that has been found in `folder`."""
    if revision is not None:
        repo = source.partition("@")[0]
        return f"{repo}@{revision}"
    folder = folder.resolve()
    if folder.is_relative_to(REPOSITORY):
        folder = folder.relative_to(REPOSITORY)
    return folder.as_posix()


def weight_files(folder):
    """The safetensors files of a model, a list of Paths: those that its index names, if it has an index.

    Raises ValueError if there are none, or if one that the index names is missing.
    """
    if (folder / INDEX).is_file():
        with loading(INDEX, folder):
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
            files = [folder / Path(name).name for name in names]  # never a file outside the folder
        for path in files:
            if not path.is_file():
                raise ValueError(f"{folder} lacks {path.name}, which its {INDEX} names: fetch it again")
    else:
        files = list(folder.glob("model.safetensors")) or sorted(folder.glob("model-*-of-*.safetensors"))

    if not files:
        raise ValueError(f"{folder} has no safetensors weights: if it is a model of the hub, fetch all of it "
                         "once with a network; else name a model that has model.safetensors (other formats "
                         "can run code and are never loaded)")
    return files


def check_weight_headers(files):
    """The number of parameters in a model's safetensors files, of which only the headers are read.

    Raises ValueError for a tensor that is in two files, and for weights of any dtype but float32, bfloat16
    and float16: other numbers are quantized weights, which are wrong without their scales.
    """
    n_parameters = 0
    file_of_tensor = {}
    for path in files:
        with loading(f"header of {path.name}", path.parent):
            header = huggingface_hub.parse_local_safetensors_file_metadata(path)

        for name, tensor in header.tensors.items():
            if name in file_of_tensor:
                raise ValueError(f"{path.parent} has the tensor {name} in both {file_of_tensor[name]} and "
                                 f"{path.name}: delete the file that does not belong to the model")
            file_of_tensor[name] = path.name

            if name.endswith(BUFFERS):  # a mask or a table of positions, no parameters
                continue
            if tensor.dtype not in WEIGHT_DTYPES:
                raise ValueError(f"{path.parent} stores {name} as {tensor.dtype}, but weights must be "
                                 "float32, bfloat16 or float16: name a version of it that is not quantized")
            n_parameters += tensor.parameter_count
    return n_parameters


def read_config(folder, source):
    """The model's config. Raises ValueError for a kind of model that cannot be an expert."""
    with loading("config", source):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text_config = config.get_text_config()
        width, n_layers = text_config.hidden_size, text_config.num_hidden_layers
        usual_size = 1 <= width <= 65_536 and 1 <= n_layers <= 1_000
        if config.is_encoder_decoder or not usual_size:
            raise ValueError(f"no causal model or encoder: width {width}, {n_layers} layers")
    return config


def read_tokenizer(folder, source):
    """The model's tokenizer: tokenizer.json as it is, if there is one.

    AutoTokenizer would choose a class by the type of the model, such as Qwen's for any model of type qwen2.
    """
    kind = transformers.AutoTokenizer
    if (folder / "tokenizer.json").is_file():
        kind = transformers.PreTrainedTokenizerFast
    with loading("tokenizer", source):
        return kind.from_pretrained(folder, trust_remote_code=False)


def output_width(text_config):
    """How many numbers a state of the last layer has. OPT-350m projects it to a smaller width."""
    return getattr(text_config, "word_embed_proj_dim", text_config.hidden_size)


def generates_text(config):
    """True for a model that was trained to continue a text and that AutoModelForCausalLM can load.

    AutoModelForCausalLM also loads encoders, with a head that was never trained. Their config names another
    architecture, such as BertForMaskedLM.
    """
    endings = ("CausalLM", "LMHeadModel", "ConditionalGeneration")
    trained_to_write = any(name.endswith(endings) for name in config.architectures or [])
    return trained_to_write and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING


@contextlib.contextmanager
def loading(part, source):
    """Turn whatever a library raises in this block into a ValueError of one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:  # of a GPU: the files are in order, and rlvr.run_cli says what to lower
        raise
    except Exception as error:  # the same mistake comes as an OSError, KeyError, RuntimeError, ...
        raise ValueError(f"the {part} of {source} cannot be loaded: fetch it again or name another model "
                         f"({first_line(error)})") from error


def first_line(error):
    """The type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


# -- Files. A file is complete or not there; a name that ends with a checksum of the content shows damage.

def write_tensors(folder, tensors, prefix=""):
    """Write {name: tensor} to <folder>/<prefix><checksum>.safetensors. Raises OSError."""
    data = save(tensors)
    write_atomic(folder / f"{prefix}{checksum(data)}.safetensors", data)


def read_tensors(path):
    """{name: tensor} of a file of `write_tensors`. Raises ValueError if it is damaged."""
    data = path.read_bytes()
    if not path.stem.endswith(checksum(data)):
        raise ValueError(f"{path} is damaged, its checksum does not match")
    return load(data)


def checksum(data):
    """The first 16 hexadecimal digits of the sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def write_atomic(path, data):
    """Write bytes under another name, then rename the file: nobody ever sees half of it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{uuid.uuid4().hex}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def weights_fingerprint(folder):
    """sha256 (hex) of a model's weights, tokenizer and config. A copy in another folder has the same one."""
    folder = Path(folder)
    files = tokenizer_and_config_files(folder) + weight_files(folder)
    return hashlib.sha256("\n".join(named_digests(files)).encode()).hexdigest()


def tokenizer_and_config_files(folder):
    """The small files in a model's folder, a list of Paths."""
    files = []
    for pattern in META_FILES:
        files += folder.glob(pattern)
    return files


def named_digests(files):
    """["<name> <sha256>"] of files, in the order of their paths."""
    return [f"{path.name} {file_digest(path)}" for path in sorted(files)]


def file_digest(path):
    """sha256 (hex) of a file."""
    # In the hub's cache a file is a link to blobs/<sha256>: there is nothing to compute.
    target = path.resolve()
    if target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name):
        return target.name
    status = path.stat()
    return digest_of_version(path, status.st_size, status.st_mtime_ns)


@functools.cache  # weights are gigabytes, and this is called for every split of every task
def digest_of_version(path, size, modified):
    """sha256 (hex) of a file that has this size and this time of modification."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, progress_bar(size, f"checking {path.name}", "B", delay=1) as bar:
        while chunk := file.read(2**24):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def progress_bar(total, description, unit, show=True, delay=0):
    """A tqdm bar that appears after `delay` seconds. In a log file it appears every 30 seconds.

    If torchrun has started several processes, only the first one shows it.
    """
    show = show and os.environ.get("RANK", "0") == "0"
    mininterval = 0.1
    if not sys.stderr.isatty():
        mininterval = delay = 30
    return tqdm(total=total, desc=description, unit=unit, unit_scale=unit == "B", disable=not show,
                delay=delay, mininterval=mininterval)


# -- Devices

def computes_in_bfloat16(device):
    """Does this device compute in bfloat16? V100, T4 and some Macs only imitate it, which is slow."""
    device = torch.device(device)
    if device.type == "cpu":
        return True
    if device.type == "cuda":
        try:
            with torch.cuda.device(device):
                return torch.cuda.is_bf16_supported(including_emulation=False)
        except (TypeError, AssertionError, RuntimeError):
            return True  # an estimate for a GPU that is not here: nearly all of them do

    # Try it: on a Mac it depends on the version of the system.
    try:
        ones = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        (ones @ ones).sum().item()
        return True
    except (RuntimeError, TypeError):
        return False


def pick_device(name, small=False):
    """The device to use: "cpu", "mps", "cuda" or "cuda:1". Raises ValueError if it is not there.

    name: one of these, or "auto" for the fastest. small: the model is so small that a Mac's CPU is faster
    than its GPU. If torchrun has started several processes, each gets a GPU of its own.
    """
    available = [kind for kind in ("cuda", "mps", "cpu") if getattr(torch, kind).is_available()]
    if name == "auto":
        name = available[0]
        if name == "mps" and small:
            name = "cpu"

    # torchrun numbers the processes on a computer. Process 1 uses GPU 1.
    kind, _, index = name.partition(":")
    local_rank = os.environ.get("LOCAL_RANK", "")
    if kind == "cuda" and local_rank:
        index = local_rank
    device = f"{kind}:{index}" if index else kind

    known_index = not index or (index.isdigit() and int(index) < torch.cuda.device_count())
    if kind not in available or not known_index:
        sentence = f"there is no {device} here: use --device {' or '.join(available)}"
        if local_rank:
            sentence += ", and start no more processes than there are GPUs"
        raise ValueError(sentence)

    if kind == "cuda":
        torch.cuda.set_device(int(index or 0))
    return device
