"""kv8: keys and values as a cache of 8 bits gives them back."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxquant.errors import VerificationError
from fxquant.formats.grid import Grid
from fxquant.formats.integer import IntegerGrid
from fxquant.ir.builder import Builder
from fxquant.ir.graph import Level
from fxquant.ir.legal_forms import OPS, STORES
from fxquant.ir.operands import operands
from fxquant.passes.decompose_attention import DecomposeAttention
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass
from fxquant.pipeline.repair import Repair
from fxquant.run.probe import probe_for, run_probe
from fxquant.schemes.named import Format8, format8
from fxquant.structure.attention import written_out
from fxquant.structure.outcome import Blocked, Changed, Outcome


class StoresCache(Repair):
    """Stores keys and values on a grid, and takes them back."""

    requires = (Level.FLOAT,)
    effect = "lossy"
    needs_calibration = False

    @property
    @abc.abstractmethod
    def grid(self) -> Grid:
        """That of the codes; of integers an affine one."""

    @property
    def sequence(self) -> tuple[Pass, ...]:
        return DecomposeAttention(), self

    def apply(self, gm: GraphModule, context: Context) -> Iterator[Outcome]:
        stored = tuple(node for node in gm.graph.nodes if node.target in STORES)
        grid = self.grid
        what = f"{grid.bits} bits" if isinstance(grid, IntegerGrid) else grid.name
        for product in written_out(gm, self.name):
            if stored:
                reason = "keys and values are stored in codes already"
                yield product.path, Blocked(reason, stored)
                continue
            self._store(gm, product.path, product.scores, turned=True)
            self._store(gm, product.path, product.output, turned=False)
            yield product.path, Changed(f"keys and values in {what}")
        _check_finite(gm, self.name)

    def _store(self, gm: GraphModule, path: str, product: Node, turned: bool) -> None:
        operand, grid = operands(product).other, self.grid
        whole = isinstance(grid, IntegerGrid)
        call = (OPS.store_kv.default, grid.bits) if whole else (OPS.store_kv_to.default, grid.name)
        builder = Builder(gm, self.name, path)
        with gm.graph.inserting_before(product):
            x = builder.call(torch.transpose, operand, -2, -1) if turned else operand
            stored = builder.call(call[0], x, call[1])
            if turned:
                stored = builder.call(torch.transpose, stored, -2, -1)
        product.update_arg(1, stored)


@dataclass(frozen=True)
class Kv8(StoresCache):
    """Keys and values as a cache of 8 bits gives them back: affine, per token and head.

    before:  scores = matmul(q, transpose(k));  y = matmul(p, v)
    after:   scores = matmul(q, transpose(store_kv(k)));  y = matmul(p, store_kv(v))

    The graph has no cache, so this simulates its error (KIVI, Liu et al. 2024, and QuaRot store
    affine codes per token and head likewise). Keys are stored as they enter the product, behind
    rotary embeddings. ``format``: integers, or E4M3 ("fp8") or E5M2, symmetric, under a scale of
    each token and head: store_kv_to in place of store_kv.
    """

    format: Format8 = "int8"
    name = "kv8"

    @property
    def grid(self) -> Grid:
        return format8(self.format)


def _check_finite(gm: GraphModule, name: str) -> None:
    """VerificationError unless the logits of a probe are; the pipeline compares no lossy pass."""
    probe = probe_for(gm)
    logits, _ = run_probe(gm, probe, {})
    if not bool(probe.attended(logits).isfinite().all()):
        raise VerificationError(
            f"after {name}: logits of the probe batch are not finite: attention written out "
            f"overflows {logits.dtype}, or the model does; give the model in fp32 or bf16"
        )
