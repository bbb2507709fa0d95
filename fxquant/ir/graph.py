"""What fxquant knows about a graph and its nodes, typed, and the one way to make nodes.

``GraphModule.meta`` holds one GraphInfo, ``Node.meta`` one Tag; passes use these accessors only.
"""

from __future__ import annotations

import copy
import enum
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.errors import GraphError
from fxquant.ir.calibration import Calibration
from fxquant.ir.functions import default_mask
from fxquant.ir.leaves import Conv1D, QuantizedParameters
from fxquant.ir.records import PassRecord as PassRecord
from fxquant.ir.records import SiteRecord as SiteRecord
from fxquant.ir.records import Tag as Tag
from fxquant.ir.streamed import Workspace, streamed_device
from fxquant.schemes.scheme import Role, Scheme
from fxquant.schemes.specs import SiteSpec

LINEAR = (nn.Linear, Conv1D)

KEY = "fxquant"
_WORKSPACE = "fxquant_workspace"
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Level(enum.StrEnum):
    """How far a graph has been lowered."""

    FLOAT = "float"
    OBSERVED = "observed"
    QDQ = "qdq"
    INTEGER = "integer"
    KERNELS = "kernels"
    INEXACT = "kernels-inexact"


@dataclass(frozen=True)
class Site:
    """One place that a scheme may quantize; ``shape`` is the weight's [N, K] as F.linear has it.

    ``bias``: it adds one; the verifier sees to it that no pass drops it.
    """

    path: str
    role: Role
    shape: tuple[int, int]
    bias: bool = False


@dataclass(frozen=True)
class LeftInFloat:
    """Something that multiplies or looks up weights and stays float, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Note:
    """What a pass has to say about a site: why it left it alone, what it chose there."""

    origin: str
    site: str
    text: str


@dataclass(frozen=True)
class GraphInfo:
    """What a graph is: filled by trace, extended by passes. Plain values only, no tensors.

    ``parameters`` and ``float_bytes`` (by dtype, largest first) are those of the user's model.
    ``calibration``: the data that passes read, None where that is not known. ``weights``: where the
    float weights come from, if it is known that they were coarser before. ``frontend``: what traced
    the model, and why not another.
    """

    model: str
    vocab_size: int
    max_positions: int | None
    blocks: tuple[str, ...]
    head: str | None
    embeddings: str | None
    config: str = field(default="", repr=False)
    level: Level = Level.FLOAT
    scheme: str = "fp"
    sites: tuple[Site, ...] = ()
    left_in_float: tuple[LeftInFloat, ...] = ()
    history: tuple[PassRecord, ...] = field(default=(), repr=False)
    notes: tuple[Note, ...] = field(default=(), repr=False)
    site_records: tuple[SiteRecord, ...] = field(default=(), repr=False)
    parameters: int = 0
    float_bytes: tuple[tuple[str, int], ...] = ()
    calibration: Calibration = None
    weights: str = ""
    frontend: str = ""


def info(gm: GraphModule) -> GraphInfo:
    """The GraphInfo of a graph that fxquant.trace made; GraphError for anything else."""
    found = gm.meta.get(KEY) if isinstance(gm, GraphModule) else None
    if isinstance(found, GraphInfo):
        return found
    if isinstance(gm, nn.Module) and hasattr(gm, "config"):
        raise GraphError(
            f"{type(gm).__name__} is a model, and a graph is needed: "
            "fxquant.convert(model, scheme) or fxquant.trace(model), in float, makes one"
        )
    raise GraphError(
        f"this {'GraphModule' if isinstance(gm, GraphModule) else type(gm).__name__} was not made "
        "by fxquant.trace or fxquant.convert, which take what "
        "AutoModelForCausalLM.from_pretrained returns"
    )


def lowered_already(facts: GraphInfo) -> str:
    """Why no scheme can start from a graph, and what can be done with it; "" if one can."""
    scheme = f"scheme {facts.scheme}, level {facts.level}"
    source = "start from the model or from fxquant.trace(model) for another scheme"
    if facts.level == Level.FLOAT:
        if facts.scheme == "fp32-gemm":
            return f"the graph's linears compute in fp32 already (scheme fp32-gemm): {source}"
        if any(site.role == "matmul" for site in facts.sites):
            return (
                "attention's products are sites of this graph already (a repair such as attn8 "
                f"ran): {source}, and name the repair in the scheme"
            )
        return ""
    if facts.level == Level.OBSERVED:
        return (
            f"the graph has observers already (level {facts.level}): {source}, or finish this one: "
            "fxquant.Pipeline((Quantize(scheme), Integerize())).run(graph)"
        )
    further = {
        Level.QDQ: ", Integerize()(graph) takes it to integers",
        Level.INTEGER: ", FuseKernels()(graph) fuses it into kernels",
    }
    rest = further.get(facts.level, "")
    kept = ", saved, exported" if facts.level in further else ""
    return (
        f"the graph is quantized already ({scheme}): {source}{rest}; as it is it can be called, "
        f"inspected{kept} and evaluated"
    )


def set_info(gm: GraphModule, value: GraphInfo) -> None:
    gm.meta[KEY] = value


def update_info(gm: GraphModule, **changes: Any) -> None:
    """Replace fields of the graph's GraphInfo."""
    set_info(gm, replace(info(gm), **changes))


def add_note(gm: GraphModule, origin: str, site: str, text: str) -> None:
    """Keep what pass ``origin`` has to say about ``site``; printouts show it."""
    update_info(gm, notes=(*info(gm).notes, Note(origin, site, text)))


