"""What ONNX Runtime computes from a model beside its graph: logits, sites' outputs, inputs' codes.

Two engines sum floats in another order, so that an input at the edge of two codes may take either;
from there on logits differ by more than rounding. So the graph is followed site by site: each is
given what the engine had before it, its codes and what it computes from the engine's codes are
compared, and the graph goes on with the engine's. What is left is the rounding of one site, and
codes that differ are counted.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.errors import ExportError
from fxquant.exports.check import ALLOWED, Checked, in_float32, random_tokens, version
from fxquant.exports.onnx_names import ZERO_POINT, kind_of, output_names, value_names
from fxquant.exports.onnx_prepare import SHIFT, prepared
from fxquant.exports.pt2_program import INPUTS
from fxquant.exports.sites import coded_sites
from fxquant.files.doors import door
from fxquant.ir.counted import counted
from fxquant.ir.graph import float_dtype, is_op, site_outputs
from fxquant.ir.legal_forms import OPS
from fxquant.run.execution import Executor, OnNode
from fxquant.run.probe import Probe

# Otherwise it codes the inputs of weight-only products too.
EXACT: Final = {"session.qdq_matmulnbits_accuracy_level": "1"}
_LESS: Final = "make room, or leave the check out: --no-check (check=False)"
_OTHER: Final = "export again, or to another format: --to pt2"
_REFUSALS: Final = tuple(
    kind
    for kind in vars(onnxruntime_pybind11_state).values()
    if isinstance(kind, type) and issubclass(kind, Exception)
)
_SHARE: Final = 1e-2  # of codes that may differ, by one
# Integers of an input, as the file holds them.
_CODES: Final = {"codes": TensorProto.UINT8, ZERO_POINT: TensorProto.INT32}


def session(path: Path, *, as_written: bool = False) -> Any:
    """Under EXACT; ``as_written``: node by node, nothing that ONNX Runtime makes of several.

    Raises ExportError where it does not load the file.
    """
    options = onnxruntime.SessionOptions()
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    for key, value in EXACT.items():
        options.add_session_config_entry(key, value)
    with door(ExportError, f"ONNX Runtime does not load {path}", _REFUSALS, _OTHER):
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def inputs_of(ids: Tensor, mask: Tensor) -> dict[str, Any]:
    return dict(zip(INPUTS, (ids.numpy(), mask.numpy()), strict=True))


class Shown:
    """A graph in float32, and a session of its file that gives the values of sites too."""

    def __init__(self, gm: GraphModule, path: Path) -> None:
        self.graph = in_float32(gm)  # not what the file was written from: that is checked too
        model = onnx.load(path, load_external_data=False)  # weights in files stay there
        there = {name for node in model.graph.node for name in node.output}
        copy = prepared(gm)
        known = value_names(copy)
        kinds = {node: kind_of(node) for node in self.graph.graph.nodes}
        self.codes = {node: known[node.name] for node, kind in kinds.items() if kind in _CODES}
        outputs = zip(site_outputs(self.graph), output_names(copy), strict=True)
        self.outputs = {node: name for (_, node), name in outputs if name in there}
        for node, name in (self.codes | self.outputs).items():
            kind = _CODES.get(kinds[node], TensorProto.FLOAT)
            model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
        # Behind products with a static range its optimizer gives other values under their names,
        # at logits that are right.
        products = any(is_op(node, OPS.int_matmul.default) for node in kinds)
        self._session = _beside(path, model, as_written=products)

    def run(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[Node, Tensor]]:
        """Logits, and what the nodes of the graph are in the engine; codes int16, as the graph's
        but for their type."""
        named = self.codes | self.outputs
        logits, *values = self._session.run(["logits", *named.values()], inputs_of(ids, mask))
        found = dict(zip(named, map(torch.from_numpy, values), strict=True))
        for node, value in found.items():
            if value.dtype == torch.uint8:
                found[node] = value.to(torch.int16) - SHIFT
        return torch.from_numpy(logits), found


def check(gm: GraphModule, path: Path) -> Checked:
    """Run the model at ``path`` on random tokens, padded too."""
    engine, shown, found = session(path), Shown(gm, path), _Found()
    for ids in random_tokens(gm):
        mask = torch.ones_like(ids)
        if len(ids) > 1:
            mask[0, : ids.shape[1] // 3] = 0
        (logits,) = engine.run(["logits"], inputs_of(ids, mask))
        found.add(shown, Probe(ids, mask), torch.from_numpy(logits))
    return _said(gm, found)


class _Found:
    """The largest differences so far, and how many codes differ.

    Attributes:
        difference: of logits, graph and engine each on its own.
        apart: codes that differ then.
        under_rules: of logits, the graph on the engine's values.
        flipped, step: codes that differ then, and by how much at most.
        furthest: the largest relative difference of a site's output then, and its name.
    """

    def __init__(self) -> None:
        self.difference = self.under_rules = self.largest = 0.0
        self.tokens = self.codes = self.apart = self.flipped = self.step = 0
        self.furthest = (0.0, "")

    def add(self, shown: Shown, probe: Probe, logits: Tensor) -> None:
        """``logits``: the engine's, where it shows nothing else."""
        followed, theirs = shown.run(probe.input_ids, probe.attention_mask)

        def count(node: Node, value: Any) -> Any:
            if node in shown.codes:
                apart = probe.attended((theirs[node] - value).abs())
                self.codes += apart.numel()
                self.apart += int((apart > 0).sum())
            return value

        def take(node: Node, value: Any) -> Any:
            if node not in theirs:
                return value
            own, apart = (probe.attended(x.abs()) for x in (value, theirs[node] - value))
            if node in shown.codes:
                self.flipped += int((apart > 0).sum())
                self.step = max(self.step, int(apart.max()))
            else:
                self.furthest = max(self.furthest, (_share(apart, own), shown.outputs[node]))
            return theirs[node].to(value.dtype)

        own = _logits(shown.graph, probe, count)
        difference = _apart(probe.attended(logits), own)
        on_theirs = _logits(shown.graph, probe, take)
        self.difference = max(self.difference, difference)
        self.under_rules = max(self.under_rules, _apart(probe.attended(followed), on_theirs))
        self.largest = max(self.largest, float(own.abs().max()))
        self.tokens += int(probe.attention_mask.sum())


