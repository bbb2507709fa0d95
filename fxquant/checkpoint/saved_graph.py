"""A graph from what a checkpoint's files hold: tried on shapes first, then built and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from fxquant.checkpoint.dataclass_json import from_json
from fxquant.checkpoint.graph_json import decode_nodes
from fxquant.checkpoint.module_json import ROLES, decode_module, register_tensors
from fxquant.checkpoint.rehearsal import rehearse
from fxquant.checkpoint.saved_info import check_info
from fxquant.checkpoint.saved_names import check_name, check_path, check_texts
from fxquant.checkpoint.site_forms import check_forms
from fxquant.checkpoint.stored_values import check_values
from fxquant.errors import CheckpointError
from fxquant.files.tensor_file import TensorFile, restore_order
from fxquant.frontends.scoring import ScoringGraph
from fxquant.ir.certificate import check_chunks
from fxquant.ir.graph import GraphInfo, set_info, tag
from fxquant.ir.legal_forms import verify
from fxquant.ir.sources import Source
from fxquant.ir.streamed import stream_leaf

_FIELDS = {"class_name", "info", "modules", "ties", "orders", "nodes"}


class Files:
    """Tensors of a checkpoint by name: read to the device, or left in their files.

    ``data``: graph.json, for its ties and storage orders. Raises CheckpointError where they do
    not fit the files.
    """

    def __init__(
        self, paths: list[Path], data: dict[str, Any], device: torch.device, stream: bool
    ) -> None:
        opened = [TensorFile.open(path) for path in paths]
        self._files: dict[str, TensorFile] = {}
        for file in opened:
            for name in file.entries:
                if name in self._files:
                    raise CheckpointError(f"two files hold a tensor {name}")
                self._files[check_path(name, "a tensor")] = file
        self._ties, self._orders = data["ties"], data["orders"]
        if not (isinstance(self._ties, dict) and isinstance(self._orders, dict)):
            raise CheckpointError("ties and orders are not tables")
        self._device, self._stream = device, stream
        self._read: dict[str, Tensor] = {}
        self.used: set[str] = set()

    def source(self, name: str) -> Source:
        key = self._ties.get(name, name)
        if not isinstance(key, str) or key not in self._files:
            raise CheckpointError(f"no tensor {str(key)[:80]} in the files")
        self.used.add(key)
        file, order = self._files[key], self._orders.get(key)
        entry = file.entries[key]
        if order is not None:
            whole = isinstance(order, list) and all(type(dim) is int for dim in order)
            if not whole or sorted(order) != list(range(len(entry.shape))):
                raise CheckpointError(f"{key}: {str(order)[:80]} is no order of its dimensions")
        return Source(file, key, entry.dtype, self._device, None if order is None else tuple(order))

    def shape(self, name: str) -> Tensor:
        """A tensor laid out as the stored one will be: fake, within a FakeTensorMode."""
        source = self.source(name)
        stored = torch.empty(source.file.entries[source.key].shape, dtype=source.dtype)
        return stored if source.order is None else restore_order(stored, source.order)

    def streams(self, source: Source) -> bool:
        return self._stream and len(source.shape) > 1

    def read(self, source: Source, parameter: bool) -> Tensor:
        value = self._read.get(source.key)
        if value is None:
            value = source.read()
        if parameter and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        self._read[source.key] = value  # ties stay ties
        return value

    def check_all_used(self) -> None:
        unused = set(self._files) - self.used
        if unused:
            raise CheckpointError(f"nothing reads the tensors {', '.join(sorted(unused)[:4])}")


class Held:
    """The tensors of a graph in memory, as the shapes that their files will have."""

    def __init__(self, gm: GraphModule, ties: dict[str, str], orders: dict[str, list[int]]) -> None:
        self._tensors, self._ties, self._orders = _tensors(gm), ties, orders

    def shape(self, name: str) -> Tensor:
        """As ``Files.shape``."""
        value, order = self._tensors[name], self._orders.get(self._ties.get(name, name))
        if order is None:
            return torch.empty(value.shape, dtype=value.dtype)
        stored = torch.empty([value.shape[dim] for dim in order], dtype=value.dtype)
        return restore_order(stored, order)


def check_fields(data: object) -> dict[str, Any]:
    """``data`` if it has the fields of graph.json; CheckpointError if not."""
    if not isinstance(data, dict) or set(data) != _FIELDS:
        raise CheckpointError(f"it does not hold exactly {', '.join(sorted(_FIELDS))}")
    check_texts(data)
    check_name(data["class_name"], "class name")
    return data


def decode_graph(data: dict[str, Any], files: Files) -> GraphModule:
    """The graph in eval mode. Its code is generated only when everything else has been checked.

    Raises CheckpointError, VerificationError and SchemeError.
    """
    facts, graph = check_nodes(data, files)
    gm = _modules(data["modules"], files, data["class_name"])
    files.check_all_used()
    gm.graph = graph
    set_info(gm, facts)
    check_graph(gm, "load")
    return gm.eval()


def check_nodes(data: dict[str, Any], files: Files | Held) -> tuple[GraphInfo, Graph]:
    """What graph.json says, its nodes tried on the shapes of the tensors; errors as decode_graph's.

    The first half of what ``load`` refuses, of which no tensor's values are read.
    """
    facts: GraphInfo = from_json(GraphInfo, data["info"])
    check_info(facts)
    graph = decode_nodes(data["nodes"])
    _check_outputs(graph, facts)
    with FakeTensorMode(allow_fallback_kernels=False):
        shapes = _modules(data["modules"], files, shapes_only=True)
        _check_targets(shapes, graph)
        leaves = {path: module.eval() for path, module in shapes.named_modules() if path}
        rehearse(graph, _tensors(shapes), leaves, facts)
    return facts, graph


def _check_outputs(graph: Graph, facts: GraphInfo) -> None:
    sites = {site.path for site in facts.sites}
    for node in graph.nodes:
        if tag(node).is_output and tag(node).site not in sites:
            raise CheckpointError(f"node {node.name}: the output of no site of the graph")


def check_graph(gm: GraphModule, after: str) -> None:
    """The second half: what the nodes and tensors are is what the graph's GraphInfo says."""
    verify(gm, after)
    check_values(gm)
    check_forms(gm)
    check_chunks(gm)


