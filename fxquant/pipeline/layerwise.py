"""What repairs share that choose codes layer by layer on second-order statistics."""

from __future__ import annotations

import abc
import functools
import hashlib
import importlib.metadata
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import FxquantError
from fxquant.ir.graph import (
    Level,
    coded_linears,
    device_of,
    info,
    install,
    linear_parameters,
    source_of,
)
from fxquant.ir.leaves import CodedLinear
from fxquant.ir.streamed import streamed_tensors
from fxquant.ir.weights import site_codes
from fxquant.numerics.quantizer import Quantizer
from fxquant.numerics.solvers.coordinate_descent import energy
from fxquant.numerics.weight_codes import WeightCodes, min_max_codes, stacked
from fxquant.pipeline.context import Context
from fxquant.pipeline.repair import Repair
from fxquant.run.block_store import BlockStore, Expected
from fxquant.run.gram import Gram
from fxquant.run.sequential import Segment, SequentialRun
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import ActivationSpec, TensorSpec
from fxquant.structure.outcome import Blocked, Changed, Outcome

# Rows of a weight on which a note's errors are measured: on all of them, the products with the
# Hessian would cost as much as solving does.
_NOTE_ROWS = 64


@dataclass(frozen=True)
class Layer:
    """A site whose codes are to be chosen; ``start`` is what an earlier repair chose,
    ``activation`` how its input will be quantized, None where that is not known yet (static)."""

    path: str
    weight: Tensor
    bias: Tensor | None
    spec: TensorSpec
    activation: ActivationSpec | None
    start: WeightCodes | None

    @functools.cached_property
    def before(self) -> WeightCodes:
        """What a repair must improve on: earlier codes, else those that quantize would choose."""
        return self.start or min_max_codes(self.weight, self.spec, self.path)


@dataclass(frozen=True)
class SharedInput:
    """Layers of one block that read ``source``; ``reader`` is the first node that does."""

    source: Node
    reader: Node
    layers: tuple[Layer, ...]

    def together(self) -> Iterator[tuple[Layer, ...]]:
        """Layers that can be solved as one: the same grid, nothing that spans rows."""
        joint: dict[tuple[TensorSpec, bool], list[Layer]] = {}
        for layer in self.layers:
            if layer.spec.granularity == "tensor":
                yield (layer,)
            else:
                joint.setdefault((layer.spec, layer.start is None), []).append(layer)
        yield from (tuple(layers) for layers in joint.values())


@dataclass(frozen=True)
class Layerwise(Repair):
    """A repair that chooses codes block by block, on inputs as quantized earlier layers make them:
    with their codes and, where activations are dynamic, with codes of their inputs. Static ranges
    are calibrated later, so under them earlier layers have quantized weights only.

    before:  y = call_module layers.0.fc1(x)        nn.Linear or Conv1D
    after:   y = call_module layers.0.fc1(x)        CodedLinear: the same weight, codes chosen

    Layers that read one input share its Hessian and are solved together.

    Args:
        within: what a layer's inputs have gone through: "layer": all earlier layers quantized,
            also those of its own block, in one run of the data; "block": earlier blocks only, its
            own in float, in two runs (the paper).

    Files in the context's cache are named by a fingerprint of model, data, scheme, options
    and versions.
    """

    within: Literal["layer", "block"] = "layer"
    requires = (Level.FLOAT,)
    effect = "equivalent"
    resumes = True
    no_place = "quantizes no linear's weight; name one in front, such as w4-g128"

    @abc.abstractmethod
    def solve(self, weight: Tensor, hessian: Tensor, layers: tuple[Layer, ...]) -> WeightCodes:
        """Codes of ``weight`` [N, K], the rows of ``layers`` one below the other."""

    def apply(self, gm: GraphModule, context: Context) -> Iterator[Outcome]:
        context.scheme.check_overrides((site.path, site.role) for site in info(gm).sites)
        if next(coded_linears(gm, context.scheme), None) is None:
            return
        run = SequentialRun(gm, context.batches, label=self.name, progress=context.progress)
        store = BlockStore(context.cache, self._fingerprint(gm, run, context))
        with store.held():
            for segment in run.segments:
                yield from self._segment(gm, run, segment, store, context.scheme)

    def _fingerprint(self, gm: GraphModule, run: SequentialRun, context: Context) -> str:
        if context.cache is None:
            return ""
        versions = [importlib.metadata.version(name) for name in ("fxquant", "torch")]
        digest = hashlib.sha256(f"{versions} {self!r} {context.scheme} {run.digest}".encode())
        stored = ((n, v) for n, v in sorted(gm.state_dict().items()) if not v.is_meta)
        for name, value in itertools.chain(stored, streamed_tensors(gm)):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    def _segment(
        self,
        gm: GraphModule,
        run: SequentialRun,
        segment: Segment,
        store: BlockStore,
        scheme: Scheme,
    ) -> Iterator[Outcome]:
        """Choose the block's codes, and move the run behind it."""
        groups = _groups(gm, segment, scheme)
        layers = {layer.path: layer for group in groups for layer in group.layers}
        expected = {
            path: Expected(one.spec, (one.weight.shape[0], one.weight.shape[1]))
            for path, one in layers.items()
        }
        chosen = store.load(segment.block, expected, device_of(gm))
        if chosen is None:
            chosen = self._choose(gm, run, groups)
            store.save(segment.block, chosen)
        for path, codes in chosen.items():
            _simulate(gm, layers[path], codes)
        if segment.end is not None:  # nothing to choose behind the last segment, nothing to run
            run.advance(segment.end)
        for path, codes in chosen.items():
            layer = layers[path]
            same = torch.equal(codes.codes, layer.before.codes)
            install(gm, path, CodedLinear(layer.weight, layer.bias, layer.spec, codes.tensors()))
            unchanged = Blocked(f"{codes.note}; no code differs from before")
            yield path, unchanged if same else Changed(codes.note)

    def _choose(
        self, gm: GraphModule, run: SequentialRun, groups: list[SharedInput]
    ) -> dict[str, WeightCodes]:
        chosen: dict[str, WeightCodes] = {}
        means = self._means(run, groups)
        for group, mean in zip(groups, means, strict=True):
            for layers in group.together():
                for layer, codes in self._solve(mean, layers):
                    chosen[layer.path] = codes
                    _simulate(gm, layer, codes)
        return chosen

    def _means(self, run: SequentialRun, groups: list[SharedInput]) -> Iterator[Tensor]:
        """Each group's Hessian, when the codes of the groups before it are installed."""
        hessians = [Gram(group.source, group.layers[0].path) for group in groups]
        if self.within == "block" and groups:
            _see_block(run, groups[-1].reader, hessians)
        for group in groups:
            hessian = hessians.pop(0)
            if self.within == "layer":
                run.advance(group.reader, hessian)
            mean = hessian.mean()
            del hessian  # K x K, a quarter of a gigabyte for K = 8192, while the solver works
            yield mean

    def _solve(
        self, hessian: Tensor, layers: tuple[Layer, ...]
    ) -> Iterator[tuple[Layer, WeightCodes]]:
        weight = torch.cat([layer.weight for layer in layers])
        names = ", ".join(layer.path for layer in layers)
        try:
            solved = self.solve(weight, hessian, layers)
        except FxquantError as error:
            raise type(error)(f"{names}: {error}") from error
        start = 0
        for layer in layers:
            codes = solved.rows(slice(start, start + len(layer.weight)))
            start += len(layer.weight)
            yield layer, replace(codes, note=_note(layer, codes, hessian))


