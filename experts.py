"""
The frozen pool: any Hugging Face model as an expert that reads each prompt once.

An expert never writes (collab.py has some that do, to compare). It reads a prompt with its own tokenizer and
leaves one vector, a hidden state pooled over its tokens (H in the paper's C = g(H)). Frozen weights and a
fixed prompt always give the same vector, so the vectors are a cache on disk, and while the policy trains no
expert is in memory:

    texts (n per expert) -> token ids -> AutoModel, in batches -> a state per text -> shards -> H (n, N, D)

Two rules keep a state the same whatever else is in its batch. Texts are padded on the right: there a causal
model cannot see the padding, an encoder's mask hides it, and every token keeps the position it has alone. And
nothing is ever cut: a text longer than the model's window is refused, not silently shortened.
"""
import hashlib
import math
import time
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load, save
from tqdm import tqdm

from folders import (META_FILES, brief, cache_dir, count_parameters, file_hash, find_model, loading,
                     read_json, weight_files, write_whole)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALL = 50_000_000      # parameters: below, float32 costs little; above, bfloat16 halves memory and time
TOKENS = {"cpu": 2048, "cuda": 16384}   # padded tokens a batch: keeps the device busy with little memory
SHARD_SECONDS = 20                      # at most this much reading is lost when the process is killed
FORMAT = "n-musketeers states 1"        # enters the fingerprint: another way of reading finds no old states


@dataclass(frozen=True)
class Pool:
    """A policy, its experts, and the defaults that suit their size."""
    policy: str
    experts: tuple
    task: str
    level: str                  # of generated tasks
    template: str               # how the policy is asked: "chat" or "plain"
    lr: float                   # of the LoRA
    router_lr: float
    batch: int                  # prompts a step
    steps: int
    max_new: int                # tokens a completion
    group: int = 8              # completions a prompt: the paper's, as are the router's width and heads
    temperature: float = 1.0    # not known of the paper; 1 is the policy's own distribution
    router_width: int = 512
    router_heads: int = 8
    router_temperature: float = 1.0
    neutral: str = "zero"       # see model.Policy
    write: int = 64             # tokens an expert may write (--collab text)


TINY = Path(__file__).resolve().parent / "tiny"
POOLS = {
    # Made for the five-minute demonstration; tiny/ says how. One family per specialist: listening shows.
    "tiny": Pool(
        str(TINY / "policy"), (str(TINY / "arithmetic"), str(TINY / "logic"), str(TINY / "algorithmic")),
        task="arithmetic+logic+algorithmic", level="tiny", template="plain",    # what they were trained on
        lr=1e-3, router_lr=2e-3,                # small models bear, and need, ten times a large one's rate
        batch=36, steps=200, max_new=8,         # 12 problems a family; the longest answer and its stop token
        router_width=64, router_heads=4, router_temperature=0.5,    # narrow inputs; few steps to choose in
        write=1,                                # a whole answer is one token of its experts
        neutral="mean"),                        # its policy was taught what the mean embedding means: nothing
    # One consumer GPU or a patient CPU. Three families, one an encoder; Apache-2.0, bge MIT.
    "small": Pool(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        ("Qwen/Qwen2.5-Coder-0.5B-Instruct", "EleutherAI/pythia-410m", "BAAI/bge-base-en-v1.5"),
        task="chain_sum", level="easy",         # 135M must be right now and then, or nothing is learned
        template="plain",                       # right in 40% at the start; with the chat template in 5%
        lr=4e-4, router_lr=4e-4,                # took two-term sums from 36 to 54% in 100 steps
        batch=8, steps=100, max_new=16),        # a step in seconds on two cores
    # The paper's run. It does not name its experts: four dense, ungated families of 1 to 2B are our choice
    # (Apache-2.0, phi-1_5 MIT). The policy is for research only; Qwen/Qwen2.5-1.5B-Instruct is Apache-2.0.
    "paper": Pool(
        "Qwen/Qwen2.5-3B-Instruct",
        ("Qwen/Qwen2.5-Math-1.5B-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct",
         "allenai/OLMo-2-0425-1B-Instruct", "microsoft/phi-1_5"),
        task="gsm8k", level="default", template="chat",
        lr=1e-4, router_lr=1e-4, batch=32, max_new=128,     # the paper's
        steps=500),                             # the paper's for Reasoning Gym; gsm8k has 233, one epoch
}
LICENCES = dict.fromkeys((      # of hub models, for the card of an export
    "HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "EleutherAI/pythia-410m",
    "Qwen/Qwen2.5-Coder-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-Math-1.5B-Instruct",
    "allenai/OLMo-2-0425-1B-Instruct"), "apache-2.0") | {
    "BAAI/bge-base-en-v1.5": "mit", "microsoft/phi-1_5": "mit", "Qwen/Qwen2.5-3B-Instruct": "qwen-research"}


