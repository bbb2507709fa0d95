"""gptq: a checkpoint as AutoGPTQ and GPTQModel lay it out, which vLLM, SGLang and others load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.exports.folder import Exported, output_folder, write_export
from fxquant.exports.modules import Modules, write_modules
from fxquant.exports.sites import CodedSite, coded_sites, groups
from fxquant.exports.source import Source, converted, generation_of
from fxquant.exports.words import common_group_size, lifted, target_of_words, words
from fxquant.exports.words_check import check as checked_words
from fxquant.files.doors import Location
from fxquant.pipeline.arguments import checked_call
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import SchemeLike

NAME: Final = "gptq"


TARGET: Final = target_of_words(NAME, (2, 3, 4, 8), whole=True)


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
            transformers, before it is put in place. Engines compute in fp16 or bf16.

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
    write_modules(modules, folder, said, site_tensors)
    (folder / "quantize_config.json").write_text(json.dumps(said, indent=2) + "\n", "utf-8")


def quantization(gm: GraphModule) -> dict[str, Any]:
    """What config.json and quantize_config.json say of the codes."""
    site = next(coded_sites(gm))
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


def site_tensors(site: CodedSite) -> dict[str, Tensor]:
    """qweight int32 [K bits / 32, N], qzeros int32 [G, N bits / 32], scales fp16 [G, N], g_idx
    int32 [K]: words run along K in the first, along N in the second."""
    grid, length = site.weight_spec.grid, site.site.shape[1]
    codes, zeros, scales = lifted(site)
    less = 0 if grid.has_zero_point else 1
    index = torch.arange(length) // (groups(site.weight_spec, length) or length)
    return {
        "qweight": words(codes, grid.bits).t(),
        "qzeros": words(zeros.t() - less, grid.bits),
        "scales": scales.t(),
        "g_idx": index.to(torch.int32),
    }