def _groups(gm: GraphModule, segment: Segment, scheme: Scheme) -> list[SharedInput]:
    found: dict[Node, tuple[Node, list[Layer]]] = {}
    for site, node in segment.sites:
        wanted = scheme.spec_for(site.path, site.role)
        spec, activation = wanted.weight, wanted.activation
        if spec is None:
            continue
        if activation is not None and not activation.dynamic:
            activation = None
        module = gm.get_submodule(site.path)
        weight, bias = linear_parameters(module)
        start = site_codes(module, spec, site.path) if isinstance(module, CodedLinear) else None
        layer = Layer(site.path, weight, bias, spec, activation, start)
        found.setdefault(source_of(node), (node, []))[1].append(layer)
    return [
        SharedInput(source, reader, tuple(layers)) for source, (reader, layers) in found.items()
    ]


def _note(layer: Layer, codes: WeightCodes, hessian: Tensor) -> str:
    """The layer's error on its inputs, relative to its output, before and after."""
    total = len(layer.weight)
    step = -(-total // _NOTE_ROWS)
    weight = layer.weight[::step]
    where = "on calibration inputs" + (f" ({len(weight)} of {total} rows)" if step > 1 else "")
    signal = energy(weight, hessian)
    if not signal:
        return f"no output {where}{codes.note}"
    old, new = (
        energy(weight - each.rows(slice(None, None, step)).dequantize(), hessian) / signal
        for each in (layer.before, codes)
    )
    return f"layer error {old:.3g} -> {new:.3g} {where}{codes.note}"


def _see_block(run: SequentialRun, until: Node, hessians: list[Gram]) -> None:
    for_source = {hessian.source: hessian for hessian in hessians}
    run.visit(
        until,
        lambda node, value, mask: (
            for_source[node](node, value, mask) if node in for_source else value
        ),
    )


def stacked_start(layers: tuple[Layer, ...]) -> WeightCodes | None:
    """The layers' earlier codes one below the other; None if nothing was chosen."""
    starts = [layer.start for layer in layers]
    present = [start for start in starts if start is not None]
    if len(present) < len(starts):
        return None
    return stacked(tuple(present))


class _Simulated(nn.Linear):
    """A linear whose input goes through its dynamic codes."""

    quantizer: Quantizer | None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.quantizer is None else self.quantizer(x))


def _simulate(gm: GraphModule, layer: Layer, codes: WeightCodes) -> None:
    """Let the run see what the codes stand for; the pass puts a CodedLinear there in the end."""
    rows, columns = layer.weight.shape
    linear = _Simulated(columns, rows, bias=False, device="meta")
    linear.quantizer = None if layer.activation is None else Quantizer(layer.activation.tensor)
    weight = codes.dequantize(layer.weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias, requires_grad=False)
    install(gm, layer.path, linear)
