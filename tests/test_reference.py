"""``convert`` against an independent module swap in float64 (tests/reference.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from transformers import PreTrainedModel

import fxquant
from fxquant.ir.graph import is_op, tag
from fxquant.ir.legal_forms import OPS
from fxquant.run.execution import Executor
from tests import reference
from tests.architectures import opt, padding_mask, token_ids
from tests.reference import PLAIN
from tests.test_tracing import traced

# Ours computes in float32, the reference in float64: x / scale, at most 127, is off by a few times
# 127 * 2^-24 = 1e-5, with what earlier layers add. So about one code in twenty thousand lies near
# enough to a tie to be rounded to the other side, and never by more than one step.
FLIPPED = 1e-4
# With the codes given, only float32 arithmetic differs: some tens of operations, 2^-24 each.
SAME_CODES = 3e-6


def batches(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Padded on the left: padding must not count in static ranges."""
    return [
        {
            "input_ids": token_ids(3, 14, seed + index),
            "attention_mask": padding_mask(3, 14, "left"),
        }
        for index in range(count)
    ]


def run_with_codes(
    qmodel: GraphModule, given: dict[str, Tensor], inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """Logits when each site's input codes are replaced by ``given``.

    With them, for each site whose codes the graph computes: (codes that differ, largest step),
    each counted on inputs that the given codes produced, so that no difference follows another.
    """
    flips: dict[str, tuple[int, int]] = {}

    def on_node(node: Node, value: Any) -> Any:
        if not is_op(node, OPS.quantize.default):
            return value
        site = tag(node).site or ""
        wanted = given[site].reshape(value.shape).to(value.dtype)
        steps = (wanted.int() - value.int()).abs()
        flips[site] = int((steps > 0).sum()), int(steps.max())
        return wanted

    return Executor(qmodel).run(on_node, **inputs), flips


@torch.no_grad()
def check_against_the_swap(
    model: PreTrainedModel, graph: GraphModule, scheme: str, swappable: PreTrainedModel
) -> None:
    """``swappable`` computes what ``model`` does, by modules that the reference can swap."""
    calibration = batches(3, seed=7)
    swapped = reference.swap(swappable, PLAIN[scheme], calibration)
    qmodel = fxquant.convert(graph, scheme, calibration=calibration)
    # No padding: a dynamic range is of all that the operator sees, and eager attention is free
    # to put anything into padding rows.
    inputs = {"input_ids": token_ids(3, 17, seed=3)}
    check_codes_and_logits(
        qmodel, swapped(**inputs).logits, model(**inputs).logits, reference.codes(swapped), inputs
    )
    assert bool(reference.codes(swapped)) == (PLAIN[scheme].activation is not None)


def check_codes_and_logits(
    qmodel: GraphModule,
    wanted: Tensor,
    unquantized: Tensor,
    given: dict[str, Tensor],
    inputs: dict[str, Tensor],
) -> None:
    """``wanted``: the swapped model's logits, ``given``: the codes that its sites read."""
    effect = float((wanted - unquantized).norm())
    assert effect > 1e-3 * float(unquantized.norm())  # else the comparison says nothing

    found, flips = run_with_codes(qmodel, given, inputs)
    assert flips.keys() <= given.keys()  # linears of one input share its codes
    assert bool(flips) == bool(given)
    assert float((found - wanted).norm()) <= SAME_CODES * float(unquantized.norm())
    assert all(step <= 1 for _, step in flips.values())
    flipped, total = (
        sum(count for count, _ in flips.values()),
        sum(map(torch.numel, given.values())),
    )
    assert flipped <= FLIPPED * total

    free = float((qmodel(**inputs) - wanted).norm())
    # After a flip later layers round what follows anew: at most another draw of the same noise.
    assert free <= (0.05 if flipped == 0 else 1.0) * effect


@pytest.mark.parametrize("scheme", PLAIN)
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_agrees_with_the_module_swap(name: str, scheme: str) -> None:
    model, graph = traced(name)
    check_against_the_swap(model, graph, scheme, model)


@torch.no_grad()
def test_the_reference_notices_a_wrong_scale() -> None:
    """A comparison that passes for another model would be worthless: scale one site by 1.01."""
    model, inputs = opt(), {"input_ids": token_ids(3, 17, seed=3)}
    qmodel = fxquant.convert(model, "w8a8-dynamic-token")
    qmodel.get_buffer("model.decoder.layers.0.fc1.weight_scale").mul_(1.01)
    swapped = reference.swap(model, PLAIN["w8a8-dynamic-token"])
    wanted = swapped(**inputs).logits
    found, _ = run_with_codes(qmodel, reference.codes(swapped), inputs)
    assert float((found - wanted).norm()) > 10 * SAME_CODES * float(wanted.norm())


@torch.no_grad()
def test_padding_does_not_count_in_the_reference_either() -> None:
    batch = batches(1, seed=0)[0]
    full = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    masked, unmasked = (reference.input_ranges(opt(), [b]) for b in (batch, full))
    assert masked.keys() == unmasked.keys()
    assert any(bool(masked[site][1] != unmasked[site][1]) for site in masked)
