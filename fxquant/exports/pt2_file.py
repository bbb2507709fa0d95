"""pt2: a torch.export program that any process with torch runs, without fxquant or transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch.fx import GraphModule
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.exports.folder import Exported, output_folder, write_config, write_export
from fxquant.exports.pt2_program import elsewhere, exported, on_cpu, quietly
from fxquant.exports.source import Source, converted, generation_of
from fxquant.exports.target import Refusal, Target
from fxquant.files.doors import Location
from fxquant.files.native_writers import held_errors
from fxquant.ir.graph import Level, Site
from fxquant.pipeline.arguments import checked_call
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import SchemeLike
from fxquant.schemes.specs import SiteSpec

NAME: Final = "pt2"
MODEL: Final = "model.pt2"


def holds(gm: GraphModule, site: Site, spec: SiteSpec) -> Refusal | None:
    """Nothing is refused: the program is the graph."""
    return None


def all_of(gm: GraphModule) -> None:
    """Nothing is refused: the program is the graph."""


TARGET: Final = Target(
    NAME,
    Level.INTEGER,
    needs_codes=False,
    check_site=holds,
    check_graph=all_of,
    never={},
    streams=False,
)


@checked_call(path="directory", output="directory")
def pt2(
    source: Source,
    directory: Location,
    *,
    scheme: SchemeLike | None = None,
    calibration: Batches | None = None,
    tokenizer: Tokenizer | None = None,
    generation_config: GenerationConfig | None = None,
    check: bool = True,
) -> Exported:
    """Write model.pt2, a program of aten operators: input_ids and attention_mask int64 [batch,
    length], of any size, to logits [batch, length, vocab]; the config and tokenizer beside it.

        program = torch.export.load("model.pt2").module()
        logits = program(input_ids=ids, attention_mask=mask)

    Args:
        source: a graph of level qdq or integer, or a float model (or its graph) with a ``scheme``
            ("fp" too), and ``calibration`` where that needs it.
        directory: a folder that is not there, is empty or holds an earlier export.
        check: run it in a fresh process, which knows torch alone, and compare logits, before it is
            put in place.

    Codes and operators are the graph's, in its dtype, on the CPU. So are the logits, bit for bit
    but where torch sums floats in another order, which the check says.

    Raises ExportError: a streamed graph; a folder that cannot be written; a check that fails.
    Nothing is written.
    """
    target = output_folder(directory)
    gm = converted(source, TARGET, scheme, calibration)
    return write_export(
        gm,
        target,
        NAME,
        write=lambda folder: _write(gm, folder),
        check=lambda folder: elsewhere(
            NAME, folder / MODEL, gm, check, "", "float sums in another order"
        ),
        extras=(tokenizer, generation_of(source, generation_config)),
    )


def _write(gm: GraphModule, folder: Path) -> None:
    program = exported(on_cpu(gm))
    with quietly(), held_errors(folder / MODEL) as file:
        torch.export.save(program, file)
    write_config(gm, folder)
