"""The first front end: transformers' own tracer, which it has up to 4.57."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Node
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.fx import HFProxy, HFTracer

from fxquant.errors import TracingError
from fxquant.frontends.leaves import is_leaf
from fxquant.frontends.recorder.record import Recorded
from fxquant.ir.graph import Tag, set_tag
from fxquant.ir.operands import op_name

# Numbers that a size is compared with: one up to this is told by the probes of an Oracle.
_STEP: Final = 2
_NUMBERS: Final = frozenset(
    {"gt", "lt", "ge", "le", "eq", "ne", "add", "sub", "mul", "floordiv", "mod"}
)


class _Proxy(HFProxy):  # type: ignore[misc]
    """HFProxy that takes no side where a size is compared with a number.

    HFTracer takes that of its own short input, whatever a graph is given later. The recorder keeps
    account of such decisions.
    """

    def __bool__(self) -> bool:
        large = [number for number in _numbers(self.node) if abs(number) > _STEP]
        if large and isinstance(getattr(self, "_metadata", None), int):  # a remainder is one too
            raise TracingError(
                f"it compares a size with {large[0]}, and HFTracer does not tell a size that "
                "inputs change from one that they do not"
            )
        return bool(super().__bool__())


def _numbers(condition: Node) -> Iterator[int | float]:
    """Those that stand in ``condition``, through arithmetic down to sizes; none beside how many
    dimensions a tensor has, which no input changes."""
    if op_name(condition) in _NUMBERS and not any(map(_is_rank, condition.args)):
        for each in condition.args:
            if isinstance(each, Node):
                yield from _numbers(each)
            elif isinstance(each, int | float):
                yield each


def _is_rank(operand: Any) -> bool:
    if not isinstance(operand, Node):
        return False
    return op_name(operand) == "dim" or operand.args[1:] == ("ndim",)


class _Tracer(HFTracer):  # type: ignore[misc]
    """HFTracer that iterates Proxies, keeps our leaves whole, and knows where it failed."""

    failed_in: str | None = None

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._leaves = {id(module): is_leaf(module) for module in root.modules()}

    def proxy(self, node: Node) -> _Proxy:
        return _Proxy(node, self)

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter([obj[index] for index in range(len(obj._metadata))])

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        made_while_tracing = bool(super().is_leaf_module(m, module_qualified_name))
        return self._leaves.get(id(m), made_while_tracing)

    def create_proxy(self, kind: str, target: Any, args: Any, *rest: Any, **more: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, *rest, **more)
        if kind == "call_module" and not hasattr(proxy, "_metadata"):
            module = self.root.get_submodule(target)
            if isinstance(module, Conv1D):
                # HFTracer cannot run it on meta; attribute access would give a Proxy here.
                weight = module._parameters["weight"]
                shape = (*args[0]._metadata.shape[:-1], module.nf)
                proxy.install_metadata(weight.new_empty(shape, device="meta"))
        return proxy

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = str(self.path_of_module(m)).removeprefix("model.")
            raise


class _Logits(nn.Module):
    """The model as a function of two tensors."""

    def __init__(self, model: PreTrainedModel, run: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._run = run

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self._run(self.model, input_ids, attention_mask)


def record(model: PreTrainedModel, run: Callable[..., Any]) -> Recorded:
    """As the recorder's ``record``. The caller holds the lock and has patched for tracing."""
    root = _Logits(model, run)
    tracer = _Tracer(root)
    ids = torch.zeros(2, 9, dtype=torch.int64, device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        graph = tracer.trace(root, dummy_inputs=inputs)
    except Exception as error:
        where = f"module {tracer.failed_in}" if tracer.failed_in else "the model itself"
        text = str(error).strip()
        raise TracingError(
            f"{type(model).__name__} cannot be traced: {where}: {type(error).__name__}: "
            f"{text.splitlines()[0] if text else ''}"
        ) from error
    constants: dict[str, Any] = {}
    for node in graph.nodes:
        scopes = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        set_tag(node, Tag(scope=scopes[-1].removeprefix("model.") if scopes else ""))
        if node.op in ("call_module", "get_attr"):
            name = str(node.target)
            if not name.startswith("model."):  # made while tracing
                constants[name] = getattr(root, name)
            node.target = name.removeprefix("model.")
    return Recorded(graph, constants)
