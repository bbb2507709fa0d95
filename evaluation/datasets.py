"""Named datasets, each with one protocol, and local ones: text, parquet, saved folders.

The papers' protocols are those of GPTQ's datautils.py (Frantar et al. 2023). C4 and PTB exist in an
old and a new one whose perplexities differ by up to 20%: they have different names here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from fxquant.errors import DataError
from fxquant.evaluation.protocol import Protocol, Recipe
from fxquant.evaluation.source import Documents, Source, load_text
from fxquant.files.doors import check_regular, location, near_file, reason
from fxquant.frontends.hub import datasets_offline, hub_is_reachable


@dataclass(frozen=True)
class HubDataset:
    """Where a named dataset lies on the hub, and its protocol.

    ``files``: (split, pattern) pairs, for repositories of which only some files are read.
    """

    repository: str
    column: str
    recipe: Recipe
    config: str | None = None
    revision: str | None = None
    files: tuple[tuple[str, str], ...] = ()

    def load(self, data: Path | None) -> tuple[Documents, Documents]:
        """The evaluated and the calibration split's column, from the hub, a cache or a clone."""
        return self._split(self.recipe.split, data), self._split(
            self.recipe.calibration_split, data
        )

    def _split(self, split: str, data: Path | None) -> Documents:
        import datasets

        clone = data / self.repository if data is not None else None
        local = clone is not None and clone.is_dir()
        with datasets_offline(not local and not hub_is_reachable()):
            rows = datasets.load_dataset(
                str(clone) if local else self.repository,
                self.config,
                split=split,
                revision=None if local else self.revision,
                data_files={name: pattern for name, pattern in self.files if name == split} or None,
            )
        return cast(Documents, rows[self.column])


_GPTQ = Recipe(
    split="test",
    calibration_split="train",
    join="\n\n",
    tokenizer="slow",
    sampler="offsets",
)
_WIKITEXT = HubDataset("Salesforce/wikitext", "text", _GPTQ, config="wikitext-2-raw-v1")
_C4_FILES = (
    ("train", "en/c4-train.00000-of-01024.json.gz"),
    ("validation", "en/c4-validation.00000-of-00008.json.gz"),
)
_C4 = HubDataset(
    "allenai/c4",
    "text",
    replace(_GPTQ, split="validation", sampler="documents"),
    files=_C4_FILES,
)
# The repository itself is a loading script, which datasets no longer runs.
_PTB = HubDataset(
    "ptb-text-only/ptb_text_only",
    "sentence",
    _GPTQ,
    revision="refs/convert/parquet",
    files=tuple((s, f"penn_treebank/{s}/*.parquet") for s in ("train", "validation", "test")),
)

NAMED: Final[Mapping[str, HubDataset]] = {
    "wikitext2": _WIKITEXT,
    "c4-old": replace(
        _C4, recipe=replace(_C4.recipe, join="", selection="samples", most_windows=256)
    ),
    "c4-new": replace(
        _C4,
        recipe=replace(_C4.recipe, join=" ", selection="head", documents=1100, most_windows=256),
    ),
    "ptb-old": replace(_PTB, recipe=replace(_GPTQ, split="validation")),
    "ptb-new": replace(_PTB, recipe=replace(_GPTQ, join=" ")),
}
_AMBIGUOUS: Final = ("c4", "ptb")


