"""What a caller has set around a call, such as modes of torch, changes no result and stays set."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from transformers import PreTrainedModel

import fxquant
from fxquant.errors import ArgumentError
from fxquant.frontends.patching import exclusive
from tests.architectures import llama, opt, token_ids
from tests.test_threads import alike

DATA, CALIBRATION = token_ids(2, 12, seed=5), [token_ids(2, 9, seed=seed) for seed in (6, 7)]
STATIC = "w8a8-static"


@contextlib.contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], object], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


class Passing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def dtype(value: torch.dtype) -> AbstractContextManager[None]:
    return setting(torch.get_default_dtype, torch.set_default_dtype, value)


@contextlib.contextmanager
def together(*modes: AbstractContextManager[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast in inference_mode": lambda: together(torch.inference_mode(), torch.autocast("cpu")),
    "a device": lambda: torch.device("meta"),
    "a device in a default device": lambda: together(
        setting(lambda: None, torch.set_default_device, "cpu"), torch.device("meta")
    ),
    "a default device": lambda: setting(lambda: None, torch.set_default_device, "meta"),
    "float64": lambda: dtype(torch.float64),
    "bfloat16": lambda: dtype(torch.bfloat16),
    "anomaly": torch.autograd.detect_anomaly,
    "a mode of a user's": Passing,
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
}


def state() -> dict[str, object]:
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "device": torch.get_default_device(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


def same(one: GraphModule, other: GraphModule) -> bool:
    """Also of streamed graphs, whose tensors are in files."""
    if not any(value.is_meta for value in (*one.parameters(), *one.buffers())):
        return alike(one, other)
    return torch.equal(one(DATA), other(DATA))


@functools.cache
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    return opt(), llama()


@functools.cache
def converted() -> GraphModule:
    return fxquant.convert(models()[0], STATIC, calibration=CALIBRATION)


def graphs(folder: Path) -> list[GraphModule]:
    """What tracing, calibrating, solving, saving and streaming make."""
    fxquant.save(converted(), folder / "saved")
    small, other = models()
    streamed = fxquant.stream(folder.parent / "model", dtype=torch.float32)
    pipeline = fxquant.recipe(STATIC, calibration=CALIBRATION)
    return [
        fxquant.convert(small, STATIC, calibration=CALIBRATION),
        fxquant.convert(other, "w4-g16+rotate+gptq", calibration=CALIBRATION),
        fxquant.load(folder / "saved"),
        fxquant.convert(streamed, STATIC, calibration=CALIBRATION),
        pipeline.run(fxquant.trace(small)),
    ]


def figures() -> list[object]:
    """Of an evaluation, an explanation and a plan."""
    found = fxquant.explain(models()[0], STATIC, calibration=CALIBRATION, data=DATA, worst=1)
    return [
        fxquant.evaluate(models()[0], DATA).loss,
        fxquant.evaluate(converted(), DATA).loss,
        [(site.site, site.cause, site.effects) for site in found.sites],
        str(fxquant.plan(models()[0], data=DATA, budget=0.5, choices=("w8", "w4", "fp"))),
        fxquant.inspect(converted()).graph(),
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[GraphModule], list[object]]:
    """A folder with the model, and what is made of it in no mode."""
    folder = tmp_path_factory.mktemp("modes")
    models()[0].save_pretrained(folder / "model")
    return folder, graphs(folder / "plain"), figures()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_changes_nothing_and_stays(
    mode: str, plain: tuple[Path, list[GraphModule], list[object]]
) -> None:
    folder, wanted, values = plain
    before = state()
    with MODES[mode]():
        inside = state()
        found, given = graphs(folder / mode), figures()
        assert state() == inside
    assert state() == before
    assert [same(*pair) for pair in zip(found, wanted, strict=True)] == [True] * len(wanted)
    assert given == values


def test_torch_knows_its_constructors_before_they_are_patched() -> None:
    """A device that is set around a call would not be that of those which it met patched."""
    _device_constructors.cache_clear()
    assert exclusive(_device_constructors.cache_info)().currsize == 1


def test_a_model_that_was_made_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        model, ids = opt(), DATA.clone()
        batches = [batch.clone() for batch in CALIBRATION]
    for scheme in (STATIC, "w4+gptq", "w8+rotate", "w8a8-static+smooth"):
        wanted = fxquant.convert(opt(), scheme, calibration=CALIBRATION)
        assert alike(fxquant.convert(model, scheme, calibration=batches), wanted)
    assert fxquant.evaluate(model, ids).loss == fxquant.evaluate(opt(), DATA).loss
    explain = functools.partial(fxquant.explain, scheme="w8", methods=("alone", "first_order"))
    found, expected = explain(model, data=ids), explain(opt(), data=DATA)
    assert str(found.sites) == str(expected.sites)


DOORS: dict[str, Callable[[GraphModule], object]] = {
    "trace": lambda _: fxquant.trace(models()[0]),
    "convert": lambda graph: fxquant.convert(graph, "w8"),
    "evaluate": lambda graph: fxquant.evaluate(graph, DATA),
    "explain": lambda graph: fxquant.explain(graph, "w8", data=DATA),
    "run": lambda graph: fxquant.recipe("w8").run(graph),
}


@pytest.mark.parametrize("door", DOORS)
def test_tensors_without_values_are_refused(door: str) -> None:
    graph = fxquant.trace(models()[0])
    pipeline = fxquant.recipe("w8")
    with (
        pytest.raises(ArgumentError, match=rf"^{door} is called under FakeTensorMode.*leave it"),
        FakeTensorMode(),
    ):
        DOORS[door](graph) if door != "run" else pipeline.run(graph)
