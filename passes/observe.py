"""observe: put an observer on the input of every site whose range is static."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxquant.ir.builder import Builder
from fxquant.ir.graph import (
    Level,
    attention_mask_node,
    device_of,
    info,
    install,
    site_outputs,
    source_of,
)
from fxquant.numerics.observers import HistogramObserver
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass
from fxquant.structure.product_sites import observed, operand_spec

CONTAINER = "fxquant_observers"


@dataclass(frozen=True)
class Observe(Pass):
    """Insert one HistogramObserver for each input that feeds static sites.

    before:  y = call_module layers.0.fc1(x)
    after:   _ = call_module fxquant_observers.layers_0_fc1(x, attention_mask)
             y = call_module layers.0.fc1(x)

    Sites that share an input (q, k and v; gate and up) share its observer.
    """

    name = "observe"
    requires = (Level.FLOAT,)
    ensures = Level.OBSERVED
    effect = "exact"

    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        context.scheme.check_overrides((site.path, site.role) for site in info(gm).sites)
        mask = attention_mask_node(gm)
        seen: set[Node] = set()
        for site, node in list(site_outputs(gm)):
            if site.role == "matmul":
                operands = operand_spec(context.scheme, site)
                if operands is not None and not operands.dynamic:
                    with gm.graph.inserting_before(node):
                        observed(Builder(gm, self.name, site.path), site, node, mask)
                continue
            activation = context.scheme.spec_for(site.path, site.role).activation
            source = source_of(node)
            if activation is None or activation.dynamic or source in seen:
                continue
            seen.add(source)
            path = f"{CONTAINER}.{site.path.replace('.', '_')}"
            install(gm, path, HistogramObserver(site.path).to(device_of(gm)))
            with gm.graph.inserting_before(node):
                Builder(gm, self.name, site.path).module(path, source, mask)
        return gm


def observers(gm: GraphModule) -> dict[Node, HistogramObserver]:
    """The observer of each observed node."""
    found = ((node, observer_of(gm, node)) for node in gm.graph.nodes)
    return {node: observer for node, observer in found if observer is not None}


def observer_of(gm: GraphModule, source: Node) -> HistogramObserver | None:
    """The observer of ``source``, None where it has none."""
    for user in source.users:
        if user.op == "call_module" and user.args[:1] == (source,):
            module = gm.get_submodule(str(user.target))
            if isinstance(module, HistogramObserver):
                return module
    return None
