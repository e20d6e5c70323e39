"""
The frozen pool: any Hugging Face model as an expert that reads each problem once.

An expert reads a prompt with its own tokenizer and leaves hidden states of its last token (H in the paper's
C = g(H)). Frozen weights and a fixed prompt always give the same states, so they are a cache on disk, and
while the policy trains no expert is in memory:

    texts -> token ids -> AutoModel, in batches -> states of each text -> shards on disk -> H (n, N, D)

It can also say what it would answer (`write_texts`): a few greedy tokens, in the same cache. Stage 0 teaches
the policy to read the states with these texts as targets, and `--collab text` puts them into its prompt.

What is easy to get wrong:
- A state must not depend on what else is in its batch. Texts are padded on the right, where a causal model
  cannot see the padding and an encoder's mask hides it. And every batch of a length has the same shape,
  because products of other shapes round differently: the cache holds the same bits however it was filled.
- Nothing is ever cut: a text longer than the model's window is refused.
- A model's folder is data: only safetensors are read, and no code in it is run.
"""
import contextlib
import functools
import hashlib
import json
import math
import os
import time
import uuid
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import parse_local_safetensors_file_metadata, snapshot_download
from safetensors.torch import load, save
from tqdm import tqdm

from rewards import cache_dir, prompt

transformers.logging.set_verbosity_error()  # what goes wrong is one sentence, see `loading`
transformers.logging.disable_progress_bar()

FORMAT = "n-musketeers 2"  # part of every fingerprint: states read in another way are never found
SMALL = 50_000_000  # parameters: below, float32 costs little; above, bfloat16 halves memory and time
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # padded tokens a batch: keeps the device busy in little memory
SHARD_SECONDS = 20  # at most this much reading is lost when the process is killed
META_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]  # config and tokenizer
STATES, TEXTS = "states", "texts"  # the two kinds of rows in the cache

