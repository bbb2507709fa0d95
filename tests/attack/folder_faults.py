"""Seeded structured faults of a model's folder: its weights, files, index and config."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fxquant.frontends.weight_files import INDEX, WEIGHTS

Metadata = dict[str, str] | None
ELSEWHERE = "elsewhere.safetensors"


@dataclass
class Checkpoint:
    """What a folder holds; ``shards`` by file name, each with its tensors' names."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    generation: dict[str, Any]
    shards: dict[str, list[str]]
    index: dict[str, Any] | None = None
    metadata: Metadata = field(default_factory=lambda: {"format": "pt"})
    links: list[str] = field(default_factory=list)
    cut: int = 0

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        tensors = load_file(folder / WEIGHTS)
        config, generation = (
            json.loads((folder / f"{name}.json").read_text())
            for name in ("config", "generation_config")
        )
        return cls(tensors, config, generation, {WEIGHTS: list(tensors)})

    def write(self, folder: Path) -> None:
        """Over a folder that holds no weights."""
        (folder / "config.json").write_text(json.dumps(self.config))
        (folder / "generation_config.json").write_text(json.dumps(self.generation))
        for file, names in self.shards.items():
            target = folder / file
            if file in self.links:
                target = folder.parent / ELSEWHERE
                (folder / file).symlink_to(target)
            held = {n: self.tensors[n].contiguous() for n in names if n in self.tensors}
            save_file(held, target, self.metadata)
            content = target.read_bytes()
            target.write_bytes(content[: -self.cut] if self.cut > 0 else content + b"x" * -self.cut)
        if self.index is not None:
            (folder / INDEX).write_text(json.dumps(self.index))


Fault = Callable[[Checkpoint, random.Random], object]

DTYPES = (
    torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16,
    torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16,
)  # fmt: skip
SHAPES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda w: w.flatten(), lambda w: w[:-1], lambda w: w[..., :-1], lambda w: w[None],
    lambda w: w.mT if w.dim() > 1 else w[:, None], lambda w: w.flatten()[0], lambda w: w[:0],
    lambda w: torch.cat([w, w]), lambda w: w.reshape(-1, 2),
)  # fmt: skip
RENAMED: tuple[Callable[[str], str], ...] = (
    lambda n: n.removeprefix("model."), lambda n: n.removeprefix("transformer."),
    lambda n: f"model.{n}", lambda n: n.replace("weight", "gamma"),
    lambda n: n.replace("bias", "beta"), lambda n: n.upper(), lambda n: f"module.{n}",
)  # fmt: skip
BUFFERS = (
    "model.layers.0.self_attn.rotary_emb.inv_freq", "transformer.h.0.attn.bias",
    "transformer.h.0.attn.masked_bias", "model.rotary_emb.inv_freq", "model.decoder.version",
    "lm_head.bias", "final_logits_bias", "model.decoder.embed_positions.extra",
)  # fmt: skip
FORMATS: tuple[Metadata, ...] = (
    *({"format": name} for name in ("pt", "tf", "flax", "np", "mlx", "PT", "", "torch")),
    None, {"total_size": "3"}, {"format": "pt", "more": "x"},
)  # fmt: skip
COUNTS = (
    "num_hidden_layers", "n_layer", "vocab_size", "hidden_size", "n_embd", "n_positions",
    "ffn_dim", "intermediate_size", "num_attention_heads", "n_head", "head_dim",
    "num_key_value_heads", "max_position_embeddings", "word_embed_proj_dim", "n_inner",
)  # fmt: skip
FLAGS = (
    "tie_word_embeddings", "torchscript", "use_cache", "enable_bias", "do_layer_norm_before",
    "attention_bias", "mlp_bias", "scale_attn_weights", "return_dict", "output_attentions",
    "output_hidden_states", "_remove_final_layer_norm", "is_decoder", "add_cross_attention",
    "layer_norm_elementwise_affine", "reorder_and_upcast_attn", "is_encoder_decoder",
)  # fmt: skip
OTHERS: dict[str, tuple[Any, ...]] = {
    "dtype": ("float16", "bfloat16", "float64", "int8", "auto", None, "torch.float16", 3),
    "torch_dtype": ("float16", "float64", "half", None),
    "architectures": (None, [], ["OPTModel"], ["LlamaForCausalLM"], ["Nope"], "OPTForCausalLM", 3),
    "model_type": ("opt", "llama", "gpt2", "bert", "nope", None),
    "pad_token_id": (None, -1, 0, 127, 128, 10**6, "0", 1.5),
    "eos_token_id": (None, [1, 2], "x", 10**9), "bos_token_id": (None, -5, "x"),
    "_attn_implementation": ("eager", "sdpa", "nope", 3), "attn_implementation": ("eager", "sdpa"),
    "rope_theta": (10000, 5e5, "x", 0), "rope_scaling": (None, {}, {"rope_type": "linear",
        "factor": 2.0}, {"rope_type": "nope"}, {"type": "dynamic"}, 3, {"rope_type": "linear"}),
    "rms_norm_eps": (1e-5, 0, 1, "x"), "layer_norm_epsilon": (1e-3, None), "dropout": (0, 1, 2.0),
    "activation_function": ("gelu", "relu", None), "hidden_act": ("relu", "silu", None),
    "layerdrop": (0.5, 1), "layer_types": (["full_attention"], None, 3), "num_labels": (2, 0, -1),
    "id2label": ({}, {"0": "x"}, 3), "problem_type": ("regression", "nope"), "unknown": (1, "x"),
    "tokenizer_class": ("GPT2Tokenizer", 3), "transformers_version": ("0.0.0", 3, None),
    "pretraining_tp": (1, 2, 0), "sliding_window": (4, None), "init_std": (0.5, "x"),
    "initializer_range": (0, 1.0), "gradient_checkpointing": (True,), "use_return_dict": (True,),
    "name_or_path": ("elsewhere", "/etc"), "_name_or_path": ("elsewhere", 3),
    "quantization_config": (None, {}, {"quant_method": "bitsandbytes"}), "sub_configs": ({}, 3),
    "tie_encoder_decoder": (True, 1), "pruned_heads": ({}, {"0": [1]}, {"0": [0, 1, 2, 3]}, 3),
    "chunk_size_feed_forward": (0, 2), "tp_plan": (None, "auto", {}), "base_model_prefix": ("x",),
}  # fmt: skip
GENERATION: dict[str, tuple[Any, ...]] = {
    "temperature": (0.5, -1, "x", 0), "max_length": (3, "x", -1), "do_sample": (True, 3),
    "num_beams": (0, "x"), "cache_implementation": ("nope", "static", 3), "top_k": (-1, "x"),
    "bos_token_id": ("x", None), "eos_token_id": ([1, "x"], {}), "pad_token_id": (-1, 10**9),
    "transformers_version": (3, None), "_from_model_config": (3, False), "unknown": (1,),
    "custom_generate": ("x/y",), "watermarking_config": ({}, 3), "compile_config": (3, {}),
}  # fmt: skip


