"""Threads that trace and convert at once; what is patched for a while is put back on every exit."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx._symbolic_trace as symbolic
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

import fxquant
from fxquant.errors import TracingError
from fxquant.exports.pt2_file import MODEL, pt2
from fxquant.frontends import patching
from fxquant.frontends.patching import exclusive
from fxquant.frontends.streaming import stream
from tests.architectures import ARCHITECTURES, gpt2, llama, opt, padding_mask, token_ids
from tests.environments import needs_hf_tracer, patched_by_hf_tracer
from tests.processes import finished
from tests.test_tracing import traced

IDS, MASK = token_ids(3, 11), padding_mask(3, 11, "both")
CALIBRATION = [token_ids(2, 9, seed=seed) for seed in range(10, 13)]
SCHEMES = (
    "w8a8-dynamic",
    "w8a8-static",
    "w4-g16/a8-static-asym:absmax+smooth",
    "w4+gptq",
)


def process() -> dict[str, Any]:
    """All that tracing and streaming patch, and the functions that the modelling files see."""
    modelling = {
        f"{name}.{key}": value
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and ".modeling_" in name
        for key, value in list(vars(module).items())
        if callable(value)
    }
    methods = ("__call__", "__getattr__", "register_parameter", "register_buffer")
    registries = (AttentionInterface, AttentionMaskInterface)
    return {
        **{f"nn.Module.{name}": nn.Module.__dict__[name] for name in methods},
        **patched_by_hf_tracer(),
        **{f"math.{name}": value for name, value in vars(math).items() if callable(value)},
        **{f"init.{name}": value for name, value in vars(nn.init).items() if callable(value)},
        **{f"registry {i}": dict(r._global_mapping) for i, r in enumerate(registries)},
        **modelling,
        "flag": symbolic._is_fx_tracing_flag,
        "new patcher": symbolic._new_patcher,
        "patcher": symbolic.CURRENT_PATCHER,
        "init": PreTrainedModel.init_weights,
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "level": logging.getLogger("torch.fx._symbolic_trace").level,
    }


def differing(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name, value in before.items() if after[name] != value}


def alike(one: GraphModule, other: GraphModule) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    equal = ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in ours.items()
    )
    return equal and torch.equal(one(IDS, MASK), other(IDS, MASK))


class Spinning:
    """A model that a thread of its own runs over and over, until it is asked how it went."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.wrong: list[object] = []
        self.runs = 0
        self._over = threading.Event()
        self._model, self._expected = model, logits(model)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        while not self._over.is_set():
            try:
                if not torch.equal(logits(self._model), self._expected):
                    self.wrong.append("other logits")
                nn.Linear(2, 2).weight.sum().item()
            except Exception as error:
                self.wrong.append(error)
            self.runs += 1
            self._over.wait(0.005)  # others may have the interpreter too

    def stop(self) -> None:
        self._over.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def unharmed(*models: PreTrainedModel) -> Iterator[None]:
    """Each model runs eagerly in a thread of its own meanwhile, and always to the same logits."""
    before, spinning = process(), [Spinning(model) for model in models]
    try:
        yield
    finally:
        for each in spinning:
            each.stop()
    assert [each.wrong[:1] for each in spinning] == [[]] * len(models)
    assert all(each.runs for each in spinning)
    assert not differing(before, process())


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    assert isinstance(found, Tensor)
    return found


def test_threads_that_convert_at_once_make_what_one_thread_makes() -> None:
    models = {"opt": opt(), "llama": llama(), "gpt2": gpt2()}
    tasks = [(name, scheme) for scheme in SCHEMES for name in models]

    def convert(task: tuple[str, str]) -> GraphModule:
        return fxquant.convert(models[task[0]], task[1], calibration=CALIBRATION)

    graphs = {name: fxquant.trace(model) for name, model in models.items()}
    expected = [
        fxquant.convert(graphs[name], scheme, calibration=CALIBRATION) for name, scheme in tasks
    ]
    with unharmed(models["opt"], gpt2(seed=3)), ThreadPoolExecutor(8) as pool:
        found = list(pool.map(convert, tasks))
    wrong = [
        t for t, one, other in zip(tasks, expected, found, strict=True) if not alike(one, other)
    ]
    assert not wrong


def test_threads_that_trace_every_architecture() -> None:
    names = [*ARCHITECTURES]
    models = [ARCHITECTURES[name]() for name in names]
    with unharmed(opt(seed=5)), ThreadPoolExecutor(6) as pool:
        graphs = list(pool.map(fxquant.trace, models))
    for name, graph in zip(names, graphs, strict=True):
        _, again = traced(name)
        assert graph.code == again.code, name
        assert torch.equal(graph(IDS, MASK), again(IDS, MASK)), name


