"""GGUF: one file that llama.cpp loads, and transformers by ``gguf_file``."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.errors import ExportError, ModelError
from fxquant.exports.check import Checked, loading, unchecked, version
from fxquant.exports.folder import Exported, output_folder, write_export
from fxquant.exports.gguf_blocks import SIZE, blocks, bytes_of, kind_of, pairs, turned
from fxquant.exports.gguf_model import (
    add_generation,
    add_model,
    architecture,
    known_config,
    unknown,
    unread,
)
from fxquant.exports.gguf_tokenizer import Vocabulary, vocabulary
from fxquant.exports.half_scales import compared_in_half, in_half, scale_refusal, weight_specs
from fxquant.exports.module_refusals import repair_refusal
from fxquant.exports.modules import Modules
from fxquant.exports.sites import codes_at
from fxquant.exports.source import Source, converted, generation_of
from fxquant.exports.target import Refusal, Target
from fxquant.files.doors import Location
from fxquant.frontends.patching import exclusive
from fxquant.frontends.pretrained import read_gguf_model, read_gguf_tokenizer
from fxquant.ir.graph import Level, Site, info
from fxquant.pipeline.arguments import checked_call
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import SchemeLike
from fxquant.schemes.specs import SiteSpec, TensorSpec

NAME: Final = "gguf"
MODEL: Final = "model.gguf"
_TYPES: Final = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_TEXTS: Final = (
    "The quick brown fox jumps over the lazy dog.",
    " Leading space, two  spaces;\n\ttabs and\n\nlines.",
    "It's what they've said: we'll see — naïve café, 日本語, Ωμέγα.",
    "x = f(a_1[2]) + 3.14159; // 1234567",
)


def refusal(gm: GraphModule, site: Site, spec: SiteSpec) -> Refusal | None:
    """Why the format cannot hold ``spec`` at ``site``."""
    assert spec.weight is not None
    reason = unknown(gm)
    if reason:
        return Refusal(reason, "ONNX (--to onnx)")
    if site.shape[1] % SIZE:
        return Refusal(f"blocks of {SIZE} do not divide its {site.shape[1]} columns", "fp there")
    eight = spec.weight.grid.bits > 4
    asym = "-asym" if spec.weight.grid.has_zero_point and not eight else ""
    nearest = "w8-g32-fp16" if eight else f"w4-g32-fp16{asym}"
    if spec.activation is not None:
        return Refusal("llama.cpp codes inputs by a rule of its own", nearest)
    if not kind_of(spec.weight):
        return Refusal(f"its blocks are w8, w4 or w4-asym in groups of {SIZE} columns", nearest)
    return scale_refusal(spec.weight)


def check_graph(gm: GraphModule) -> None:
    """Raise ExportError for what no module of the model does, and for a model that is not known."""
    reason = unknown(gm)
    if reason:
        raise ExportError(f"{NAME} cannot hold {info(gm).model}: {reason}")
    Modules.of(gm).check(NAME)


def check_tokenizer(tokenizer: Tokenizer, source: Source) -> None:
    """Raise ExportError for a tokenizer that has no form beside the model of ``source``; a model
    that has none itself is refused for that."""
    config = known_config(source)
    if config:
        vocabulary(tokenizer, config["vocab_size"], config, generation_of(source, None))


TARGET: Final = Target(
    NAME,
    Level.QDQ,
    needs_codes=False,
    check_site=refusal,
    check_graph=check_graph,
    never={
        "attn8": "llama.cpp has no codes of attention's operands in a file",
        "kv8": "how a cache is stored is a setting of llama.cpp, not of a file",
        "kv4": "how a cache is stored is a setting of llama.cpp, not of a file",
        "split_outliers": "a tensor has one kind of block, not some columns in float",
    },
    packages=(NAME,),
    check_repairs=repair_refusal,
    check_tokenizer=check_tokenizer,
)


@checked_call(path="directory", output="directory")
def gguf(
    source: Source,
    directory: Location,
    *,
    scheme: SchemeLike | None = None,
    calibration: Batches | None = None,
    tokenizer: Tokenizer | None = None,
    generation_config: GenerationConfig | None = None,
    check: bool = True,
) -> Exported:
    """Write model.gguf: w8-g32 as Q8_0, w4-g32 as Q4_0, w4-g32-asym as Q4_1, the rest in the
    graph's dtype and norms in float32.

    Args:
        source: a graph of level qdq or integer, or a float model (or its graph) with a ``scheme``
            ("fp" too), and ``calibration`` where that needs it.
        directory: a folder that is not there, is empty or holds an earlier export.
        tokenizer: kept in the file, with its chat template; without one the file has no vocabulary.
        generation_config: in place of the model's; the file holds how a token is sampled and
            where it stops, and nothing else of it.
        check: load it with transformers and compare logits, before it is put in place.

    Scales are fp16 there. Those of a scheme such as ``w4-g32-fp16`` are so from the start, and the
    graph's figures are the file's; others go to the nearest, codes stay, and the result says what
    that does to the logits (``fxquant.exports.with_half_scales`` gives the graph of the file).

    Raises ExportError: gguf is not installed, something that the format cannot hold, with the site
    (before any work where scheme and tokenizer show it); a folder that cannot be written; a check
    that fails. Nothing is written.
    """
    target = output_folder(directory)
    config, generation = known_config(source), generation_of(source, generation_config)
    words = None
    if tokenizer is not None and config:
        words = vocabulary(tokenizer, config["vocab_size"], config, generation)
    runs = bool(config) and unchecked(source, check, ("accelerate",)) is None
    reason = unread(config) if runs else ""
    if reason:
        raise ExportError(
            f"{NAME}: transformers, which loads the file for its check, does not read all of it: "
            f"{reason}: --no-check (check=False) writes it for llama.cpp, which does"
        )
    gm = converted(source, TARGET, scheme, calibration)
    modules = Modules.of(gm)
    return write_export(
        gm,
        target,
        NAME,
        write=lambda folder: _write(modules, words, generation, folder / MODEL),
        check=lambda folder: _check(gm, tokenizer, folder / MODEL, check),
        extras=(),
    )


@dataclass(frozen=True)
class _Part:
    """A tensor of the file: its bytes are read when it is written."""

    name: str
    shape: tuple[int, ...]  # in elements, or in bytes of blocks
    kind: str
    read: Callable[[], Tensor]


def _write(
    modules: Modules, words: Vocabulary | None, generation: GenerationConfig | None, path: Path
) -> None:
    import gguf as library

    kinds = library.GGMLQuantizationType
    writer = library.GGUFWriter(path, architecture(modules.gm).name)
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    parts = list(_parts(modules))
    writer.add_file_type(_file_type(library.LlamaFileType, parts))
    add_model(writer, modules.model.config, modules.config, info(modules.gm).model)
    _add_tokenizer(writer, words)
    if generation is not None:
        add_generation(writer, generation)
    for part in parts:
        dtype = torch.empty(0, dtype=_stored_as(part)).numpy().dtype
        count = torch.Size(part.shape).numel() * dtype.itemsize
        writer.add_tensor_info(part.name, part.shape, dtype, count, raw_dtype=kinds[part.kind])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in parts:
            writer.write_tensor_data(part.read().contiguous().numpy().view(_Whole))
    finally:
        writer.close()


class _Whole(np.ndarray):
    """numpy's own ``tofile`` says nothing of what the system did not take at its end."""

    def tofile(self, file: Any, sep: str = "", format: str = "%s") -> None:
        file.write(self.data)


