"""quantize: replace each site by quantize-dequantize on its input and integer weight codes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.errors import CalibrationError
from fxquant.ir.builder import Builder
from fxquant.ir.graph import (
    Level,
    Site,
    SiteRecord,
    info,
    install,
    leave_in_float,
    linear_parameters,
    site_outputs,
    source_of,
    update_info,
)
from fxquant.ir.leaves import QuantizedParameters
from fxquant.ir.legal_forms import OPS, erase_observers
from fxquant.ir.weights import site_codes
from fxquant.numerics.static_input import StaticRange, static_input
from fxquant.numerics.weight_codes import GLOBAL_SCALE, min_max_codes
from fxquant.passes.observe import observer_of
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass
from fxquant.schemes.scheme import Scheme, matches
from fxquant.schemes.specs import ActivationSpec, SiteSpec, TensorSpec
from fxquant.schemes.spelling import spell_site
from fxquant.structure.code_nodes import choose, decoded, input_codes, unpacked, weight_node
from fxquant.structure.product_sites import lower_product, operand_spec


@dataclass(frozen=True)
class Quantize(Pass):
    """Lower every site of the scheme to fake quantization (level qdq).

    before:  y = call_module layers.0.fc1(x)
    after:   x_q = quantize(x, scale, zero_point, qmin, qmax, int8)
             x_dq = dequantize(x_q, scale, zero_point)
             w = dequantize(weight codes, weight_scale, weight_zero_point)
             y = linear(x_dq, w, bias)

    Static scales come from the observers, which go away; dynamic ones from choose_qparams nodes.
    Sites that read one input with one spec share its codes. The float weight is dropped.
    """

    name = "quantize"
    requires = (Level.FLOAT, Level.OBSERVED)
    ensures = Level.QDQ
    effect = "lossy"

    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        context.scheme.check_overrides((site.path, site.role) for site in info(gm).sites)
        inputs = _Inputs(gm, {}, {})
        records: list[SiteRecord] = []
        for site, node in list(site_outputs(gm)):
            if site.role == "matmul":
                operands = operand_spec(context.scheme, site)
                if operands is None:
                    leave_in_float(gm, site.path, _why_float(site, context.scheme))
                else:
                    records += lower_product(gm, site, node, operands)
                continue
            spec = context.scheme.spec_for(site.path, site.role)
            if spec.weight is None:
                leave_in_float(gm, site.path, _why_float(site, context.scheme))
                continue
            if site.role == "embeddings":
                records.append(_lower_embedding(gm, site, node, spec.weight))
            else:
                records.append(_lower_linear(gm, site, node, spec, inputs))
        erase_observers(gm)
        update_info(gm, scheme=str(context.scheme), site_records=tuple(records))
        return gm


def _why_float(site: Site, scheme: Scheme) -> str:
    if any(matches(pattern, site.path, site.role) for pattern, _ in scheme.overrides):
        return "an override of the scheme leaves it in float"
    if site.role == "linear":
        return "the scheme quantizes no weights"
    return f"{site.role}: float unless the scheme's overrides name {site.role!r}"


@dataclass(frozen=True)
class _Inputs:
    """Quantized inputs, shared by the sites that read one node with one spec."""

    gm: GraphModule
    done: dict[tuple[Node, ActivationSpec], Node]
    records: dict[tuple[Node, ActivationSpec], StaticRange]

    def dequantized(
        self, builder: Builder, source: Node, spec: ActivationSpec, owner: QuantizedParameters
    ) -> Node:
        """The node of the dequantized input; static scales become buffers of ``owner``."""
        if (source, spec) in self.done:
            return self.done[source, spec]
        if spec.dynamic:
            scale, zero_point = choose(builder, source, spec.tensor)
        else:
            # Asked of the graph: the node that was observed may itself have been lowered since.
            observer = observer_of(self.gm, source)
            if observer is None:
                raise CalibrationError(
                    f"{builder.site}: its range is static, but its input was not observed; run "
                    "Observe and Calibrate before Quantize"
                )
            buffers, self.records[source, spec] = static_input(observer, spec)
            for name, value in buffers.items():
                owner.register_buffer(name, value)
            scale, zero_point = builder.attribute("input_scale"), None
            if spec.tensor.grid.has_zero_point:
                zero_point = builder.attribute("input_zero_point")
        numbers = input_codes(builder, source, spec.tensor, scale, zero_point)
        size = spec.tensor.group_size or 0
        result = builder.call(
            OPS.dequantize.default, numbers, scale, zero_point, size, source, name="x_dq"
        )
        self.done[source, spec] = result
        return result


def _lower_linear(
    gm: GraphModule, site: Site, node: Node, spec: SiteSpec, inputs: _Inputs
) -> SiteRecord:
    assert spec.weight is not None
    module = gm.get_submodule(site.path)
    weight, bias = linear_parameters(module)
    source = source_of(node)
    codes = site_codes(module, spec.weight, site.path)
    sqnr = codes.sqnr(weight)
    tensors = codes.tensors()
    if bias is not None:
        tensors["bias"] = bias
    parameters = QuantizedParameters(tensors)
    install(gm, site.path, parameters)
    builder = Builder(gm, Quantize.name, site.path, (node,))
    with gm.graph.inserting_before(node):
        x = source
        if spec.activation is not None:
            x = inputs.dequantized(builder, source, spec.activation, parameters)
        w = weight_node(builder, spec.weight, site.shape[1], source)
        b = None if bias is None else builder.attribute("bias")
        y = builder.call(nn.functional.linear, x, w, b, name="y", is_output=True)
    builder.replace(node, y)
    static = None if spec.activation is None else inputs.records.get((source, spec.activation))
    return SiteRecord(site.path, spell_site(spec), sqnr, **({} if static is None else vars(static)))


def _lower_embedding(gm: GraphModule, site: Site, node: Node, spec: TensorSpec) -> SiteRecord:
    """Look up codes and their scales, then dequantize only the rows found."""
    weight, _ = linear_parameters(gm.get_submodule(site.path))
    codes = min_max_codes(weight, spec, site.path)
    sqnr, tensors = codes.sqnr(weight), codes.tensors()
    install(gm, site.path, QuantizedParameters({**tensors, "like": weight.new_empty(0)}))
    builder = Builder(gm, Quantize.name, site.path, (node,))

    def rows(name: str) -> Node | None:
        if name not in tensors:
            return None
        table = builder.attribute(name)
        if tensors[name].dim() == 0:
            return table
        return builder.call(nn.functional.embedding, node.args[0], table, name=f"{name}_rows")

    with gm.graph.inserting_before(node):
        stored, scales = rows("weight"), rows("weight_scale")
        assert stored is not None
        assert scales is not None
        y = builder.call(
            OPS.dequantize.default,
            unpacked(builder, spec.grid, stored, site.shape[1]),
            decoded(builder, scales, rows(GLOBAL_SCALE), spec, "w_scale"),
            rows("weight_zero_point"),
            spec.group_size or 0,
            builder.attribute("like"),
            name="y",
            is_output=True,
        )
    builder.replace(node, y)
    return SiteRecord(site.path, spell_site(SiteSpec(spec)), sqnr)
