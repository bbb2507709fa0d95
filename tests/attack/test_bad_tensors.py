"""Tensors that are no tokens, no masks or no logits: one error that says which."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

import fxquant
from fxquant.errors import FxquantError, ModelError, NonFiniteError
from fxquant.evaluation import perplexity
from fxquant.ir.graph import clone_sharing_storage
from fxquant.run.loss import token_nll, window_losses
from tests.architectures import VOCABULARY, opt, token_ids
from tests.attack.bad import SHORT, exit_code, pairs, write_model

IDS = token_ids(2, 8)


@functools.cache
def graph() -> GraphModule:
    return fxquant.trace(opt())


class Named(Tensor):
    """A class of a user's own that computes like a tensor."""


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([IDS[0], IDS[1][:5]], layout=layout)


def masked() -> Any:
    return np.ma.masked_array(IDS.numpy(), IDS.numpy() > 40)


NO_IDS: dict[str, Callable[[], Any]] = {
    "nested": lambda: nested(torch.strided), "jagged": lambda: nested(torch.jagged),
    "sparse": IDS.to_sparse, "compressed": IDS.to_sparse_csr, "meta": lambda: IDS.to("meta"),
    "quantized": lambda: torch._empty_affine_quantized([2, 8], scale=1.0, zero_point=0,
                                                       dtype=torch.quint8),
    "complex": lambda: IDS.to(torch.complex64), "float": IDS.float, "half": IDS.half,
    "8 bits": lambda: IDS.float().to(torch.float8_e4m3fn), "truths": lambda: IDS > 9,
    "fake": lambda: FakeTensorMode().from_tensor(IDS), "no axis": lambda: torch.tensor(3),
    "three axes": lambda: IDS[None], "four axes": lambda: IDS[None, None],
    "no rows": lambda: IDS[:0], "no tokens": lambda: IDS[:, :0],
    "beyond": lambda: torch.tensor([[2**62]]), "objects": lambda: IDS.numpy().astype(object),
    "dates": lambda: IDS.numpy().astype("datetime64[s]"), "masked": masked,
    "texts": lambda: IDS.numpy().astype(str), "array of no axis": lambda: np.array(3),
    "records": lambda: np.zeros(2, dtype=[("a", "i8")]), "long": lambda: np.ones(3, "longdouble"),
    "ragged": lambda: [np.array([1, 2]), np.array([1])], "deep": lambda: [[[[1]]]],
}  # fmt: skip
FORMS: dict[str, Callable[[Any], Any]] = {
    "a batch": lambda value: iter([value]), "in a dict": lambda value: [{"input_ids": value}],
    "a dict": lambda value: {"input_ids": value},
    "a mask": lambda value: [{"input_ids": IDS, "attention_mask": value}],
}  # fmt: skip


@pytest.mark.filterwarnings("error:Casting complex")
@pytest.mark.parametrize(("kind", "form"), pairs(NO_IDS, FORMS))
def test_what_are_no_tokens(kind: str, form: str) -> None:
    if (kind, form) == ("truths", "a mask"):
        return  # it is one
    for scheme in ("w8a8-static", "w4+gptq"):
        with pytest.raises(FxquantError) as caught:
            fxquant.convert(graph(), scheme, calibration=FORMS[form](NO_IDS[kind]()))
        assert "batch 0: " in str(caught.value)
    with pytest.raises(FxquantError) as caught:
        fxquant.evaluate(graph(), FORMS[form](NO_IDS[kind]()))
    assert "window 0" in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", ["nested", "jagged", "sparse", "meta", "quantized", "fake"])
def test_a_tensor_of_windows_that_has_none(kind: str) -> None:
    for call in (
        lambda: fxquant.convert(graph(), "w8a8-static", calibration=NO_IDS[kind]()),
        lambda: fxquant.evaluate(graph(), NO_IDS[kind]()),
    ):
        with pytest.raises(FxquantError, match=r"^(calibration|data) "):
            call()


RIGHT: dict[str, Callable[[], Any]] = {
    "a class of its own": lambda: IDS.as_subclass(Named), "reversed": lambda: IDS.flip(1).numpy(),
    "reversed view": lambda: IDS.numpy()[:, ::-1],
    "foreign bytes": lambda: IDS.numpy().astype(">i8"),
    "parameter": lambda: torch.nn.Parameter(IDS, requires_grad=False),
    "transposed": lambda: token_ids(8, 2).T, "one stored": lambda: torch.tensor([[3]]).expand(2, 8),
    **{str(d): functools.partial(IDS.to, d) for d in (torch.uint8, torch.uint16, torch.uint64)},
}  # fmt: skip


