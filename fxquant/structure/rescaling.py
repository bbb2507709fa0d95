"""Move a scale through the graph: divide at the producer, multiply the consumers' columns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import NonFiniteError, VerificationError
from fxquant.ir.builder import Builder
from fxquant.ir.graph import float_dtype, install, linear_parameters
from fxquant.ir.leaves import InverseScale
from fxquant.ir.weights import install_weight, with_parameters
from fxquant.structure.absorption import ScaleGroup
from fxquant.structure.scale_paths import Producer

CONTAINER = "fxquant_scales"


def rescale(gm: GraphModule, group: ScaleGroup, scale: Tensor, origin: str) -> None:
    """Divide the group's channels by ``scale`` float [channels] and undo it in the consumers.

    Channels that no consumer reads, such as queries and keys of a fused projection, stay.
    Products are computed in fp32 and rounded once to each parameter's dtype. Where the group has
    no producer a ``mul`` node is placed on its input. Raises NonFiniteError for a scale that is
    not finite and positive, SchemeError (from install_weight) where codes were chosen already.
    """
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise NonFiniteError(
            f"{origin}: {group.names()}: a scale is not finite and positive: the statistics or "
            "weights behind it are damaged"
        )
    read = torch.cat([consumer.columns for consumer in group.consumers]).unique().to(scale.device)
    scale = torch.ones_like(scale).index_copy_(0, read, scale[read]).float()
    for consumer in group.consumers:
        path = consumer.site.path
        weight, bias = linear_parameters(gm.get_submodule(path))
        factors = scale[consumer.columns.to(scale.device)]
        install_weight(gm, path, weight.float() * factors, bias, origin)
    if group.producer is None:
        _insert(gm, group, scale, origin)
    else:
        _divide(gm, group.producer, scale, origin)


def _divide(gm: GraphModule, producer: Producer, scale: Tensor, origin: str) -> None:
    if producer.kind == "vector":
        owner, _, name = producer.path.rpartition(".")
        module = gm.get_submodule(owner)
        vector = module.get_parameter(name).detach()
        divided = (vector.float() + producer.offset) / scale - producer.offset
        install(gm, owner, with_parameters(module, **{name: divided.to(vector.dtype)}))
        return
    module = gm.get_submodule(producer.path)
    if producer.kind == "rows":
        weight, bias = linear_parameters(module)
        moved = None if bias is None else bias.float() / scale
        install_weight(gm, producer.path, weight.float() / scale[:, None], moved, origin)
        return
    install(gm, producer.path, _divided_norm(module, scale, float_dtype(gm)))


def _divided_norm(module: nn.Module, scale: Tensor, dtype: torch.dtype) -> nn.Module:
    """A norm whose output is divided by ``scale``; one without a gain gets one, of ``dtype``."""
    gain, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    weight = gain.detach() if isinstance(gain, Tensor) else torch.ones_like(scale, dtype=dtype)
    values: dict[str, Tensor | None] = {"weight": (weight.float() / scale).to(weight.dtype)}
    if isinstance(bias, Tensor):
        values["bias"] = (bias.detach().float() / scale).to(bias.dtype)
    other = with_parameters(module, **values)
    setattr(other, "elementwise_affine", True)  # noqa: B010  (nn.Module types it as a tensor)
    return other


def _insert(gm: GraphModule, group: ScaleGroup, scale: Tensor, origin: str) -> None:
    first = group.consumers[0]
    path = f"{CONTAINER}.{origin}_{first.site.path.replace('.', '_')}"
    if f"{path}.values" in dict(gm.named_buffers()):
        raise VerificationError(f"{origin}: {first.site.path} has a multiplication already")
    weight, _ = linear_parameters(gm.get_submodule(first.site.path))
    install(gm, path, InverseScale((1 / scale).to(weight.dtype)))
    builder = Builder(gm, origin, first.site.path)
    source = group.source
    with gm.graph.inserting_before(first.node):
        values = builder.tensor(f"{path}.values", name="inverse_scale")
        scaled = builder.call(torch.mul, source, values, name="scaled")
    for consumer in group.consumers:
        consumer.node.replace_input_with(source, scaled)
