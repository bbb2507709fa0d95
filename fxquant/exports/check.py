"""What an engine computes from an export, beside what the graph computes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedModel

from fxquant.errors import ExportError, ModelError
from fxquant.files.doors import reason
from fxquant.ir.counted import counted
from fxquant.ir.graph import clone_sharing_storage, info
from fxquant.ir.streamed import streamed_device

# Logits that were summed in another order: relative to the largest.
ALLOWED = 1e-5
_LENGTHS = ((2, 12), (1, 1), (1, 67))

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Checked:
    """The logits of an engine beside those of the graph, on random tokens.

    Attributes:
        engine: its name and version, "" where nothing was run.
        difference: largest difference from the graph's logits.
        under_rules: largest difference from the graph's under the engine's own arithmetic.
        largest: the largest logit.
        allowed: of ``under_rules``, relative to ``largest``.
        tokens: how many were tried.
        cause: why ``difference`` is what it is.
        skipped: why nothing was run.
    """

    engine: str = ""
    difference: float = 0.0
    under_rules: float = 0.0
    largest: float = 0.0
    allowed: float = ALLOWED
    tokens: int = 0
    cause: str = ""
    skipped: str = ""

    @property
    def passed(self) -> bool:
        near = math.isfinite(self.under_rules) and self.under_rules <= self.allowed * self.largest
        return bool(self.skipped) or near

    def __str__(self) -> str:
        if self.skipped:
            return f"not checked: {self.skipped}"
        text = (
            f"{self.engine}: largest difference of a logit {self.difference:.3g} (the largest is "
            f"{self.largest:.3g}) on {counted(self.tokens, 'random token')}: {self.cause}"
        )
        if not self.passed:
            text += (
                f"; under the engine's own rules {self.under_rules:.3g} is left, and "
                f"{self.allowed * self.largest:.3g} is allowed"
            )
        elif self.under_rules != self.difference:
            text += f"; under the engine's own rules {self.under_rules:.3g}"
        return text


def unchecked(gm: nn.Module, check: bool, packages: tuple[str, ...]) -> Checked | None:
    """What there is to say where an engine is not asked; None where it can be."""
    if not check:
        return Checked(skipped="as asked")
    if streamed_device(gm) is not None:
        return Checked(skipped="the graph is streamed, and an engine holds the model in memory")
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    names = ", ".join(name.replace("_", "-") for name in absent)
    return Checked(skipped=f"{names} is not installed (pip install 'fxquant[exports]')")


def version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


@contextlib.contextmanager
def loading(target: str, engine: str) -> Iterator[None]:
    """What an engine says of files that it does not load, as an ExportError."""
    try:
        yield
    except ModelError as error:
        raise ExportError(
            f"{target}: nothing is written: {engine} does not load what was written "
            f"({reason(error.__cause__ or error)}): take another format (--to onnx), or --no-check "
            "(check=False) to write it for other engines"
        ) from error


def random_tokens(gm: GraphModule) -> tuple[Tensor, ...]:
    """Token ids int64 [batch, length] of several shapes, the same on each call."""
    facts, generator = info(gm), torch.Generator().manual_seed(0)
    most = facts.max_positions or 67
    shapes = [(batch, min(length, most)) for batch, length in _LENGTHS]
    return tuple(torch.randint(facts.vocab_size, shape, generator=generator) for shape in shapes)


def compared(
    gm: GraphModule,
    engine: str,
    computed: Logits,
    ruled: Callable[..., Tensor],
    cause: Callable[[], str],
    called: Callable[..., Tensor] | None = None,
) -> Checked:
    """``computed`` beside ``gm`` and beside ``ruled``, the graph under the engine's arithmetic.

    ``cause`` is asked once all have run; ``called`` is how ``gm`` is, if not with ids alone.
    """
    probes = random_tokens(gm)
    differences = {"graph": 0.0, "ruled": 0.0}
    largest = 0.0
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for ids in probes:
            found = computed(ids).float()
            graph = called or gm
            own = graph(input_ids=ids).float()
            other = own if ruled is graph else ruled(input_ids=ids).float()
            for name, expected in (("graph", own), ("ruled", other)):
                apart = float((found - expected).abs().max())
                # NaN too: it is a difference of which nothing is known.
                differences[name] = max(differences[name], apart if apart == apart else torch.inf)
                largest = max(largest, float(expected.abs().max()))
    return Checked(
        engine,
        differences["graph"],
        differences["ruled"],
        largest,
        tokens=sum(ids.numel() for ids in probes),
        cause=cause() if differences["graph"] else "bit for bit",
    )


def by_attention(found: Checked, engine: PreTrainedModel, again: Callable[[], Checked]) -> Checked:
    """``found``, with its cause where it did not pass and ``again`` does once ``engine`` computes
    attention eagerly: transformers' usual way drops what some models do there (Gemma 2's cap)."""
    usual = engine.config._attn_implementation
    if found.passed or usual == "eager" or not engine._can_set_attn_implementation():
        return found
    engine.set_attn_implementation("eager")
    if not again().passed:
        return found
    said = (
        f"attention is {usual} there, which computes something else for this model than eager, as "
        "in the graph: write it with --no-check (check=False), and read it with "
        "attn_implementation='eager'"
    )
    return replace(found, cause=said)


def in_float32(gm: GraphModule) -> GraphModule:
    """A copy that computes in float32 on the CPU, as engines are asked to."""
    return clone_sharing_storage(gm).float().cpu()
