"""What the modules of transformers cannot hold, known of a float graph and a scheme."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.fx import GraphModule

from fxquant.errors import ModelError
from fxquant.exports.modules import MILDER, Modules
from fxquant.exports.target import Refusal
from fxquant.ir.graph import Site, info
from fxquant.schemes.scheme import Scheme
from fxquant.structure.residual import residual_stream
from fxquant.structure.rotations import centred


def kind_refusal(gm: GraphModule, sites: Iterable[Site]) -> tuple[str, Refusal] | None:
    """The first of ``sites``, linears, at which the model has no nn.Linear, with the reason.

    Raises ExportError for a graph without the config of its model.
    """
    modules = Modules.of(gm)
    for site in sites:
        kind = modules.kind(site.path)
        if kind is nn.Linear:
            continue
        found = "no module of that name" if kind is None else f"a {kind.__name__}"
        reason = f"it codes nn.Linear only, and {modules.name} has {found} there"
        return site.path, Refusal(reason, "ONNX (--to onnx)")
    return None


def repair_refusal(gm: GraphModule, scheme: Scheme) -> tuple[str, Refusal] | None:
    """What a repair of ``scheme`` would do to the float graph that no module of its model does,
    with its place; None where none is known before it has run."""
    for name, options in scheme.repairs:
        if name == "rotate":
            found = _rotation_refusal(gm, bool(dict(options).get("online", True)))
            if found is not None:
                return f"scheme {scheme}", found
        if name != "correct_bias":
            continue
        for site in info(gm).sites:
            coded = scheme.spec_for(site.path, site.role).weight is not None
            if coded and getattr(gm.get_submodule(site.path), "bias", None) is None:
                reason = "correct_bias would give it a bias, and the model's module there has none"
                return site.path, Refusal(reason, "the scheme without +correct_bias")
    return None


def _rotation_refusal(gm: GraphModule, online: bool) -> Refusal | None:
    try:
        of_layer_norms = centred(residual_stream(gm))
    except ModelError:
        return None  # rotate itself says why it cannot
    if of_layer_norms:
        reason = "rotate takes the means out of its LayerNorms, and the model's modules do not"
        return Refusal(reason, "the scheme without +rotate")
    if online:
        reason = "it rotates inputs by nodes of the graph, which no module of the model does"
        return Refusal(reason, MILDER["rotate_inputs"])
    return None