class Expert:
    """One frozen model: its tokenizer, its sizes (from files alone) and, only while reading, its weights.

    source     a folder, or a hub name "org/model", "org/model@revision"
    read       the token(s) that make a state: "last" (for a BERT its [SEP]), "first", or the "mean" of all
    layers     which layers are read: 0 is the embedding, k block k, -1 the last one, after the final norm
    positions  with "last": the states of this many last tokens
    own_text   read what it writes too, behind the prompt: the last states are those while it answered
    tokens     the most tokens that it may write
    cue        text behind every prompt, such as "The answer is "
    untrained  the same architecture with random weights, always the same ones (a control)
    A text gives K = `entries` states of width `width`: `positions` a layer with "last", else one. Raises
    ValueError, one sentence with the mend, for a model that is missing, damaged or of an unreadable kind.
    """

    def __init__(self, source, read="last", layers=(-1,), positions=1, own_text=False, tokens=16, cue="",
                 device="cpu", untrained=False):
        self.source, self.read, self.positions, self.tokens, self.cue = source, read, positions, tokens, cue
        self.device, self.untrained = torch.device(device), untrained
        self.folder, self.revision = find_model(source)
        repo = source.partition("@")[0]
        self.name = Path(repo).name if self.revision else self.folder.resolve().name
        self.pinned = f"{repo}@{self.revision}" if self.revision else source  # finds the same weights again
        files = weight_files(self.folder)
        with loading("header, config or tokenizer", source):
            headers = [parse_local_safetensors_file_metadata(path) for path in files]
            self.params = sum(sum(header.parameter_count.values()) for header in headers)
            self.config = transformers.AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            text = self.config.get_text_config()  # of a vision-language model: its language model's config
            self.width, self.n_layers = text.hidden_size, text.num_hidden_layers
            usual = 1 <= self.width <= 65_536 and 1 <= self.n_layers <= 1_000
            if self.config.is_encoder_decoder or not usual:
                raise ValueError(f"no causal model or encoder: width {self.width}, {self.n_layers} layers")
            # tokenizer.json as it is: AutoTokenizer takes the class of the model's type, Qwen's for any qwen2
            fast = (self.folder / "tokenizer.json").is_file()
            kind = transformers.PreTrainedTokenizerFast if fast else transformers.AutoTokenizer
            self.tokenizer = kind.from_pretrained(self.folder, trust_remote_code=False)
            # the smaller of two: RoBERTa's config counts two positions that it cannot use
            window = getattr(text, "max_position_embeddings", None) or math.inf
            self.window = min(window, self.tokenizer.model_max_length)
        self.dtype = torch.float32 if self.params < SMALL else torch.bfloat16
        if any(not -self.n_layers - 1 <= layer <= self.n_layers for layer in layers):
            raise ValueError(f"{self.name} has layers 0 to {self.n_layers} (-1 is the last), not "
                             f"{' '.join(map(str, layers))}: choose another --layer")
        self.layers = [layer % (self.n_layers + 1) for layer in layers]
        self.entries = len(self.layers) * (positions if read == "last" else 1)  # K: states that a text gives
        self.template = "chat" if self.tokenizer.chat_template else "plain"
        ends = ("CausalLM", "LMHeadModel", "ConditionalGeneration")  # an encoder's head only reads
        self.writes = any(head.endswith(ends) for head in self.config.architectures or [])
        self.own_text = own_text and self.writes

    def prompt(self, problem):
        """The text that it reads: the problem, without an instruction for its answer's form, and the cue."""
        return prompt(problem, self.template, self.tokenizer, ask=False) + self.cue

    def fingerprint(self, kind):
        """sha256 (hex) over all that decides a row but the text: the name of its folder in the cache."""
        settings = (self.read, self.layers, self.positions) if kind == STATES else ()
        if kind == TEXTS or self.own_text:
            settings += (self.tokens,)
        if self.device.type != "cpu":  # another processor rounds in other ways
            settings += (self.device.type,)
        parts = [FORMAT, kind, settings, self.dtype, self.template, self.cue, self.revision, self.untrained]
        files = [path for pattern in META_FILES for path in self.folder.glob(pattern)]
        if self.revision is None:  # a commit names its weights; those of a folder are looked at
            files += weight_files(self.folder)
        parts += [f"{path.name} {file_digest(path, path.stat().st_mtime_ns)}" for path in sorted(files)]
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()

    def tokenize(self, texts, room=0):
        """Token ids of each text. Raises ValueError for one that is empty or longer than the window less
        `room`. A chat text holds its special tokens already; a plain one is given the tokenizer's own."""
        ids = self.tokenizer(list(texts), add_special_tokens=self.template == "plain")["input_ids"]
        for row in ids:
            if not 1 <= len(row) <= self.window - room:
                raise ValueError(f"a prompt has {len(row)} tokens for {self.name}, which has room for 1 to "
                                 f"{self.window - room}: use an easier --level or another expert")
        return ids

    def load(self, kind):
        auto = transformers.AutoModel if kind == STATES else transformers.AutoModelForCausalLM
        with loading("model", self.source):
            if self.untrained:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    model = auto.from_config(self.config, dtype=self.dtype, trust_remote_code=False)
            else:
                model, report = auto.from_pretrained(self.folder, dtype=self.dtype, use_safetensors=True,
                                                     trust_remote_code=False, output_loading_info=True)
                # what is missing was filled with random numbers: only BERT's pooler may be, it is not read
                missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
                if missing:
                    raise ValueError(f"{len(missing)} tensors are not in its files, among them {missing[0]}")
        return model.to(self.device).eval()

    @torch.no_grad()
    def states_of(self, model, ids, length):
        """States (B, K, width) of B lists of token ids, padded on the right to `length`."""
        lengths = torch.tensor([len(row) for row in ids])
        tokens = torch.stack([F.pad(torch.tensor(row), (0, length - len(row))) for row in ids])  # (B, T)
        real = torch.arange(length) < lengths[:, None]  # (B, T)
        out = model(input_ids=tokens.to(self.device), attention_mask=real.long().to(self.device),
                    output_hidden_states=any(layer < self.n_layers for layer in self.layers))
        states = []
        for layer in self.layers:
            inside = layer < self.n_layers
            hidden = (out.hidden_states[layer] if inside else out.last_hidden_state).cpu()  # (B, T, width)
            if self.read == "mean":
                states.append((hidden.float() * real[..., None]).sum(1) / lengths[:, None])
            elif self.read == "first":
                states.append(hidden[:, 0])
            else:
                for back in range(1, self.positions + 1):  # the last token first
                    states.append(hidden[torch.arange(len(ids)), (lengths - back).clamp(min=0)])
        states = torch.stack(states, dim=1).to(self.dtype)
        if not states.isfinite().all():
            raise ValueError(f"{self.name} gives states that are not finite: leave this expert out")
        return states

    @torch.no_grad()
    def texts_of(self, model, ids, length):
        """What follows B lists of token ids, greedily, until a line ends: ids (B, tokens), -1 behind the end.
        Padding stands on the left, so that all go on at one column."""
        stop = sorted({*stop_tokens(self.folder, model.config), *line_ends(self.tokenizer)})
        tokens = torch.stack([F.pad(torch.tensor(row), (length - len(row), 0), value=stop[0]) for row in ids])
        real = torch.stack([torch.arange(length) >= length - len(row) for row in ids]).long()
        greedy = transformers.GenerationConfig(max_new_tokens=self.tokens, do_sample=False, eos_token_id=stop)
        model.generation_config = greedy  # its own may hold penalties that this one does not mention
        wrote = model.generate(input_ids=tokens.to(self.device), attention_mask=real.to(self.device),
                               generation_config=greedy)[:, length:].cpu()
        ended = torch.isin(wrote, torch.tensor(stop)).cumsum(1) > 0
        return F.pad(wrote.masked_fill(ended, -1), (0, self.tokens - wrote.shape[1]), value=-1).int()