@pytest.mark.parametrize("kind", RIGHT)
def test_other_ways_to_hold_tokens(kind: str) -> None:
    given = RIGHT[kind]()
    plain = torch.tensor(np.array(given.tolist()))
    expected, found = (fxquant.evaluate(graph(), [each]) for each in (plain, given))
    assert (expected.loss, expected.digest) == (found.loss, found.digest)
    one, other = (
        fxquant.convert(graph(), "w8a8-static", calibration=[each])(IDS) for each in (plain, given)
    )
    assert torch.equal(one, other)


# What a model returns


NO_LOGITS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "integers": (lambda y: (100 * y).long(), "a tensor of torch.int64"),
    "codes": (lambda y: y.to(torch.int8), "a tensor of torch.int8"),
    "truths": (lambda y: y > 0, "a tensor of torch.bool"),
    "complex": (lambda y: y.to(torch.complex64), "a tensor of torch.complex64"),
    "last token": (lambda y: y[:, -1], rf"a tensor \[2, {VOCABULARY}\]"),
    "flat": (lambda y: y.flatten(0, 1), rf"a tensor \[16, {VOCABULARY}\]"),
    "shorter": (lambda y: y[:, :-1], rf"a tensor \[2, 7, {VOCABULARY}\]"),
    "longer": (lambda y: torch.cat([y, y], 1), rf"a tensor \[2, 16, {VOCABULARY}\]"),
    "one row": (lambda y: y[:1], r"a tensor \[1, 8"), "transposed": (lambda y: y.mT, "a tensor "),
    "four axes": (lambda y: y[None], r"a tensor \[1, 2, 8"),
    "no axis": (lambda y: y.sum(), r"a tensor \[\]"),
    "few tokens": (lambda y: y[..., :3], "logits of 3 tokens"),
    "none of them": (lambda y: y[..., :0], "logits of 0 tokens"),
    "nothing": (lambda y: None, "a NoneType"), "a tuple": (lambda y: (y, y), "a tuple"),
    "a dict": (lambda y: {"logits": y}, "a dict"), "a number": (lambda y: 3.0, "a float"),
    "sparse": (lambda y: y.to_sparse(), "not dense"), "meta": (lambda y: y.to("meta"), "no values"),
    "nested": (lambda y: torch.nested.nested_tensor(list(y)), "not dense"),
}  # fmt: skip


def returning(change: Callable[[Tensor], Any]) -> GraphModule:
    """The graph with ``change`` behind its logits."""
    found = clone_sharing_storage(graph())
    (output,) = (node for node in found.graph.nodes if node.op == "output")
    (logits,) = output.args
    with found.graph.inserting_before(output):
        changed = found.graph.call_function(change, (logits,))
    changed.meta.update(logits.meta)
    output.args = (changed,)
    found.recompile()
    return found


@pytest.mark.parametrize("kind", NO_LOGITS)
def test_what_are_no_logits(kind: str) -> None:
    change, message = NO_LOGITS[kind]
    pattern = f"the model's result is .*{message}.*logits \\[2, 8, vocabulary"
    with pytest.raises(ModelError, match=pattern):
        perplexity.evaluate(returning(change), IDS, batch_size=2)
    with pytest.raises(ModelError, match=pattern), torch.no_grad():
        list(window_losses(lambda ids: change(graph()(ids)), IDS, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value: float) -> None:
    changed = returning(lambda y: y.index_fill(2, torch.tensor([5]), value))
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        perplexity.evaluate(changed, IDS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_logits_of_any_float_dtype_and_of_a_padded_vocabulary(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 8, VOCABULARY + 9, generator=torch.Generator().manual_seed(3))
    found = token_nll(logits.to(dtype), IDS)
    wanted = -logits.to(dtype).float()[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, wanted)


# Files that are none, where a command writes


@pytest.fixture
def in_time() -> Iterator[None]:
    """A test that waits for a pipe's other end fails."""

    def late(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def loop(path: Path) -> None:
    path.symlink_to(path)


OUTPUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "evaluate": (("--schemes=w8", *SHORT, "--overwrite"), ("results.json", "table.md", ".lock")),
    "explain": (("--scheme=w8", *SHORT, "--methods=alone"), ("explanation.json", "report.md")),
    "plan": (("--budget=9", *SHORT, "--choices", "w8", "fp"), ("plan.json", "scheme.json")),
}  # fmt: skip


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize(("command", "make"), pairs(OUTPUTS, [os.mkfifo, Path.mkdir, loop]))
def test_outputs_that_are_no_files(
    command: str, make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model")
    more, names = OUTPUTS[command]
    for name in names:
        folder = tmp_path / name.strip(".")
        folder.mkdir()
        make(folder / name)
        code = exit_code(command, "--model", model, *more, "--output", folder)
        written = capsys.readouterr().err
        assert "Traceback" not in written
        if code:
            assert code == 2
            assert written.count("error: ") == 1
            assert str(folder) in written
        else:
            assert make is loop or name == ".lock", "a link or a lock is replaced"
        assert not list(folder.glob("*.partial"))