def _stored_as(part: _Part) -> torch.dtype:
    if part.kind in ("F32", "F16"):
        return torch.float32 if part.kind == "F32" else torch.float16
    return torch.uint8


def _file_type(names: Any, parts: list[_Part]) -> int:
    """What most of the elements are, as llama.cpp calls it."""
    sizes: dict[str, int] = {}
    for part in parts:
        if len(part.shape) > 1:
            sizes[part.kind] = sizes.get(part.kind, 0) + torch.Size(part.shape).numel()
    coded = {kind: size for kind, size in sizes.items() if kind.startswith("Q")} or sizes
    kind = max(coded, key=lambda each: coded[each])
    return int(names.ALL_F32 if kind == "F32" else names[f"MOSTLY_{kind}"])


def _parts(modules: Modules) -> Iterator[_Part]:
    import gguf as library

    gm, config = modules.gm, modules.model.config
    kind = architecture(gm)
    key = next(k for k, name in library.MODEL_ARCH_NAMES.items() if name == kind.name)
    names = library.get_tensor_name_map(key, config.num_hidden_layers)

    def heads(path: str) -> int:
        """How many rotated heads the rows of a tensor are, 0 where they stay as they are."""
        own = path.rpartition(".")[2]
        counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        return counts.get(own, 0) if kind.pairs else 0

    for full, read in modules.tensors():
        path, _, own = full.rpartition(".")
        shape = tuple(modules.keys[full].shape)
        dtype = torch.float32 if len(shape) == 1 else modules.keys[full].dtype
        called = names.get_name(path)
        if called is None:
            raise ExportError(f"{NAME} has no name for {full}: take another format (--to onnx)")
        bits = partial(_floats, read, dtype, heads(path))
        if _TYPES[dtype] == "BF16":
            shape = (*shape[:-1], 2 * shape[-1])
        yield _Part(f"{called}.{own}", shape, _TYPES[dtype], bits)
    for path, spec in weight_specs(gm).items():
        rows, length = modules.keys[f"{path}.weight"].shape
        shape = bytes_of(spec, (rows, length))
        coded = partial(_coded, gm, path, spec, length, heads(path))
        yield _Part(f"{names.get_name(path)}.weight", shape, kind_of(spec), coded)
        bias = getattr(gm.get_submodule(path), "bias", None)
        if bias is not None:
            value = partial(_floats, bias.detach, torch.float32, heads(path))
            yield _Part(f"{names.get_name(path)}.bias", tuple(bias.shape), "F32", value)


