"""decompose_attention: fused attention as the products and the softmax inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxquant.errors import VerificationError
from fxquant.ir.builder import Builder
from fxquant.ir.functions import hide, shared_heads
from fxquant.ir.graph import Level, device_of, info, is_op
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass
from fxquant.run.execution import Executor
from fxquant.run.probe import Probe
from fxquant.structure.attention import attention_path, products_in_float, recount_products
from fxquant.structure.batched_products import unbatch_products
from fxquant.structure.vocabulary import Kind, is_a


@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Write attention out, so that its two products can be quantized.

    before:  y = attention(q, k, v, mask, s)
    after:   scores = matmul(q * s, transpose(k))
             p = softmax(hide(scores, mask))        (a float mask is added; none: causal)
             y = matmul(p, v)

    The query is scaled, not the product, which would overflow fp16 where the scores themselves do
    not (PyTorch's own math kernel scales its operands too). In half precision mask and softmax are
    in fp32, as in fused kernels: added to fp16's least number, as OPT's mask has it, a score would
    vanish. A row that sees nothing (a query of padding) gives 0, as the fused function does.
    Attention that a model writes out by bmm or baddbmm becomes products of [batch, heads, ...].
    """

    name = "decompose_attention"
    requires = (Level.FLOAT,)
    effect = "equivalent"

    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        fused = [n for n in gm.graph.nodes if is_a(n, Kind.ATTENTION)]
        before = products_in_float(gm)
        facts = _operands(gm, fused)
        for node in fused:
            _write_out(gm, node, facts)
        unbatch_products(gm, self.name)
        recount_products(gm, before)
        return gm


@torch.no_grad()
def _operands(gm: GraphModule, fused: list[Node]) -> dict[Node, Any]:
    """What the fused nodes read, on a tiny batch: head widths and dtypes of masks."""
    wanted = {operand for node in fused for operand in node.all_input_nodes}
    found: dict[Node, Any] = {}

    def keep(node: Node, value: Any) -> Any:
        if node in wanted:
            found[node] = value
        return value

    if fused:
        length = min(5, info(gm).max_positions or 5)
        probe = Probe.random(info(gm).vocab_size, device_of(gm), length=length)
        Executor(gm).run(keep, input_ids=probe.input_ids, attention_mask=probe.attention_mask)
    return found


def _write_out(gm: GraphModule, node: Node, facts: dict[Node, Any]) -> None:
    call = operands(node)
    query, key, value, scale = call.query, call.key, call.value, call.scale
    if scale is None:
        scale = float(facts[query].shape[-1]) ** -0.5
    build = Builder(gm, DecomposeAttention.name, attention_path(gm, node) or node.name)
    with gm.graph.inserting_before(node):
        if getattr(call, "enable_gqa", False):
            key, value = (build.call(shared_heads, x, query) for x in (key, value))
        turned = build.call(torch.transpose, key, -2, -1)
        scores = build.call(torch.matmul, build.call(torch.mul, query, scale), turned)
        half = facts[query].dtype in (torch.float16, torch.bfloat16)
        if half:
            scores = build.method("float", scores)
        scores = _masked(build, scores, node, facts)
        weights = build.call(torch.ops.aten._safe_softmax.default, scores, -1)
        if half:
            weights = build.method("type_as", weights, query)
        result = build.call(torch.matmul, weights, value)
    build.replace(node, result)


def _masked(build: Builder, scores: Node, fused: Node, facts: dict[Node, Any]) -> Node:
    """``scores`` as the ``fused`` call masks them."""
    call = operands(fused)
    if is_op(fused, OPS.attention.default):
        mask, is_causal = call.mask, call.mask is None
    else:
        mask, is_causal = call.attn_mask, call.is_causal
        if call.dropout_p:
            raise VerificationError(f"decompose_attention: {fused.name}: dropout in an eval graph")
    if mask is not None and facts[mask].dtype != torch.bool:
        return build.call(torch.add, scores, mask)
    return build.call(hide, scores, mask) if is_causal or mask is not None else scores
