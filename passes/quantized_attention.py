"""attn8, kv8, kv4: codes in attention's products, and in the cache that would feed them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fxquant.context import Context
from fxquant.errors import ModelError, VerificationError
from fxquant.graph import (
    Builder,
    Level,
    Site,
    Tag,
    info,
    is_op,
    set_tag,
    tag,
    update_info,
)
from fxquant.levels import OPS
from fxquant.operands import operands
from fxquant.outcome import Blocked, Changed, Outcome
from fxquant.passes.attention_products import Product, attention_products
from fxquant.passes.decompose_attention import DecomposeAttention
from fxquant.passes.name_sites import products_in_float, recount_products
from fxquant.pipeline import Pass, probe_for, run_probe
from fxquant.repair import Repair


def _products(gm: GraphModule, name: str) -> list[Product]:
    found = list(attention_products(gm))
    if not found:
        raise ModelError(
            f"{name}: {info(gm).model}: no attention found in its blocks: a softmax between two "
            "matmuls of [batch, heads, tokens, ...] (a fused or batched form of its own?)"
        )
    return found


@dataclass(frozen=True)
class Attn8(Repair):
    """Make attention's products sites, which quantize and integerize lower like linears.

    before:  y = scaled_dot_product_attention(q, k, v, ...)
    after:   scores = matmul(q, k^T)          site self_attn.qk, role "matmul"
             y = matmul(softmax(...), v)      site self_attn.pv
    integer: rescale(int_matmul(q_q, k_q), q_scale, k_scale)

    8 bits, symmetric; static or dynamic, per tensor or per token as the scheme's activations are
    (I-BERT, Kim et al. 2021, quantizes the same two products).
    """

    name = "attn8"
    requires = (Level.FLOAT,)
    effect = "equivalent"
    needs_calibration = False
    makes_sites = True
    no_place = "quantizes nothing; attn8 goes with one that does, such as w8a8-dynamic"

    @property
    def sequence(self) -> tuple[Pass, ...]:
        return DecomposeAttention(), self

    def apply(self, gm: GraphModule, context: Context) -> Iterator[Outcome]:
        if not any(spec.weight for spec in context.scheme.specs):
            return
        sites, before = list(info(gm).sites), products_in_float(gm)
        for product in _products(gm, self.name):
            for node, kind in ((product.scores, "qk"), (product.output, "pv")):
                path = f"{product.path}.{kind}"
                if tag(node).is_output:
                    yield path, Blocked("it is a site already", (node,))
                    continue
                set_tag(node, Tag(path, self.name, is_output=True))
                # Rows and columns depend on the input.
                sites.append(Site(path, "matmul", (0, 0)))
                yield path, Changed()
        update_info(gm, sites=tuple(sites))
        recount_products(gm, before)


def _check_finite(gm: GraphModule, name: str) -> None:
    """VerificationError unless the logits of a probe are; the pipeline compares no lossy pass."""
    probe = probe_for(gm)
    logits, _ = run_probe(gm, probe, {})
    if not bool(probe.attended(logits).isfinite().all()):
        raise VerificationError(
            f"after {name}: logits of the probe batch are not finite: attention written out "
            f"overflows {logits.dtype}, or the model does; give the model in fp32 or bf16"
        )


@dataclass(frozen=True)
class _StoredKeysAndValues(Repair):
    """Keys and values as a cache of few bits gives them back: affine, per token and head.

    before:  scores = matmul(q, transpose(k));  y = matmul(p, v)
    after:   scores = matmul(q, transpose(store_kv(k)));  y = matmul(p, store_kv(v))

    The graph has no cache, so this simulates its error (KIVI, Liu et al. 2024, and QuaRot store
    affine codes per token and head likewise). Keys are stored as they enter the product, behind
    rotary embeddings.
    """

    bits: ClassVar[int]
    requires = (Level.FLOAT,)
    effect = "lossy"
    needs_calibration = False

    @property
    def sequence(self) -> tuple[Pass, ...]:
        return DecomposeAttention(), self

    def apply(self, gm: GraphModule, context: Context) -> Iterator[Outcome]:
        stored = tuple(node for node in gm.graph.nodes if is_op(node, OPS.store_kv.default))
        for product in _products(gm, self.name):
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


@dataclass(frozen=True)
class Kv8(_StoredKeysAndValues):
    """store_kv with 8 bits."""

    name = "kv8"
    bits = 8


@dataclass(frozen=True)
class Kv4(_StoredKeysAndValues):
    """store_kv with 4 bits."""

    name = "kv4"
    bits = 4
