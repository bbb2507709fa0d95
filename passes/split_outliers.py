"""split_outliers: the few columns with large activations stay in float, the rest gets codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import SchemeError
from fxquant.ir.builder import Builder
from fxquant.ir.graph import (
    LeftInFloat,
    Level,
    Site,
    coded_linears,
    info,
    install,
    linear_parameters,
    source_of,
    update_info,
)
from fxquant.ir.leaves import FloatColumns, OutlierIndex
from fxquant.ir.weights import install_weight
from fxquant.numerics.observers import ChannelAbsmax
from fxquant.pipeline.context import Context
from fxquant.pipeline.options import Positive
from fxquant.pipeline.repair import Repair
from fxquant.run.observe_nodes import observe_nodes
from fxquant.structure.outcome import Blocked, Changed, Outcome

CONTAINER = "fxquant_outliers"


@dataclass(frozen=True)
class SplitOutliers(Repair):
    """The decomposition of LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339, equation 8).

    before:  y = fc1(x)
    after:   y = fc1(x * keep) + linear(index_select(x, -1, index), outlier columns of W)

    Columns whose max|x| over calibration exceeds ``threshold`` (6 in the paper) are taken out of
    the quantized product: zero in its input and weight, so that both ranges shrink, and float
    beside it. The paper looks for them in every batch; here they are fixed by calibration, as
    static codes need. Sites that read one input share the split. Only sites whose activations are
    quantized are split.
    """

    name = "split_outliers"
    requires = (Level.FLOAT,)
    effect = "equivalent"
    no_place = "quantizes no activation"
    remedy = "lower the threshold or leave it out"

    threshold: Positive = 6.0

    @property
    def keeps_site_outputs(self) -> bool:
        return False

    def apply(self, gm: GraphModule, context: Context) -> Iterator[Outcome]:
        readers: dict[Node, list[tuple[Site, Node]]] = {}
        for site, node, spec in coded_linears(gm, context.scheme):
            if spec.activation is not None:
                readers.setdefault(source_of(node), []).append((site, node))
        if not readers:
            return
        observers = {
            source: ChannelAbsmax(members[0][0].path) for source, members in readers.items()
        }
        observe_nodes(gm, observers, context.batches, label=self.name, progress=context.progress)
        for source, members in readers.items():
            largest = observers[source].max_abs
            index = (largest > self.threshold).nonzero().flatten()
            if index.numel() == largest.numel():
                raise SchemeError(
                    f"split_outliers: {members[0][0].path}: all {index.numel()} columns exceed "
                    f"{self.threshold:g}, nothing would be quantized; raise the threshold"
                )
            if index.numel():
                # Not ``source``, which may itself have been split since.
                _split(gm, source_of(members[0][1]), members, index)
            text = f"{index.numel()} of {largest.numel()} columns exceed {self.threshold:g}"
            text = f"{text}; the largest is {largest.max():.3g}"
            for site, _ in members:
                yield site.path, Changed(text) if index.numel() else Blocked(text)


def _split(gm: GraphModule, source: Node, members: list[tuple[Site, Node]], index: Tensor) -> None:
    first, first_node = members[0]
    weight, _ = linear_parameters(gm.get_submodule(first.path))
    keep = torch.ones(weight.shape[1], dtype=weight.dtype, device=weight.device)
    keep[index] = 0
    shared = f"{CONTAINER}.{first.path.replace('.', '_')}"
    install(gm, shared, OutlierIndex(index, keep))
    builder = Builder(gm, SplitOutliers.name, first.path)
    with gm.graph.inserting_before(first_node):
        kept = builder.tensor(f"{shared}.keep", "keep")
        rest = builder.call(torch.mul, source, kept, name="rest")
        places = builder.tensor(f"{shared}.index", "outlier_index")
        picked = builder.call(torch.index_select, source, -1, places, name="outliers")
    for site, node in members:
        node.replace_input_with(source, rest)
        _add_float_part(gm, site, node, picked, index)


def _add_float_part(gm: GraphModule, site: Site, node: Node, picked: Node, index: Tensor) -> None:
    weight, bias = linear_parameters(gm.get_submodule(site.path))
    path = f"{CONTAINER}.{site.path.replace('.', '_')}_columns"
    install(gm, path, FloatColumns(site.path, weight[:, index].contiguous()))
    rest = weight.clone()
    rest[:, index] = 0
    install_weight(gm, site.path, rest, bias, SplitOutliers.name)
    builder = Builder(gm, SplitOutliers.name, site.path)
    users = list(node.users)
    with gm.graph.inserting_after(node):
        columns = builder.tensor(f"{path}.weight", "outlier_weight")
    with gm.graph.inserting_after(columns):
        part = builder.call(nn.functional.linear, picked, columns, name="float_part")
    with gm.graph.inserting_after(part):
        total = builder.call(torch.add, node, part, name="with_outliers")
    for user in users:
        user.replace_input_with(node, total)
    what = f"{index.numel()} of {site.shape[1]} input columns, beside the codes: outliers"
    left = LeftInFloat(site.path, what)
    update_info(gm, left_in_float=(*info(gm).left_in_float, left))