def read_states(experts, texts, progress=True):
    """H, what every expert makes of every problem: (n, N * K, D), D the widest expert's width.

    texts: N lists of n strings, texts[e][i] is problem i as expert e is to see it. Only what is not in the
    cache is read. Narrower states are padded with zeros; their dtype is kept, or float32 if they differ.
    """
    D = max(expert.width for expert in experts)
    columns = [F.pad(cached_rows(expert, STATES, prompts, progress), (0, D - expert.width))
               for expert, prompts in zip(experts, texts)]
    return torch.cat(columns, dim=1)

def write_texts(experts, texts, progress=True):
    """What every expert would say to every problem: N lists of n lines of text, "" of one that only reads."""
    columns = []
    for expert, prompts in zip(experts, texts):
        written = [""] * len(prompts)
        if expert.writes:
            rows = [row[row >= 0].tolist() for row in cached_rows(expert, TEXTS, prompts, progress)]
            written = expert.tokenizer.batch_decode(rows, skip_special_tokens=True)
        columns.append([" ".join(text.split()) for text in written])
    return columns

# -- The cache: <cache>/<kind>/<fingerprint>/<checksum>.safetensors, each with `keys` (n, 32) uint8, the
# sha256 of n texts, and `rows`, one a text. Processes may share it: at worst two read the same text.

def cached_rows(expert, kind, texts, progress=True):
    """The row of each text, stacked: from the cache or, where it is not there, from the model now."""
    folder = cache_dir() / kind / expert.fingerprint(kind)
    keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
    rows = stored_rows(folder)
    missing = {key: text for key, text in zip(keys, texts) if key not in rows}
    if missing:
        rows |= fill_cache(expert, kind, missing, folder, progress)
        torch.cuda.empty_cache()  # the weights' memory; without a GPU nothing happens
    return torch.stack([rows[key] for key in keys])

def stored_rows(folder):
    """{key: row} of all shards in a folder. A damaged shard is deleted, with a warning."""
    rows = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            shard = read_tensors(path)
            rows |= {key.tobytes(): row for key, row in zip(shard["keys"].numpy(), shard["rows"])}
        except (ValueError, OSError) as error:
            warnings.warn(f"{error}; its texts are read again", stacklevel=2)
            path.unlink(missing_ok=True)
    return rows

def fill_cache(expert, kind, missing, folder, progress):
    """{key: row} of the texts in `missing` ({key: text}), computed and stored, a shard every 20 seconds and
    at the end, even if that is an interruption. Only in here are the weights in memory."""
    compute = expert.states_of if kind == STATES else expert.texts_of
    room = expert.tokens if kind == TEXTS else 0
    keys, ids = list(missing), expert.tokenize(missing.values(), room)
    if kind == STATES and expert.own_text:  # a prompt that leaves no room for its own text: ValueError here
        own = cached_rows(expert, TEXTS, missing.values(), progress)
        ids = [row + written[written >= 0].tolist() for row, written in zip(ids, own)]
    model, rows, fresh, since = expert.load(kind), {}, {}, time.monotonic()
    verb = "reads" if kind == STATES else "writes"
    quiet = None if progress else True  # None: tqdm shows the bar on a terminal, not in a log file
    try:
        with tqdm(total=len(keys), desc=f"{expert.name} {verb}", unit="text", disable=quiet) as bar:
            for places, length, size in batches(ids, expert.window - room, expert.device.type):
                batch = [ids[i] for i in places]
                batch += batch[:1] * (size - len(batch))  # the shape that every batch of this length has
                fresh |= zip([keys[i] for i in places], compute(model, batch, length))
                bar.update(len(places))
                if time.monotonic() - since > SHARD_SECONDS:
                    write_shard(folder, fresh)
                    rows, fresh, since = rows | fresh, {}, time.monotonic()
    finally:
        if fresh:
            write_shard(folder, fresh)
    return rows | fresh

