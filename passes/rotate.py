"""rotate: turn the residual stream into another basis, in which no channel stands out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import ModelError, VerificationError
from fxquant.ir.builder import Builder
from fxquant.ir.graph import Level, device_of, float_dtype, info, install, source_of
from fxquant.ir.leaves import InverseScale
from fxquant.ir.operands import operands
from fxquant.numerics.hadamard import orthogonal_factors, random_signs
from fxquant.passes.fold_norms import FoldNorms
from fxquant.passes.rotate_inputs import RotateInputs
from fxquant.pipeline.context import Context
from fxquant.pipeline.options import Seed
from fxquant.pipeline.pipeline import Pass
from fxquant.pipeline.repair import Repair
from fxquant.structure.outcome import Changed, Outcome
from fxquant.structure.residual import residual_stream
from fxquant.structure.rotations import (
    CONTAINER,
    centred,
    check_rotatable,
    fold_lookup_norm,
    online_rotation,
    put_linear,
    put_table,
    readers_of,
    table_of,
    weights_of,
)
from fxquant.structure.stream import ResidualStream, is_lookup


@dataclass(frozen=True)
class Rotate(Repair):
    """QuaRot (Ashkboos et al. 2024): outlier channels are spread over all by orthogonal matrices.

    before:  h = embedding(ids);  y = fc1(layer_norm(h));  h = h + fc2(x)
    after:   h' = h Q;  y = fc1'(rms_norm(h'));  h' = h' + fc2'(x)

    Norms commute with rotations once they neither scale channels, which ``fold_norms`` sees to
    before, nor subtract a mean: that is taken out of everything that writes to the stream
    (SliceGPT, Ashkboos et al. 2024, section 3.2). Then writers W -> Q^T W, readers W -> W Q; a
    tied head is untied. Q is a Hadamard matrix with random signs where the width has one, else a
    random orthogonal. What no weight writes, as the norm behind a sublayer does (Gemma 2, OLMo 2),
    is rotated by nodes, and only if ``online``; ``rotate_inputs`` follows then, for what enters
    the linears that end MLPs.

    Raises ModelError, naming the node, where the structure does not allow it.
    """

    seed: Seed = 0
    online: bool = True
    name = "rotate"
    requires = (Level.FLOAT,)
    effect = "equivalent"
    needs_calibration = False

    @property
    def sequence(self) -> tuple[Pass, ...]:
        online = (RotateInputs(self.seed),) if self.online else ()
        return FoldNorms(), self, *online

    @property
    def keeps_site_outputs(self) -> bool:
        return False  # the same stream in other coordinates

    def apply(self, gm: GraphModule, context: Context) -> Iterator[Outcome]:
        stream = residual_stream(gm)
        check_rotatable(gm, stream)
        if stream.turned and not self.online:
            raise ModelError(
                f"rotate: {info(gm).model}: no weight writes {stream.turned[0][0].name}, which is "
                "added to the residual stream: it can be rotated by a node only; leave "
                "online=false out"
            )
        fold_lookup_norm(gm, stream)
        take_mean = _without_mean(gm, stream)
        left, right, hadamard = orthogonal_factors(stream.width, self.seed)
        signs = random_signs(stream.width, self.seed)
        rotation = signs[:, None] * torch.kron(left, right)
        for node in stream.writers:
            _rotate_writer(gm, node, rotation, take_mean)
        for node in readers_of(stream):
            weight, bias = weights_of(gm, node)
            put_linear(gm, node, weight.double() @ rotation.to(weight.device), bias)
        for value, user in stream.turned:
            _rotate_value(gm, value, user, signs, self.seed, take_mean)
        gm.delete_all_unused_submodules()
        kind = "Hadamard" if hadamard else "random orthogonal"
        nodes = f", {len(stream.turned)} values by nodes" if stream.turned else ""
        yield "residual stream", Changed(f"{kind} of width {stream.width}{nodes}")


def _without_mean(gm: GraphModule, stream: ResidualStream) -> bool:
    """Make LayerNorms without gain RMSNorms; whether there are any, so that writers lose it."""
    for norm in stream.norms:
        if norm.gain is not None or norm.bias is not None:
            raise VerificationError(f"rotate: {norm.node} scales channels: fold_norms goes before")
        if norm.call is not None and norm.centred:
            _without_its_mean(gm, norm.call)
    for node in stream.deviations:
        node.replace_all_uses_with(source_of(node))
    gm.graph.eliminate_dead_code()
    return centred(stream)


def _without_its_mean(gm: GraphModule, node: Node) -> None:
    if node.op == "call_module":
        path = str(node.target)
        module = gm.get_submodule(path)
        if isinstance(module, nn.LayerNorm):  # else another call of it came first
            plain = nn.RMSNorm(module.normalized_shape, eps=module.eps, elementwise_affine=False)
            install(gm, path, plain)
        return
    call, path = operands(node), f"fxquant_norms.{node.name}"
    plain = nn.RMSNorm(call.normalized_shape, eps=call.eps, elementwise_affine=False)
    install(gm, path, plain.eval())
    builder = Builder(gm, Rotate.name, node.name, (node,))
    with gm.graph.inserting_before(node):
        builder.replace(node, builder.module(path, call.input, name="rms_norm"))


def _rotate_writer(gm: GraphModule, node: Node, rotation: Tensor, take_mean: bool) -> None:
    if is_lookup(gm, node):
        table = table_of(gm, node)
        put_table(gm, node, _turn(table.double(), rotation, take_mean).to(table.dtype))
        return
    weight, bias = weights_of(gm, node)
    columns = [weight.double()] + ([] if bias is None else [bias.double()[:, None]])
    turned = [_turn(each.t(), rotation, take_mean).t() for each in columns]
    put_linear(gm, node, turned[0], None if bias is None else turned[1][:, 0])


def _rotate_value(
    gm: GraphModule, value: Node, user: Node, signs: Tensor, seed: int, take_mean: bool
) -> None:
    """Let ``user`` add ``value`` [..., width] in the new basis."""
    like = signs.to(device_of(gm), float_dtype(gm))
    path = f"{CONTAINER}.signs{len(signs)}_seed{seed}"
    if path not in dict(gm.named_modules()):
        install(gm, path, InverseScale(like))
    build = Builder(gm, Rotate.name, value.name)
    with gm.graph.inserting_before(user):
        x = value
        if take_mean:
            x = build.call(torch.sub, x, build.call(torch.mean, x, -1, True))
        x = build.call(torch.mul, x, build.tensor(f"{path}.values", "signs"))
        turned = build.module(online_rotation(gm, len(signs), seed, like), x, name="turned")
    user.replace_input_with(value, turned)


def _turn(rows: Tensor, rotation: Tensor, take_mean: bool) -> Tensor:
    """Rows [n, width] of the stream in the new basis, without their means where norms took them."""
    if take_mean:
        rows = rows - rows.mean(-1, keepdim=True)
    return rows @ rotation.to(rows.device)
