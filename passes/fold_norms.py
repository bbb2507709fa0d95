"""fold_norms: move every norm's gain and bias into the linears that read it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from torch.fx import GraphModule

from fxquant.ir.graph import Level, Site, info, install, update_info
from fxquant.ir.operands import operands
from fxquant.ir.weights import with_parameters
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass
from fxquant.structure.residual import residual_stream
from fxquant.structure.rotations import check_rotatable, put_linear, weights_of
from fxquant.structure.stream import Norm


@dataclass(frozen=True)
class FoldNorms(Pass):
    """What QuaRot (Ashkboos et al. 2024, section 4) does first: norms that scale no channel.

    before:  y = fc1(layer_norm(h))        gain g, bias b
    after:   y = fc1(layer_norm(h))        no gain, no bias; fc1: W diag(g), bias + W b

    The bias goes into every reader, once each. Raises ModelError, naming the node, where the
    structure does not allow the stream to be rotated afterwards.
    """

    name = "fold_norms"
    requires = (Level.FLOAT,)
    effect = "equivalent"

    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        stream = residual_stream(gm)
        check_rotatable(gm, stream)
        for norm in stream.norms:
            _fold(gm, norm)
        update_info(gm, sites=tuple(_with_its_bias(gm, site) for site in info(gm).sites))
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        return gm


def _fold(gm: GraphModule, norm: Norm) -> None:
    if norm.gain is None and norm.bias is None:
        return
    if norm.call is None:
        norm.node.replace_all_uses_with(norm.normed)
        gm.graph.erase_node(norm.node)
    elif norm.call.op == "call_module":
        path = str(norm.call.target)
        module = gm.get_submodule(path)
        assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
        plain = with_parameters(module, **dict.fromkeys(module._parameters))
        plain.elementwise_affine = False
        install(gm, path, plain)
    else:
        call = operands(norm.call)
        norm.call.args = (call.input, call.normalized_shape)
        norm.call.kwargs = {"eps": call.eps}
    for node in norm.readers:
        weight, old = weights_of(gm, node)
        folded = weight.double()
        new = None if old is None else old.double()
        if norm.bias is not None:
            shift = folded @ norm.bias.detach().double()
            new = shift if new is None else new + shift
        if norm.gain is not None:
            folded = folded * norm.gain.detach().double()
        put_linear(gm, node, folded, new)


def _with_its_bias(gm: GraphModule, site: Site) -> Site:
    """The site as it is once a norm's bias is folded: the verifier guards a bias that it names."""
    if site.role not in ("linear", "head"):
        return site
    return replace(site, bias=gm.get_submodule(site.path).bias is not None)
