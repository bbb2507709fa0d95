"""What the nodes of each site do, read back from the graph and compared with its scheme.

A scheme's text is printed as what the graph computes: so its sites are the forms that quantize and
integerize write for that text, over the site's own codes, scales and recorded range.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.checkpoint.saved_specs import expected_specs
from fxquant.errors import CheckpointError
from fxquant.formats.integer import IntegerGrid
from fxquant.ir.graph import Level, Site, SiteRecord, get_tensor, info, is_op, site_outputs
from fxquant.ir.leaves import Conv1D, Fp32Linear, QuantizedParameters
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import ActivationSpec, TensorSpec
from fxquant.structure.product_sites import operand_spec

_CODES = (OPS.quantize.default, OPS.quantize_to.default)
_CHOICES = (OPS.choose_qparams.default, OPS.choose_scale.default)


def check_forms(gm: GraphModule) -> None:
    """Raise CheckpointError, with the site, where its nodes are not what the scheme says.

    At levels qdq and integer: bits, zero points, granularity, groups, whether a range is static and
    the scale it is recorded with; at all levels the shapes of what stays float.
    """
    facts = info(gm)
    scheme = Scheme.parse(facts.scheme)
    found = Counter(site.path for site, _ in site_outputs(gm))
    for path, count in found.items():
        if count > 1:
            raise CheckpointError(f"{path}: {count} nodes are its output")
    records = {(each.path, each.operand): each for each in facts.site_records}
    coded = facts.level in (Level.QDQ, Level.INTEGER)
    seen: set[Node] = set()
    for site, node in site_outputs(gm):
        _Form(gm, site, scheme, records, seen).check(node, coded)
    for node in gm.graph.nodes:
        if node.target in (*_CODES, *_CHOICES) and node not in seen:
            raise CheckpointError(f"node {node.name}: codes of an input that is no site's")
    _check_cache(gm)


def _check_cache(gm: GraphModule) -> None:
    """A cache is stored in the bits of the pass that is said to have run."""
    ran = {record.name for record in info(gm).history}
    stored = [node for node in gm.graph.nodes if is_op(node, OPS.store_kv.default)]
    for node in stored:
        if f"kv{operands(node).bits}" not in ran:
            raise CheckpointError(
                f"node {node.name}: a cache of {operands(node).bits!r} bits, and no pass "
                f"kv{operands(node).bits} is in the graph's history"
            )
    for name in ran & {"kv4", "kv8"}:
        if not any(operands(node).bits == int(name[2:]) for node in stored):
            raise CheckpointError(f"info: {name} is in the history, but nothing stores its cache")


def _stored(node: object) -> str:
    """Path of the tensor that is read, flattened, unpacked or looked up in; "" for another node."""
    while isinstance(node, Node) and node.op == "call_function":
        if is_op(node, OPS.unpack_int4.default):
            node = operands(node).packed
        elif is_op(node, OPS.decode.default):
            node = operands(node).stored
        elif is_op(node, nn.functional.embedding):
            node = operands(node).weight
        elif is_op(node, torch.flatten):
            node = node.args[0]
        else:
            return ""
    return str(node.target) if isinstance(node, Node) and node.op == "get_attr" else ""


class _Form:
    """One site. ``seen``: the nodes that make codes of inputs, of all sites that were checked."""

    def __init__(
        self,
        gm: GraphModule,
        site: Site,
        scheme: Scheme,
        records: dict[tuple[str, str], SiteRecord],
        seen: set[Node],
    ) -> None:
        self.gm, self.site, self.scheme = gm, site, scheme
        self.records, self.seen = records, seen

    def check(self, node: Node, coded: bool) -> None:
        if self.site.role == "matmul":
            own = operand_spec(self.scheme, self.site) if coded else None
            if own is not None:
                self._product(node)
            return
        spec = self.scheme.spec_for(self.site.path, self.site.role)
        if not coded or spec.weight is None:
            self._float(node)
        elif self.site.role == "embeddings":
            self._weight(operands(self._is(node, OPS.dequantize.default)), spec.weight)
        elif (
            spec.activation is None
            or info(self.gm).level == Level.QDQ
            or not isinstance(spec.weight.grid, IntegerGrid)
            or not isinstance(spec.activation.tensor.grid, IntegerGrid)
        ):
            self._linear(node, spec.weight, spec.activation)
        else:
            self._integer(node, spec.weight, spec.activation)

    def fail(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self.site.path}: {what}, which is not what scheme {self.scheme} means there; the "
            "file was changed or is damaged"
        )

    def _is(self, node: object, *targets: Any) -> Node:
        if not (isinstance(node, Node) and node.target in targets):
            found = getattr(node, "target", node)
            self.fail(f"{getattr(node, 'name', 'an operand')} is {str(found)[:80]}")
        return node

    def _own(self, node: object, name: str, wanted: bool = True) -> None:
        """Whether ``node`` reads the site's own tensor, or is None where there is none."""
        path = f"{self.site.path}.{name}"
        if (_stored(node) != path) if wanted else node is not None:
            self.fail(f"{_stored(node) or node} stands for its {name}")

    def _float(self, node: Node) -> None:
        module = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is None or node.target != self.site.path:
            self.fail("its output is not that of its float module")
        fp32 = self.scheme.fp32_gemm and self.site.role == "linear"
        if isinstance(module, QuantizedParameters) or isinstance(module, Fp32Linear) is not fp32:
            self.fail(f"its module is a {type(module).__name__}")
        weight = module.weight
        assert isinstance(weight, Tensor)
        shape = tuple(weight.shape)[:: -1 if isinstance(module, Conv1D) else 1]
        if shape != self.site.shape:
            self.fail(f"a weight of {list(shape)}, recorded as {list(self.site.shape)}")

    def _weight(self, call: Any, spec: TensorSpec) -> None:
        """Codes, scale, zero point and groups, by a dequantize's or a GEMM's operands."""
        names = vars(call)
        codes = names["codes"] if "codes" in names else names["weight_codes"]
        scale = names["scale"] if "codes" in names else names["weight_scale"]
        shift = names["zero_point"] if "codes" in names else names["weight_zero_point"]
        self._own(codes, "weight")
        self._own(scale, "weight_scale")
        self._own(shift, "weight_zero_point", spec.grid.has_zero_point)
        if call.group_size != (spec.group_size or 0):
            self.fail(f"groups of {call.group_size!r}")

    def _bias(self, node: object) -> None:
        self._own(node, "bias", self.site.bias)

    def _linear(self, node: Node, weight: TensorSpec, spec: ActivationSpec | None) -> None:
        call = operands(self._is(node, nn.functional.linear))
        self._weight(operands(self._is(call.weight, OPS.dequantize.default)), weight)
        self._bias(call.bias)
        codes = operands(call.input).codes if is_op(call.input, OPS.dequantize.default) else None
        if spec is not None:
            self._dequantized(call.input, spec)
        elif is_op(codes, OPS.quantize.default):
            self.fail("its input is rounded to codes")

    def _dequantized(self, node: object, spec: ActivationSpec) -> None:
        call = operands(self._is(node, OPS.dequantize.default))
        self._input(call.codes, call.scale, call.zero_point, spec)
        if call.group_size != 0:
            self.fail(f"groups of {call.group_size!r} in its input")

    def _integer(self, node: Node, weight: TensorSpec, spec: ActivationSpec) -> None:
        result = node
        if self.site.bias:
            call = operands(self._is(node, OPS.add_bias.default))
            self._bias(call.bias)
            result = call.y
        found = operands(self._is(result, OPS.rescale.default))
        grouped = weight.group_size is not None
        kernel = OPS.grouped_gemm.default if grouped else OPS.int_gemm.default
        gemm = operands(self._is(found.sums, kernel))
        shifted, moved = spec.tensor.grid.has_zero_point, weight.grid.has_zero_point
        if grouped:
            self._weight(gemm, weight)
            self._own(gemm.weight_sum, "weight_sum", shifted)
            zero_point = gemm.zero_point
            rest = (found.weight_scale, found.zero_point, found.weight_sum, found.x_sum)
            if any(each is not None for each in (*rest, found.weight_zero_point)):
                self.fail("it is corrected twice")
        else:
            self._own(gemm.weight_codes, "weight")
            self._own(found.weight_scale, "weight_scale")
            self._own(found.weight_zero_point, "weight_zero_point", moved)
            self._own(found.weight_sum, "weight_sum", shifted)
            zero_point = found.zero_point
            if moved:
                sums = operands(self._is(found.x_sum, OPS.code_sum.default))
                self._same(sums.codes, gemm.x_codes)
            else:
                self._same(found.x_sum, None)
        self._input(gemm.x_codes, found.scale, zero_point, spec)

    def _product(self, node: Node) -> None:
        integer = info(self.gm).level == Level.INTEGER
        if integer:
            found = operands(self._is(node, OPS.rescale.default))
            product = self._is(found.sums, OPS.int_matmul.default)
            sides = [(operands(product).left_codes, found.scale)]
            sides += [(operands(product).right_codes, found.weight_scale)]
            if found.zero_point is not None or found.x_sum is not None:
                self.fail("it is corrected by zero points")
        else:
            call = operands(self._is(node, torch.matmul))
            both = [operands(self._is(x, OPS.dequantize.default)) for x in (call.input, call.other)]
            sides = [(each.codes, each.scale) for each in both]
        for operand, (codes, scale) in zip(("left", "right"), sides, strict=True):
            text = self.records[self.site.path, operand].spec
            own = dict(dict(expected_specs(self.scheme, self.site))[operand])[text]
            assert own is not None
            self._input(_turned(codes), _turned(scale), None, own, operand)

    def _same(self, one: object, other: object) -> None:
        if one is not other:
            self.fail(f"{one} stands beside {other}")

    def _input(
        self, codes: object, scale: object, shift: object, spec: ActivationSpec, operand: str = ""
    ) -> None:
        """The codes of its input: their ends, their scale and zero point, and where those are
        from."""
        grid = spec.tensor.grid
        if isinstance(grid, IntegerGrid):
            made = self._is(codes, OPS.quantize.default)
            call = operands(made)
            self._same(call.zero_point, shift)
            if (call.qmin, call.qmax) != grid.codes:
                self.fail(f"codes {call.qmin!r}..{call.qmax!r} of its input")
        else:
            decoded = operands(self._is(codes, OPS.decode.default))
            made = self._is(decoded.stored, OPS.quantize_to.default)
            call = operands(made)
            if {decoded.grid, call.grid} != {grid.name}:
                self.fail(f"its input in {call.grid}")
        self._same(call.scale, scale)
        self.seen.add(made)
        if spec.dynamic:
            self._chosen(call.x, scale, shift, spec.tensor)
        else:
            self._recorded(scale, shift, operand)

    def _chosen(self, x: Node, scale: object, shift: object, spec: TensorSpec) -> None:
        grid = spec.grid
        wanted: tuple[Any, ...] = (x, spec.granularity)
        if isinstance(grid, IntegerGrid):
            chosen = self._item(scale, 0)
            wanted += (not grid.has_zero_point, *grid.codes)
            if grid.has_zero_point:
                self._same(self._item(shift, 1), chosen)
        else:
            chosen = self._is(scale, OPS.choose_scale.default)
            wanted += (grid.name,)
        self._same(None if grid.has_zero_point else shift, None)
        self.seen.add(chosen)
        found = tuple(vars(operands(chosen)).values())
        if found != wanted:
            self.fail(f"its dynamic range is by {found[1:]}")

    def _item(self, node: object, index: int) -> Node:
        item = self._is(node, operator.getitem)
        if item.args[1] != index:
            self.fail(f"{item.name} is item {item.args[1]!r}")
        return self._is(item.args[0], OPS.choose_qparams.default)

    def _recorded(self, scale: object, shift: object, operand: str) -> None:
        """A static scale is that of the site's own record; sites that read one input share it."""
        record = self.records[self.site.path, operand]
        name = f"{operand or 'input'}_scale"
        owner, _, last = _stored(scale).rpartition(".")
        if last != name or (operand and owner != self.site.path):
            self.fail(f"the scale of its input is {_stored(scale) or scale}")
        assert isinstance(scale, Node)
        value = float(get_tensor(self.gm, scale))
        if record.scale != value:
            self.fail(f"the scale {value:g} of its input is recorded as {record.scale}")
        if isinstance(shift, Node):
            if _stored(shift) != f"{owner}.input_zero_point":
                self.fail(f"the zero point of its input is {_stored(shift) or shift}")
            if record.zero_point != int(get_tensor(self.gm, shift)):
                self.fail(f"its zero point is recorded as {record.zero_point}")
        elif shift is not None or record.zero_point:
            self.fail("it has no zero point")


def _turned(node: object) -> object:
    """What is transposed, if anything is."""
    return node.args[0] if is_op(node, torch.transpose) else node
