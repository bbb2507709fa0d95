"""gptq: a checkpoint as AutoGPTQ and GPTQModel lay it out, which vLLM, SGLang and others load."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.exports.folder import Exported, output_folder, write_export
from fxquant.exports.modules import Modules, repair_refusal
from fxquant.exports.source import Source, converted, generation_of
from fxquant.exports.target import Refusal, Target
from fxquant.exports.words import (
    check_alike,
    check_graph,
    common_group_size,
    first_site,
    group_size,
    lifted,
    refusal,
    words,
    write,
)
from fxquant.exports.words_check import check as checked_words
from fxquant.files.doors import Location
from fxquant.ir.graph import Level, Site
from fxquant.numerics.weight_codes import WeightCodes
from fxquant.pipeline.arguments import checked_call
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import SchemeLike
from fxquant.schemes.specs import SiteSpec

NAME: Final = "gptq"
_BITS: Final = (2, 3, 4, 8)


def site_refusal(gm: GraphModule, site: Site, spec: SiteSpec) -> Refusal | None:
    """Why the format cannot hold ``spec`` at ``site``."""
    return refusal(gm, site, spec, _BITS)


_ROW: Final = "a linear has codes or floats there, not some columns of each"
_ATTENTION: Final = "it codes weights of linears, and nothing of attention"
TARGET: Final = Target(
    NAME,
    Level.QDQ,
    needs_codes=True,
    check_site=site_refusal,
    check_graph=partial(check_graph, NAME),
    never={"attn8": _ATTENTION, "kv8": _ATTENTION, "kv4": _ATTENTION, "split_outliers": _ROW},
    check_specs=partial(check_alike, NAME, whole=True),
    check_repairs=repair_refusal,
)


@checked_call(path="directory", output="directory")
def gptq(
    source: Source,
    directory: Location,
    *,
    scheme: SchemeLike | None = None,
    calibration: Batches | None = None,
    tokenizer: Tokenizer | None = None,
    generation_config: GenerationConfig | None = None,
    check: bool = True,
) -> Exported:
    """Write a checkpoint whose linears are qweight, qzeros, scales and g_idx.

    Args:
        source: a graph of level qdq or integer, or a float model (or its graph) with a ``scheme``
            (weights of 2, 3, 4 or 8 bits, however chosen), and ``calibration`` where that needs it.
        directory: a folder that is not there, is empty or holds an earlier export.
        check: unpack what was written, by another reading of the layout, and compare logits in
            transformers, before it is put in place. The engines themselves need CUDA.

    Scales are fp16 there: ``w4-g128-fp16`` has them so from the start, others go to the nearest.
    Symmetric weights are format "gptq", which keeps a zero point less one; asymmetric ones
    "gptq_v2", which keeps it as it is, since 0 less one has no place in a word.

    Raises ExportError: something that the format cannot hold, with the site (before any work where
    the scheme shows it); a folder that cannot be written; a check that fails. Nothing is written.
    """
    target = output_folder(directory)
    gm = converted(source, TARGET, scheme, calibration)
    modules = Modules.of(gm)
    return write_export(
        gm,
        target,
        NAME,
        write=lambda folder: _write(modules, folder),
        check=lambda folder: checked_words(modules, folder, NAME, check),
        extras=(tokenizer, generation_of(source, generation_config)),
    )


def _write(modules: Modules, folder: Path) -> None:
    said = quantization(modules.gm)
    write(modules, folder, said, site_tensors)
    (folder / "quantize_config.json").write_text(json.dumps(said, indent=2) + "\n", "utf-8")


def quantization(gm: GraphModule) -> dict[str, Any]:
    """What config.json and quantize_config.json say of the codes."""
    site = first_site(gm)
    symmetric = not site.weight_spec.grid.has_zero_point
    return {
        "quant_method": NAME,
        "bits": site.weight_spec.grid.bits,
        "group_size": common_group_size(gm),
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": NAME if symmetric else "gptq_v2",
    }


def site_tensors(held: WeightCodes) -> dict[str, Tensor]:
    """qweight int32 [K bits / 32, N], qzeros int32 [G, N bits / 32], scales fp16 [G, N], g_idx
    int32 [K]: words run along K in the first, along N in the second."""
    bits, length = held.spec.grid.bits, held.codes.shape[1]
    codes, zeros, scales = lifted(held)
    less = 0 if held.spec.grid.has_zero_point else 1
    size = group_size(held.spec, length)
    groups = torch.arange(length) // (size if size > 0 else length)
    return {
        "qweight": words(codes, bits).t(),
        "qzeros": words(zeros.t() - less, bits),
        "scales": scales.t(),
        "g_idx": groups.to(torch.int32),
    }
