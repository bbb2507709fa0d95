"""What repairs share that choose codes layer by layer on second-order statistics."""

from __future__ import annotations

import abc
import functools
import hashlib
import importlib.metadata
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import FxquantError, SchemeError, VerificationError
from fxquant.graph import (
    CodedLinear,
    Level,
    add_note,
    coded_linears,
    device_of,
    info,
    install,
    linear_parameters,
    source_of,
)
from fxquant.operators import unpack_int4
from fxquant.passes.block_store import BlockStore, Expected
from fxquant.passes.coordinate_descent import energy
from fxquant.passes.fake_quantize import fake_activation
from fxquant.passes.hessians import Hessian
from fxquant.passes.quantize import quantize_weight, site_codes
from fxquant.passes.weight_codes import WeightCodes
from fxquant.repair import Repair
from fxquant.sequential import Segment, SequentialRun
from fxquant.specs import ActivationSpec, TensorSpec
from fxquant.streamed import streamed_tensors

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
        return self.start or nearest(self)


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
        cache: see Repair; files are named by a fingerprint of model, data, scheme, options and
            versions.
    """

    within: str = "layer"
    requires = (Level.FLOAT,)
    effect = "equivalent"
    resumes = True

    def __post_init__(self) -> None:
        if self.within not in ("layer", "block"):
            raise SchemeError(f'{self.name}: within must be "layer" or "block", not {self.within}')

    @abc.abstractmethod
    def solve(self, weight: Tensor, hessian: Tensor, layers: tuple[Layer, ...]) -> WeightCodes:
        """Codes of ``weight`` [N, K], the rows of ``layers`` one below the other."""

    def rewrite(self, gm: GraphModule) -> GraphModule:
        self.scheme.check_overrides((site.path, site.role) for site in info(gm).sites)
        if next(coded_linears(gm, self.scheme), None) is None:
            raise SchemeError(
                f"{self.name}: scheme {self.scheme} quantizes no linear's weight; name one in "
                "front, such as w4-g128"
            )
        run = SequentialRun(gm, self.batches, label=self.name, progress=self.progress)
        store = BlockStore(self.cache, self._fingerprint(gm, run))
        with store.held():
            changed = sum(self._segment(gm, run, segment, store) for segment in run.segments)
        if not changed:
            raise VerificationError(
                f"{self.name}: no code differs from before; the repair had no effect"
            )
        return gm

    def _fingerprint(self, gm: GraphModule, run: SequentialRun) -> str:
        if self.cache is None:
            return ""
        versions = [importlib.metadata.version(name) for name in ("fxquant", "torch")]
        digest = hashlib.sha256(f"{versions} {self!r} {self.scheme} {run.digest}".encode())
        stored = ((n, v) for n, v in sorted(gm.state_dict().items()) if not v.is_meta)
        for name, value in itertools.chain(stored, streamed_tensors(gm)):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    def _segment(
        self, gm: GraphModule, run: SequentialRun, segment: Segment, store: BlockStore
    ) -> int:
        """Choose the block's codes, move the run behind it; how many codes changed."""
        groups = self._groups(gm, segment)
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
        changed = 0
        for path, codes in chosen.items():
            layer = layers[path]
            changed += int((codes.codes != layer.before.codes).sum())
            install(gm, path, CodedLinear(layer.weight, layer.bias, layer.spec, codes.tensors()))
            add_note(gm, self.name, path, codes.note)
        return changed

    def _groups(self, gm: GraphModule, segment: Segment) -> list[SharedInput]:
        found: dict[Node, tuple[Node, list[Layer]]] = {}
        for site, node in segment.sites:
            wanted = self.scheme.spec_for(site.path, site.role)
            spec, activation = wanted.weight, wanted.activation
            if spec is None:
                continue
            if activation is not None and not activation.dynamic:
                activation = None
            module = gm.get_submodule(site.path)
            weight, bias = linear_parameters(module)
            start = _start(module, spec, site.path)
            layer = Layer(site.path, weight, bias, spec, activation, start)
            found.setdefault(source_of(node), (node, []))[1].append(layer)
        return [
            SharedInput(source, reader, tuple(layers)) for source, (reader, layers) in found.items()
        ]

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
        hessians = [Hessian(group.source, group.layers[0].path) for group in groups]
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


def _see_block(run: SequentialRun, until: Node, hessians: list[Hessian]) -> None:
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
    if len(present) == 1:
        return present[0]
    return replace(
        present[0],
        codes=torch.cat([start.codes for start in present]),
        scales=torch.cat([start.scales for start in present]),
        zero_points=torch.cat([start.zero_points for start in present]),
    )


def nearest(layer: Layer) -> WeightCodes:
    """What quantize would do by itself: rounding to nearest in the min-max range."""
    return _unpacked(
        quantize_weight(layer.weight, layer.spec, layer.path), layer.spec, layer.weight
    )


def _start(module: nn.Module, spec: TensorSpec, site: str) -> WeightCodes | None:
    if not isinstance(module, CodedLinear):
        return None
    return _unpacked(site_codes(module, spec, site), spec, module.weight)


def _unpacked(tensors: dict[str, Tensor], spec: TensorSpec, weight: Tensor) -> WeightCodes:
    codes, scales = tensors["weight"], tensors["weight_scale"]
    if spec.bits <= 4:
        codes = unpack_int4(codes, weight.shape[1])
    zeros = tensors.get("weight_zero_point", torch.zeros_like(scales, dtype=torch.int32))
    return WeightCodes(codes, scales, zeros, spec)


class _Simulated(nn.Linear):
    """A linear whose input goes through its dynamic codes."""

    activation: ActivationSpec | None

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is not None:
            x = fake_activation(x, self.activation, {}).to(x.dtype)
        return super().forward(x)


def _simulate(gm: GraphModule, layer: Layer, codes: WeightCodes) -> None:
    """Let the run see what the codes stand for; the pass puts a CodedLinear there in the end."""
    rows, columns = layer.weight.shape
    linear = _Simulated(columns, rows, bias=False, device="meta")
    linear.activation = layer.activation
    weight = codes.dequantize().to(layer.weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias, requires_grad=False)
    install(gm, layer.path, linear)
