"""ONNX: a model that ONNX Runtime runs with integer products, of any batch and length."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch.fx import GraphModule
from torch.onnx._internal.exporter._errors import ConversionError, DispatchError
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.errors import ExportError
from fxquant.exports.check import Checked, unchecked
from fxquant.exports.folder import Exported, output_folder, write_config, write_export
from fxquant.exports.onnx_names import name_sites
from fxquant.exports.onnx_prepare import four_bit, prepared
from fxquant.exports.pt2_program import INPUTS, of_any_size
from fxquant.exports.sites import groups
from fxquant.exports.source import Source, converted, generation_of
from fxquant.exports.target import Refusal, Target, nearest_group
from fxquant.files.doors import Location, reason
from fxquant.formats.integer import IntegerGrid
from fxquant.formats.scales import FP32
from fxquant.frontends.patching import exclusive, exporting
from fxquant.ir.graph import Level, Site, is_op, tag
from fxquant.ir.legal_forms import OPS
from fxquant.pipeline.arguments import checked_call
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import SchemeLike
from fxquant.schemes.specs import SiteSpec
from fxquant.schemes.spelling import spell_site

NAME: Final = "onnx"
MODEL: Final = "model.onnx"
OPSET: Final = 21
_WRITERS: Final = ("onnx", "onnxscript")
_NO_ROW: Final = {
    OPS.store_kv.default: "a session has no cache whose storage it could show",
    OPS.store_kv_to.default: "a session has no cache whose storage it could show",
    OPS.grouped_gemm.default: "ONNX has no integer product with a scale a group",
    OPS.choose_scale.default: "ONNX Runtime's processors have no products of that format",
    OPS.quantize_to.default: "ONNX Runtime's processors have no products of that format",
    OPS.decode.default: "ONNX Runtime's processors have no products of that format",
}


def refusal(gm: GraphModule, site: Site, spec: SiteSpec) -> Refusal | None:
    """Why the format cannot hold ``spec`` at ``site``."""
    weight, activation = spec.weight, spec.activation
    assert weight is not None
    if not isinstance(weight.grid, IntegerGrid):
        return Refusal(f"codes of {weight.grid.name} are not written here", "w8")
    if site.role == "embeddings" and (ragged := nearest_group(weight, site.shape[1])) is not None:
        return ragged
    if site.role == "embeddings" and weight.scale != FP32:
        return Refusal(f"a table has no scales in {weight.scale.name}", "w8")
    if activation is None:
        return None
    if activation.tensor.granularity == "group":
        reason = "its integer product has no scale for each group of an input"
        return Refusal(reason, "w8a8-dynamic-token")
    if not isinstance(activation.tensor.grid, IntegerGrid):
        return Refusal(
            f"inputs of {activation.tensor.grid.name} are not written here", "w8a8-dynamic-token"
        )
    if groups(weight, site.shape[1]):
        reason = "its integer product has no scale for each group of a weight"
        rows = replace(weight, granularity="channel", group_size=None, scale=FP32)
        return Refusal(reason, spell_site(SiteSpec(rows, activation)))
    return None


def check_graph(gm: GraphModule) -> None:
    """Raise ExportError for an operator that has no form in ONNX."""
    for node in gm.graph.nodes:
        for op, why in _NO_ROW.items():
            if is_op(node, op):
                raise ExportError(
                    f"{NAME} cannot hold {tag(node).site or node.name}: {why}; nearest that it "
                    f"can: the scheme without what {tag(node).origin} does there"
                )


_CACHE: Final = "a session has no cache whose storage it could show"
TARGET: Final = Target(
    NAME,
    Level.INTEGER,
    needs_codes=False,
    check_site=refusal,
    check_graph=check_graph,
    never={"kv8": _CACHE, "kv4": _CACHE},
    packages=_WRITERS,
    streams=False,
)


@checked_call(path="directory", output="directory")
def onnx(
    source: Source,
    directory: Location,
    *,
    scheme: SchemeLike | None = None,
    calibration: Batches | None = None,
    tokenizer: Tokenizer | None = None,
    generation_config: GenerationConfig | None = None,
    check: bool = True,
) -> Exported:
    """Write model.onnx (opset 21, float32): input_ids and attention_mask int64 [batch, length] to
    logits [batch, length, vocab], and the model's config and tokenizer beside it.

    Args:
        source: a graph of level qdq or integer, or a float model (or its graph) with a ``scheme``
            ("fp" too), and ``calibration`` where that needs it.
        directory: a folder that is not there, is empty or holds an earlier export.
        check: run it in ONNX Runtime and compare logits and codes, before it is put in place.

    Products of two codes are MatMulInteger, exact on any processor; weights alone DequantizeLinear
    and MatMul, which the runtime makes one kernel. Sites' nodes carry their paths.

    Raises ExportError: the packages are missing, something that the format cannot hold, with the
    site (before any work where the scheme shows it); a folder that cannot be written; a check that
    fails. Nothing is written.
    """
    target = output_folder(directory)
    gm = converted(source, TARGET, scheme, calibration)
    return write_export(
        gm,
        target,
        NAME,
        write=lambda folder: _write(gm, folder),
        check=lambda folder: _check(gm, folder, check),
        extras=(tokenizer, generation_of(source, generation_config)),
    )


def _write(gm: GraphModule, folder: Path) -> None:
    import onnx as library

    from fxquant.exports.onnx_bfloat import computed_in_float32

    copy = prepared(gm)
    exported, program = _made(copy)
    name_sites(program.model, copy, exported.graph_module)
    computed_in_float32(program.model)
    _pack(program.model, four_bit(gm))
    program.save(folder / MODEL)
    library.checker.check_model(folder / MODEL)
    inferred = folder / "inferred.onnx"
    library.shape_inference.infer_shapes_path(folder / MODEL, inferred, strict_mode=True)
    inferred.unlink()
    write_config(gm, folder)


@exclusive  # torch's exporters replace functions of torch and levels of loggers for all threads
def _made(copy: GraphModule) -> tuple[torch.export.ExportedProgram, Any]:
    """The graph as torch exports it, and as ONNX."""
    with _quietly(), exporting():
        exported = of_any_size(copy)
        return exported, _translated(exported)


def _translated(exported: torch.export.ExportedProgram) -> Any:
    from fxquant.exports.onnx_table import TABLE

    try:
        return torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=TABLE,
            input_names=list(INPUTS),
            output_names=["logits"],
            optimize=True,
            verbose=False,
        )
    except ConversionError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DispatchError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise ExportError(
            f"{NAME}: torch has no form in ONNX for a part of the graph: {reason(cause)}; nearest "
            "that holds it: --to pt2"
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of packages that are not installed, and its optimizer of
    shapes."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _pack(model: Any, paths: set[str]) -> None:
    """Store the codes and zero points of ``paths`` as INT4."""
    import numpy as np
    import onnx_ir as ir

    for path in paths:
        for own in ("codes", "zero_point"):
            value = model.graph.initializers.get(f"{path}.{own}")
            if value is None:
                continue
            codes = value.const_value.numpy().astype(np.int8)
            packed = ir.tensor(codes.astype(ir.DataType.INT4.numpy()), name=value.name)
            value.const_value, value.dtype = packed, ir.DataType.INT4


def _check(gm: GraphModule, folder: Path, wanted: bool) -> Checked:
    said = unchecked(gm, wanted, ("onnxruntime",))
    if said is not None:
        return said
    from fxquant.exports.onnx_check import check

    return check(gm, folder / MODEL)
