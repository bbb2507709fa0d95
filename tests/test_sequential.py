"""The sequential run: the same values as whole runs, block by block, with leaves that change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import fxquant
from fxquant.errors import CalibrationError
from fxquant.ir.graph import info, install, site_outputs, source_of
from fxquant.passes import NameSites
from fxquant.run.execution import Executor
from fxquant.run.sequential import SequentialRun, segments
from tests.architectures import ARCHITECTURES, opt, padding_mask, token_ids


def batches() -> list[Any]:
    """Ragged, one of them padded."""
    padded = {"input_ids": token_ids(2, 9), "attention_mask": padding_mask(2, 9, "left")}
    return [token_ids(3, 7, seed=2), padded]


def named(name: str) -> GraphModule:
    return NameSites()(fxquant.trace(ARCHITECTURES[name]()))


def inputs_of_sites(gm: GraphModule) -> dict[str, list[Tensor]]:
    """Each site's input on each batch, from whole runs of the graph as it is."""
    found: dict[str, list[Tensor]] = {}
    readers: dict[Node, list[str]] = {}
    for site, node in site_outputs(gm):
        readers.setdefault(source_of(node), []).append(site.path)

    def keep(node: Node, value: Any) -> Any:
        for path in readers.get(node, []):
            found.setdefault(path, []).append(value)
        return value

    for batch in batches():
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        with torch.no_grad():
            Executor(gm).run(keep, **inputs)
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_block_once_in_order_with_its_sites(name: str) -> None:
    gm = named(name)
    found = segments(gm)
    position = {node: index for index, node in enumerate(gm.graph.nodes)}
    assert [s.block for s in found if s.block != info(gm).head] == list(info(gm).blocks)
    linears = [site.path for site in info(gm).sites if site.role == "linear"]
    assert [s.path for each in found for s, _ in each.sites if s.role == "linear"] == linears
    for segment, following in zip(found, [*found[1:], None], strict=True):
        assert segment.end is (following.first if following else None)
        for _, node in segment.sites:
            assert position[node] >= position[segment.first]
            assert segment.end is None or position[node] < position[segment.end]


@pytest.mark.parametrize(
    "name", ["opt", "opt-post-layernorm", "llama", "gpt2", "gpt-neox-parallel"]
)
def test_later_blocks_see_what_changed_ones_produce(name: str) -> None:
    """Halve every linear's weight block by block; the inputs seen are those of the halved model."""
    gm = named(name)
    run = SequentialRun(gm, batches(), label="test")
    seen: dict[str, list[Tensor]] = {}
    for segment in run.segments:
        readers = {source_of(node): site.path for site, node in segment.sites}

        def keep(node: Node, value: Any, mask: Tensor, readers: dict[Node, str] = readers) -> Any:
            if node in readers:
                assert value.shape[:2] == mask.shape or value.shape[0] == mask.numel()
                seen.setdefault(readers[node], []).append(value)
            return value

        first = segment.sites[0][0].path
        run.visit(segment.end, lambda node, value, mask: value)  # the cuts stay
        if segment.sites[0][0].role == "linear":
            install(gm, first, _halved(gm.get_submodule(first)))
        run.advance(segment.end, keep)
    # Now every block is halved. What a block's later sites saw came from its halved first site.
    expected = inputs_of_sites(gm)
    linears = [node for site, node in site_outputs(gm) if site.role != "embeddings"]
    assert len(seen) == len({source_of(node) for node in linears})
    for path, values in seen.items():
        for value, wanted in zip(values, expected[path], strict=True):
            assert torch.equal(value, wanted), path


def _halved(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.weight.mul_(0.5)  # type: ignore[operator]
    return other


def test_what_cannot_run_says_why() -> None:
    gm = named("opt")
    with pytest.raises(CalibrationError, match="gptq needs calibration data"):
        SequentialRun(gm, None, label="gptq")
    with pytest.raises(CalibrationError, match="saw no token"):
        SequentialRun(gm, [], label="gptq")
    masked = {"input_ids": token_ids(1, 4), "attention_mask": torch.zeros(1, 4, dtype=torch.int64)}
    with pytest.raises(CalibrationError, match="saw no token"):
        SequentialRun(gm, [masked], label="gptq")
    with pytest.raises(CalibrationError, match="batch 0"):
        SequentialRun(gm, [torch.randn(1, 3)], label="gptq")
    with pytest.raises(CalibrationError, match="no block with a site"):
        SequentialRun(fxquant.trace(opt()), batches(), label="gptq")
