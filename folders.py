"""
Model folders and files: found, checked, never trusted.

A model is a folder of somebody else's: config and tokenizer as JSON, weights in safetensors. Nothing of it is
run, and nothing of the size that it claims is made before the claim has been looked at. Whatever is wrong is
a ValueError of one sentence. What we write ourselves lies in `cache_dir`, or is written by `write_whole`.
"""
import contextlib
import hashlib
import json
import math
import os
import time
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

META_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]  # config and tokenizer
KNOWN = {"llama": "Llama, SmolLM2", "qwen2": "Qwen2, Qwen2.5", "qwen3": "Qwen3"}
ROPES = ("default", "linear", "llama3", "yarn")  # the others change with the text's length: no cache could


def cache_dir():
    """Where what we keep lies: $N_MUSKETEERS_CACHE, else ~/.cache/n-musketeers (states in `states`)."""
    return Path(os.environ.get("N_MUSKETEERS_CACHE") or Path.home() / ".cache" / "n-musketeers")


def brief(error):
    return f"{type(error).__name__}: {error}".split("\n")[0]


def write_whole(path, data):
    """Write bytes so that the file is whole or not there, whatever happens meanwhile. Raises OSError."""
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


def sweep(folder, age=3600):
    """Remove what a killed `write_whole` left in a folder and those in it; a young one may be in use."""
    for path in [*Path(folder).glob("*.part"), *Path(folder).glob("*/*.part")]:
        with contextlib.suppress(OSError):              # another process was quicker
            if len(path.stem) == 32 and time.time() - path.stat().st_mtime >= age:
                path.unlink()


def find_model(source):
    """(folder, commit): a local folder and None, or the snapshot of a hub model `org/name[@revision]`."""
    if os.path.isdir(source):
        return Path(source), None
    from huggingface_hub import snapshot_download
    repo, _, revision = source.partition("@")
    try:
        folder = Path(snapshot_download(repo, revision=revision or None, ignore_patterns=["*/*"],
                                        allow_patterns=[*META_FILES, "model*.safetensors"]))
    except Exception as error:      # the errors of the hub's client share no base class
        raise ValueError(f"{source} is no folder and cannot be had from the Hugging Face hub: name a folder, "
                         f"or check name, network and HF_HUB_OFFLINE ({brief(error)})") from error
    return folder, folder.name


def read_json(path):
    """The object in a JSON file, {} if there is no such file. Raises ValueError if it holds anything else."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: fetch this model again ({brief(error)})") from error


def weight_files(folder):
    """The safetensors files transformers would load. Raises ValueError if there are none."""
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file():
        names = sorted(set(read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values()))
    if not names or any(Path(name).name != name for name in names):     # ../elsewhere is not this model's
        raise ValueError(f"{folder} has no safetensors weights: name a model that has model.safetensors "
                         "(other formats can run code and are never loaded)")
    return [folder / name for name in names]


def count_parameters(path):
    """Numbers stored in a safetensors file, from its header alone."""
    try:
        with safe_open(path, framework="pt") as tensors:
            return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or damaged: fetch it again ({brief(error)})") from error


def file_hash(path):
    """sha256 of a file, remembered by path, size and time of change, as reading gigabytes takes seconds."""
    stat, memo_file, memo = path.stat(), cache_dir() / "hashes.json", {}
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    with contextlib.suppress(ValueError, OSError):      # only a memo: unreadable or unwritable, we hash again
        memo = read_json(memo_file)
    if key not in memo:
        with open(path, "rb") as file:
            memo[key] = hashlib.file_digest(file, "sha256").hexdigest()
        with contextlib.suppress(OSError):
            write_whole(memo_file, json.dumps(memo, indent=0).encode())
    return memo[key]


@contextlib.contextmanager
def loading(what, source):
    """Silence transformers' bars and load reports, and turn whatever it raises into one sentence."""
    from transformers.utils import logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:      # one mistake may come as an OSError, KeyError, RuntimeError, ...
        raise ValueError(f"the {what} of {source} cannot be loaded: fetch it again or name another model "
                         f"({brief(error)})") from error
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


# -- policies, which are run by our own decoder
def read_config(folder):
    """The few facts of a config.json that the decoder needs, as a dict. Raises ValueError for what it cannot
    run, and for numbers that no model has, before anything of such a size is made."""
    try:
        raw = json.loads((Path(folder) / "config.json").read_text())
        kind = raw.get("model_type")
    except (OSError, ValueError, AttributeError) as e:
        raise ValueError(f"{folder} holds no readable config.json: name a Hugging Face model folder") from e
    if str(kind) not in KNOWN:
        known = "; ".join(f"{k} ({v})" for k, v in KNOWN.items())
        raise ValueError(f"{folder} is of architecture {kind!r}, but a policy is one of {known}")
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    with loading("config", folder):
        c = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        sizes = dict(head_dim=head_dim, window=c.max_position_embeddings) | {k: getattr(c, k) for k in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "vocab_size")}
        odd = {k: n for k, n in sizes.items() if not 1 <= n <= 2**20}  # what no model has a million of
        if odd or c.num_attention_heads % c.num_key_value_heads or not 0 < c.rms_norm_eps < 1:
            raise ValueError(f"{odd or sizes}, rms_norm_eps {c.rms_norm_eps}")
        rope = c.rope_parameters
        kind = rope.get("rope_type", "default")
        inv_freq, scale = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim), 1.0
        if kind in ROPES[1:]:
            inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](c, torch.device("cpu"))
        if not (inv_freq.isfinite().all() and math.isfinite(scale)):
            raise ValueError(f"{rope} gives angles that are not finite")
    if c.hidden_act != "silu" or "sliding_attention" in (getattr(c, "layer_types", None) or ()):
        raise ValueError(f"{folder} uses {c.hidden_act} or a sliding window: choose another policy")
    if kind not in ROPES:
        raise ValueError(f"{folder} has rope scaling {kind!r}, not {', '.join(ROPES)}: choose another policy")
    return sizes | dict(
        rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=c.tie_word_embeddings, model_type=c.model_type,
        inv_freq=inv_freq, rope_scale=scale, stop=stop_tokens(folder, c))


def tensor_shapes(c):
    """The part of a tensor's name before .weight or .bias -> the shape of the weight, by `read_config`."""
    d, ff, V, D = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["head_dim"]
    q, k = c["num_attention_heads"] * D, c["num_key_value_heads"] * D
    return dict(embed_tokens=(V, d), lm_head=(V, d), q_proj=(q, d), k_proj=(k, d), v_proj=(k, d),
                o_proj=(d, q), gate_proj=(ff, d), up_proj=(ff, d), down_proj=(d, ff), q_norm=(D,),
                k_norm=(D,), norm=(d,), input_layernorm=(d,), post_attention_layernorm=(d,))


def stop_tokens(folder, config):
    """Ids that end a completion: generation_config.json's, else config.json's. Raises ValueError when neither
    names one."""
    ids = read_json(Path(folder) / "generation_config.json").get("eos_token_id")
    ids = config.eos_token_id if ids is None else ids
    ids = ids if isinstance(ids, list) else [ids]
    if not ids or not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
        raise ValueError(f"{folder} names no eos_token_id in its vocabulary ({ids}), so no completion ends: "
                         "add it to its config.json")
    return ids
