"""attn8, kv8, kv4: codes in attention's products, and in the cache that would feed them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fxquant.errors import ModelError, SchemeError, VerificationError
from fxquant.graph import Builder, Level, Site, Tag, add_note, arguments, info, set_tag, update_info
from fxquant.levels import OPS
from fxquant.passes.attention_products import Product, attention_products
from fxquant.passes.decompose_attention import DecomposeAttention
from fxquant.passes.name_sites import attention_left_in_float
from fxquant.pipeline import probe_for, run_probe
from fxquant.repair import Repair


def _written_out(gm: GraphModule, name: str) -> list[Product]:
    DecomposeAttention().rewrite(gm)
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

    def rewrite(self, gm: GraphModule) -> GraphModule:
        if not any(spec.weight for spec in self.scheme.specs):
            raise SchemeError("attn8 goes with a scheme that quantizes, such as w8a8-dynamic+attn8")
        sites = list(info(gm).sites)
        for product in _written_out(gm, self.name):
            for node, what in ((product.scores, "qk"), (product.output, "pv")):
                path = f"{product.path}.{what}"
                set_tag(node, Tag(path, self.name, is_output=True))
                # Rows and columns depend on the input.
                sites.append(Site(path, "matmul", (0, 0)))
        update_info(gm, sites=tuple(sites), left_in_float=attention_left_in_float(gm))
        return gm


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

    def rewrite(self, gm: GraphModule) -> GraphModule:
        if any(n.target is OPS.store_kv.default for n in gm.graph.nodes):
            raise SchemeError(f"{self.name}: keys and values are stored in codes already")
        for product in _written_out(gm, self.name):
            self._store(gm, product.path, product.scores, turned=True)
            self._store(gm, product.path, product.output, turned=False)
            add_note(gm, self.name, product.path, f"keys and values in {self.bits} bits")
        _check_finite(gm, self.name)
        return gm

    def _store(self, gm: GraphModule, path: str, product: Node, turned: bool) -> None:
        operand = arguments(product)[1]
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
