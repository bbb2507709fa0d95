"""What a command starts from: a float model under schemes, a saved graph, or an export in its
engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fxquant.checkpoint.manifest import is_checkpoint
from fxquant.errors import DataError, ExportError
from fxquant.evaluation.models import PACKAGE_PREFIX, check_float, check_no_export
from fxquant.exports.folder import is_export
from fxquant.exports.runtimes import engines_of
from fxquant.files.doors import as_path, near_file


def check_saved(model: str, schemes: Sequence[object], runtime: str | None) -> None:
    """Raise DataError where no scheme is given and the model has none of its own, ModelError where
    schemes are given and it is quantized already; ExportError for an export without a runtime."""
    if is_export(Path(model)):
        if runtime is None:
            target, engines = engines_of(Path(model))
            nearest = (
                f"give --runtime {engines}, the engine to run it in"
                if engines
                else "no --runtime runs it; evaluate what it was made from"
            )
            raise ExportError(f"{model} is an export to {target}: {nearest}")
        if schemes:
            raise ExportError(f"{model} is an export, which has its scheme: leave out --schemes")
    elif schemes:
        check_float(model)
    elif not is_checkpoint(Path(model)):
        raise DataError(
            "give --schemes, such as w8 w8a8-static (only a saved graph and an export have their "
            f"own{_absent(model)})"
        )


def saved_graph(name: str, advice: str) -> Path:
    """The folder of a saved graph; DataError with ``advice`` for anything else, ModelError for an
    export."""
    folder = as_path(name, "the model")
    if not is_checkpoint(folder):
        check_no_export(name)
        raise DataError(f"{name} is no saved graph{_absent(name)}: {advice}")
    return folder


def _absent(name: str) -> str:
    """That there is no folder ``name``, which may be a hub's name too."""
    path = Path(name)
    if path.exists() or name.startswith(PACKAGE_PREFIX):
        return ""
    return f", and {name} is no folder{near_file(path)}"