class Expert:
    """One frozen model: its tokenizer, its geometry (from config alone) and, only while reading, its weights.

    name      a folder, or a hub name `org/model`, `org/model@revision`
    read      the token(s) that make the state: "last" (for a BERT its [SEP]), "first", or the "mean" of all
    layer     0 embeddings, k after block k, -1 (the number of blocks) after the final norm
    dtype     "float32" or "bfloat16", of computing and cache; by default float32 below 50M parameters, on
              every device, so that a CPU and a GPU can share a cache
    template  "chat", "plain", or "auto" (chat if the tokenizer has a chat template). A chat text holds its
              special tokens already, a plain one is given the tokenizer's own.
    untrained the same architecture with random weights, always the same ones (a control)
    Raises ValueError for a model that is missing, damaged or of a kind that cannot be read.
    """
    auto = "AutoModel"      # the class in transformers that loads it

    def __init__(self, name, *, read="last", layer=-1, dtype=None, device="cpu", template="auto",
                 untrained=False):
        self.source, self.device, self.read, self.model = str(name), torch.device(device), read, None
        self.folder, self.revision = find_model(self.source)
        self.name = Path(self.source.partition("@")[0]).name if self.revision else self.folder.resolve().name
        self.width, self.layers, self.window, self.has_template = self.geometry()
        self.params = sum(map(count_parameters, weight_files(self.folder)))
        dtype = dtype or ("float32" if self.params < SMALL else "bfloat16")
        if read not in ("last", "first", "mean") or dtype not in DTYPES:
            raise ValueError(f"experts read last, first or mean in {', '.join(DTYPES)}: not {read}, {dtype}")
        if not -self.layers - 1 <= layer <= self.layers:
            raise ValueError(f"{self.name} has layers 0 to {self.layers} (-1 is the last), not {layer}")
        if template == "chat" and not self.has_template:
            raise ValueError(f"{self.name} has no chat template: ask it with --template plain or auto")
        self.layer, self.dtype = layer % (self.layers + 1), DTYPES[dtype]
        self.template = template if template != "auto" else "chat" if self.has_template else "plain"
        self.row_bytes = self.width * self.dtype.itemsize + 32      # of one text in the cache, with its key
        self.untrained, self.kept = untrained, self.dtype           # kept: the dtype of its rows in the cache
        self.marks = ["untrained"] if untrained else []             # what else the fingerprint must tell

    def geometry(self):
        """(width, layers, window, has_template) from the JSON files, without importing a model class."""
        config, tokenizer = (read_json(self.folder / f) for f in ("config.json", "tokenizer_config.json"))
        text = config.get("text_config")                # a model that also sees keeps its reader in here
        text = text if isinstance(text, dict) else config

        def first(*keys):
            return next((text[key] for key in keys if isinstance(text.get(key), int)), 0)

        width = first("hidden_size", "d_model", "n_embd", "dim")
        layers = first("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        if config.get("is_encoder_decoder") or not (1 <= width <= 65_536 and 1 <= layers <= 1_000):
            raise ValueError(f"{self.source} needs the config.json of a causal model or an encoder (found "
                             f"width {width}, {layers} layers): fetch it again or name another model")
        # The smaller of two: RoBERTa's config counts two positions that it cannot use.
        window = min(first("max_position_embeddings", "n_positions", "max_seq_len") or math.inf,
                     tokenizer.get("model_max_length") or math.inf)
        files = [self.folder / f"chat_template.{kind}" for kind in ("jinja", "json")]
        return width, layers, window, "chat_template" in tokenizer or any(path.is_file() for path in files)

    @cached_property
    def fingerprint(self):
        """sha256 (hex) over all that decides a state but the text: this expert's folder in the cache."""
        files = [path for pattern in META_FILES for path in self.folder.glob(pattern)]
        if self.revision is None:                       # a commit names its weights, a folder's are looked at
            files += weight_files(self.folder)
        parts = [FORMAT, self.read, self.layer, self.dtype, self.template, self.revision, *self.marks]
        parts += [f"{path.name} {file_hash(path)}" for path in sorted(files)]
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()

    @cached_property
    def encoder(self):
        """Is it a reader alone, of BERT's kin? Told by the type and architecture in its config.json."""
        config = read_json(self.folder / "config.json")
        kind, heads = str(config.get("model_type")), config.get("architectures") or []
        writes = any(head.endswith(("CausalLM", "LMHeadModel")) for head in heads)
        return ("bert" in kind or kind in ("mpnet", "electra")) and not writes

    @cached_property
    def tokenizer(self):
        """Its own tokenizer, loaded when first asked for, as importing transformers takes seconds. It is what
        tokenizer.json says: AutoTokenizer goes by the model's type, and splits as Qwen for any qwen2."""
        with loading("tokenizer", self.source):
            from transformers import AutoTokenizer, PreTrainedTokenizerFast
            kind = PreTrainedTokenizerFast if (self.folder / "tokenizer.json").is_file() else AutoTokenizer
            return kind.from_pretrained(self.folder, trust_remote_code=False)

    def tokenize(self, texts):
        """Token ids of each text. Raises ValueError for a text that is empty or longer than the window."""
        plain = self.template == "plain"
        ids = self.tokenizer(list(texts), add_special_tokens=plain, verbose=False)["input_ids"]
        for row in ids:
            if not 1 <= len(row) <= self.window:
                raise ValueError(f"a prompt has {len(row)} tokens for {self.name}, whose window is 1 to "
                                 f"{self.window}: use fewer shots, an easier level or another expert")
        return ids

    def load(self):
        """Bring the weights to the device, if they are not there."""
        if self.model is not None:
            return
        with loading("model", self.source):
            import transformers
            auto, report = getattr(transformers, self.auto), dict(missing_keys=())
            if self.untrained:
                config = transformers.AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    model = auto.from_config(config, dtype=self.dtype, trust_remote_code=False)
            else:
                model, report = auto.from_pretrained(self.folder, dtype=self.dtype, use_safetensors=True,
                                                     trust_remote_code=False, output_loading_info=True)
            # What is missing was filled with random numbers; only the pooler, above the last layer, may be.
            missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
            if missing:
                raise ValueError(f"{len(missing)} tensors are not in its files, among them {missing[0]}")
        model.config.get_text_config().use_cache = False    # one pass: keys and values are not wanted again
        self.model = model.to(self.device).eval()

    def free(self):
        """Give the weights' memory back."""
        self.model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def forward(self, ids):
        """States of one batch, B lists of token ids: (B, width), float32, on the CPU."""
        lengths = torch.tensor([len(row) for row in ids], device=self.device)              # (B,)
        rows = [torch.tensor(row) for row in ids]           # padded with 0: any id will do, it is masked
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)   # (B, T)
        real = torch.arange(tokens.shape[1], device=self.device) < lengths[:, None]        # (B, T)
        inside = self.layer < self.layers
        out = self.model(input_ids=tokens, attention_mask=real.long(), output_hidden_states=inside)
        hidden = out.hidden_states[self.layer] if inside else out.last_hidden_state        # (B, T, width)
        if self.read == "mean":
            state = (hidden.float() * real[..., None]).sum(1) / lengths[:, None]           # (B, width)
        else:
            at = lengths - 1 if self.read == "last" else torch.zeros_like(lengths)
            state = hidden[torch.arange(len(ids), device=self.device), at]                 # (B, width)
        if not torch.isfinite(state).all():
            raise ValueError(f"{self.name} gives states that are not finite: leave this expert out")
        return state.float().cpu()

    def batches(self, ids):
        """(places in `ids`, their states) batch by batch, longest first: what does not fit fails at once."""
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        while order:
            size = max(1, TOKENS.get(self.device.type, TOKENS["cpu"]) // len(ids[order[0]]))
            places, order = order[:size], order[size:]
            yield places, self.forward([ids[i] for i in places])

    def states(self, texts):
        """(len(texts), width), float32, on the CPU, straight from the model, which stays loaded."""
        self.load()
        result = torch.empty(len(texts), self.width)
        for places, states in self.batches(self.tokenize(texts)):
            result[places] = states
        return result


def line_ends(tokenizer, stop):
    """In the plain form the answer is the first line, so every token that ends a line ends the completion."""
    marks = ("\n", "Ċ", "<0x0A>")  # as is, in byte-level vocabularies, in SentencePiece's
    ends = [i for token, i in tokenizer.get_vocab().items() if any(mark in token for mark in marks)]
    return sorted({*stop, *ends})


# The cache: <folder>/<fingerprint>/<seal>.safetensors, each with `keys` (n, 32) uint8, the sha256 of n texts,
# and `states` (n, width). Its name is the sha256 of its content, so damage shows; and any number of processes
# may share a folder: at worst two read the same text.


def text_key(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def seal(expert, data):
    return hashlib.sha256(expert.fingerprint.encode() + data).hexdigest()


def write_shard(expert, folder, rows):
    """Add one shard of rows, {key: state}. A full disk costs the cache, not the run: it is said and left."""
    keys = torch.tensor([list(key) for key in rows], dtype=torch.uint8)         # (n, 32)
    data = save({"keys": keys, "states": torch.stack(list(rows.values()))})     # states (n, width)
    try:
        write_whole(Path(folder) / expert.fingerprint / f"{seal(expert, data)}.safetensors", data)
    except OSError as error:
        warnings.warn(f"states of {expert.name} cannot be kept in {folder} and will be read again next time: "
                      f"free some space or set N_MUSKETEERS_CACHE ({brief(error)})", stacklevel=2)


def open_shard(expert, path):
    """{key: state} of one shard; a damaged one is named in a warning, deleted, and counts as empty."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:       # another process found it damaged first
        return {}
    if seal(expert, data) == path.stem:
        shard = load(data)
        return {key.tobytes(): state for key, state in zip(shard["keys"].numpy(), shard["states"])}
    warnings.warn(f"a shard of {expert.name}'s states was damaged: it is deleted, its texts are read again "
                  f"({path})", stacklevel=2)
    path.unlink(missing_ok=True)
    return {}


def stored(expert, folder):
    """{key: state} of all that this expert has left in the cache."""
    shards = sorted((Path(folder) / expert.fingerprint).glob("*.safetensors"))
    return {key: state for path in shards for key, state in open_shard(expert, path).items()}


def cached(expert, texts, folder=None):
    """How many of `texts` need not be read again."""
    rows = stored(expert, folder or cache_dir() / "states")
    return sum(text_key(text) in rows for text in texts)


def read_missing(expert, texts, folder, progress):
    """{key: state} of `texts` ({key: text}), read now and kept: a shard every 20 seconds and at the end, even
    if that is an interruption. Only in here are the weights in memory."""
    keys, ids = list(texts), expert.tokenize(texts.values())
    rows, fresh, since = {}, {}, time.monotonic()
    try:
        expert.load()
        quiet = None if progress else True              # None: no bar in a log file either
        with tqdm(total=len(keys), desc=f"{expert.name} reads", unit="text", disable=quiet) as bar:
            for places, states in expert.batches(ids):
                fresh |= zip([keys[i] for i in places], states.to(expert.kept))
                bar.update(len(places))
                if time.monotonic() - since > SHARD_SECONDS:
                    write_shard(expert, folder, fresh)
                    rows, fresh, since = rows | fresh, {}, time.monotonic()
    finally:
        expert.free()
        if fresh:
            write_shard(expert, folder, fresh)
    return rows | fresh


def rows_of(expert, texts, folder, progress=True):
    """The row of each text, from the cache or, where it is not there, from the model now."""
    folder = folder or cache_dir() / "states"
    keys, rows = [text_key(text) for text in texts], stored(expert, folder)
    missing = {key: text for key, text in zip(keys, texts) if key not in rows}
    if missing:
        rows |= read_missing(expert, missing, folder, progress)
    return [rows[key] for key in keys]


def read(experts, texts, folder=None, progress=True):
    """H, every problem as every expert reads it: (n, N, D), D the widest expert's width.

    experts  N of them; texts: N lists of n strings, texts[e][i] being problem i as expert e is to see it
    folder   the cache, by default cache_dir()/states; only texts that are not in it are read
    Narrower states are padded with zeros. The dtype is the experts' own, float32 if theirs differ.
    """
    dtype = experts[0].dtype if len({expert.dtype for expert in experts}) == 1 else torch.float32
    H = torch.zeros(len(texts[0]), len(experts), max(e.width for e in experts), dtype=dtype)       # (n, N, D)
    for e, expert in enumerate(experts):
        for i, row in enumerate(rows_of(expert, texts[e], folder, progress)):
            H[i, e, :expert.width] = row
    return H
