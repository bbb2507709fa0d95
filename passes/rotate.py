"""rotate: turn the residual stream, and what enters each MLP's last linear, into another basis."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import ModelError, SchemeError
from fxquant.graph import (
    LINEAR,
    Builder,
    CodedLinear,
    Level,
    Site,
    add_note,
    get_tensor,
    info,
    install,
    linear_parameters,
    source_of,
    tag,
    update_info,
)
from fxquant.hadamard import orthogonal_factors, random_signs
from fxquant.repair import Repair
from fxquant.residual import Norm, ResidualStream, residual_stream

CONTAINER = "fxquant_rotations"


class OnlineRotation(nn.Module):
    """``x @ kron(left, right)`` over the last dimension, by the two factors; orthogonal."""

    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (self.left.shape[0], self.right.shape[0]))
        return torch.matmul(self.left.t(), torch.matmul(parts, self.right)).flatten(-2)


@dataclass(frozen=True)
class Rotate(Repair):
    """QuaRot (Ashkboos et al. 2024): outlier channels are spread over all by orthogonal matrices.

    before:  h = embedding(ids);  y = fc1(layer_norm(h));  h = h + fc2(act(y))
    after:   h' = h Q;  y = fc1'(rms_norm(h'));  h' = h' + fc2'(rotation(act(y)))

    Norms commute with rotations once they neither scale channels nor subtract a mean. So gains
    and biases go into every linear that reads the norm; the mean is taken out of everything that
    writes to the stream (SliceGPT, Ashkboos et al. 2024, section 3.2). Then writers W -> Q^T W,
    readers W -> W Q; a tied head is untied. Q is a Hadamard matrix with random signs where the
    width has one, else a random orthogonal. ``online``: a node rotates the input of each linear
    that ends an MLP, whose weight takes the inverse.

    Raises ModelError, naming the node, where the structure does not allow it.
    """

    seed: int = 0
    online: bool = True
    name = "rotate"
    requires = (Level.FLOAT,)
    effect = "equivalent"
    needs_calibration = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise SchemeError(
                f"rotate: seed is a whole number from 0 to 2**64 - 1, not {self.seed}"
            )

    @property
    def keeps_site_outputs(self) -> bool:
        return False  # the same stream in other coordinates

    def rewrite(self, gm: GraphModule) -> GraphModule:
        stream = residual_stream(gm)
        _check(gm, stream)
        centred = _centred(stream)
        for norm in stream.norms:
            _fold(gm, norm)
        update_info(gm, sites=tuple(_with_its_bias(gm, site) for site in info(gm).sites))
        left, right, hadamard = orthogonal_factors(stream.width, self.seed)
        rotation = random_signs(stream.width, self.seed)[:, None] * torch.kron(left, right)
        for node in stream.writers:
            _rotate_writer(gm, node, rotation, centred)
        for node in (*stream.readers, *(r for norm in stream.norms for r in norm.readers)):
            weight, bias = linear_parameters(_linear(gm, node))
            _put(gm, node, weight.double() @ rotation.to(weight.device), bias)
        kind = "Hadamard" if hadamard else "random orthogonal"
        add_note(gm, self.name, "residual stream", f"{kind} of width {stream.width}")
        if self.online:
            for node in stream.writers:
                if _ends_mlp(gm, node):
                    _rotate_input(gm, node, self.seed)
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        return gm


def _linear(gm: GraphModule, node: Node) -> nn.Module:
    return gm.get_submodule(str(node.target))


def _put(gm: GraphModule, node: Node, weight: Tensor, bias: Tensor | None) -> None:
    """Install a linear of ``weight`` [N, K] in the dtype of the one that stands there."""
    old, _ = linear_parameters(_linear(gm, node))
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(old.dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(old.dtype), requires_grad=False)
    install(gm, str(node.target), linear)


def _check(gm: GraphModule, stream: ResidualStream) -> None:
    readers = [*stream.readers, *(r for norm in stream.norms for r in norm.readers)]
    calls = [str(node.target) for node in gm.graph.nodes if node.op in ("call_module", "get_attr")]
    for node in (*stream.writers, *readers):
        path = str(node.target) if node.op == "call_module" else str(_table(node).target)
        if calls.count(path) > 1:
            raise ModelError(f"rotate: {path} is used more than once; it is not rotated")
        if node.op == "call_module" and isinstance(_linear(gm, node), CodedLinear):
            raise ModelError(f"rotate: {path}: its codes are chosen already; rotate before that")


def _table(node: Node) -> Node:
    """The weight of a functional embedding."""
    operand = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    assert isinstance(operand, Node)
    return operand


def _centred(stream: ResidualStream) -> bool:
    """Whether the norms subtract the mean; ModelError where some do and some do not."""
    means = {norm.layer_norm is not None for norm in stream.norms}
    if len(means) > 1 or (True in means and stream.readers):
        raise ModelError(
            "rotate: some readers of the residual stream subtract its mean and some do not; the "
            "mean cannot be moved into what writes to it"
        )
    return means == {True}


def _fold(gm: GraphModule, norm: Norm) -> None:
    """Move the norm's gain and bias into all its readers; what is left is a plain RMS norm."""
    gain, bias = norm.gain, None
    if norm.layer_norm is not None:
        module = gm.get_submodule(str(norm.layer_norm.target))
        assert isinstance(module, nn.LayerNorm)
        gain, bias = module.weight, module.bias
        plain = nn.RMSNorm(module.normalized_shape, eps=module.eps, elementwise_affine=False)
        install(gm, str(norm.layer_norm.target), plain)
    elif gain is not None:
        norm.node.replace_all_uses_with(norm.normed)
        gm.graph.erase_node(norm.node)
    for node in norm.readers:
        weight, old = linear_parameters(_linear(gm, node))
        folded = weight.double()
        new = None if old is None else old.double()
        if bias is not None:
            shift = folded @ bias.detach().double()
            new = shift if new is None else new + shift
        if gain is not None:
            folded = folded * gain.detach().double()
        _put(gm, node, folded, new)


def _with_its_bias(gm: GraphModule, site: Site) -> Site:
    """The site as it is once a norm's bias is folded: the verifier guards a bias that it names."""
    if site.role not in ("linear", "head"):
        return site
    return replace(site, bias=gm.get_submodule(site.path).bias is not None)


def _rotate_writer(gm: GraphModule, node: Node, rotation: Tensor, centred: bool) -> None:
    if node.op == "call_module" and isinstance(_linear(gm, node), LINEAR):
        weight, bias = linear_parameters(_linear(gm, node))
        columns = [weight.double()] + ([] if bias is None else [bias.double()[:, None]])
        turned = [_turn(each.t(), rotation, centred).t() for each in columns]
        _put(gm, node, turned[0], None if bias is None else turned[1][:, 0])
        return
    if node.op == "call_module":
        old = _linear(gm, node)
        assert isinstance(old, nn.Embedding)
        rows, width = old.weight.shape
        new = nn.Embedding(rows, width, padding_idx=old.padding_idx, device="meta")
        turned_weight = _turn(old.weight.detach().double(), rotation, centred)
        new.weight = nn.Parameter(turned_weight.to(old.weight.dtype), requires_grad=False)
        install(gm, str(node.target), new)
        return
    operand = _table(node)
    table = get_tensor(gm, operand).detach()
    owner, _, name = str(operand.target).rpartition(".")
    turned_table = _turn(table.double(), rotation, centred).to(table.dtype)
    setattr(gm.get_submodule(owner), name, nn.Parameter(turned_table, requires_grad=False))


def _turn(rows: Tensor, rotation: Tensor, centred: bool) -> Tensor:
    """Rows [n, width] of the stream in the new basis, without their means where norms took them."""
    if centred:
        rows = rows - rows.mean(-1, keepdim=True)
    return rows @ rotation.to(rows.device)


_PRODUCTS = ("scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum")


def _ends_mlp(gm: GraphModule, node: Node) -> bool:
    """A linear of a block whose input comes from linears, but through no attention product."""
    if node.op != "call_module" or not isinstance(_linear(gm, node), LINEAR):
        return False
    if not any(str(node.target).startswith(f"{block}.") for block in info(gm).blocks):
        return False
    seen, stack = set(), [source_of(node)]
    while stack:
        current = stack.pop()
        if current in seen or (
            current.op == "call_module" and isinstance(_linear(gm, current), LINEAR)
        ):
            continue
        seen.add(current)
        target = current.target
        if (target if isinstance(target, str) else getattr(target, "__name__", "")) in _PRODUCTS:
            return False
        stack.extend(current.all_input_nodes)
    return True


def _rotate_input(gm: GraphModule, node: Node, seed: int) -> None:
    path = str(node.target)
    weight, bias = linear_parameters(_linear(gm, node))
    width = weight.shape[1]
    left, right = (each.to(weight.device) for each in orthogonal_factors(width, seed)[:2])
    # Row by row W kron(left, right), without the [K, K] matrix.
    square = weight.double().unflatten(1, (left.shape[0], right.shape[0]))
    turned = (square.transpose(1, 2) @ left).transpose(1, 2) @ right
    _put(gm, node, turned.flatten(1), bias)
    name = f"{CONTAINER}.width{width}_seed{seed}"
    if name not in dict(gm.named_modules()):  # one for all layers of the width
        install(gm, name, OnlineRotation(left.to(weight.dtype), right.to(weight.dtype)))
    builder = Builder(gm, Rotate.name, tag(node).site or path)
    with gm.graph.inserting_before(node):
        rotated = builder.module(name, source_of(node), name="rotated")
    node.replace_input_with(source_of(node), rotated)