def check_dataset(name: str) -> None:
    """Raise DataError for what is neither ``builtin``, a named dataset nor an existing path."""
    if name == "builtin" or name in NAMED or Path(location(name, "dataset")).exists():
        return
    if name in _AMBIGUOUS:
        raise DataError(
            f"{name} has two protocols whose perplexities must not be mixed: say {name}-old "
            f"(GPTQ's get_{name}) or {name}-new (its --new-eval)"
        )
    known = (
        f"known are builtin, {', '.join(NAMED)}, or the path of a text file, a .parquet file or a "
        "folder of save_to_disk"
    )
    if looks_like_a_path(name):
        raise DataError(f"no such file {name!r}{near_file(Path(name))}; {known}")
    near = difflib.get_close_matches(name, ["builtin", *NAMED], 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise DataError(f"unknown dataset {name!r}: {known}, and there is no such file{hint}")


def looks_like_a_path(text: str) -> bool:
    """Whether a string is the path of a file or a folder, to look at it: one line of no great
    length with a slash and no blank, or with a suffix."""
    if len(text.splitlines()) != 1 or len(text) > 250:
        return False
    return bool(re.fullmatch(r"\S*[/\\]\S*|.*\S\.[A-Za-z]\w{0,7}", text))


def open_source(name: str, data: Path | None = None) -> Source:
    """The text called ``name``: see ``check_dataset`` for what it may be.

    ``data``: a folder with clones of hub datasets, ``data/OWNER/NAME``, looked at first.

    Raises DataError that says what is missing and where it may be put.
    """
    check_dataset(name)
    path = Path(name)
    if name in NAMED:
        return _named(name, data)
    if path.is_dir():
        return _saved_folder(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    return load_text(name)


def how_to_get(name: str) -> str:
    """What to download for a named dataset, and where to put it."""
    repository, revision = NAMED[name].repository, NAMED[name].revision
    version = f" --revision {revision}" if revision else ""
    files = "".join(f" --include '{pattern}'" for _, pattern in NAMED[name].files)
    return (
        f"hf download --repo-type dataset {repository}{version}{files} --local-dir "
        f"DATA/{repository}, then give --data DATA"
    )


def tokenizer_note(model: str, protocol: Protocol) -> str:
    """What has to be said where a protocol of the papers was run with another tokenizer; or ""."""
    dataset = NAMED.get(protocol.dataset)
    if dataset is None or dataset.recipe.tokenizer != "slow":
        return ""
    if not protocol.tokenizer.startswith("fast"):
        return ""
    return (
        f"{model} has no slow tokenizer, which the papers used: {protocol.dataset} was cut by its "
        "fast one"
    )


def _named(name: str, data: Path | None) -> Source:
    dataset = NAMED[name]
    try:
        evaluation, calibration = dataset.load(data)
    # Whatever a loader, a filesystem or an HTTP client of datasets raises means the same here.
    except Exception as error:
        raise DataError(
            f"cannot load {name} ({dataset.repository}): {_first_line(error)}. It needs the "
            f"network or a filled cache of datasets; by hand: {how_to_get(name)}. --dataset also "
            "takes a local text or parquet file or a folder of save_to_disk"
        ) from error
    return Source(name, evaluation, calibration, dataset.recipe)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {reason(error).removeprefix(f'{type(error).__name__}: ')}"


def _saved_folder(path: Path) -> Source:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"{path} is not a folder that save_to_disk wrote: {_first_line(error)}"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        return _splits(path, dict(found))
    return Source(path.name, _text_column(found, path), None, Recipe(join="\n\n"))


def _splits(path: Path, splits: Mapping[str, Any]) -> Source:
    evaluated = next((name for name in ("test", "validation") if name in splits), None)
    evaluated = evaluated or next(iter(splits))
    others = [name for name in splits if name != evaluated]
    train = "train" if "train" in others else None
    recipe = Recipe(evaluated, train or "rest of the text", join="\n\n")
    calibration = None if train is None else _text_column(splits[train], path)
    return Source(path.name, _text_column(splits[evaluated], path), calibration, recipe)


def _parquet(path: Path) -> Source:
    import datasets
    import pyarrow.parquet

    check_regular(path)
    try:
        # datasets would log what it raises, with tracebacks.
        count = pyarrow.parquet.ParquetFile(path).metadata.num_rows
        if not count:
            raise DataError(f"{path} holds no rows of text")
        rows = datasets.Dataset.from_parquet(str(path))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot read {path} as parquet: {_first_line(error)}") from error
    return Source(path.name, _text_column(rows, path), None, Recipe(join="\n\n"))


def _text_column(rows: Any, path: Path) -> Documents:
    strings = [
        name
        for name, kind in rows.features.items()
        if getattr(kind, "dtype", "") in ("string", "large_string")
    ]
    chosen = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
    if chosen is None:
        raise DataError(
            f"{path} needs a column 'text' or exactly one column of strings; it has "
            f"{', '.join(rows.features) or 'none'}"
        )
    return cast(Documents, rows[chosen])