def _modules(
    data: object, files: Files | Held, name: str = "Shapes", shapes_only: bool = False
) -> GraphModule:
    """A GraphModule without nodes that holds the modules; ``shapes_only``: their tensors fake."""
    if not isinstance(data, dict):
        raise CheckpointError("the modules are not a table")
    gm = ScoringGraph(nn.Module(), Graph(), name)
    seen = {""}
    for path, module in data.items():
        owner, _, _ = path.rpartition(".")
        where = f"module {path[:80]!r}"
        if path:
            check_path(path, where)
        if path in seen - {""} or owner not in seen or not isinstance(module, dict):
            raise CheckpointError(f"{where} does not follow the module that holds it")
        seen.add(path)
        _install(gm, path, module, files, shapes_only)
    return gm


def _tensors(gm: GraphModule) -> Mapping[str, Tensor]:
    return {
        **dict(gm.named_parameters(remove_duplicate=False)),
        **dict(gm.named_buffers(remove_duplicate=False)),
    }


def _check_targets(gm: GraphModule, graph: Graph) -> None:
    """Nodes may read tensors and call leaves, no other attribute of a module: a way to its
    ``__dict__`` would be one to run anything. CheckpointError names the node."""
    tensors = set(_tensors(gm))
    leaves = {name for name, _ in gm.named_modules(remove_duplicate=False) if name}
    for node in graph.nodes:
        known = {"get_attr": tensors, "call_module": leaves}.get(node.op)
        if known is not None and node.target not in known:
            raise CheckpointError(
                f"node {node.name!r}: target {node.target!r} of a {node.op} is no "
                f"{'tensor' if node.op == 'get_attr' else 'module'} of the saved graph"
            )


def _install(
    gm: GraphModule, path: str, data: dict[str, Any], files: Files | Held, shapes_only: bool
) -> None:
    tensors: dict[str, Tensor] = {}
    streamed: dict[str, Source] = {}
    roles = data.get("tensors", {})
    if not isinstance(roles, dict) or not {*map(str, roles.values())} <= set(ROLES):
        raise CheckpointError(f"{path}: its tensors are not each one of {', '.join(ROLES)}")
    for name, role in roles.items():
        full = check_path(f"{path}.{name}" if path else name, "a tensor")
        if "." in name or not ROLES[role].there:
            continue
        if shapes_only:
            tensors[name] = files.shape(full)
            continue
        assert isinstance(files, Files)
        source = files.source(full)
        if files.streams(source):
            streamed[name] = source
            tensors[name] = torch.empty(source.shape, dtype=source.dtype, device="meta")
        else:
            tensors[name] = files.read(source, ROLES[role].parameter)
    if not path:
        register_tensors(gm, roles, tensors)
        return
    module = decode_module(path, data, tensors)
    if streamed:
        stream_leaf(module, streamed)
    gm.add_submodule(path, module)
