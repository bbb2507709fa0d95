"""rotate_inputs: rotate what enters each MLP's last linear, by a node in front of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxquant.ir.builder import Builder
from fxquant.ir.graph import LINEAR, Level, info, install, linear_parameters, source_of, tag
from fxquant.ir.leaves import OnlineRotation
from fxquant.numerics.hadamard import orthogonal_factors
from fxquant.pipeline.context import Context
from fxquant.pipeline.options import Seed
from fxquant.pipeline.pipeline import Pass
from fxquant.structure.residual import residual_stream
from fxquant.structure.rotations import put_linear

CONTAINER = "fxquant_rotations"


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
        for node in residual_stream(gm).writers:
            if _ends_mlp(gm, node):
                _rotate_input(gm, node, self.seed)
        return gm


_PRODUCTS = ("scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum")


def _is_linear(gm: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), LINEAR)


def _ends_mlp(gm: GraphModule, node: Node) -> bool:
    """A linear of a block whose input comes from linears, but through no attention product."""
    if not _is_linear(gm, node):
        return False
    if not any(str(node.target).startswith(f"{block}.") for block in info(gm).blocks):
        return False
    seen, stack = set(), [source_of(node)]
    while stack:
        current = stack.pop()
        if current in seen or _is_linear(gm, current):
            continue
        seen.add(current)
        target = current.target
        if (target if isinstance(target, str) else getattr(target, "__name__", "")) in _PRODUCTS:
            return False
        stack.extend(current.all_input_nodes)
    return True


def _rotate_input(gm: GraphModule, node: Node, seed: int) -> None:
    path = str(node.target)
    weight, bias = linear_parameters(gm.get_submodule(path))
    width = weight.shape[1]
    left, right = (each.to(weight.device) for each in orthogonal_factors(width, seed)[:2])
    # Row by row W kron(left, right), without the [K, K] matrix.
    square = weight.double().unflatten(1, (left.shape[0], right.shape[0]))
    turned = (square.transpose(1, 2) @ left).transpose(1, 2) @ right
    put_linear(gm, node, turned.flatten(1), bias)
    name = f"{CONTAINER}.width{width}_seed{seed}"
    if name not in dict(gm.named_modules()):  # one for all layers of the width
        install(gm, name, OnlineRotation(left.to(weight.dtype), right.to(weight.dtype)))
    builder = Builder(gm, RotateInputs.name, tag(node).site or path)
    with gm.graph.inserting_before(node):
        rotated = builder.module(name, source_of(node), name="rotated")
    node.replace_input_with(source_of(node), rotated)