def test_threads_that_explain_plan_and_inspect() -> None:
    model = opt()
    explain = partial(fxquant.explain, model, "w8a8-static", calibration=CALIBRATION, data=IDS)
    steps: dict[str, Callable[[], str]] = {
        # All but the seconds.
        "explain": lambda: repr(replace(explain(), costs={}, forward_seconds=0.0)),
        "plan": lambda: str(fxquant.plan(model, calibration=CALIBRATION, data=IDS, budget=0.05)),
        "inspect": lambda: fxquant.inspect(fxquant.convert(model, "w4")).graph(),
    }
    expected = {name: step() for name, step in steps.items()}
    names = [*steps, "explain"]
    with unharmed(model), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: steps[name](), names))
    for name, text in zip(names, found, strict=True):
        assert text == expected[name], name


def test_streams_opened_while_others_build_models(tmp_path: Path) -> None:
    opt().half().save_pretrained(tmp_path)

    def streamed() -> Tensor:
        graph = fxquant.convert(stream(tmp_path, dtype=torch.float32), "w8a8-dynamic")
        return torch.as_tensor(graph(IDS, MASK))

    def built(_: int) -> bool:
        parameters = list(nn.Linear(3, 5).parameters())
        return all(not p.is_meta and bool(p.abs().sum() > 0) for p in parameters)

    expected = streamed()
    with unharmed(llama()), ThreadPoolExecutor(4) as pool:
        found = [pool.submit(streamed) for _ in range(4)]
        assert all(pool.map(built, range(500)))
        assert all(torch.equal(each.result(60), expected) for each in found)


# In the middle of a trace


