"""Sites of an observed graph, each able to run with any subset of its error parts."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.analysis.int8_product import Int8Product, int8_product
from fxquant.analysis.parts import Cause, Parts, ordered, with_parts
from fxquant.analysis.simulated_weight import SimulatedWeight
from fxquant.errors import SchemeError
from fxquant.ir.blocks import block_of, within
from fxquant.ir.graph import LINEAR, Site, info, linear_parameters, site_outputs, source_of
from fxquant.ir.leaves import CodedLinear
from fxquant.ir.weights import site_codes
from fxquant.numerics.observers import HistogramObserver
from fxquant.numerics.quantizer import Quantizer
from fxquant.numerics.static_input import static_quantizer
from fxquant.passes.observe import observers
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import FLOAT, ActivationSpec, SiteSpec
from fxquant.structure.product_sites import (
    is_transposed,
    operand_observer,
    operand_spec,
    operand_specs,
)


@dataclass(frozen=True, eq=False)
class SimulatedSite(abc.ABC):
    """A quantized site as a function of its input and of the error parts that are let in.

    Attributes:
        site: path, role and weight shape [N, K].
        node: the node that holds its output in the float graph.
        causes: the parts its error can have; a product of two activations has no "weights".
    """

    site: Site
    node: Node
    causes: tuple[Cause, ...]

    @property
    def path(self) -> str:
        return self.site.path

    @abc.abstractmethod
    def output(self, parts: Parts, *operands: Tensor) -> Tensor:
        """The site's output [..., N]: that of the float graph for no part, of qdq for all.

        ``operands``: its input, or the two factors of a product.
        """

    @abc.abstractmethod
    def errors(self, *operands: Tensor) -> dict[Cause, Tensor]:
        """The exact parts of quantized minus float output, for what arrives: [..., N] each.

        weights x (Ŵ - W)^T, clipping (clip(x) - x) Ŵ^T, rounding (x̂ - clip(x)) Ŵ^T. Where scales
        are rounded themselves, what that changes of the weights' and of rounding's part is "scale",
        and what it clips of W is "clipping". A part that is zero everywhere is left out.
        """

    def by_token(self, values: Tensor) -> Tensor:
        """Sums of ``values``, of the output's shape, over all but batch and token: [b * L]."""
        return values.sum(-1).flatten()


@dataclass(frozen=True, eq=False)
class LinearSite(SimulatedSite):
    """A linear, and the quantizer of its input.

    ``product8``: computes the output with every part, where that is faster.
    """

    simulated: SimulatedWeight
    bias: Tensor | None
    quantizer: Quantizer | None
    spec: SiteSpec
    observer: HistogramObserver | None
    product8: Int8Product | None = None

    def output(self, parts: Parts, *operands: Tensor) -> Tensor:
        (x,) = operands
        whole = parts >= frozenset(self.causes)
        if self.product8 is not None and self.quantizer is not None and whole:
            return self.product8(self.quantizer, x, self.bias)
        if self.quantizer is not None:
            x = with_parts(self.quantizer, x, parts)
        return nn.functional.linear(x, self.simulated.under(parts), self.bias)

    @property
    def weight(self) -> Tensor:
        return self.simulated.float_

    @property
    def coded_weight(self) -> Tensor:
        return self.simulated.coded

    def weight_errors(self) -> dict[Cause, Tensor]:
        """The parts of Ŵ - W [N, K]."""
        return self.simulated.errors()

    def product(self, x: Tensor) -> Tensor:
        """x W^T, without the bias."""
        return nn.functional.linear(x, self.weight)

    def input_errors(self, x: Tensor) -> dict[Cause, Tensor]:
        """The parts of x̂ - x [..., K]; those that are zero everywhere are left out."""
        if self.quantizer is None:
            return {}
        split = self.quantizer.split(x)
        found: dict[Cause, Tensor] = {
            "clipping": split.clipped - x,
            "rounding": split.exact - split.clipped,
        }
        if self.quantizer.rounds_scale:
            found["scale"] = split.rounded - split.exact
        return {cause: error for cause, error in found.items() if bool(error.any())}

    def errors(self, *operands: Tensor) -> dict[Cause, Tensor]:
        (x,) = operands
        found: dict[Cause, Tensor] = {
            cause: nn.functional.linear(error, self.coded_weight)
            for cause, error in self.input_errors(x).items()
        }
        for cause, error in self.weight_errors().items():
            own = nn.functional.linear(x, error)
            found[cause] = found[cause] + own if cause in found else own
        return found

    @property
    def weight_error(self) -> Tensor:
        return self.coded_weight - self.weight


