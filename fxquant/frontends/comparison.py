"""The user's own model, run on probes of several shapes, and the traced graph beside it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedModel

from fxquant.errors import FxquantError, ModelError, NonFiniteError, TracingError
from fxquant.frontends.write_guard import NoWrites
from fxquant.ir.graph import GraphInfo, info
from fxquant.run.batched import run_batches
from fxquant.run.probe import Probe, relative_difference

TESTED_TRANSFORMERS = "4.57.6"
_LONG = 67  # tokens: beyond the chunks of 64 that some architectures loop over


@dataclass(frozen=True)
class OracleProbe:
    """Token ids int64 [B, L] and a mask of 0 and 1, None for a call without one."""

    input_ids: Tensor
    attention_mask: Tensor | None

    @property
    def inputs(self) -> dict[str, Tensor]:
        given = {"input_ids": self.input_ids}
        if self.attention_mask is not None:
            given["attention_mask"] = self.attention_mask
        return given

    def attended(self, values: Tensor) -> Tensor:
        """Rows [tokens, ...] of [B, L, ...] that are not padding."""
        if self.attention_mask is None:
            return values.flatten(0, 1)
        return values[self.attention_mask.bool()]

    def __str__(self) -> str:
        shape = list(self.input_ids.shape)
        if self.attention_mask is None:
            return f"token ids {shape} without a mask"
        padded = "a padded" if bool((self.attention_mask == 0).any()) else "an"
        return f"token ids {shape} with {padded} attention mask"


def oracle_probes(facts: GraphInfo, device: torch.device) -> tuple[OracleProbe, ...]:
    """Four rows padded left, not (twice, alike but for the last token) and right; one row padded
    left; one token; one long row without a mask: 127 tokens in 4 forwards.

    All are made of the same few tokens, at most 39.
    """
    most = facts.max_positions or _LONG
    drawn = Probe.random(facts.vocab_size, device, batch=3, length=min(13, most))
    left, middle, right = drawn.input_ids
    other = middle.clone()
    other[-1] = next((t for t in drawn.input_ids.flatten() if t != middle[-1]), 0)
    order = torch.tensor([0, 1, 1, 2], device=device)
    several = OracleProbe(
        torch.stack([left, middle, other, right]), drawn.attention_mask.index_select(0, order)
    )
    stock = drawn.input_ids.flatten().repeat(2).flip(0)
    short = stock[None, : min(7, most)]
    mask = torch.ones_like(short)
    if short.shape[1] > 2:
        mask[0, :2] = 0
    single = stock[None, :1]
    return (
        several,
        OracleProbe(short, mask),
        OracleProbe(single, torch.ones_like(single)),
        OracleProbe(stock[None, : min(_LONG, most)], None),
    )


@dataclass(frozen=True)
class Oracle:
    """What the user's model computes on each probe: logits of the attended tokens, [T, vocab].

    ``hooks``: paths of the modules whose hooks have seen the probes.
    """

    model: PreTrainedModel
    probes: tuple[OracleProbe, ...]
    logits: tuple[Tensor, ...]
    hooks: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel, facts: GraphInfo, device: torch.device) -> Oracle:
        """Run ``model``, a copy in eval mode of the user's with all that acts on its function.

        Raises ModelError (it does not run, writes into its own tensors, or is not causal) and
        NonFiniteError (NaN or infinity).
        """
        found = []
        probes = oracle_probes(facts, device)
        with torch.autocast(device.type, enabled=False), torch.no_grad(), NoWrites(model):
            for probe in probes:
                found.append(probe.attended(_logits(model, probe)))
                # Where it overflows on a long text only, what runs it on one will say so.
                if probe is probes[0] and not bool(torch.isfinite(found[0]).all()):
                    raise NonFiniteError(
                        f"{_first_bad_leaf(model, probe)}: the float model itself computes NaN or "
                        "infinity here on a probe batch; it overflows its dtype or its weights are "
                        "damaged"
                    )
                if probe is probes[0]:
                    _check_causal(model, found[0], probe)
        hooks = dict.fromkeys(note.site for note in facts.notes)
        return cls(model, probes, tuple(found), tuple(hooks))


def _logits(model: PreTrainedModel, probe: OracleProbe) -> Tensor:
    name, shape = type(model).__name__, tuple(probe.input_ids.shape)
    try:
        logits = model(**probe.inputs, use_cache=False, return_dict=True).logits
    except FxquantError:
        raise
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"{name} itself fails on {probe}, before anything is traced: {type(error).__name__}: "
            f"{said[0]}; fxquant takes a model for which model(input_ids=..., attention_mask=..., "
            "use_cache=False, return_dict=True).logits works"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 3 or tuple(logits.shape[:2]) != shape:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"{name}: logits [batch, length, vocab] expected for {probe}, got {got}")
    return logits


def _check_causal(model: PreTrainedModel, logits: Tensor, probe: OracleProbe) -> None:
    """Another last token must not change what is predicted before it (BERT sees both sides)."""
    assert probe.attention_mask is not None
    before, after = (rows[:-1] for rows in logits.split(probe.attention_mask.sum(1).tolist())[1:3])
    if before.numel() and relative_difference(before, after) > _allowed(logits):
        _check_repeats(model, logits, probe)
        raise ModelError(
            f"{type(model).__name__} is not causal: a token changes the logits before it, so its "
            "loss would be no perplexity (an encoder loaded as a decoder?)"
        )


def _check_repeats(model: PreTrainedModel, logits: Tensor, probe: OracleProbe) -> None:
    """Raise ModelError where ``model`` gives other logits on ``probe`` than it gave before."""
    known = torch.isfinite(logits).all(-1)
    again = probe.attended(_logits(model, probe))
    difference = relative_difference(logits[known], again[known])
    if difference > _allowed(logits):
        raise ModelError(
            f"{type(model).__name__} gives other logits each time it is called (relative "
            f"difference {difference:.3g} on {probe}): it draws random numbers in eval mode, or "
            "counts its calls; a graph computes one function"
        )


@torch.no_grad()
def compare(gm: GraphModule, oracle: Oracle) -> None:
    """Raise TracingError where the graph does not compute the model's logits at attended tokens,
    naming the probe and the first module that differs."""
    allowed = _allowed(oracle.logits[0])
    name = type(oracle.model).__name__
    most = info(gm).max_positions or _LONG  # a graph may hold up to a length only
    pairs = [
        (probe, expected)
        for probe, expected in zip(oracle.probes, oracle.logits, strict=True)
        if probe.input_ids.shape[1] <= most
    ]
    with torch.autocast(oracle.probes[0].input_ids.device.type, enabled=False):
        try:
            results = list(run_batches(gm, [probe.inputs for probe, _ in pairs]))
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            raise TracingError(
                f"the traced graph of {name} does not run on other shapes than the traced one: "
                f"{type(error).__name__}: {said[0]}. {_versions()}"
            ) from error
        for (probe, expected), result in zip(pairs, results, strict=True):
            known = torch.isfinite(expected).all(-1)
            difference = relative_difference(expected[known], probe.attended(result)[known])
            if difference > allowed:
                _check_repeats(oracle.model, expected, probe)
                where = _first_difference(gm, oracle.model, probe, allowed)
                if oracle.hooks:
                    where += f" (a graph calls no hooks, as {', '.join(oracle.hooks)} has)"
                raise TracingError(
                    f"the traced graph of {name} disagrees with the eager model: relative logit "
                    f"difference {difference:.3g} (at most {allowed:.3g}) on {probe}, first at "
                    f"module {where}. {_versions()}"
                )


def _allowed(logits: Tensor) -> float:
    """Relative difference of logits that were summed in another order."""
    return max(1e-5, 4 * torch.finfo(logits.dtype).eps)


def _versions() -> str:
    return (
        f"Versions: transformers {transformers.__version__} (tested {TESTED_TRANSFORMERS}), torch "
        f"{importlib.metadata.version('torch')}"
    )


Outputs = dict[str, Tensor]


@torch.no_grad()
def _leaf_outputs(module: nn.Module, probe: OracleProbe, **more: Any) -> Outputs:
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
        module(**probe.inputs, **more)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _first_bad_leaf(eager: nn.Module, probe: OracleProbe) -> str:
    outputs = _leaf_outputs(eager, probe, use_cache=False)
    bad = (name for name, value in outputs.items() if not bool(torch.isfinite(value).all()))
    return next(bad, "logits")


def _first_difference(gm: GraphModule, eager: nn.Module, probe: OracleProbe, allowed: float) -> str:
    ours = _leaf_outputs(gm, probe)
    theirs = _leaf_outputs(eager, probe, use_cache=False)
    tokens = probe.input_ids.numel()
    for name, value in ours.items():
        if name in theirs and value.shape == theirs[name].shape:
            both = (theirs[name], value)
            if value.shape[:-1].numel() == tokens:
                shape = (*probe.input_ids.shape, -1)
                both = tuple(probe.attended(v.reshape(shape)) for v in both)  # type: ignore[assignment]
            if relative_difference(*both) > allowed:
                return name
    return "the model's output (every leaf module agrees)"