def batches(ids, window, device):
    """(places in `ids`, padded length, number of rows) of each batch: texts of about one length together,
    the longest first, so that what does not fit fails at once."""
    lengths = [min(math.ceil(len(row) / 16) * 16, window) for row in ids]
    for length in sorted(set(lengths), reverse=True):
        size = max(1, BATCH_TOKENS.get(device, BATCH_TOKENS["cpu"]) // length)
        places = [place for place, padded in enumerate(lengths) if padded == length]
        for start in range(0, len(places), size):
            yield places[start:start + size], length, size

def write_shard(folder, rows):
    """Add a shard of {key: row}. A full disk costs the cache, not the run."""
    keys = torch.tensor([list(key) for key in rows], dtype=torch.uint8)  # (n, 32)
    try:
        write_tensors(folder, {"keys": keys, "rows": torch.stack(list(rows.values()))})
    except OSError as error:
        warnings.warn(f"what was read cannot be kept in {folder} and will be read again: free space on the "
                      f"disk or set N_MUSKETEERS_CACHE ({error})", stacklevel=2)

# -- Files of ours: complete or not there, and damage shows, as a name ends with its content's checksum

def write_tensors(folder, tensors, prefix=""):
    """Write {name: tensor} as <prefix><checksum>.safetensors. Raises OSError."""
    data = save(tensors)
    write_atomic(folder / f"{prefix}{checksum(data)}.safetensors", data)

def read_tensors(path):
    """{name: tensor} of a file of `write_tensors`. Raises ValueError if it is damaged."""
    data = path.read_bytes()
    if not path.stem.endswith(checksum(data)):
        raise ValueError(f"{path} is damaged, its checksum does not match")
    return load(data)

@functools.cache
def file_digest(path, modified):
    """sha256 (hex) of a file as it was at that time: weights are gigabytes, and asked for at each split."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def checksum(data):
    return hashlib.sha256(data).hexdigest()[:16]

def write_atomic(path, data):
    """Write bytes so that the file is complete or not there, whatever happens meanwhile. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{uuid.uuid4().hex}.part")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)

def pick_device(name):
    there = [kind for kind in ("cuda", "mps", "cpu") if getattr(torch, kind).is_available()]
    kind, _, index = (there[0] if name == "auto" else name).partition(":")
    index = (os.environ.get("LOCAL_RANK", "") if kind == "cuda" else "") or index  # a GPU for each rank
    device = f"{kind}:{index}" if index else kind
    if kind not in there or (index and (not index.isdigit() or int(index) >= torch.cuda.device_count())):
        raise ValueError(f"there is no {device} here: use --device {' or '.join(there)}, and no more "
                         "ranks than GPUs")
    if kind == "cuda":
        torch.cuda.set_device(int(index or 0))
    return device

# -- A model's folder: found, checked, never trusted

def find_model(source):
    """(folder, commit): a local folder and None, or the snapshot of a hub model "org/name[@revision]"."""
    if os.path.isdir(source):
        return Path(source), None
    repo, _, revision = source.partition("@")
    try:
        folder = Path(snapshot_download(repo, revision=revision or None, ignore_patterns=["*/*"],
                                        allow_patterns=[*META_FILES, "model*.safetensors", "README.md"]))
    except Exception as error:  # the errors of the hub's client share no base class
        raise ValueError(f"{source} is no folder and cannot be had from the Hugging Face hub: name a folder, "
                         f"or check name, network and HF_HUB_OFFLINE ({brief(error)})") from error
    return folder, folder.name

def weight_files(folder):
    """The safetensors files of a model. Raises ValueError if there are none."""
    files = list(folder.glob("model.safetensors")) or sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no safetensors weights: name a model that has model.safetensors "
                         "(other formats can run code and are never loaded)")
    return files

def stop_tokens(folder, config):
    """Ids that end a text: generation_config.json's, else config.json's. ValueError if there are none."""
    config = config.get_text_config()  # of a vision-language model: its language model's config
    ids = getattr(config, "eos_token_id", None)
    if (folder / "generation_config.json").is_file():
        with loading("generation_config.json", folder):
            own = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
        ids = ids if own is None else own
    ids = ids if isinstance(ids, list) else [ids]
    if not ids or not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
        raise ValueError(f"{folder} names no eos_token_id in its vocabulary ({ids}), so no text ends: add it "
                         "to its config.json")
    return ids

def line_ends(tokenizer):
    """Ids of all tokens that end a line: as is, in byte-level vocabularies, in SentencePiece's."""
    marks = ("\n", "Ċ", "<0x0A>")
    return [i for token, i in tokenizer.get_vocab().items() if any(mark in token for mark in marks)]

@contextlib.contextmanager
def loading(part, source):
    """Turn whatever a library raises into one sentence."""
    try:
        yield
    except Exception as error:  # one mistake may come as an OSError, KeyError, RuntimeError, ...
        raise ValueError(f"the {part} of {source} cannot be loaded: fetch it again or name another model "
                         f"({brief(error)})") from error

def brief(error):
    return f"{type(error).__name__}: {error}".split("\n")[0]