def _floats(read: Callable[[], Tensor], dtype: torch.dtype, heads: int) -> Tensor:
    value = read().cpu().to(dtype)
    value = pairs(value, heads) if heads else value
    return value.view(torch.uint8) if dtype == torch.bfloat16 else value


def _coded(gm: GraphModule, path: str, spec: TensorSpec, length: int, heads: int) -> Tensor:
    held = in_half(codes_at(gm, path, spec, length), path, minima=True)
    return blocks(turned(held, heads) if heads else held)


def _add_tokenizer(writer: Any, words: Vocabulary | None) -> None:
    if words is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(list(words.tokens))
    writer.add_token_types(list(words.types))
    if words.scores:
        writer.add_token_scores(list(words.scores))
    if words.merges:
        writer.add_token_merges(list(words.merges))
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unknown", writer.add_unk_token_id),
        ("padding", writer.add_pad_token_id),
    ):
        if name in words.special:
            add(words.special[name])
    for number, add in zip(
        words.ends, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False
    ):
        add(number)
    writer.add_add_bos_token(words.adds_bos)
    writer.add_add_eos_token(words.adds_eos)
    writer.add_add_space_prefix(words.adds_space)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)


@exclusive  # it replaces the process's stderr
def _check(gm: GraphModule, tokenizer: Tokenizer | None, path: Path, wanted: bool) -> Checked:
    said = unchecked(gm, wanted, ("accelerate",))
    if said is not None:
        return said
    name = f"{version('transformers')} with {version('gguf')}"
    with contextlib.redirect_stderr(io.StringIO()):  # its bars
        with loading(NAME, name):
            engine = read_gguf_model(path).eval()
        words = "" if tokenizer is None else _same_ids(tokenizer, path)
    found = compared_in_half(gm, engine, f"{name}, float32", minima=True)
    return replace(found, cause=f"{found.cause}; {words}") if words else found


def _same_ids(tokenizer: Tokenizer, path: Path) -> str:
    """How often transformers' reading of the file's tokenizer gives the ids of ``tokenizer``."""
    try:
        other = read_gguf_tokenizer(path)
        same = sum(
            tokenizer(text, add_special_tokens=False)["input_ids"]
            == other(text, add_special_tokens=False)["input_ids"]
            for text in _TEXTS
        )
    except ModelError as error:  # of the reader: the tokenizer is written as it is
        return f"transformers does not read its tokenizer ({error})"
    return f"transformers reads its tokenizer: the same ids for {same} of {len(_TEXTS)} texts"
