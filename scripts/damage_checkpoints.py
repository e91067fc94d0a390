"""Damages the files of tiny checkpoints in every way that a bad disk, a broken download or a wrong converter does, and tries to
load each: it must load, or be refused in a sentence, and never take much memory.

    python scripts/damage_checkpoints.py [--count 1500] [--seed 0] [--out damage.json]
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
from tokenizers import pre_tokenizers

from stepgraph.engine.model_defaults import sampling_defaults_of
from stepgraph.errors import StepgraphError
from stepgraph.models import load_model, resolve
from stepgraph.models.source import ModelSource

INNER_NAMES = re.compile(
    r"_PassThrough|_Passed|\bKeyError|\bNoneType\b|Error\(|Error:|object has no attribute|not subscriptable|unsupported operand|"
    r"positional argument|site-packages|stepgraph[/.]\w+[/.]\w+|<class|Traceback|trust_remote_code"
)
"""What no sentence about a model may show: names and paths of code, and what Python says of a mistake in it."""
NUMBERS = (-1, 0, 1, 3, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 10**12, 2**63 - 1, 2**64 - 1)
VALUES = (
    *NUMBERS,
    None,
    True,
    "",
    "64",
    "\ud800",
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    1e300,
    [],
    [0],
    ["a"],
    {},
    {"a": []},
)
SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FIELDS = SIZES | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": [2],
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "dtype": "float32",
}
OTHERS = {
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64},
    "sliding_window": 16,
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "num_nextn_predict_layers": 1,
}
GENERATION = {
    "eos_token_id": [2, 3],
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
}


class Outcome(NamedTuple):
    """What came of one damaged checkpoint."""

    kind: str  # "loaded", "refused" or "failed"
    about: str


def write_folder(folder: Path) -> None:
    """A tiny Llama as transformers saves it, tokenizer included."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FIELDS))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    save_file(tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    names = dict.fromkeys(tensors(), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}"
    )
    fast.save_pretrained(folder)


