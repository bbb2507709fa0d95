"""The traced graph beside the model it was traced from, and where they part."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedModel

from fxquant.errors import ModelError, NonFiniteError, TracingError
from fxquant.ir.graph import device_of, float_dtype
from fxquant.run.probe import Probe, relative_difference

TESTED_TRANSFORMERS = "4.57.6"


def compare_with_eager(gm: GraphModule, eager: PreTrainedModel) -> None:
    """Logits on a batch of another shape than the traced one, padded left and right."""
    facts = gm.meta["fxquant"]
    length = min(13, facts.max_positions or 13)
    probe = Probe.random(facts.vocab_size, device_of(gm), batch=3, length=length)
    inputs = {"input_ids": probe.input_ids, "attention_mask": probe.attention_mask}
    with torch.no_grad():
        expected = probe.attended(eager(**inputs, use_cache=False, return_dict=True).logits)
        found = probe.attended(gm(**inputs))
    if not bool(torch.isfinite(expected).all()):
        raise NonFiniteError(
            f"{_first_bad_leaf(eager, inputs)}: the float model itself computes NaN or infinity "
            "here on a probe batch; it overflows its dtype or its weights are damaged"
        )
    difference = relative_difference(expected, found)
    allowed = max(1e-5, 4 * torch.finfo(float_dtype(gm)).eps)
    if difference > allowed:
        raise TracingError(
            f"the traced graph of {type(eager).__name__} disagrees with the eager model: relative "
            f"logit difference {difference:.3g} (at most {allowed:.3g}), first at module "
            f"{_first_difference(gm, eager, inputs, allowed)}. Versions: transformers "
            f"{transformers.__version__} (tested {TESTED_TRANSFORMERS}), torch "
            f"{importlib.metadata.version('torch')}"
        )
    _check_causal(gm, inputs, type(eager).__name__)


def _check_causal(gm: GraphModule, inputs: dict[str, Tensor], name: str) -> None:
    """Another last token must not change what is predicted before it (BERT sees both sides)."""
    ids, mask = inputs["input_ids"][:1], torch.ones_like(inputs["attention_mask"][:1])
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % gm.meta["fxquant"].vocab_size
    with torch.no_grad():
        before, after = (gm(input_ids=i, attention_mask=mask)[:, :-1] for i in (ids, changed))
    if before.numel() and relative_difference(before, after) > 1e-3:
        raise ModelError(
            f"{name} is not causal: a token changes the logits before it, so its loss would be no "
            "perplexity (an encoder loaded as a decoder?)"
        )


Outputs = dict[str, Tensor]


@torch.no_grad()
def _leaf_outputs(module: nn.Module, inputs: dict[str, Tensor]) -> Outputs:
    """Output of each leaf module, in the order of their calls."""
    outputs: Outputs = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.setdefault(name, output.detach())

        return keep

    handles = [
        leaf.register_forward_hook(hook(name))
        for name, leaf in module.named_modules()
        if not any(True for _ in leaf.children())
    ]
    try:
        module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _first_bad_leaf(eager: nn.Module, inputs: dict[str, Tensor]) -> str:
    outputs = _leaf_outputs(eager, {**inputs, "use_cache": False})  # type: ignore[dict-item]
    bad = (name for name, value in outputs.items() if not bool(torch.isfinite(value).all()))
    return next(bad, "logits")


def _first_difference(
    gm: GraphModule, eager: nn.Module, inputs: dict[str, Tensor], allowed: float
) -> str:
    ours = _leaf_outputs(gm, inputs)
    theirs = _leaf_outputs(eager, {**inputs, "use_cache": False})  # type: ignore[dict-item]
    keep = inputs["attention_mask"].bool().reshape(-1)
    for name, value in ours.items():
        if name in theirs and value.shape == theirs[name].shape:
            both = (theirs[name], value)
            if value.shape[:-1].numel() == keep.numel():
                both = tuple(v.reshape(keep.numel(), -1)[keep] for v in both)  # type: ignore[assignment]
            if relative_difference(*both) > allowed:
                return name
    return "the model's output (every leaf module agrees)"
