"""kv8: keys and values as a cache of 8 bits gives them back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fxquant.errors import VerificationError
from fxquant.ir.builder import Builder
from fxquant.ir.graph import Level, is_op
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.passes.decompose_attention import DecomposeAttention
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass
from fxquant.pipeline.repair import Repair
from fxquant.run.probe import probe_for, run_probe
from fxquant.structure.attention import written_out
from fxquant.structure.outcome import Blocked, Changed, Outcome


@dataclass(frozen=True)
class Kv8(Repair):
    """Keys and values as a cache of 8 bits gives them back: affine, per token and head.

    before:  scores = matmul(q, transpose(k));  y = matmul(p, v)
    after:   scores = matmul(q, transpose(store_kv(k)));  y = matmul(p, store_kv(v))

    The graph has no cache, so this simulates its error (KIVI, Liu et al. 2024, and QuaRot store
    affine codes per token and head likewise). Keys are stored as they enter the product, behind
    rotary embeddings.
    """

    name = "kv8"
    bits: ClassVar[int] = 8
    requires = (Level.FLOAT,)
    effect = "lossy"
    needs_calibration = False

    @property
    def sequence(self) -> tuple[Pass, ...]:
        return DecomposeAttention(), self

    def apply(self, gm: GraphModule, context: Context) -> Iterator[Outcome]:
        stored = tuple(node for node in gm.graph.nodes if is_op(node, OPS.store_kv.default))
        for product in written_out(gm, self.name):
            if stored:
                reason = "keys and values are stored in codes already"
                yield product.path, Blocked(reason, stored)
                continue
            self._store(gm, product.path, product.scores, turned=True)
            self._store(gm, product.path, product.output, turned=False)
            yield product.path, Changed(f"keys and values in {self.bits} bits")
        _check_finite(gm, self.name)

    def _store(self, gm: GraphModule, path: str, product: Node, turned: bool) -> None:
        operand = operands(product).other
        builder = Builder(gm, self.name, path)
        with gm.graph.inserting_before(product):
            x = builder.call(torch.transpose, operand, -2, -1) if turned else operand
            stored = builder.call(OPS.store_kv.default, x, self.bits)
            if turned:
                stored = builder.call(torch.transpose, stored, -2, -1)
        product.update_arg(1, stored)


def _check_finite(gm: GraphModule, name: str) -> None:
    """VerificationError unless the logits of a probe are; the pipeline compares no lossy pass."""
    probe = probe_for(gm)
    logits, _ = run_probe(gm, probe, {})
    if not bool(probe.attended(logits).isfinite().all()):
        raise VerificationError(
            f"after {name}: logits of the probe batch are not finite: attention written out "
            f"overflows {logits.dtype}, or the model does; give the model in fp32 or bf16"
        )