def tensors() -> dict[str, torch.Tensor]:
    """Weights of the tiny Llama."""
    E, M, V, D = (FIELDS[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    layer = {"self_attn.q_proj": (4 * D, E), "self_attn.k_proj": (2 * D, E), "self_attn.v_proj": (2 * D, E)}
    layer |= {"self_attn.o_proj": (E, 4 * D), "mlp.gate_proj": (M, E), "mlp.up_proj": (M, E), "mlp.down_proj": (E, M)}
    layer |= {"input_layernorm": (E,), "post_attention_layernorm": (E,)}
    shapes = {"model.embed_tokens": (V, E), "model.norm": (E,)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(0)
    return {f"{name}.weight": torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path) -> None:
    """The same Llama as llama.cpp's converter writes it, some of its matrices in blocks."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(FIELDS["max_position_embeddings"])
    writer.add_embedding_length(FIELDS["hidden_size"])
    writer.add_block_count(2)
    writer.add_feed_forward_length(FIELDS["intermediate_size"])
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_scaling_factor(2.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, "ab", "<|im_end|>"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * len(alphabet), 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}<|im_end|>")
    for name, values in tensors().items():
        stem = name.removesuffix(".weight")
        layer, part = (stem.split(".", 3)[2:]) if ".layers." in stem else (None, stem)
        new = f"blk.{layer}.{GGUF_NAMES[part]}.weight" if layer is not None else f"{GGUF_NAMES[part]}.weight"
        kind = (
            gguf.GGMLQuantizationType.Q8_0
            if "ffn_gate" in new or "token_embd" in new
            else gguf.GGMLQuantizationType.F32
        )
        writer.add_tensor(new, gguf.quants.quantize(values.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def damage_bytes(rng: random.Random, content: bytes, header: int) -> bytes:
    """A truncation, bits that flip, a length or number that is overwritten, text that is no UTF-8, or parts out of place. Most of
    it in the first `header` bytes, where it matters."""
    data = bytearray(content)
    place = rng.randrange(min(len(data), header) if rng.random() < 0.9 else len(data))
    kind = rng.randrange(7)
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(min(len(data), header))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[place : place + 8] = struct.pack("<Q", rng.choice(NUMBERS) % 2**64)
    elif kind == 3:
        data[place : place + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
    elif kind == 4:
        data[place : place + 2] = rng.choice((b"\xff\xfe", b"\xc3\x28", b"\x00\x00", b"\xed\xa0"))
    elif kind == 5:
        del data[place : place + rng.choice((1, 4, 8, 100))]
    else:
        data[place:place] = data[: rng.choice((1, 8, 64))]
    return bytes(data)


def damage_gguf(rng: random.Random, content: bytes) -> bytes:
    """As `damage_bytes`, or in a length, count or number of the metadata, found by what stands before it."""
    if rng.random() < 0.5:
        return damage_bytes(rng, content, header=9000)
    keys = [
        b"block_count",
        b"embedding_length",
        b"context_length",
        b"head_count",
        b"head_count_kv",
        b"key_length",
        b"freq_base",
    ]
    keys += [b"scaling.factor", b"rms_epsilon", b"ggml.tokens", b"ggml.merges", b"token_type", b"eos_token_id"]
    keys += [b"feed_forward_length", b"chat_template", b"ggml.model", b"ggml.pre"]
    keys += [b"token_embd.weight", b"attn_q.weight", b"output_norm.weight"]
    key = rng.choice(keys)
    place = content.index(key) + len(key)
    data = bytearray(content)
    at = place + rng.choice((0, 4, 4, 8, 12, 16))
    size, letter = rng.choice(((4, "<I"), (8, "<Q")))
    data[at : at + size] = struct.pack(letter, rng.choice(NUMBERS) % 2 ** (8 * size))
    return bytes(data)


def damage_json(rng: random.Random, fields: dict[str, Any], others: dict[str, Any]) -> bytes:
    """A value of another kind, at any depth, more than one sometimes; a field too many or too few; or damaged bytes."""
    if rng.random() < 0.2:
        return damage_bytes(rng, json.dumps(fields).encode(), header=2000)
    if rng.random() < 0.05:
        return rng.choice((b"", b"[]", b"3", b'"a"', b"null", b"[" * 100_000, b'{"a":' * 50_000, b"\xff{}"))
    changed = json.loads(json.dumps(fields))
    if others and rng.random() < 0.3:
        name = rng.choice(list(others))
        changed[name] = others[name]
    for _ in range(rng.choice((1, 1, 2))):
        inside = changed
        while True:
            name = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
            if not (isinstance(inside[name], dict | list) and inside[name] and rng.random() < 0.6):
                break
            inside = inside[name]
        if isinstance(inside, dict) and rng.random() < 0.15:
            del inside[name]
        else:
            inside[name] = rng.choice(VALUES)
        if not inside:
            break
    return json.dumps(changed).encode("utf-8", "surrogatepass")


def read_all(source: ModelSource) -> None:
    """What a start does with a checkpoint: config, defaults, tokenizer, weights, a chat."""
    sampling_defaults_of(source)
    tokenizer = source.tokenizer_if_any()
    length = min(source.config.max_position_embeddings, 256)
    load_model(source, dtype=torch.float32, device=torch.device("cpu"), max_model_len=length, packed=True)
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("a b"))


def try_one(path: Path) -> Outcome:
    """Load a checkpoint."""
    try:
        read_all(resolve(str(path)))
    except StepgraphError as error:
        sentence = str(error)
        told = sentence and len(sentence) < 2000 and not INNER_NAMES.search(sentence.replace(str(path), ""))
        return Outcome("refused" if told else "failed", sentence[:2000])
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return Outcome("loaded", "")


def damaged(folder: Path, rng: random.Random) -> Iterator[tuple[str, Path]]:
    """For ever: the name of the file that is damaged, and the path of the checkpoint that holds it."""
    intact, copy = folder / "intact", folder / "copy"
    write_folder(intact)
    write_gguf(folder / "intact.gguf")
    whole = (folder / "intact.gguf").read_bytes()
    stored = (intact / "model.safetensors").read_bytes()
    header = 8 + struct.unpack_from("<Q", stored)[0]
    files: dict[str, Callable[[], bytes]] = {
        "model.gguf": lambda: damage_gguf(rng, whole),
        "model.safetensors": lambda: damage_bytes(rng, stored, header),
        "config.json": lambda: damage_json(rng, FIELDS, OTHERS),
    }
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"):
        fields = json.loads((intact / name).read_text())
        files[name] = lambda fields=fields: damage_json(rng, fields, {})  # type: ignore[misc]
    weights = {"model.gguf": 5, "model.safetensors": 3, "config.json": 4, "tokenizer.json": 1}
    while True:
        for name, create in files.items():
            for _ in range(weights.get(name, 1)):
                if name == "model.gguf":
                    (folder / name).write_bytes(create())
                    yield name, folder / name
                    continue
                shutil.copytree(intact, copy, dirs_exist_ok=True)
                if name == "model.safetensors":
                    (copy / "model.safetensors.index.json").unlink()
                (copy / name).write_bytes(create())
                yield name, copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1500, help="damaged files")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    parser.add_argument("--out", type=Path, help="JSON file for what failed")
    parser.add_argument("--keep", type=Path, help="folder for the checkpoints that failed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    rng, begun = random.Random(options.seed), time.monotonic()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    failures: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        source = damaged(Path(folder), rng)
        for number in range(options.count):
            name, path = next(source)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            outcome = try_one(path)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
            if grown > 512:
                outcome = Outcome("failed", f"took {grown} MiB more than any before; {outcome}")
            counts[name, outcome.kind] += 1
            if outcome.kind == "failed":
                failures.append({"file": name, "number": str(number), "about": outcome.about})
                print(f"{number}, {name}: {outcome.about}", file=sys.stderr, flush=True)
                if options.keep:
                    (shutil.copytree if path.is_dir() else shutil.copyfile)(
                        path, options.keep / f"{number}-{path.name}"
                    )
    for (name, kind), count in sorted(counts.items()):
        print(f"{name:32} {kind:10} {count:5}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"{options.count} files in {time.monotonic() - begun:.0f} s, {len(failures)} failed, peak {peak} MiB of memory"
    )
    if options.out:
        options.out.write_text(json.dumps(failures, indent=1))
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