def _chosen(found: Checkpoint, rng: random.Random) -> str:
    return rng.choice(sorted(found.tensors) or [""])


def _put(found: Checkpoint, name: str, value: Tensor) -> None:
    found.tensors[name] = value.clone()
    if name not in found.shards[WEIGHTS]:
        found.shards[WEIGHTS].append(name)


def cast(found: Checkpoint, rng: random.Random) -> None:
    name, dtype = _chosen(found, rng), rng.choice(DTYPES)
    names = list(found.tensors) if rng.random() < 0.3 else [name]
    found.tensors.update((each, found.tensors[each].to(dtype)) for each in names)


def reshape(found: Checkpoint, rng: random.Random) -> None:
    name = _chosen(found, rng)
    found.tensors[name] = rng.choice(SHAPES)(found.tensors[name])


def drop(found: Checkpoint, rng: random.Random) -> None:
    del found.tensors[_chosen(found, rng)]


def add(found: Checkpoint, rng: random.Random) -> None:
    name = _chosen(found, rng)
    more = rng.choice(
        [f"{name}.x", f"model.{name}", name.replace(".0.", ".2."), name.replace(".1.", ".7."),
         name.removeprefix("model."), name.removeprefix("transformer."), *BUFFERS]
    )  # fmt: skip
    _put(found, more, found.tensors[name])


def rename(found: Checkpoint, rng: random.Random) -> None:
    change = rng.choice(RENAMED)
    names = list(found.tensors) if rng.random() < 0.6 else [_chosen(found, rng)]
    for name in names:
        found.tensors[change(name)] = found.tensors.pop(name)
    found.shards[WEIGHTS] = list(found.tensors)


def swap(found: Checkpoint, rng: random.Random) -> None:
    name = _chosen(found, rng)
    alike = [n for n, w in found.tensors.items() if w.shape == found.tensors[name].shape]
    other = rng.choice(alike)
    found.tensors[name], found.tensors[other] = found.tensors[other], found.tensors[name]


def fill(found: Checkpoint, rng: random.Random) -> None:
    name = _chosen(found, rng)
    if found.tensors[name].numel() and found.tensors[name].is_floating_point():
        changed = found.tensors[name].clone()
        changed.view(-1)[0] = rng.choice((float("nan"), float("inf"), 1e30, 0.0, -0.0))
        found.tensors[name] = changed


def head(found: Checkpoint, rng: random.Random) -> None:
    """A tied head's copy, another head, a head alone."""
    tables = [n for n in found.tensors if n.endswith(("embed_tokens.weight", "wte.weight"))]
    if not tables:
        return
    value = found.tensors[tables[0]]
    kind = rng.choice(("equal", "another", "alone", "shorter", "half", "no head"))
    if kind == "no head":
        found.tensors.pop("lm_head.weight", None)
        return
    made = {"another": value.float() + 1, "shorter": value.flatten()[1:], "half": value.half()}.get(
        kind, value
    )
    _put(found, "lm_head.weight", made)
    if kind == "alone":
        del found.tensors[tables[0]]


def layers(found: Checkpoint, rng: random.Random) -> None:
    name = "n_layer" if "n_layer" in found.config else "num_hidden_layers"
    found.config[name] = rng.choice((1, 3))


