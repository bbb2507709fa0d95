"""The absorption question: what can take a scale of a linear's input, and who must share it.

Asked by every repair that moves a per-channel scale between an activation and weights:
SmoothQuant, AWQ, cross-layer equalization.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxquant.ir.graph import Site, linear_sites, source_of
from fxquant.ir.operands import op_name
from fxquant.structure.channels import channel_numbers, columns_of, leak
from fxquant.structure.outcome import Blocked
from fxquant.structure.scale_paths import Producer, ScalePath, find_path


@dataclass(frozen=True)
class Consumer:
    """A linear whose columns take the other half of the scale.

    ``columns`` int64 [K]: the producer's channel behind each input column. Heads of one
    key/value group have the same numbers, so they share a scale.
    """

    site: Site
    node: Node
    columns: Tensor


@dataclass(frozen=True)
class ScaleGroup:
    """Linears that must share one scale [channels], and what can take its inverse.

    ``producer`` None: nothing can, and ``obstacle`` says why; the consumers then read one node,
    and an explicit multiplication there is the only way.
    """

    consumers: tuple[Consumer, ...]
    producer: Producer | None
    obstacle: Blocked | None = None

    @property
    def channels(self) -> int:
        if self.producer is not None:
            return self.producer.channels
        return self.consumers[0].site.shape[1]

    @property
    def source(self) -> Node:
        """The input of the first consumer."""
        return source_of(self.consumers[0].node)

    @property
    def start(self) -> Node:
        """The first node whose value the scale changes."""
        return self.source if self.producer is None else self.producer.start

    def gather(self, per_column: list[Tensor], reduce: str) -> Tensor:
        """Values of each consumer's columns, [K] each, as one value a channel: float32 [channels].

        ``reduce``: "amax" or "mean"; channels that no column reads get 0.
        """
        values = torch.cat([value.float() for value in per_column])
        index = torch.cat([c.columns for c in self.consumers]).to(values.device)
        result = values.new_zeros(self.channels)
        return result.scatter_reduce(0, index, values, reduce, include_self=False)

    def names(self) -> str:
        return ", ".join(consumer.site.path for consumer in self.consumers)


def scale_groups(gm: GraphModule) -> tuple[ScaleGroup, ...]:
    """Every linear site of a float graph in exactly one group, in graph order of ``start``."""
    linears = list(linear_sites(gm))
    by_source = {source_of(node): find_path(gm, source_of(node)) for _, node in linears}
    paths = [path for path in by_source.values() if isinstance(path, ScalePath)]
    numbers = channel_numbers(gm, paths) if paths else {}
    by_start: dict[Node, list[tuple[Site, Node]]] = {}
    for site, node in linears:
        path = by_source[source_of(node)]
        start = path.producer.node if isinstance(path, ScalePath) else source_of(node)
        by_start.setdefault(start, []).append((site, node))
    groups: list[ScaleGroup] = []
    for members in by_start.values():
        groups.extend(_groups(members, by_source, numbers))
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    return tuple(sorted(groups, key=lambda group: order[group.start]))


def _groups(
    members: list[tuple[Site, Node]],
    by_source: dict[Node, ScalePath | Blocked],
    numbers: dict[Node, Tensor],
) -> list[ScaleGroup]:
    found = [by_source[source_of(node)] for _, node in members]
    paths = [path for path in found if isinstance(path, ScalePath)]
    if not paths:
        first = found[0]
        assert isinstance(first, Blocked)
        return [_blocked(members, first)]
    columns = [columns_of(numbers[source_of(node)]) for _, node in members]
    known = [column for column in columns if column is not None]
    obstacle = _obstacle(members, paths, columns, numbers)
    if obstacle is None:
        consumers = zip(members, known, strict=True)
        group = tuple(Consumer(site, node, column) for (site, node), column in consumers)
        return [ScaleGroup(group, paths[0].producer)]
    apart: dict[Node, list[tuple[Site, Node]]] = {}
    for member in members:
        apart.setdefault(source_of(member[1]), []).append(member)
    return [_blocked(some, obstacle) for some in apart.values()]


def _obstacle(
    members: list[tuple[Site, Node]],
    paths: list[ScalePath],
    columns: list[Tensor | None],
    numbers: dict[Node, Tensor],
) -> Blocked | None:
    producer = paths[0].producer
    nodes = frozenset(node for path in paths for node in path.nodes)
    for path in paths:
        for node, carrier in path.through.items():
            if any(other in nodes and other is not carrier for other in node.all_input_nodes):
                return Blocked(
                    f"{producer.path} is multiplied by itself in {op_name(node)}", (node,)
                )
    used = []
    for (site, node), column in zip(members, columns, strict=True):
        if column is None:
            return Blocked(f"{site.path} reads channels that change with the position", (node,))
        used.append(column)
    stranger = leak(nodes, frozenset(node for _, node in members), numbers, torch.cat(used))
    if stranger is not None:
        what = op_name(stranger) or str(stranger.target)
        return Blocked(
            f"{producer.path}, where its input comes from, also feeds {what}", (stranger,)
        )
    return None


def _blocked(members: list[tuple[Site, Node]], obstacle: Blocked) -> ScaleGroup:
    consumers = tuple(Consumer(site, node, torch.arange(site.shape[1])) for site, node in members)
    return ScaleGroup(consumers, None, obstacle)
