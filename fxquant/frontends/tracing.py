"""The front end: a Hugging Face causal LM becomes a GraphModule at level float.

The user's model is read, never touched: a copy that shares its storage is traced, and the result
is compared with a second copy, run eagerly, before anything else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils.fx import HFTracer

from fxquant.errors import GraphError, ModelError, NonFiniteError, TracingError
from fxquant.frontends.attention import registered
from fxquant.frontends.comparison import TESTED_TRANSFORMERS, Oracle, compare
from fxquant.frontends.handed_over import check_handed_over, own_copy
from fxquant.frontends.patching import exclusive, tracing
from fxquant.frontends.scoring import ScoringGraph
from fxquant.frontends.settled import settle
from fxquant.ir import leaves as own
from fxquant.ir.functions import default_mask
from fxquant.ir.graph import (
    GraphInfo,
    Tag,
    info,
    lowered_already,
    set_info,
    set_tag,
)
from fxquant.ir.levels import verify
from fxquant.ir.size import bytes_by_dtype
from fxquant.ir.streamed import restream, streamed_device, streamed_tensors, unstreamed

# 4.52 scales OPT's attention twice (transformers issue 38277): perplexity 26 became 388418.
BROKEN_TRANSFORMERS = ("4.52",)


class _Logits(nn.Module):
    """The model as a function of two tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True
        )
        logits = output.logits
        assert isinstance(logits, Tensor | torch.fx.Proxy)
        return logits  # type: ignore[return-value]


class _Tracer(HFTracer):  # type: ignore[misc]
    """HFTracer that iterates Proxies, keeps Conv1D whole, and knows where it failed."""

    failed_in: str | None = None

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter([obj[index] for index in range(len(obj._metadata))])

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Conv1D) or bool(super().is_leaf_module(m, module_qualified_name))

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


def trace(model: PreTrainedModel) -> GraphModule:
    """The model's function of (input_ids, attention_mask=None) to logits, as a graph.

    Args:
        model: a Hugging Face causal LM on one device, any float dtype, in any state; it is left
            exactly as it is. A model of ``streaming.stream`` is traced on meta, and its leaves
            are read from their files when they are used.

    Returns a GraphModule in eval mode: ``input_ids`` int64 [batch, length], ``attention_mask``
    [batch, length] of 0 and 1 (None: all 1), result float [batch, length, vocab]. Batch and
    length are free. Leaves are new modules over the model's storage, at the model's paths.

    Threads: any number may trace at once, and they take turns, since torch.fx and transformers
    patch ``nn.Module`` and torch while they trace. The patches act in the tracing thread only and
    are gone whatever ends it; in other threads models, this one too, go on computing as ever. What
    must wait in another thread: tracing by other means, and torch.compile's first call, which
    would read the patched functions.

    Raises ModelError (not a causal LM, unsupported transformers), NonFiniteError (a parameter
    holds NaN or infinity), TracingError (names the module that cannot be traced, or the first
    module whose output differs from the eager model's).
    """
    _check_versions()
    _check_model(model)
    check_handed_over(model)
    facts = _describe(model)
    device = streamed_device(model) or model.device
    oracle = Oracle.of(own_copy(model), facts, device)
    copy = own_copy(model)
    sources = unstreamed(copy)  # a streamed model is traced on meta
    settle(copy)
    gm = _symbolic(copy)
    set_info(gm, facts)
    _drop_dropout(gm)
    _default_mask(gm)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.recompile()
    restream(gm, sources)
    verify(gm, "trace")
    compare(gm, oracle)
    return gm


def _check_versions() -> None:
    version = transformers.__version__
    if version.startswith(BROKEN_TRANSFORMERS):
        raise ModelError(
            f"transformers {version} computes OPT wrongly (its attention is scaled twice, "
            f"transformers issue 38277); install {TESTED_TRANSFORMERS}"
        )


