"""Without a network: one error at once, no raw warnings; what is said while a model loads."""

from __future__ import annotations

import logging
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from fxquant.cli.main import main
from fxquant.errors import ModelError
from fxquant.evaluation import models, source
from fxquant.evaluation.protocol import PLAIN
from fxquant.frontends import hub
from fxquant.frontends.hub import without_notices
from tests.models import SMALL_OPT, small_opt
from tests.processes import FXQUANT, finished

FAST = logging.getLogger("transformers.models.llama.tokenization_llama_fast")


def test_a_hub_name_without_a_network_is_one_line() -> None:
    options = ["evaluate", "--model", "nobody/nothing", "--schemes", "w8", "--windows", "1"]
    done = finished([*FXQUANT, *options], HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("fxquant: error: cannot load nobody/nothing: ")
    assert "needs the network or a filled cache" in line


def test_a_preset_without_a_network_is_said_at_once(tmp_path: Path) -> None:
    options = ["reproduce", "gptq-table", "--output", str(tmp_path / "out")]
    done = finished([*FXQUANT, *options], HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    first, *rest = done.stderr.splitlines()
    assert first == "fxquant: error: gptq-table cannot be run here yet:"
    assert all(line.startswith(("  model ", "  dataset ", "    ")) for line in rest)  # none raw
    assert [line.split(":")[0] for line in rest if line.startswith("  model ")] == [
        f"  model facebook/opt-{size}" for size in ("125m", "350m", "1.3b")
    ]


def test_a_cached_models_slow_tokenizer_is_not_asked_of_an_unreachable_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []

    def read(name: str, revision: str | None, *, fast: bool, offline: bool) -> None:
        asked.append(offline)
        raise ModelError("it has none")

    tokenizer = small_opt()[1]
    monkeypatch.setattr(tokenizer, "name_or_path", "nobody/nothing")
    monkeypatch.setattr(source, "read_tokenizer", read)
    monkeypatch.setattr(source, "hub_is_reachable", lambda: False)
    recipe = replace(PLAIN, tokenizer="slow")
    assert source.tokenizer_for(recipe, tokenizer) is tokenizer
    assert asked == [True]


def test_a_directory_does_not_ask_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise AssertionError("asked")

    monkeypatch.setattr(models, "hub_is_reachable", asked)
    models.load_model(str(SMALL_OPT))


def test_only_the_legacy_notice_is_silenced() -> None:
    notice = "You are using the default legacy behaviour of the <class 'LlamaTokenizerFast'>."
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    slow, ear = logging.getLogger("transformers.models.llama.tokenization_llama"), Ear()
    for logger in (FAST, slow):
        logger.addHandler(ear)
    try:
        with without_notices():
            FAST.warning(notice)
            FAST.warning("something else")
            slow.warning(notice)
        FAST.warning(notice)
    finally:
        for logger in (FAST, slow):
            logger.removeHandler(ear)
    assert heard == ["something else", notice, notice]


def test_a_finished_scheme_is_a_line_without_a_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    short = ["--windows", "1", "--length", "32", "--calibration-windows", "1"]
    options = ["--model", str(SMALL_OPT), "--schemes", "w8", *short]
    assert main(["evaluate", *options, "--output", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": loss ")[0] for line in lines] == ["fp", "w8"]
    assert all(line.endswith(" s") for line in lines)


def test_an_address_that_is_looked_up_for_ever_is_not_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given_up = threading.Event()

    def look_up(*_: object, **__: object) -> None:
        assert given_up.wait(60), "the caller waits"
        raise socket.gaierror(socket.EAI_AGAIN, "no answer")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    try:
        assert not hub.hub_is_reachable()
    finally:
        given_up.set()