class Stops(nn.Module):
    """An activation that calls ``act`` when it is traced, by either front end."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy | FakeTensor):
            self.act()
        return torch.relu(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stops:
        return Stops(self.act)


def stopping(act: Callable[[], None], name: str = "opt") -> PreTrainedModel:
    model = ARCHITECTURES[name]()
    path = {"opt": "model.decoder.layers.1", "gpt2": "transformer.h.1.mlp"}[name]
    owner = model.get_submodule(path)
    setattr(owner, "activation_fn" if name == "opt" else "act", Stops(act))
    return model


def test_other_threads_see_nothing_of_a_trace_that_is_halfway() -> None:
    halfway, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        halfway.set()
        assert go_on.wait(60)

    # GPT-2's modelling file holds functions that the tracer wraps where it finds them.
    model, other = stopping(wait, "gpt2"), gpt2(seed=4)
    expected = logits(other)
    outer = threading.Thread(target=fxquant.trace, args=(model,), daemon=True)
    before = process()
    outer.start()
    assert halfway.wait(60)
    try:
        assert differing(before, process())  # the trace is halfway
        assert not symbolic.is_fx_tracing()
        assert torch.equal(logits(other), expected)
        assert torch.equal(logits(model), logits(model))
        assert torch.equal(torch.arange(3), torch.tensor([0, 1, 2]))
        assert isinstance(other.lm_head.weight, nn.Parameter)
        assert not nn.Linear(2, 2).weight.is_meta
        other.get_submodule("transformer.h.0.mlp.c_fc").forward(torch.randn(2, 32))
    finally:
        go_on.set()
        outer.join(60)
    assert not differing(before, process())


class Interrupted(BaseException):
    """As KeyboardInterrupt is: no Exception."""


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit, Interrupted])
def test_everything_is_put_back_when_a_trace_ends_early(kind: type[BaseException]) -> None:
    def fail() -> None:
        raise kind("stop here")

    model, other = stopping(fail), opt(seed=2)
    traced = fxquant.trace(other)(IDS, MASK)
    before, expected = process(), logits(other)
    with pytest.raises(TracingError if kind is RuntimeError else kind, match="stop here"):
        fxquant.convert(model, "w8")
    assert not differing(before, process())
    assert torch.equal(logits(other), expected)
    with ThreadPoolExecutor(1) as pool:  # the lock is free
        assert torch.equal(pool.submit(fxquant.trace, other).result(60)(IDS, MASK), traced)


@pytest.mark.parametrize(
    ("frontend", "times"), [pytest.param("hf", 40, marks=needs_hf_tracer), ("recorder", 10)]
)
def test_everything_is_put_back_wherever_a_trace_is_interrupted(frontend: str, times: int) -> None:
    """In a process of its own: torch's fake tensors may stay as an interruption left them."""
    script = f"from tests.test_threads import interrupt; interrupt({frontend!r}, {times})"
    done = finished([sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr


def interrupt(frontend: str, times: int) -> None:
    """Interruptions at random lines of torch's, transformers' and our own code."""
    seed = random.randrange(2**32)
    generator = random.Random(seed)
    trace = partial(fxquant.trace, opt(num_hidden_layers=1), frontend=frontend)
    expected, before = trace()(IDS, MASK), process()
    lines = _lines_of(trace)
    for _ in range(times):
        at = generator.randrange(lines)
        with contextlib.suppress(Interrupted):
            _lines_of(trace, stop_at=at)
        assert not differing(before, process()), (seed, at)
        assert _is_free(), (seed, at)
    # The recorder may miss then that a mask can be left out, which only queries of padding see.
    attended = MASK.bool()
    assert torch.equal(trace()(IDS, MASK)[attended], expected[attended]), seed


def test_the_lock_is_free_wherever_its_holder_is_interrupted() -> None:
    """At each line, that of letting it go too: other threads would wait for ever."""
    step = exclusive(lambda: None)
    for at in range(1, _lines_of(step) + 1):
        with pytest.raises(Interrupted):
            _lines_of(step, stop_at=at)
        assert _is_free(), at


def _is_free() -> bool:
    """Whether another thread may trace."""

    def taken() -> bool:
        if not patching.LOCK.acquire(timeout=5):
            return False
        patching.LOCK.release()
        return True

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(taken).result(60)


def _lines_of(step: Callable[[], object], stop_at: int | None = None) -> int:
    """How many lines ``step`` runs in the files that patch; Interrupted at line ``stop_at``."""
    count = 0
    files = (
        *(
            "fxquant/frontends/patching.py",
            "fxquant/frontends/tracing.py",
            "fxquant/frontends/attention.py",
        ),
        *("transformers/utils/fx.py", "torch/fx/_symbolic_trace.py", "contextlib.py"),
    )

    def watch(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line":
            count += 1
            if count == stop_at:
                raise Interrupted
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        step()
    finally:
        sys.settrace(before)
    return count


def test_exports_leave_threads_alone_that_convert_and_run_models(tmp_path: Path) -> None:
    scheme = "w8a8-dynamic-token"
    models = [llama(), llama(seed=5)]
    graphs = [fxquant.convert(model, scheme) for model in models]

    def export(number: int) -> GraphModule:
        pt2(graphs[number], tmp_path / str(number), check=False)
        return fxquant.convert(models[number], scheme)

    with unharmed(llama(seed=7)), ThreadPoolExecutor(2) as pool:
        found = list(pool.map(export, range(2)))
    assert all(alike(each, graphs[number]) for number, each in enumerate(found))
    for number in range(2):
        program = torch.export.load(tmp_path / str(number) / MODEL).module()
        expected = graphs[number](input_ids=IDS, attention_mask=MASK)
        assert torch.equal(program(input_ids=IDS, attention_mask=MASK), expected)


def test_a_model_is_compiled_while_another_thread_traces() -> None:
    """torch.compile takes back torch.fx's patches while it compiles: not those of another thread,
    whose modules would all be opened up."""
    halfway, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        halfway.set()
        assert go_on.wait(60)

    model, other, found = stopping(wait), llama(seed=9), list[GraphModule]()
    expected, before = logits(other), process()
    thread = threading.Thread(target=lambda: found.append(fxquant.trace(model)), daemon=True)
    thread.start()
    assert halfway.wait(60)
    try:
        compiled = torch.compile(other, backend="eager")
        torch.testing.assert_close(logits(compiled), expected)
    finally:
        go_on.set()
        thread.join(60)
    assert not differing(before, process())
    again = fxquant.trace(stopping(lambda: None))
    assert found[0].code == again.code
    assert torch.equal(found[0](IDS, MASK), again(IDS, MASK))


@pytest.mark.parametrize("on_meta", [False, True], ids=["a trace", "opening on meta"])
def test_what_another_thread_patches_for_a_while_stays_its_own(
    on_meta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' from_pretrained patches a method of all modules; it may begin before, and end
    within, what patches it here."""
    original = nn.Module.register_parameter

    def loading(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)

    @exclusive
    def step() -> None:
        with patching.parameters_on_meta() if on_meta else patching.tracing():
            assert nn.Linear(2, 2).weight.is_meta is on_meta
            nn.Module.register_parameter = original  # type: ignore[method-assign]

    monkeypatch.setattr(nn.Module, "register_parameter", loading)
    step()
    assert nn.Module.register_parameter is original