@dataclass(frozen=True, eq=False)
class EmbeddingSite(SimulatedSite):
    """A table of rows that are looked up: only the weights can be wrong."""

    simulated: SimulatedWeight

    def output(self, parts: Parts, *operands: Tensor) -> Tensor:
        return nn.functional.embedding(operands[0], self.simulated.under(parts))

    def errors(self, *operands: Tensor) -> dict[Cause, Tensor]:
        return self.simulated.errors(partial(nn.functional.embedding, operands[0]))


@dataclass(frozen=True, eq=False)
class ProductSite(SimulatedSite):
    """A product of two activations, left [b, heads, L, K] by right [b, heads, K, N].

    Errors by operand, left first: (Q(a) - a) b, then Q(a) (Q(b) - b), each split into clipping and
    rounding; "rounding" is always listed. Scores that the mask hides count among them: they are
    computed too.
    ``transposed``: the right operand's tokens are its columns (k^T), and so are its scales.
    """

    left: Quantizer
    right: Quantizer
    transposed: bool

    def output(self, parts: Parts, *operands: Tensor) -> Tensor:
        left, right = operands
        coded_right = self._turn(with_parts(self.right, self._turn(right), parts))
        return torch.matmul(with_parts(self.left, left, parts), coded_right)

    def errors(self, *operands: Tensor) -> dict[Cause, Tensor]:
        left, right = operands
        a, b = self.left.split(left), self.right.split(self._turn(right))
        clipped, rounded = self._turn(b.clipped), self._turn(b.rounded)
        clipping = (a.clipped - left) @ right + a.rounded @ (clipped - right)
        rounding = (a.rounded - a.clipped) @ right + a.rounded @ (rounded - clipped)
        found: dict[Cause, Tensor] = {"clipping": clipping} if bool(clipping.any()) else {}
        return {**found, "rounding": rounding}

    def coded_right(self, right: Tensor) -> Tensor:
        """The right operand behind quantize and dequantize."""
        return self._turn(self.right(self._turn(right)))

    def by_token(self, values: Tensor) -> Tensor:
        return values.sum((1, -1)).flatten()

    def _turn(self, right: Tensor) -> Tensor:
        return right.transpose(-2, -1) if self.transposed else right


class SiteMaker:
    """Builds simulated sites of one observed graph; ranges of shared inputs are found once."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._observers = observers(gm)
        self._ranges: dict[tuple[Node, ActivationSpec], Quantizer] = {}
        self._known = {site.path: (site, node) for site, node in site_outputs(gm)}

    def make(self, path: str, spec: SiteSpec) -> SimulatedSite:
        """The site at ``path`` under ``spec``, which quantizes its weight, or its operands."""
        site, node = self._known[path]
        if site.role == "matmul":
            assert spec.activation is not None
            return self._product(site, node, spec.activation)
        assert spec.weight is not None
        module = self._gm.get_submodule(path) if node.op == "call_module" else None
        if not isinstance(module, (*LINEAR, nn.Embedding)):
            raise SchemeError(
                f"{path}: explain knows linears and embeddings, not {node.op} {node.target}; "
                "leave the site in float by an override"
            )
        weight, bias = linear_parameters(module)
        codes = site_codes(module, spec.weight, path)
        nearest = not isinstance(module, CodedLinear)
        coded = codes.dequantize(weight.dtype)
        own = SimulatedWeight.of(weight, coded, spec.weight, nearest)
        quantizer = self.quantizer(path, spec.activation)
        causes = ordered(own.causes | _causes_of_input(quantizer))
        if site.role == "embeddings":
            return EmbeddingSite(site, node, causes, own)
        observer = self._observers.get(source_of(node))
        product8 = int8_product(site, weight, codes, spec)
        return LinearSite(site, node, causes, own, bias, quantizer, spec, observer, product8)

    def _product(self, site: Site, node: Node, spec: ActivationSpec) -> ProductSite:
        left, right = (
            self._operand(site, side, own)
            for side, own in zip(("left", "right"), operand_specs(node, spec), strict=True)
        )
        causes: tuple[Cause, ...] = ("clipping", "rounding")
        return ProductSite(site, node, causes, left, right, is_transposed(node))

    def _operand(self, site: Site, side: str, spec: ActivationSpec) -> Quantizer:
        if spec.dynamic:
            return Quantizer(spec.tensor)
        return static_quantizer(operand_observer(self._gm, site, side), spec)

    def quantizer(self, path: str, spec: ActivationSpec | None) -> Quantizer | None:
        """The quantizer of the site's input; static ranges come from the calibrated observer."""
        if spec is None:
            return None
        if spec.dynamic:
            return Quantizer(spec.tensor)
        source = source_of(self._known[path][1])
        if (source, spec) not in self._ranges:
            self._ranges[source, spec] = static_quantizer(self._observers[source], spec)
        return self._ranges[source, spec]