def leave_in_float(gm: GraphModule, path: str, reason: str) -> None:
    """Say that what multiplies or looks up weights at ``path`` stays float."""
    update_info(gm, left_in_float=(*info(gm).left_in_float, LeftInFloat(path, reason)))


def tag(node: Node) -> Tag:
    found = node.meta.get(KEY)
    return found if isinstance(found, Tag) else Tag()


def set_tag(node: Node, value: Tag) -> None:
    node.meta[KEY] = value


def site_outputs(gm: GraphModule) -> Iterator[tuple[Site, Node]]:
    """Each site with the node that holds its output, in graph order."""
    sites = {site.path: site for site in info(gm).sites}
    for node in gm.graph.nodes:
        if tag(node).is_output:
            yield sites[tag(node).site or ""], node


def linear_sites(gm: GraphModule) -> Iterator[tuple[Site, Node]]:
    """The sites that multiply by a weight: no embedding, no product of attention."""
    return ((site, node) for site, node in site_outputs(gm) if site.role in ("linear", "head"))


def coded_linears(gm: GraphModule, scheme: Scheme) -> Iterator[tuple[Site, Node, SiteSpec]]:
    """The linear sites whose weights ``scheme`` turns into codes."""
    for site, node in linear_sites(gm):
        spec = scheme.spec_for(site.path, site.role)
        if spec.weight is not None:
            yield site, node, spec


def clone_sharing_storage(module: ModuleT, *, hooks: bool = False) -> ModuleT:
    """A deep copy whose parameters and buffers are new objects over the same storage, ties kept.

    What is done to the copy (``half``, ``to``, ``train``, new leaves) never reaches the original;
    only writing into a tensor in place would, and nothing here does. ``hooks``: with the forward
    hooks that it has, the user's own, which may hold what cannot be copied; those that are bound to
    a module act on its copy.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(_over_storage_of(parameter), requires_grad=False)
    for part in module.modules():
        for value in part.__dict__.values():  # a module has a dozen, which deepcopy is slow at
            if type(value) in (dict, OrderedDict) and not value:
                memo[id(value)] = type(value)()
        for tensor in _tensors({k: v for k, v in part.__dict__.items() if k != "_parameters"}):
            memo.setdefault(id(tensor), _over_storage_of(tensor))
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values()):
            if not isinstance(getattr(hook, "__self__", None), nn.Module):
                memo[id(hook)] = hook
    clone = copy.deepcopy(module, memo)
    for part in clone.modules():
        for found in () if hooks else (part._forward_hooks, part._forward_pre_hooks):
            found.clear()
    return clone


def _over_storage_of(tensor: Tensor) -> Tensor:
    """A plain tensor also of one made in inference mode, through which no gradient goes."""
    if not tensor.is_inference():
        return tensor.detach()
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    parts = tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    return plain.set_(*parts)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def source_of(node: Node) -> Node:
    """The node's first argument, which is a node."""
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def is_linear(gm: GraphModule, node: Node) -> bool:
    """Whether the node calls a module that multiplies by a weight."""
    return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), LINEAR)


def nodes_behind(start: Iterable[Node], stop: Callable[[Node], bool]) -> Iterator[Node]:
    """``start`` and what they are computed from, each node once, not past one that stops."""
    todo, seen = list(start), set[Node]()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if not stop(node):
            todo.extend(node.all_input_nodes)


def linear_parameters(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Detached weight [N, K] as F.linear has it (a view for Conv1D's [K, N]), and bias [N]."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    if isinstance(module, Conv1D):
        weight = weight.t()
    return weight, bias.detach() if isinstance(bias, Tensor) else None


def get_tensor(gm: GraphModule, node: Node) -> Tensor:
    """The parameter or buffer that a get_attr node reads."""
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(gm.get_submodule(owner), name)
    assert isinstance(value, Tensor)
    return value


def is_op(node: object, op: Any) -> TypeGuard[Node]:
    """Whether ``node`` calls ``op``, an ``torch.ops`` overload or a function."""
    return isinstance(node, Node) and node.op == "call_function" and node.target is op


def install(gm: GraphModule, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path``, in place of what stands there; write it to the workspace."""
    workspace = gm.meta.get(_WORKSPACE)
    if workspace is not None:
        workspace.keep(module)
    gm.add_submodule(path, module)


def set_workspace(gm: GraphModule, workspace: Workspace) -> None:
    """Let passes on ``gm`` write the leaves that they install to ``workspace``."""
    gm.meta[_WORKSPACE] = workspace


def float_dtype(gm: GraphModule) -> torch.dtype:
    """The dtype of the graph's float parameters (bias, norms, embeddings), fp32 if it has none."""
    for module in gm.modules():
        if not isinstance(module, QuantizedParameters):
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    return parameter.dtype
    return torch.float32


def device_of(gm: GraphModule) -> torch.device:
    """The device of the graph's first parameter or buffer, the one it is read to if streamed."""
    streamed = streamed_device(gm)
    if streamed is not None:
        return streamed
    first = next(itertools.chain(gm.parameters(), gm.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def attention_mask_node(gm: GraphModule) -> Node:
    """The node that holds the attention mask with its default filled in; made where none does."""
    ids, mask = (node for node in gm.graph.nodes if node.op == "placeholder")
    filled: Node | None = next((u for u in mask.users if u.target is default_mask), None)
    if filled is not None:
        return filled
    with gm.graph.inserting_after(mask):
        filled = gm.graph.call_function(default_mask, (mask, ids))
    set_tag(filled, Tag())
    return filled
