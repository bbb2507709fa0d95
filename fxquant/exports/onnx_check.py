"""What ONNX Runtime computes from a model beside its graph: logits, and the codes of inputs.

Two engines sum floats in another order, so that an input at the edge of two codes may take either;
from there on logits differ by more than rounding. So the graph is run on the engine's own codes:
what is left then is rounding, and codes that differ are counted.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.errors import ExportError
from fxquant.exports.check import Checked, in_float32, random_tokens, version
from fxquant.exports.onnx_names import code_names
from fxquant.exports.onnx_prepare import prepared
from fxquant.exports.pt2_program import INPUTS
from fxquant.exports.sites import coded_sites
from fxquant.files.doors import door
from fxquant.ir.counted import counted
from fxquant.ir.graph import is_op
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.run.execution import Executor
from fxquant.run.probe import Probe

# Otherwise it codes the inputs of weight-only products too.
EXACT: Final = {"session.qdq_matmulnbits_accuracy_level": "1"}
# Of logits whose codes are the same: every block sums in another order.
_ALLOWED: Final = 1e-4
_LESS: Final = "make room, or leave the check out: --no-check (check=False)"
_SHARE: Final = 1e-2  # of codes that may differ, by one


def session(path: Path, **entries: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def inputs_of(ids: Tensor, mask: Tensor) -> dict[str, Any]:
    return dict(zip(INPUTS, (ids.numpy(), mask.numpy()), strict=True))


def check(gm: GraphModule, path: Path) -> Checked:
    """Run the model at ``path`` on random tokens, padded too."""
    known = code_names(prepared(gm))
    graph = in_float32(gm)  # not what the file was written from: the check is of that too
    nodes = [node for node in graph.graph.nodes if is_op(node, OPS.quantize.default)]
    names = {node: known[node.name] for node in nodes}
    padded = not any(_whole(node) for node in graph.graph.nodes)
    engine, found = session(path, **EXACT), _Found()
    shown = _showing(path, list(names.values())) if names else engine
    for ids in random_tokens(gm):
        mask = torch.ones_like(ids)
        if padded and len(ids) > 1:
            mask[0, : ids.shape[1] // 3] = 0
        given = inputs_of(ids, mask)
        with torch.no_grad():
            expected = graph(input_ids=ids, attention_mask=mask)[mask.bool()]
        logits, *_ = engine.run(["logits"], given)
        found.difference = max(
            found.difference, _apart(torch.from_numpy(logits)[mask.bool()], expected)
        )
        found.add(graph, names, shown, ids, mask)
    return _said(gm, path, found)


class _Found:
    """The largest differences so far, and how many codes differed."""

    def __init__(self) -> None:
        self.difference = self.under_rules = self.largest = 0.0
        self.tokens = self.codes = self.flipped = self.step = 0

    def add(
        self, graph: GraphModule, names: dict[Node, str], shown: Any, ids: Tensor, mask: Tensor
    ) -> None:
        """Run the graph on the engine's codes."""
        probe = Probe(ids, mask)
        logits, *codes = shown.run(["logits", *names.values()], inputs_of(ids, mask))
        theirs = {
            node: torch.from_numpy(each).to(torch.int16) - 128
            for node, each in zip(names, codes, strict=True)
        }

        def take(node: Node, value: Any) -> Any:
            if node not in theirs:
                return value
            apart = probe.attended((theirs[node] - value.to(torch.int16)).abs())
            self.codes += apart.numel()
            self.flipped += int((apart > 0).sum())
            self.step = max(self.step, int(apart.max()))
            return theirs[node].to(torch.int8)

        with torch.no_grad():
            expected = Executor(graph).run(take, input_ids=ids, attention_mask=mask)[mask.bool()]
        found = torch.from_numpy(logits)[mask.bool()]
        self.under_rules = max(self.under_rules, _apart(found, expected))
        self.largest = max(self.largest, float(expected.abs().max()))
        self.tokens += int(mask.sum())


def _whole(node: Node) -> bool:
    """Whether it takes a range over all tokens: over what engines compute for padding, which is
    theirs to choose."""
    return is_op(node, OPS.choose_qparams.default) and operands(node).granularity == "tensor"


def _apart(first: Tensor, second: Tensor) -> float:
    apart = float((first - second).abs().max())
    return apart if apart == apart else torch.inf


def _said(gm: GraphModule, path: Path, found: _Found) -> Checked:
    cause = "float sums in another order"
    if found.flipped:
        cause += f", by which {found.flipped} of {counted(found.codes, 'code')} of inputs differ"
    elif found.codes:
        cause += f"; {counted(found.codes, 'code')} of inputs are the same"
    if any(site.quantize is None for site in coded_sites(gm)):
        cause += f", with {next(iter(EXACT))}={next(iter(EXACT.values()))}"
    result = Checked(
        version("onnxruntime"),
        found.difference,
        found.under_rules,
        found.largest,
        _ALLOWED,
        tokens=found.tokens,
        cause=cause,
    )
    if found.step > 1 or found.flipped > _SHARE * found.codes:
        wrong = f"; codes differ by up to {found.step}, which no order of sums explains"
        return replace(result, under_rules=torch.inf, cause=cause + wrong)
    return result


def _showing(path: Path, names: list[str]) -> Any:
    """A session of the same model that gives the named values too; weights in files stay there."""
    model = onnx.load(path, load_external_data=False)
    for name in names:
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.UINT8, None))
    target = path.with_name("shown.onnx")
    try:
        with door(ExportError, f"cannot write {target}, a copy for the check", (OSError,), _LESS):
            onnx.save(model, target)
        return session(target, **EXACT)
    finally:
        target.unlink(missing_ok=True)