def _causes_of_input(quantizer: Quantizer | None) -> frozenset[Cause]:
    if quantizer is None:
        return frozenset()
    return frozenset(("clipping", "rounding", *(("scale",) if quantizer.rounds_scale else ())))


def simulated_sites(gm: GraphModule, scheme: Scheme) -> tuple[SimulatedSite, ...]:
    """Every site that ``scheme`` quantizes in an observed graph, in graph order."""
    maker = SiteMaker(gm)
    specs = ((site, simulated_spec(scheme, site)) for site, _ in site_outputs(gm))
    with torch.no_grad():
        return tuple(maker.make(site.path, spec) for site, spec in specs if spec != FLOAT)


def simulated_spec(scheme: Scheme, site: Site) -> SiteSpec:
    """What quantizes the site; of a product of activations, its operands' ActivationSpec."""
    if site.role == "matmul":
        activation = operand_spec(scheme, site)
        weight = next((spec.weight for spec in scheme.specs if spec.weight), None)
        return FLOAT if activation is None else SiteSpec(weight, activation)
    spec = scheme.spec_for(site.path, site.role)
    return FLOAT if spec.weight is None else spec


@dataclass(frozen=True)
class Place:
    """Where a site stands: its block (None outside the blocks) and its kind."""

    block: str | None
    kind: str


class Located(Protocol):
    """A site and the node that holds its output."""

    @property
    def site(self) -> Site: ...

    @property
    def node(self) -> Node: ...

    @property
    def path(self) -> str: ...


def places(gm: GraphModule, sites: Sequence[Located]) -> dict[str, Place]:
    """Block and kind of each site, by path.

    Sites of one block that read the same node (q, k and v; gate and up) are one kind; groups of
    different blocks are one kind when their paths inside the block are equal. The kind is written
    with those paths: ``self_attn.q_proj/k_proj/v_proj``. Outside the blocks it is the role.
    """
    blocks = info(gm).blocks
    groups: dict[tuple[str, Node], list[str]] = {}
    found: dict[str, Place] = {}
    for each in sites:
        block = block_of(each.path, blocks)
        if block is None:
            found[each.path] = Place(None, each.site.role)
        else:
            groups.setdefault((block, source_of(each.node)), []).append(each.path)
    for (block, _), paths in groups.items():
        kind = _joined([within(path, block) for path in paths])
        found.update({path: Place(block, kind) for path in paths})
    return {each.path: found[each.path] for each in sites}


def _joined(paths: list[str]) -> str:
    """The paths, without repeating the parent that they share with the first."""
    return "/".join(_without_parent(paths))


def _without_parent(paths: list[str]) -> Iterator[str]:
    parent = paths[0].rpartition(".")[0]
    for index, path in enumerate(paths):
        yield path.removeprefix(f"{parent}.") if index and parent else path
