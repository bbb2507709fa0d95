"""What explain and plan are given, checked and brought into one form before any work."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxquant.analysis.sites import simulated_spec
from fxquant.errors import CalibrationError, DataError, SchemeError
from fxquant.ir.calibrated_rows import seen_rows
from fxquant.ir.calibration import Spans, calibration_words
from fxquant.ir.counted import part_of
from fxquant.ir.graph import GraphInfo, device_of, info
from fxquant.ir.streamed import check_present
from fxquant.pipeline.recording import DrawnBatches, Recording, record_of
from fxquant.pipeline.repair import Repair
from fxquant.recipes.conversion import convert
from fxquant.recipes.repairs import REPAIRS
from fxquant.run.batches import Batch, Batches, check_ids, check_mask, model_inputs
from fxquant.run.encodings import batches_of, encoding
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import FLOAT

Windows = Tensor | Iterable[Batch]


def as_windows(data: Windows | None, graph: GraphModule, what: str = "data") -> tuple[Tensor, ...]:
    """Windows int64 [b, L] on the graph's device: a tensor [N, L] becomes N of them, and whatever
    is taken as calibration is taken here, without padding.

    Raises DataError, about the argument ``what``, for anything else, for ids outside the
    vocabulary, and when nothing is there.
    """
    check_present(graph)
    return tuple(ids.to(device_of(graph)) for ids in token_windows(data, info(graph), what))


def token_windows(data: Windows | None, facts: GraphInfo, what: str = "data") -> tuple[Tensor, ...]:
    """As ``as_windows``, on the CPU, for a graph of which there are facts only."""
    if data is None:
        raise DataError(
            f"no windows to measure the loss on: pass {what}=, a LongTensor [N, L] or a list of "
            "them"
        )
    given = enumerate(batches_of(data, what, DataError))
    where = "window" if what == "data" else f"{what}= window"
    parts = tuple(_window(part, f"{where} {index}") for index, part in given)
    if not parts:
        raise DataError(f"{what}= holds no window")
    for index, ids in enumerate(parts):
        check_ids(ids, facts, f"{where} {index}")
    return parts


def _window(part: Batch, where: str) -> Tensor:
    given = encoding(part, where, DataError)
    ids, mask = given["input_ids"], given.get("attention_mask")
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise DataError(f"{where}: expected integers [b, L], got {ids.dtype} {list(ids.shape)}")
    if mask is not None:
        check_mask(mask, ids, where, DataError)
    if mask is not None and not bool(mask.all()):
        raise DataError(f"{where} is padded: the loss is measured on windows without padding")
    if ids.shape[0] < 1 or ids.shape[1] < 2:
        raise DataError(f"{where}: {list(ids.shape)} holds no token to predict")
    return ids


def as_batches(calibration: Batches | None, graph: GraphModule) -> list[dict[str, Tensor]] | None:
    """Checked calibration batches that can be read many times, on the graph's device."""
    if calibration is None:
        return None
    facts, device = info(graph), device_of(graph)
    if isinstance(calibration, Recording):
        calibration = calibration.batches  # a check is no reading
    given = enumerate(batches_of(calibration))
    batches = [model_inputs(batch, facts, index) for index, batch in given]
    if not batches:
        raise CalibrationError("calibration is empty (was a one-shot iterator used up?)")
    return [{name: value.to(device) for name, value in each.items()} for each in batches]


def watched(
    calibration: Batches | None, batches: Sequence[dict[str, Tensor]] | None
) -> Iterable[dict[str, Tensor]] | None:
    """The checked batches, through the Recording that was given as calibration, if it was one."""
    if not isinstance(calibration, Recording) or batches is None:
        return batches
    calibration.checked(batches)
    return cast("Iterable[dict[str, Tensor]]", calibration)


def check_unseen(
    graph: GraphModule,
    windows: Sequence[Tensor],
    data: Windows | None,
    batches: Sequence[dict[str, Tensor]] | None,
    calibration: Batches | None,
    allowed: bool,
) -> list[str]:
    """Raise DataError where windows hold what the graph was or will be calibrated on.

    ``windows`` and ``batches``: of ``data`` and ``calibration``, checked. Returns what has to be
    said of it where it is ``allowed``. Without ``data`` nothing is claimed to be unseen.
    """
    if data is None:
        return []
    known = info(graph).calibration or ()
    if batches:
        read = calibration if isinstance(calibration, DrawnBatches) else batches
        known = (*known, record_of(read, graph, "calibrate"))
    rows = tuple(row for ids in windows for row in ids.cpu())
    places = data.origin.spans if isinstance(data, DrawnBatches) else Spans()
    seen = seen_rows(known, rows, places)
    if not seen:
        return []
    found = f"data=: {part_of(len(seen), len(rows), 'window')} what is calibrated on"
    if not allowed:
        raise DataError(
            f"{found}, {calibration_words(known)}: their loss would not be of unseen text; cut one "
            "fxquant.windows and take its .batches to calibrate and its .evaluation as data, or "
            "pass allow_overlap=True"
        )
    return [f"{found}: their loss is not of unseen text"]


def unpadded(batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The batches' tokens, as windows to measure on; DataError where a batch is padded."""
    for index, batch in enumerate(batches):
        if "attention_mask" in batch and not bool(batch["attention_mask"].all()):
            raise DataError(
                f"calibration batch {index} is padded, and the loss is measured on windows without "
                "padding: pass data="
            )
    return [batch["input_ids"] for batch in batches]


def baseline_notes(repairs: Iterable[Repair]) -> list[str]:
    """What of a scheme is not explained, since the float graph that it starts from has it."""
    return [
        f"{repair.name} changes the float graph itself: its error is in the float loss, not in "
        "Δloss"
        for repair in repairs
        if repair.effect == "lossy"
    ]


def restricted(scheme: Scheme, pattern: str | None, graph: GraphModule) -> Scheme:
    """``scheme`` at the sites that the glob ``pattern`` covers, float elsewhere.

    Raises SchemeError when it quantizes nothing, or the pattern covers no site that it quantizes.
    """
    check_quantizes(scheme)
    if pattern is None:
        return scheme
    named = info(named_graph(graph, scheme)).sites
    covered = [site for site in named if fnmatch.fnmatchcase(site.path, pattern)]
    specs = tuple((site.path, simulated_spec(scheme, site)) for site in covered)
    kept = tuple((path, spec) for path, spec in specs if spec != FLOAT)
    if not kept:
        raise SchemeError(
            f"sites={pattern!r} covers no site that {scheme} quantizes; the model's sites are "
            f"{', '.join(site.path for site in named[:8])}{', ...' if len(named) > 8 else ''}"
        )
    return replace(scheme, spec=FLOAT, overrides=kept)


def check_quantizes(scheme: Scheme) -> None:
    """Raise SchemeError for a scheme that quantizes nothing."""
    if scheme.fp32_gemm or not any(spec.weight for spec in scheme.specs):
        raise SchemeError(f"scheme {scheme} quantizes nothing: there is no error to explain")


def named_graph(graph: GraphModule, scheme: Scheme) -> GraphModule:
    """The float graph with the scheme's sites named, products of activations too."""
    makers = tuple(repair for repair in scheme.repairs if REPAIRS[repair[0]].makes_sites)
    return convert(graph, replace(scheme, repairs=makers), level="float")


def observed_graph(
    graph: GraphModule,
    scheme: Scheme,
    calibration: Batches | None,
    progress: bool,
) -> GraphModule:
    """The float graph with the scheme's repairs applied and its observers calibrated."""
    check_quantizes(scheme)
    return convert(graph, scheme, calibration=calibration, level="observed", progress=progress)
