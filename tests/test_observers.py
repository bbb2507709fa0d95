"""Observers: exact statistics, exact merging, padding that does not count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxquant.errors import CalibrationError, NonFiniteError
from fxquant.numerics.observers import BINS, ChannelAbsmax, HistogramObserver, Observer, attended
from fxquant.numerics.ranges import distribution

SEEDS = st.integers(0, 2**32 - 1)
KINDS: tuple[type[Observer], ...] = (HistogramObserver, ChannelAbsmax)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def batch(generator: torch.Generator, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A ragged batch [B, L, C] with few outliers, and its mask, padded left, right or anywhere."""
    b, length = torch.randint(1, 5, (2,), generator=generator).tolist()
    x = torch.randn(b, length, channels, generator=generator) ** 3
    mask = torch.randint(0, 2, (b, length), generator=generator)
    return x.to(dtype), mask


def observe(observer: Observer, batches: list[tuple[Tensor, Tensor]]) -> Observer:
    for x, mask in batches:
        observer(x, mask)
    return observer


def real_rows(batches: list[tuple[Tensor, Tensor]]) -> np.ndarray:
    """The attended tokens, one at a time, as float64 [tokens, C]."""
    rows = [
        x[b, t].double().numpy()
        for x, mask in batches
        for b in range(x.shape[0])
        for t in range(x.shape[1])
        if mask[b, t]
    ]
    return np.array(rows).reshape(len(rows), batches[0][0].shape[-1])


def buffers_equal(a: Observer, b: Observer) -> bool:
    mine, theirs = dict(a.named_buffers()), dict(b.named_buffers())
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def full(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.int64)


# --- against plain computations -------------------------------------------------------------------


