"""awq: a checkpoint as AutoAWQ lays it out for its GEMM kernels, which vLLM and SGLang load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from torch import Tensor
from torch.fx import GraphModule
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.exports.folder import Exported, output_folder, write_export
from fxquant.exports.modules import Modules, write_modules
from fxquant.exports.sites import CodedSite, coded_sites
from fxquant.exports.source import Source, converted, generation_of
from fxquant.exports.words import common_group_size, lifted, target_of_words, words
from fxquant.exports.words_check import check as checked_words
from fxquant.files.doors import Location
from fxquant.ir.graph import linear_sites
from fxquant.pipeline.arguments import checked_call
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import SchemeLike

NAME: Final = "awq"
# The column that each slot of a word holds, lowest first.
_ORDER: Final = [0, 2, 4, 6, 1, 3, 5, 7]


TARGET: Final = target_of_words(NAME, (4,), whole=False)


@checked_call(path="directory", output="directory")
def awq(
    source: Source,
    directory: Location,
    *,
    scheme: SchemeLike | None = None,
    calibration: Batches | None = None,
    tokenizer: Tokenizer | None = None,
    generation_config: GenerationConfig | None = None,
    check: bool = True,
) -> Exported:
    """Write a checkpoint whose linears are qweight, qzeros and scales of 4 bits.

    Args:
        source: a graph of level qdq or integer, or a float model (or its graph) with a ``scheme``
            (weights of 4 bits, however chosen), and ``calibration`` where that needs it.
        directory: a folder that is not there, is empty or holds an earlier export.
        check: unpack what was written, by another reading of the layout, and compare logits in
            transformers, before it is put in place. Engines compute in fp16 or bf16.

    Scales are fp16 there: ``w4-g128-fp16-asym`` has them so from the start, others go to the
    nearest. Linears that the scheme leaves in float stay so. Symmetric weights have zero point 8.

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
    own = {"zero_point": True, "q_group_size": said["group_size"], "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(own, indent=2) + "\n", "utf-8")


def quantization(gm: GraphModule) -> dict[str, Any]:
    """What config.json says of the codes."""
    coded = {each.path for each in coded_sites(gm)}
    left = [each.path for each, _ in linear_sites(gm) if each.path not in coded]
    return {
        "quant_method": NAME,
        "bits": 4,
        "group_size": common_group_size(gm),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": left,
    }


def site_tensors(site: CodedSite) -> dict[str, Tensor]:
    """qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales fp16 [G, N]: words run along N, and
    eight columns stand in them in an order of their own."""
    codes, zeros, scales = lifted(site)
    return {
        "qweight": words(_shuffled(codes.t()), 4),
        "qzeros": words(_shuffled(zeros.t()), 4),
        "scales": scales.t(),
    }


def _shuffled(numbers: Tensor) -> Tensor:
    eights: Tensor = numbers.unflatten(1, (-1, len(_ORDER)))
    return eights[..., _ORDER].flatten(1)
