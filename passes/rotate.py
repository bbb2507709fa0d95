"""rotate: turn the residual stream into another basis, in which no channel stands out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import VerificationError
from fxquant.ir.graph import LINEAR, Level, get_tensor, install, linear_parameters
from fxquant.ir.weights import with_parameters
from fxquant.numerics.hadamard import orthogonal_factors, random_signs
from fxquant.passes.fold_norms import FoldNorms
from fxquant.passes.rotate_inputs import RotateInputs
from fxquant.pipeline.context import Context
from fxquant.pipeline.options import Seed
from fxquant.pipeline.pipeline import Pass
from fxquant.pipeline.repair import Repair
from fxquant.structure.outcome import Changed, Outcome
from fxquant.structure.residual import ResidualStream, residual_stream
from fxquant.structure.rotations import centred, check_rotatable, put_linear, readers_of, table_of


@dataclass(frozen=True)
class Rotate(Repair):
    """QuaRot (Ashkboos et al. 2024): outlier channels are spread over all by orthogonal matrices.

    before:  h = embedding(ids);  y = fc1(layer_norm(h));  h = h + fc2(x)
    after:   h' = h Q;  y = fc1'(rms_norm(h'));  h' = h' + fc2'(x)

    Norms commute with rotations once they neither scale channels, which ``fold_norms`` sees to
    before, nor subtract a mean: that is taken out of everything that writes to the stream
    (SliceGPT, Ashkboos et al. 2024, section 3.2). Then writers W -> Q^T W, readers W -> W Q; a
    tied head is untied. Q is a Hadamard matrix with random signs where the width has one, else a
    random orthogonal. ``online``: ``rotate_inputs`` follows, for what enters the linears that end
    MLPs.

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
        take_mean = _without_mean(gm, stream)
        left, right, hadamard = orthogonal_factors(stream.width, self.seed)
        rotation = random_signs(stream.width, self.seed)[:, None] * torch.kron(left, right)
        for node in stream.writers:
            _rotate_writer(gm, node, rotation, take_mean)
        for node in readers_of(stream):
            weight, bias = linear_parameters(gm.get_submodule(str(node.target)))
            put_linear(gm, node, weight.double() @ rotation.to(weight.device), bias)
        kind = "Hadamard" if hadamard else "random orthogonal"
        yield "residual stream", Changed(f"{kind} of width {stream.width}")


def _without_mean(gm: GraphModule, stream: ResidualStream) -> bool:
    """Make LayerNorms without gain RMSNorms; whether there are any, so that writers lose it."""
    for norm in stream.norms:
        if norm.layer_norm is None and norm.gain is None:
            continue
        path = str((norm.layer_norm or norm.node).target)
        module = None if norm.layer_norm is None else gm.get_submodule(path)
        if not isinstance(module, nn.LayerNorm) or module.elementwise_affine:
            raise VerificationError(f"rotate: {path} scales channels: fold_norms goes before")
        plain = nn.RMSNorm(module.normalized_shape, eps=module.eps, elementwise_affine=False)
        install(gm, path, plain)
    return centred(stream)


def _rotate_writer(gm: GraphModule, node: Node, rotation: Tensor, take_mean: bool) -> None:
    path = str(node.target)
    old = gm.get_submodule(path) if node.op == "call_module" else None
    if isinstance(old, LINEAR):
        weight, bias = linear_parameters(old)
        columns = [weight.double()] + ([] if bias is None else [bias.double()[:, None]])
        turned = [_turn(each.t(), rotation, take_mean).t() for each in columns]
        put_linear(gm, node, turned[0], None if bias is None else turned[1][:, 0])
        return
    if old is not None:
        assert isinstance(old, nn.Embedding)
        rows, width = old.weight.shape
        new = nn.Embedding(rows, width, padding_idx=old.padding_idx, device="meta")
        turned_weight = _turn(old.weight.detach().double(), rotation, take_mean)
        new.weight = nn.Parameter(turned_weight.to(old.weight.dtype), requires_grad=False)
        install(gm, path, new)
        return
    operand = table_of(node)
    table = get_tensor(gm, operand).detach()
    owner, _, name = str(operand.target).rpartition(".")
    turned_table = _turn(table.double(), rotation, take_mean).to(table.dtype)
    install(gm, owner, with_parameters(gm.get_submodule(owner), **{name: turned_table}))


def _turn(rows: Tensor, rotation: Tensor, take_mean: bool) -> Tensor:
    """Rows [n, width] of the stream in the new basis, without their means where norms took them."""
    if take_mean:
        rows = rows - rows.mean(-1, keepdim=True)
    return rows @ rotation.to(rows.device)
