"""What a saved graph says of its calibration is compared with text: it must be comparable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fxquant
from fxquant.errors import CheckpointError
from tests.attack.mutations import write
from tests.models import SMALL_OPT

TEXT = " ".join(f"Sentence {index} is about the number {index * index}." for index in range(400))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "saved"
    loaded = fxquant.load_model(str(SMALL_OPT))
    text = fxquant.windows(TEXT, loaded.tokenizer, count=2, length=32, calibration=2)
    fxquant.save(fxquant.convert(loaded.model, "w8a8-static", calibration=text.batches), folder)
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("runs", text) for text in ("zz.", "5:.", "0:abcdefabcdef.", "-3:abcdefabcdef.", "x:1.")),
        *(("spans", [[text, 0, 32]]) for text in (1, -1, 10**6)),
        *(("spans", [[0, *ends]]) for ends in ((-1, 32), (32, 32), (40, 32))),
    ],
)
def test_a_calibration_that_cannot_be_compared_is_refused(
    key: str, value: Any, drawn: Path, tmp_path: Path
) -> None:
    data = json.loads((drawn / "graph.json").read_text())
    record = data["info"]["calibration"][0]
    (record if key == "runs" else record["origin"]["spans"])[key] = value
    copy = tmp_path / "saved"
    copy.mkdir()
    for path in drawn.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    write(copy, data)
    with pytest.raises(CheckpointError, match=r"calibration|kept whole"):
        fxquant.load(copy)


def test_as_it_was_written_it_loads(drawn: Path) -> None:
    (record,) = fxquant.load(drawn).meta["fxquant"].calibration
    assert record.runs
    assert record.origin.spans.spans
