"""The parts of a quantized site's form: its weight, its input, where their scales are from."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.errors import CheckpointError
from fxquant.formats.integer import IntegerGrid
from fxquant.formats.scales import FP32
from fxquant.ir.graph import Site, SiteRecord, get_tensor, is_op
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.numerics.weight_codes import GLOBAL_SCALE
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import ActivationSpec, TensorSpec
from fxquant.structure.code_nodes import by_integers


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


class SiteParts:
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

    def _same(self, one: object, other: object) -> None:
        if one is not other:
            self.fail(f"{one} stands beside {other}")

    def _weight(self, codes: object, scale: object, shift: object, spec: TensorSpec) -> None:
        """Codes, scale and zero point of the site's own weight."""
        self._own(codes, "weight")
        named = operands(codes).grid if is_op(codes, OPS.decode.default) else None
        if named is not None and named != spec.grid.name:
            self.fail(f"its weight in {named}")
        self._weight_scale(scale, spec)
        self._own(shift, "weight_zero_point", spec.grid.has_zero_point)

    def _weight_scale(self, scale: object, spec: TensorSpec) -> None:
        if spec.scale != FP32:
            call = operands(self._is(scale, OPS.decode_scales.default))
            self._own(call.global_scale, GLOBAL_SCALE, spec.scale.two_level)
            self._format(call.scale, spec)
            scale = call.stored
        self._own(scale, "weight_scale")

    def _format(self, name: object, spec: TensorSpec) -> None:
        if name != spec.scale.name:
            self.fail(f"scales in {name}")

    def _groups(self, size: object, spec: TensorSpec) -> None:
        if type(size) is not int or size != (spec.group_size or 0):
            self.fail(f"groups of {size!r}")

    def _input(
        self, codes: object, scale: object, shift: object, spec: ActivationSpec, operand: str = ""
    ) -> None:
        """The codes of its input: their ends, their scale and zero point, and where those are
        from."""
        grid = spec.tensor.grid
        if by_integers(spec.tensor):
            made = self._is(codes, OPS.quantize.default)
            call = operands(made)
            self._same(call.zero_point, shift)
            if (call.qmin, call.qmax) != grid.codes:
                self.fail(f"codes {call.qmin!r}..{call.qmax!r} of its input")
        else:
            made = self._is(codes, OPS.quantize_to.default)
            call = operands(made)
            if call.grid != grid.name:
                self.fail(f"its input in {call.grid}")
            self._groups(call.group_size, spec.tensor)
        self._same(call.scale, scale)
        self.seen.add(made)
        if spec.dynamic:
            self._chosen(call.x, scale, shift, spec.tensor)
        else:
            self._recorded(scale, shift, operand)

    def _decoded(self, numbers: object, spec: TensorSpec) -> object:
        """The codes behind an input's numbers."""
        if by_integers(spec):
            return numbers
        call = operands(self._is(numbers, OPS.decode.default))
        if (call.grid, call.length) != (spec.grid.name, 0):
            self.fail(f"its input in {call.grid}")
        return call.stored

    def _chosen(self, x: Node, scale: object, shift: object, spec: TensorSpec) -> None:
        grid = spec.grid
        wanted: tuple[Any, ...] = (x, spec.granularity)
        if spec.group_size is not None:
            chosen, wanted = self._chosen_groups(x, scale, spec)
        elif isinstance(grid, IntegerGrid):
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

    def _chosen_groups(
        self, x: Node, scale: object, spec: TensorSpec
    ) -> tuple[Node, tuple[Any, ...]]:
        """The node that chooses scales of groups, and what its operands are to be."""
        shared, names = None, (spec.grid.name, spec.scale.name)
        if spec.scale != FP32:
            call = operands(self._is(scale, OPS.decode_scales.default))
            self._format(call.scale, spec)
            scale, shared = call.stored, call.global_scale
        if spec.scale.two_level:
            own = self._is(shared, OPS.choose_global_scale.default)
            self.seen.add(own)
            if tuple(vars(operands(own)).values()) != (x, *names):
                self.fail("what its groups share is chosen otherwise")
        else:
            self._same(shared, None)
        chosen = self._is(scale, OPS.choose_group_scales.default)
        return chosen, (x, shared, *names, spec.group_size)

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