@given(seed=SEEDS, count=st.integers(1, 4), dtype=DTYPES)
@settings(deadline=None, max_examples=20)
def test_histogram_counts_upper_halves_of_floats(seed: int, count: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    batches = [batch(g, 5, dtype) for _ in range(count)]
    observer = observe(HistogramObserver("s"), batches)
    rows = real_rows(batches).astype(np.float32)
    # The upper 16 bits through the bytes: big endian, the first two of four.
    upper = np.frombuffer(rows.astype(">f4").tobytes(), dtype=">u2")[::2]
    wanted = np.bincount(upper, minlength=BINS)
    assert isinstance(observer, HistogramObserver)
    np.testing.assert_array_equal(observer.counts.numpy(), wanted)
    assert int(observer.tokens) == len(rows)
    assert float(observer.min_value) == (rows.min() if len(rows) else math.inf)
    assert float(observer.max_value) == (rows.max() if len(rows) else -math.inf)


@given(seed=SEEDS, count=st.integers(1, 4), dtype=DTYPES)
@settings(deadline=None, max_examples=20)
def test_channel_statistics(seed: int, count: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    batches = [batch(g, 6, dtype) for _ in range(count)]
    rows = real_rows(batches)
    channel = ChannelAbsmax("s")
    observe(channel, batches)
    assert int(channel.tokens) == len(rows)
    if not len(rows):
        assert channel.max_abs.numel() == 0
        return
    np.testing.assert_array_equal(channel.max_abs.numpy(), np.abs(rows).max(0))


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS)
@settings(deadline=None, max_examples=10)
def test_padding_does_not_count(kind: type[Observer], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, mask = batch(g, 4, torch.float32)
    poisoned = torch.where(mask[..., None].bool(), x, torch.tensor(math.nan))
    assert buffers_equal(observe(kind("s"), [(x, mask)]), observe(kind("s"), [(poisoned, mask)]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fully_masked_batch_changes_nothing(kind: type[Observer]) -> None:
    x = torch.randn(2, 3, 4)
    observer, kept = kind("s"), kind("s")
    for o in (observer, kept):
        o(x, full(x))
    observer(torch.full((2, 3, 4), math.inf), torch.zeros(2, 3, dtype=torch.int64))
    assert buffers_equal(observer, kept)


def test_attended_rows() -> None:
    x, mask = torch.randn(2, 3, 4), torch.tensor([[0, 1, 1], [1, 0, 0]])
    wanted = torch.stack((x[0, 1], x[0, 2], x[1, 0]))
    assert torch.equal(attended(x, mask), wanted)
    # OPT flattens batch and length for fc1; attention keeps heads apart.
    assert torch.equal(attended(x.reshape(6, 4), mask), wanted)
    assert torch.equal(attended(x.reshape(2, 3, 2, 2), mask), wanted)
    assert torch.equal(attended(x.transpose(0, 1).contiguous().transpose(0, 1), mask), wanted)
    for dtype in (torch.bool, torch.float32, torch.int32):
        assert torch.equal(attended(x, mask.to(dtype)), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_flattened_activations_are_seen_alike(kind: type[Observer]) -> None:
    x, mask = torch.randn(2, 5, 4), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    flat = observe(kind("s"), [(x.reshape(10, 4), mask)])
    assert buffers_equal(flat, observe(kind("s"), [(x, mask)]))


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS, cut=st.integers(0, 4), dtype=DTYPES)
@settings(deadline=None, max_examples=12)
def test_merging_is_observing_everything_at_once(
    kind: type[Observer], seed: int, cut: int, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(seed)
    batches = [batch(g, 3, dtype) for _ in range(4)]  # some of them fully masked
    whole = observe(kind("s"), batches)
    left, right = observe(kind("s"), batches[:cut]), observe(kind("s"), batches[cut:])
    kept = {name: value.clone() for name, value in right.named_buffers()}
    left.merge(right)
    assert buffers_equal(left, whole)
    # The other one stays what it was, also when the first goes on.
    observe(left, batches)
    for name, value in right.named_buffers():
        assert torch.equal(value, kept[name])


def test_only_one_kind_merges() -> None:
    with pytest.raises(TypeError, match="cannot merge ChannelAbsmax into HistogramObserver"):
        HistogramObserver("s").merge(ChannelAbsmax("s"))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_name_the_site(
    kind: type[Observer], bad: float, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 3, 4).to(dtype)
    x[1, 1, 2] = bad
    observer = kind("model.decoder.layers.7.fc2")
    with pytest.raises(NonFiniteError, match=r"model\.decoder\.layers\.7\.fc2: .*NaN or infinite"):
        observer(x, full(x))
    assert buffers_equal(observer, kind("s"))  # nothing was counted


@pytest.mark.parametrize(
    ("dtype", "large"), [(torch.float16, 4e4), (torch.bfloat16, 3e38), (torch.float32, 3e38)]
)
def test_large_finite_activations_of_both_signs(dtype: torch.dtype, large: float) -> None:
    x = torch.tensor([[[large, -large]]]).to(dtype)
    observer = HistogramObserver("s")
    observer(x, full(x))
    assert float(observer.max_value) == x.max().item()


def test_an_observer_that_saw_nothing_says_so() -> None:
    observer = HistogramObserver("layers.0.fc1")
    with pytest.raises(CalibrationError, match=r"layers\.0\.fc1: calibration saw no token"):
        distribution(observer)
    observer(torch.randn(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(CalibrationError, match=r"layers\.0\.fc1: calibration saw no token"):
        distribution(observer)


# --- standing in a graph --------------------------------------------------------------------------


def test_observing_changes_neither_input_nor_gradient_state() -> None:
    for kind in KINDS:
        x = torch.randn(2, 3, 4, requires_grad=True)
        kept = x.detach().clone()
        observer = kind("s")
        assert observer(x, full(x)) is None
        assert torch.equal(x, kept)
        assert not any(value.requires_grad for value in observer.buffers())


def test_memory_does_not_grow() -> None:
    for kind in KINDS:
        observer, sizes = kind("s"), set()
        for _ in range(3):
            observe(observer, [(torch.randn(2, 5, 4), torch.ones(2, 5))])
            sizes.add(sum(value.numel() for value in observer.buffers()))
        assert len(sizes) == 1


def test_dead_code_elimination_keeps_observers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.observer = HistogramObserver("s")

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            self.observer(x, mask)
            return x + 1

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    model = Model()
    gm = torch.fx.GraphModule(model, Tracer().trace(model))
    gm.graph.eliminate_dead_code()
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["observer"]
