"""rotate_inputs: rotate what enters each MLP's last linear, by a node in front of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxquant.ir.blocks import block_of
from fxquant.ir.builder import Builder
from fxquant.ir.graph import (
    Level,
    info,
    is_linear,
    linear_parameters,
    nodes_behind,
    source_of,
    tag,
)
from fxquant.numerics.hadamard import orthogonal_factors
from fxquant.pipeline.context import Context
from fxquant.pipeline.options import Seed
from fxquant.pipeline.pipeline import Pass
from fxquant.structure.residual import residual_stream
from fxquant.structure.rotations import online_rotation, put_linear
from fxquant.structure.vocabulary import PRODUCTS, is_a


@dataclass(frozen=True)
class RotateInputs(Pass):
    """The online rotation of QuaRot (Ashkboos et al. 2024), where no weight can take it over.

    before:  h = h + fc2(act(y))
    after:   h = h + fc2'(rotation(act(y)))        fc2' = fc2 rotation^T

    A Hadamard matrix where the width has one, else a random orthogonal.
    """

    seed: Seed = 0
    name = "rotate_inputs"
    requires = (Level.FLOAT,)
    effect = "equivalent"

    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        stream = residual_stream(gm)
        behind = nodes_behind([value for value, _ in stream.turned], lambda n: is_linear(gm, n))
        for node in (*stream.writers, *(n for n in behind if is_linear(gm, n))):
            if _ends_mlp(gm, node):
                _rotate_input(gm, node, self.seed)
        return gm


def _ends_mlp(gm: GraphModule, node: Node) -> bool:
    """A linear of a block whose input comes from linears, but through no attention product."""
    if not is_linear(gm, node) or block_of(str(node.target), info(gm).blocks) is None:
        return False
    behind = nodes_behind([source_of(node)], lambda n: is_linear(gm, n) or is_a(n, *PRODUCTS))
    return not any(is_a(found, *PRODUCTS) for found in behind)


def _rotate_input(gm: GraphModule, node: Node, seed: int) -> None:
    path = str(node.target)
    weight, bias = linear_parameters(gm.get_submodule(path))
    width = weight.shape[1]
    left, right = (each.to(weight.device) for each in orthogonal_factors(width, seed)[:2])
    # Row by row W kron(left, right), without the [K, K] matrix.
    square = weight.double().unflatten(1, (left.shape[0], right.shape[0]))
    turned = (square.transpose(1, 2) @ left).transpose(1, 2) @ right
    put_linear(gm, node, turned.flatten(1), bias)
    name = online_rotation(gm, width, seed, weight)
    builder = Builder(gm, RotateInputs.name, tag(node).site or path)
    with gm.graph.inserting_before(node):
        rotated = builder.module(name, source_of(node), name="rotated")
    node.replace_input_with(source_of(node), rotated)