def _check_model(model: object) -> None:
    kind = type(model).__name__
    if isinstance(model, GraphModule) and "fxquant" in model.meta:
        raise GraphError(
            lowered_already(info(model))
            or "this is a graph of fxquant.trace already: pass it to convert, explain or plan"
        )
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{kind} is not a Hugging Face model: pass what AutoModelForCausalLM.from_pretrained "
            "returns, or fxquant.load_model(name).model"
        )
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if model.config.is_encoder_decoder or not (known or model.can_generate()):
        raise ModelError(
            f"{kind} is not a causal language model: load it with AutoModelForCausalLM; "
            "encoders, encoder-decoders and headless models have no next-token loss"
        )
    for name, parameter in itertools.chain(model.named_parameters(), streamed_tensors(model)):
        if parameter.device.type != "meta" and parameter.numel():
            low, high = torch.aminmax(parameter.detach())
            if not (math.isfinite(float(low)) and math.isfinite(float(high))):
                raise NonFiniteError(
                    f"{name}: the weight holds NaN or infinity; the checkpoint is damaged or "
                    "was cast to a dtype that it overflows"
                )


@exclusive
def _symbolic(copy: PreTrainedModel) -> GraphModule:
    root = _Logits(copy)
    ids = torch.zeros(2, 9, dtype=torch.int64, device=copy.device)
    tracer = _Tracer()
    implementation = copy.config._attn_implementation
    with tracing(), registered(implementation) as name:
        if copy._can_set_attn_implementation():
            copy.set_attn_implementation(name)
        try:
            graph = tracer.trace(
                root, dummy_inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            )
        except Exception as error:
            where = tracer.failed_in or type(copy).__name__
            raise TracingError(
                f"{type(copy).__name__} cannot be traced: module {where or 'the model itself'}: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error
    return _stripped(root, graph, type(copy).__name__)


def _stripped(root: nn.Module, graph: torch.fx.Graph, class_name: str) -> GraphModule:
    """A GraphModule whose targets are paths in the user's model, without the wrapper's prefix."""
    leaves: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            path = str(node.target)
            owner, _, name = path.rpartition(".")
            leaf = _own(getattr(root.get_submodule(owner), name))
            node.target = path.removeprefix("model.")
            leaves[node.target] = leaf
        scopes = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        set_tag(node, Tag(scope=scopes[-1].removeprefix("model.") if scopes else ""))
    return ScoringGraph(leaves, graph, class_name).eval()


def _own(leaf: Any) -> Any:
    """The leaf as graphs have it: nothing below the front end knows transformers' classes."""
    if type(leaf) is not Conv1D:
        return leaf
    return own.Conv1D(leaf.weight, leaf.bias).train(leaf.training)


def _drop_dropout(gm: GraphModule) -> None:
    """Dropout of an eval graph is the identity; kept, it would come alive in ``train()``."""
    for node in list(gm.graph.nodes):
        is_module = node.op == "call_module" and isinstance(
            gm.get_submodule(str(node.target)), nn.Dropout | nn.Identity
        )
        if is_module or (node.op == "call_function" and node.target is nn.functional.dropout):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def _default_mask(gm: GraphModule) -> None:
    ids, mask = (node for node in gm.graph.nodes if node.op == "placeholder")
    mask.args = (None,)
    with gm.graph.inserting_after(mask):
        filled = gm.graph.call_function(default_mask, (mask, ids))
    mask.replace_all_uses_with(filled, delete_user_cb=lambda user: user is not filled)


def _path_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


# What a loader sets on a model whose float weights were coarser before; see GraphInfo.weights.
WEIGHTS_WERE = "fxquant_weights_were"


def _describe(model: PreTrainedModel) -> GraphInfo:
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    return GraphInfo(
        model=str(model.config._name_or_path or type(model).__name__),
        vocab_size=int(getattr(embedding, "num_embeddings", config.vocab_size)),
        max_positions=_positive(getattr(config, "max_position_embeddings", None)),
        blocks=_decoder_blocks(model),
        head=_path_of(model, model.get_output_embeddings()),
        embeddings=_path_of(model, embedding),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        float_bytes=bytes_by_dtype((*model.parameters(), *model.buffers())),
        config=str(model.config.to_json_string(use_diff=False)),
        calibration=(),
        weights=getattr(model, WEIGHTS_WERE, ""),
    )


def _positive(count: int | None) -> int | None:
    """XLNet, which has no limit, says -1."""
    return None if count is None or count < 1 else count


def _decoder_blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the repeated blocks: children of the outermost ModuleLists that hold linears."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        has_linear = any(isinstance(part, nn.Linear | Conv1D) for part in module.modules())
        if isinstance(module, nn.ModuleList) and has_linear and not inside:
            lists[name] = module
    return tuple(
        f"{name}.{index}" for name, blocks in lists.items() for index in range(len(blocks))
    )