def shard(found: Checkpoint, rng: random.Random) -> None:
    """Files and index, with or without a fault in them."""
    names = sorted(found.tensors)
    count = rng.choice((1, 2, 3))
    files = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    if rng.random() < 0.15:
        files[0] = rng.choice((WEIGHTS, "weights.safetensors", "a b.safetensors", "x.bin"))
    found.shards = {file: names[n::count] for n, file in enumerate(files)}
    named = {name: file for file, held in found.shards.items() for name in held}
    found.index = {"metadata": {"total_size": 1}, "weight_map": named}
    if rng.random() < 0.75:
        rng.choice(INDEX_FAULTS)(found, rng)


def _named(found: Checkpoint) -> dict[str, Any]:
    assert found.index is not None
    named: dict[str, Any] = found.index["weight_map"]
    return named


def _move(found: Checkpoint, rng: random.Random) -> None:
    target = rng.choice(
        (*found.shards, "", ".", "..", "../elsewhere.safetensors", "/etc/hostname", 3, None,
         "none.safetensors", WEIGHTS, "config.json", "a/b.safetensors", "model-\u0661.safetensors")
    )  # fmt: skip
    _named(found)[rng.choice(sorted(found.tensors))] = target


def _twice(found: Checkpoint, rng: random.Random) -> None:
    held = rng.choice(list(found.shards.values()))
    held.append(rng.choice(sorted(found.tensors)))


def _link(found: Checkpoint, rng: random.Random) -> None:
    found.links.append(rng.choice(list(found.shards)))


def _whole_too(found: Checkpoint, rng: random.Random) -> None:
    """model.safetensors beside the shards: transformers takes it first."""
    found.shards[WEIGHTS] = sorted(found.tensors)[:: rng.choice((1, 2))]
    if rng.random() < 0.5:
        found.index = None


def _unread(found: Checkpoint, rng: random.Random) -> None:
    found.shards[f"model-{rng.choice((9, 'x'))}.safetensors"] = sorted(found.tensors)[:2]


def _lost(found: Checkpoint, rng: random.Random) -> None:
    del found.shards[rng.choice(list(found.shards))]
    found.shards = found.shards or {"none.safetensors": []}


INDEX_FAULTS: tuple[Fault, ...] = (
    lambda found, rng: found.index.pop("weight_map"),  # type: ignore[union-attr]
    lambda found, rng: found.index.pop("metadata"),  # type: ignore[union-attr]
    lambda found, rng: found.index.update(metadata=rng.choice(([], 3, None, {}, {"x": 1}))),  # type: ignore[union-attr]
    lambda found, rng: found.index.update(weight_map=rng.choice(([], 3, None, {}, "x"))),  # type: ignore[union-attr]
    lambda found, rng: _named(found).pop(rng.choice(sorted(_named(found)))),
    lambda found, rng: _named(found).update({"nothing": rng.choice(list(found.shards))}),
    lambda found, rng: setattr(found, "index", None),
    lambda found, rng: found.tensors.pop(_chosen(found, rng)),
    *(_move, _move, _twice, _link, _whole_too, _unread, _lost),
)


def length(found: Checkpoint, rng: random.Random) -> None:
    found.cut = rng.choice((1, 100, -1, -100))


def file_format(found: Checkpoint, rng: random.Random) -> None:
    found.metadata = rng.choice(FORMATS)


def count(found: Checkpoint, rng: random.Random) -> None:
    name = rng.choice(COUNTS)
    value = found.config.get(name)
    value = value if isinstance(value, int) else 4
    found.config[name] = rng.choice((value - 1, value + 1, 2 * value, 0, -1, None, str(value)))


def flag(found: Checkpoint, rng: random.Random) -> None:
    name = rng.choice(FLAGS)
    found.config[name] = rng.choice((True, False, 0, 1, 1, 0, 2, "true", None))


def other(found: Checkpoint, rng: random.Random) -> None:
    name = rng.choice(list(OTHERS))
    found.config[name] = copy.deepcopy(rng.choice(OTHERS[name]))


def forget(found: Checkpoint, rng: random.Random) -> None:
    found.config.pop(rng.choice(sorted(found.config) or [""]), None)


def generation(found: Checkpoint, rng: random.Random) -> None:
    name = rng.choice(list(GENERATION))
    found.generation[name] = rng.choice(GENERATION[name])


FAULTS: tuple[Fault, ...] = (
    *(cast, reshape, drop, add, rename, swap, fill, head, layers, shard, shard, shard, length),
    *(file_format, count, flag, flag, other, other, other, forget, generation),
)


def faulty(original: Checkpoint, rng: random.Random) -> tuple[Checkpoint, str]:
    """A copy with one to three faults, and their names."""
    found = copy.deepcopy(original)
    chosen = sorted(rng.sample(FAULTS, rng.choice((1, 1, 2, 3))), key=lambda each: each is shard)
    for fault in chosen:
        if found.tensors:
            fault(found, rng)
    return found, ", ".join(fault.__name__ for fault in chosen)
