"""What is kept of a graph's past, as plain values: no tensors, no nodes, ready for JSON."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tag:
    """A node's provenance.

    Attributes:
        site: the site it belongs to.
        origin: the pass that made it, or "trace".
        is_output: whether it holds the site's output.
        made_from: names of the nodes that it was made from, in the graph before ``origin`` ran.
        replaces: the name of the node whose users it took over, if it took over any.
        scope: path of the module whose forward made it, in the user's model.
    """

    site: str | None = None
    origin: str = "trace"
    is_output: bool = False
    made_from: tuple[str, ...] = ()
    replaces: str | None = None
    scope: str = ""


@dataclass(frozen=True)
class NodeText:
    """A node in words. Operands that are nodes are written ``%name``.

    Attributes:
        name, op: as torch.fx has them.
        target: the function's or method's name, or the path of the module or buffer.
        kind: class name of the module that a call_module calls, else "".
        args, kwargs: the operands.
    """

    name: str
    op: str
    target: str
    kind: str
    args: tuple[str, ...]
    kwargs: tuple[tuple[str, str], ...]
    tag: Tag


@dataclass(frozen=True)
class Delta:
    """How one pass changed the list of nodes: enough to go back, and no more.

    Attributes:
        before: (position, node) in the list before the pass, of nodes that went or changed.
        after: positions in the list after the pass of nodes that came or changed.
        size: number of nodes after the pass.
        leaves: paths of modules and buffers that hold other tensors than before.
    """

    before: tuple[tuple[int, NodeText], ...] = ()
    after: tuple[int, ...] = ()
    size: int = 0
    leaves: tuple[str, ...] = ()


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        name, spelling: ``smooth`` and ``smooth(alpha=0.5)``.
        added, removed: nodes that came and went beyond those ``replaced`` one for one.
        sites: number of sites with a node or a parameter that changed.
        milliseconds: of the pass with its verification.
        difference: largest relative output difference on the probe, None for lossy passes.
        delta: what changed in the list of nodes.
    """

    name: str
    added: int
    removed: int
    sites: int
    milliseconds: float
    difference: float | None
    replaced: int = 0
    spelling: str = ""
    delta: Delta = field(default=Delta(), repr=False)


@dataclass(frozen=True)
class SiteRecord:
    """What ``quantize`` decided at a site, kept because observers and float weights go.

    A product of two activations has two, one for each operand.

    Attributes:
        path: the site.
        spec: its SiteSpec as text, such as ``w8a8-static``; of an operand, ``a8-static``.
        weight_sqnr: of the codes against the float weight, in dB; infinite for an exact one, None
            where there is no weight.
        scale, zero_point: of a static input; None where ranges are dynamic or nothing is coded.
        estimator: how the range was found: ``p99.9``, ``absmax``, ``mse``, ``entropy``.
        low, high: the estimated range of the input.
        seen_low, seen_high: the calibration's exact extremes.
        clipped: share of the calibration's elements outside [low, high], 0..1; printed "outside".
        histogram: the calibration's elements in equal bins from seen_low to seen_high.
        operand: "left" or "right" in a product of two activations, else "".
    """

    path: str
    spec: str
    weight_sqnr: float | None
    scale: float | None = None
    zero_point: int | None = None
    estimator: str | None = None
    low: float | None = None
    high: float | None = None
    seen_low: float | None = None
    seen_high: float | None = None
    clipped: float | None = None
    histogram: tuple[int, ...] = field(default=(), repr=False)
    operand: str = ""