def _logits(graph: GraphModule, probe: Probe, on_node: OnNode) -> Tensor:
    """Of tokens that are attended to, [tokens, vocab]."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        found = Executor(graph).run(
            on_node, input_ids=probe.input_ids, attention_mask=probe.attention_mask
        )
    return probe.attended(found)


def _apart(first: Tensor, second: Tensor) -> float:
    apart = float((first - second).abs().max())
    return apart if apart == apart else torch.inf


def _share(apart: Tensor, own: Tensor) -> float:
    """The largest of ``apart`` as a share of the largest of ``own``."""
    furthest = float(apart.max())
    if not furthest:
        return 0.0
    share = furthest / float(own.max().clamp(min=torch.finfo(torch.float32).tiny))
    return share if share == share else torch.inf


def _said(gm: GraphModule, found: _Found) -> Checked:
    cause = "float sums in another order"
    dtype = float_dtype(gm)
    if dtype != torch.float32:
        cause += f", beside the graph in float32 (its own floats are {dtype})".replace("torch.", "")
    if found.apart or found.flipped:
        cause += (
            f", by which {found.apart} of {counted(found.codes, 'code')} of inputs differ, and "
            f"{found.flipped} where a site's inputs are the engine's"
        )
    elif found.codes:
        cause += f"; {counted(found.codes, 'code')} of inputs are the same"
    if any(site.quantize is None for site in coded_sites(gm)):
        cause += f", with {next(iter(EXACT))}={next(iter(EXACT.values()))}"
    result = Checked(
        version("onnxruntime"),
        found.difference,
        found.under_rules,
        found.largest,
        tokens=found.tokens,
        cause=cause,
    )
    wrong = ""
    if found.step > 1 or found.flipped > _SHARE * found.codes:
        wrong = f"; codes differ by up to {found.step}, which no order of sums explains"
    share, name = found.furthest
    if share > ALLOWED:
        wrong += (
            f"; from the engine's own inputs of the site, {name} is off by {share:.3g} of its "
            f"largest, and {ALLOWED:g} is allowed"
        )
    return replace(result, under_rules=torch.inf, cause=cause + wrong) if wrong else result


def _beside(path: Path, model: onnx.ModelProto, as_written: bool = False) -> Any:
    """A session of ``model``, whose weights lie beside ``path``."""
    target = path.with_name("shown.onnx")
    try:
        with door(ExportError, f"cannot write {target}, a copy for the check", (OSError,), _LESS):
            onnx.save(model, target)
        return session(target, as_written=as_written)
    finally:
        target.unlink(missing_ok=True)
