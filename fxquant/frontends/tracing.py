"""The front end: a Hugging Face causal LM becomes a GraphModule at level float.

The user's model is read, never touched: a copy that shares its storage is traced, and the result
is compared with a second copy, run eagerly, before anything else.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fxquant.errors import GraphError, ModelError, NonFiniteError, TracingError
from fxquant.files.tensor_file import FLOATS
from fxquant.frontends.attention import registered
from fxquant.frontends.comparison import TESTED_TRANSFORMERS, Oracle, compare
from fxquant.frontends.functional import make_functional
from fxquant.frontends.handed_over import check_handed_over, own_copy
from fxquant.frontends.hooks import only_watching
from fxquant.frontends.leaves import as_leaf
from fxquant.frontends.masks import fuse_masks
from fxquant.frontends.mixtures import expert_sources, make_dense
from fxquant.frontends.patching import exclusive, no_mask_left_out, tracing
from fxquant.frontends.recorder.record import Recorded, record
from fxquant.frontends.scoring import ScoringGraph
from fxquant.frontends.settled import settle
from fxquant.ir.blocks import block_of
from fxquant.ir.functions import default_mask
from fxquant.ir.graph import (
    GraphInfo,
    Note,
    info,
    lowered_already,
    set_info,
)
from fxquant.ir.legal_forms import verify
from fxquant.ir.size import bytes_by_dtype
from fxquant.ir.streamed import restream, streamed_device, streamed_tensors, unstreamed
from fxquant.pipeline.arguments import checked_call

# 4.52 scales OPT's attention twice (transformers issue 38277): perplexity 26 became 388418.
BROKEN_TRANSFORMERS: Final = ("4.52",)
FRONT_ENDS: Final = ("auto", "hf", "recorder")
HAS_TRACER: Final = importlib.util.find_spec("transformers.utils.fx") is not None


@checked_call()
def trace(model: PreTrainedModel, frontend: str = "auto") -> GraphModule:
    """The model's function of (input_ids, attention_mask=None) to logits, as a graph.

    Args:
        model: a Hugging Face causal LM on one device, any float dtype, in any state; it is left
            exactly as it is. A model of ``streaming.stream`` is traced on meta, and its leaves
            are read from their files when they are used.
        frontend: "hf", transformers' tracer (it has one up to 4.57); "recorder", ours, for every
            version; "auto": the first where there is one, the second where there is none and for
            what the first cannot trace. The graph's GraphInfo says which.

    Returns a GraphModule in eval mode: ``input_ids`` int64 [batch, length], ``attention_mask``
    [batch, length] of 0 and 1 (None: all 1), result float [batch, length, vocab]. Batch and
    length are free. Leaves are new modules over the model's storage, at the model's paths.

    Threads: any number may trace at once, and they take turns, since torch.fx and transformers
    patch ``nn.Module`` and torch while they trace. The patches act in the tracing thread only and
    are gone whatever ends it; in other threads models, this one too, go on computing as ever. What
    must wait in another thread: tracing by other means, models that transformers loads or builds
    on meta by itself (it patches ``nn.Module`` for all threads meanwhile; ``load_model`` waits),
    and torch.compile's first call, which would read the patched functions.

    Raises ModelError (not a causal LM, unsupported transformers, no such front end),
    NonFiniteError (a parameter holds NaN or infinity), TracingError, a ModelError (names the module
    that cannot be traced, or the first module whose output differs from the eager model's).
    """
    _check_versions()
    chosen = _front_ends(frontend)
    _check_model(model)
    hooks = check_handed_over(model)
    facts = replace(_describe(model), notes=tuple(hook.note for hook in hooks))
    eager = only_watching(own_copy(model), hooks)
    oracle = Oracle.of(eager, facts, streamed_device(model) or model.device)
    failure = ""
    for name in chosen[:-1]:
        try:
            return _traced(model, oracle, replace(facts, frontend=_words(name, "")), name)
        except TracingError as error:
            failure = str(error)
    name = chosen[-1]
    return _traced(model, oracle, replace(facts, frontend=_words(name, failure)), name)


def _front_ends(frontend: str) -> tuple[str, ...]:
    """Those to try, one after the other."""
    if frontend not in FRONT_ENDS:
        raise ModelError(
            f"unknown front end {frontend!r}: known are {', '.join(map(repr, FRONT_ENDS))}"
        )
    if frontend == "hf" and not HAS_TRACER:
        raise ModelError(
            f"front end 'hf': transformers {transformers.__version__} has no tracer of its own "
            "(4.57 was the last with one); use 'recorder' or 'auto'"
        )
    every = ("hf", "recorder") if HAS_TRACER else ("recorder",)
    return every if frontend == "auto" else (frontend,)


def _traced(model: PreTrainedModel, oracle: Oracle, facts: GraphInfo, frontend: str) -> GraphModule:
    """By one front end, and compared with the model."""
    copy = own_copy(model)
    sources = unstreamed(copy)  # a streamed model is traced on meta
    settle(copy)
    mixtures = make_dense(copy)
    sources |= expert_sources(mixtures, sources)
    gm, longest = _graph_by(frontend, copy)
    dense = tuple(Note("trace", each.path, str(each)) for each in mixtures)
    facts = replace(facts, notes=facts.notes + dense)
    set_info(gm, _bounded(facts, longest))
    _drop_dropout(gm)
    _default_mask(gm)
    make_functional(gm.graph)
    fuse_masks(gm)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.recompile()
    restream(gm, sources)
    verify(gm, "trace")
    compare(gm, oracle)
    return gm


def _bounded(facts: GraphInfo, longest: int | None) -> GraphInfo:
    """``facts`` of a graph that holds up to a length of ``longest``, or one more: with 64 positions
    max(0, 64 - length) gives at 64 what it gives below."""
    if longest is None:
        return facts
    if facts.max_positions is not None and longest + 1 < facts.max_positions:
        raise TracingError(
            f"{facts.model} cannot be traced: above a length of {longest} it computes another way "
            f"than below, its config allows {facts.max_positions}, and a graph holds one way only"
        )
    return replace(
        facts, max_positions=longest if facts.max_positions is None else facts.max_positions
    )


def _words(frontend: str, failure: str) -> str:
    name = f"HFTracer of transformers {transformers.__version__}"
    if frontend == "recorder":
        name = f"recorder, transformers {transformers.__version__}"
    return f"{name} (HFTracer: {failure})" if failure else name


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
        if parameter.is_floating_point() and parameter.dtype not in FLOATS:
            raise ModelError(
                f"{name} is of {parameter.dtype}, in which nothing is computed: give the model in "
                "float32, float16 or bfloat16 (a quantized checkpoint is none to start from)"
            )
        if parameter.device.type != "meta" and parameter.numel():
            low, high = torch.aminmax(parameter.detach())
            if not (math.isfinite(float(low)) and math.isfinite(float(high))):
                raise NonFiniteError(
                    f"{name}: the weight holds NaN or infinity; the checkpoint is damaged or "
                    "was cast to a dtype that it overflows"
                )


@exclusive
def _graph_by(frontend: str, copy: PreTrainedModel) -> tuple[GraphModule, int | None]:
    """A GraphModule over the parts of ``copy``, whose targets are paths in the user's model, and
    the greatest length for which it holds."""
    make = record if frontend == "recorder" else _hf_record()
    implementation = copy.config._attn_implementation
    with tracing(), registered(implementation) as name:
        if copy._can_set_attn_implementation():
            copy.set_attn_implementation(name)
        recorded = make(copy, _logits)
    parts: dict[str, Any] = dict(recorded.constants)
    for node in recorded.graph.nodes:
        path = str(node.target)
        if node.op in ("call_module", "get_attr") and path not in parts:
            owner, _, name = path.rpartition(".")
            parts[path] = as_leaf(getattr(copy.get_submodule(owner), name))
    return ScoringGraph(parts, recorded.graph, type(copy).__name__).eval(), recorded.longest


def _hf_record() -> Callable[..., Recorded]:
    from fxquant.frontends import hf_fx  # only where transformers has its tracer

    return hf_fx.record


def _logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Any:
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    with no_mask_left_out():
        return model(**inputs, use_cache=False, return_dict=True).logits


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
        max_positions=_max_positions(config),
        blocks=_decoder_blocks(model),
        head=_path_of(model, model.get_output_embeddings()),
        embeddings=_path_of(model, embedding),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        float_bytes=bytes_by_dtype((*model.parameters(), *model.buffers())),
        config=str(model.config.to_json_string(use_diff=False)),
        calibration=(),
        weights=getattr(model, WEIGHTS_WERE, ""),
    )


def _max_positions(config: PretrainedConfig) -> int | None:
    """As the config says it; XLNet, which has no limit, says -1. MPT's name is its own."""
    names = ("max_position_embeddings", "max_seq_len")
    count = next((n for name in names if (n := getattr(config, name, None)) is not None), None)
    return None if count is None or count < 1 else count


def _decoder_blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the repeated blocks: children of the outermost ModuleLists that hold matrices, each
    once, by the path that its parts have."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, ParametrizationList):  # a ModuleList, but what it holds is no block
            continue
        outermost = block_of(name, lists) is None
        if isinstance(module, nn.ModuleList) and _holds_matrix(module) and outermost:
            lists[name] = module
    first: dict[nn.Module, str] = {}
    for name, blocks in lists.items():
        for index, block in enumerate(blocks):
            first.setdefault(block, f"{name}.{index}")
    return tuple(first.values())


def _holds_matrix(module: nn.Module) -> bool:
    return any(
        parameter.dim() > 1
        for part in module.modules()
        if not isinstance(part, nn.Embedding)
        for parameter in part.parameters(recurse=False)
    )
