"""attn8: the two products of attention in exact integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule

from fxquant.ir.graph import Level, Site, Tag, info, set_tag, tag, update_info
from fxquant.passes.decompose_attention import DecomposeAttention
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass
from fxquant.pipeline.repair import Repair
from fxquant.schemes.named import Format8
from fxquant.structure.attention import products_in_float, recount_products, written_out
from fxquant.structure.outcome import Blocked, Changed, Outcome


@dataclass(frozen=True)
class Attn8(Repair):
    """Make attention's products sites, which quantize and integerize lower like linears.

    before:  y = attention(q, k, v, mask, s)
    after:   scores = matmul(q, k^T)          site self_attn.qk, role "matmul"
             y = matmul(softmax(...), v)      site self_attn.pv
    integer: rescale(int_matmul(q_q, k_q), q_scale, k_scale)

    8 bits, symmetric; static or dynamic, per tensor or per token as the scheme's activations are
    (I-BERT, Kim et al. 2021, quantizes the same two products). ``format``: integers, or E4M3
    ("fp8") or E5M2, whose products meet in code_matmul.
    """

    format: Format8 = "int8"

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
        products = list(written_out(gm, self.name))
        calls = Counter(product.path for product in products)
        for product in products:
            for node, kind in ((product.scores, "qk"), (product.output, "pv")):
                path = f"{product.path}.{kind}"
                if tag(node).is_output:
                    yield path, Blocked("it is a site already", (node,))
                    continue
                if (count := calls[product.path]) > 1:
                    reason = (
                        f"{count} attentions of one module: their inputs need not share a range"
                    )
                    yield path, Blocked(reason, (node,))
                    continue
                set_tag(node, Tag(path, self.name, is_output=True))
                # Rows and columns depend on the input.
                sites.append(Site(path, "matmul", (0, 0)))
                yield path, Changed()
        update_info(gm, sites=tuple(sites))
        recount_products(gm, before)
