"""What stands at each site of a quantized graph, read from its nodes, as an export needs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.errors import ExportError
from fxquant.ir.graph import Site, get_tensor, info, is_op, linear_sites
from fxquant.ir.leaves import QuantizedParameters
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.numerics.quantization import group_count
from fxquant.numerics.weight_codes import GLOBAL_SCALE, WeightCodes
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import SiteSpec, TensorSpec


@dataclass(frozen=True)
class CodedSite:
    """A linear whose weight is codes.

    ``output`` holds its output; ``quantize`` makes the codes of its input, None where that stays
    float. Sites that read one input share the node.
    """

    gm: GraphModule
    site: Site
    spec: SiteSpec
    output: Node

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def weight_spec(self) -> TensorSpec:
        assert self.spec.weight is not None
        return self.spec.weight

    @cached_property
    def quantize(self) -> Node | None:
        return _quantize_node(self.output)

    def codes(self) -> WeightCodes:
        """The weight's codes, unpacked, on the CPU; read on each call."""
        return codes_at(self.gm, self.path, self.weight_spec, self.site.shape[1])

    def bias(self) -> Tensor | None:
        value = getattr(self.gm.get_submodule(self.path), "bias", None)
        return None if value is None else value.detach().cpu()

    def static_input(self) -> tuple[Tensor, Tensor | None] | None:
        """Scale and zero point, 0-dim, of an input whose range is static; None for others."""
        if self.quantize is None:
            return None
        call = operands(self.quantize)
        if call.scale.op != "get_attr":
            return None
        node = getattr(call, "zero_point", None)  # which codes of integers alone have
        zero = None if node is None else get_tensor(self.gm, node).cpu()
        return get_tensor(self.gm, call.scale).cpu(), zero


def codes_at(gm: GraphModule, path: str, spec: TensorSpec, length: int) -> WeightCodes:
    """The codes, unpacked, on the CPU, of the weight [N, ``length``] at ``path``; an embedding's
    too."""
    held = gm.get_submodule(path)
    names = ("weight", "weight_scale", "weight_zero_point", GLOBAL_SCALE)
    found = {name: getattr(held, name).cpu() for name in names if hasattr(held, name)}
    return WeightCodes.read(found, spec, length)


def recorded_specs(gm: GraphModule) -> dict[str, SiteSpec]:
    """What the graph's records say of each path, embeddings too."""
    records = info(gm).site_records
    return {each.path: Scheme.parse(each.spec).spec for each in records if not each.operand}


def groups(spec: TensorSpec, length: int) -> int:
    """The group size of a weight whose rows have more than one group, else 0."""
    size = spec.group_size
    return size if size is not None and group_count(length, size) > 1 else 0


def coded_sites(gm: GraphModule) -> Iterator[CodedSite]:
    """The linears of ``gm``, level qdq or integer, whose weights are codes, in graph order."""
    specs = recorded_specs(gm)
    for site, node in linear_sites(gm):
        if isinstance(gm.get_submodule(site.path), QuantizedParameters):
            if site.path not in specs:
                raise ExportError(
                    f"{site.path}: the graph does not say what its codes mean (it has no record of "
                    "the site): convert the model again"
                )
            yield CodedSite(gm, site, specs[site.path], node)


def _quantize_node(output: Node) -> Node | None:
    """The node that makes the codes of a site's input, from the node that holds its output."""
    node = operands(output).y if is_op(output, OPS.add_bias.default) else output
    if is_op(node, OPS.rescale.default):
        codes = operands(operands(node).sums).x_codes
    else:
        x = operands(node).input
        if not is_op(x, OPS.dequantize.default):
            return None
        codes = operands(x).codes
        if is_op(codes, OPS.decode.default):
            codes = operands(codes).stored
    assert isinstance(codes, Node)
    return codes
