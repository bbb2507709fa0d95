"""The folder of an export: checked before it stands there, replaced only by another."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch.fx import GraphModule
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.checkpoint.dataclass_json import to_json
from fxquant.checkpoint.target import is_empty, partial_folder, put_in_place, saving
from fxquant.errors import ExportError
from fxquant.exports.check import Checked
from fxquant.files.doors import Location, as_path, door, printable, read_object
from fxquant.frontends.model_config import CONFIG
from fxquant.frontends.rust_tokenizers import save_tokenizer
from fxquant.ir.graph import info

RECORD = "fxquant_export.json"


@dataclass(frozen=True)
class Exported:
    """Where an export lies, what its check found, and what another engine would make of it."""

    path: Path
    target: str
    checked: Checked
    note: str = ""

    def __str__(self) -> str:
        lines = (str(self.checked), self.note, f"written to {self.path} ({self.target})")
        return "\n".join(line for line in lines if line)


def output_folder(given: Location) -> Path:
    """The folder that an export goes to; its parent is made.

    Raises ExportError where it cannot be written or holds anything but an earlier export.
    """
    target = as_path(given, "directory", ExportError)
    if target.exists() and not (is_export(target) or is_empty(target)):
        raise ExportError(f"{target} exists and is not an export of fxquant; give another folder")
    with door(ExportError, f"cannot write {target}", (OSError,), "give another folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(target):  # the longest name that stands beside it
            pass
    return target


def is_export(directory: Path) -> bool:
    """Whether ``directory`` holds the record of an export."""
    return exported_to(directory) is not None


def exported_to(directory: Path) -> str | None:
    """The format that the record of an export in ``directory`` names; None where there is none."""
    try:
        data = read_object(directory / RECORD, ExportError)
    except ExportError:
        return None
    if data.get("format") != "fxquant export":
        return None
    return printable(str(data.get("target")))[:40]


def write_export(
    gm: GraphModule,
    directory: Location,
    name: str,
    write: Callable[[Path], None],
    check: Callable[[Path], Checked],
    extras: tuple[Tokenizer | GenerationConfig | None, ...],
    note: str = "",
) -> Exported:
    """Let ``write`` fill a folder, ``check`` load it, and put it at ``directory`` if it is right.

    ``extras`` are saved beside it, ``note`` is kept with what the check found. Raises ExportError
    where writing or the check fails, which leaves what was there before.
    """
    target = output_folder(directory)
    with saving(target, ExportError), partial_folder(target) as partial:
        with _writing(target):
            write(partial)
            for each in extras:
                if isinstance(each, GenerationConfig):  # as the model has it, valid or not
                    each.to_json_file(partial / "generation_config.json", use_diff=True)
                elif each is not None:
                    save_tokenizer(each, partial)
        found = check(partial)  # an engine's own errors are none of writing
        if not found.passed:
            raise ExportError(f"{name}: nothing is written to {target}: {found}")
        record = {
            "format": "fxquant export",
            "target": name,
            "model": info(gm).model,
            "scheme": info(gm).scheme,
            "vocab_size": info(gm).vocab_size,
            "max_positions": info(gm).max_positions,
            "weights": info(gm).weights,
            "calibration": to_json(info(gm).calibration),
            "written_by": {
                each: importlib.metadata.version(each)
                for each in ("fxquant", "torch", "transformers")
            },
            "checked": asdict(found),
            "note": note,
        }
        with _writing(target):
            (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            put_in_place(partial, target)
    return Exported(target, name, found, note)


def write_config(gm: GraphModule, folder: Path) -> None:
    """The model's own config, where the graph has one."""
    if info(gm).config:
        (folder / CONFIG).write_text(info(gm).config, encoding="utf-8")


def _writing(target: Path) -> contextlib.AbstractContextManager[None]:
    return door(ExportError, f"cannot write {target}", (OSError, SafetensorError))
