"""What a graph was calibrated on, as plain values: kept with it, saved with it, printed from it."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from fxquant.ir.counted import counted

UNKNOWN, NOTHING = "unknown data", "nothing"


@dataclass(frozen=True)
class Text:
    """A text by its sha256, and that of the ids a tokenizer made of it: where both are equal, so
    are the positions of tokens."""

    text_hash: str
    tokens_hash: str


@dataclass(frozen=True)
class Spans:
    """Where windows lie: (index in ``texts``, first token, token behind the last) of each."""

    texts: tuple[Text, ...] = ()
    spans: tuple[tuple[int, int, int], ...] = ()

    def first(self, count: int) -> Spans:
        """Of the first ``count`` windows."""
        return replace(self, spans=self.spans[:count])


@dataclass(frozen=True)
class Origin:
    """How windows were drawn from a text.

    Attributes:
        source, split, join, sampler: the text and its protocol, as Source and Recipe have them.
        tokenizer: kind and class.
        text_hash: sha256 of the source, as Provenance has it.
        length: tokens a window.
        seed: of the draw.
        spans: where each window lies.
        command: the command line that drew them, "" for none.
    """

    source: str
    split: str
    join: str
    sampler: str
    tokenizer: str
    text_hash: str
    length: int
    seed: int
    spans: Spans
    command: str = ""

    def words(self, windows: int) -> str:
        """Such as "16 windows of 512 from builtin (calibration topics, grid)"."""
        place = f"{self.source} ({self.split}, {self.sampler})"
        return f"{counted(windows, 'window')} of {self.length} from {place}"


@dataclass(frozen=True)
class Reading:
    """A pass, as it is spelled, and how many of the batches it read."""

    name: str
    batches: int


@dataclass(frozen=True)
class CalibrationRecord:
    """Batches that passes read.

    Attributes:
        shapes: (batches, rows, tokens a row), batches in a row that are alike together.
        tokens: those that are attended to.
        ids_hash: sha256 of all token ids.
        readings: the passes, in the order in which they ran.
        dtype, device, versions: of the graph and of what ran it.
        origin: None where batches were handed over as bare tensors.
        batch_hashes: the first 16 hexadecimal digits of each batch's sha256.
        runs: hashes of runs of tokens, see ``token_runs``.
    """

    shapes: tuple[tuple[int, int, int], ...]
    tokens: int
    ids_hash: str
    readings: tuple[Reading, ...]
    dtype: str
    device: str
    versions: dict[str, str]
    origin: Origin | None = None
    batch_hashes: tuple[str, ...] = field(default=(), repr=False)
    runs: str = field(default="", repr=False)

    @property
    def windows(self) -> int:
        """Rows of all batches."""
        return sum(batches * rows for batches, rows, _ in self.shapes)

    def words(self) -> str:
        """What was read, such as "16 windows of 512 from builtin (calibration topics, grid)"."""
        if self.origin is not None:
            return self.origin.words(self.windows)
        lengths = sorted({length for _, _, length in self.shapes})
        length = counted(lengths[-1], "token")
        if len(lengths) > 1:
            length = f"{lengths[0]} to {length}"
        rows = counted(self.windows, "row")
        return f"{rows} of {length} of unknown text ({self.ids_hash[:23]})"

    def details(self) -> str:
        """What ``words`` leaves out, but the hashes of single batches and runs."""
        origin = self.origin
        drawn = "seed and command unknown"
        if origin is not None:
            drawn = f"text {origin.text_hash[:23]}, {origin.tokenizer}, seed {origin.seed}"
        passes = ", ".join(each.name for each in self.brief().readings)
        versions = version_words(self.versions)
        command = f"; {origin.command}" if origin is not None and origin.command else ""
        return (
            f"{drawn}, {counted(self.tokens, 'token')} {self.ids_hash[:23]}, read by {passes} in "
            f"{self.dtype} on {self.device}; {versions}{command}"
        )

    def line(self) -> str:
        """``words`` and ``details``, for under a table."""
        return f"{self.words()}, {self.details()}"

    def brief(self) -> CalibrationRecord:
        """Without the hashes of single batches and runs: as results have it."""
        count = len(self.batch_hashes)
        named = (
            each
            if each.batches == count or not count
            else replace(
                each, name=f"{each.name} (the first {counted(each.batches, 'batch', 'batches')})"
            )
            for each in self.readings
        )
        return replace(self, readings=tuple(named), batch_hashes=(), runs="")


Calibration = tuple[CalibrationRecord, ...] | None
"""Of a graph: one record for each data that was read, none where none was; None: unknown."""


def calibration_words(found: Calibration) -> str:
    """What stands behind "calibrated on"."""
    if found is None:
        return UNKNOWN
    records = folded(found)
    alike = Counter(record.words() for record in records)
    return " and ".join(_told_apart(record, alike) for record in records) or NOTHING


def folded(records: Iterable[CalibrationRecord]) -> tuple[CalibrationRecord, ...]:
    """The records of the same token ids as one, with where they are from if any of them says it."""
    found: dict[str, CalibrationRecord] = {}
    for record in records:
        old = found.setdefault(record.ids_hash, record)
        known = record if old.origin is None else old
        readings = dict.fromkeys((*old.readings, *record.readings))
        found[record.ids_hash] = replace(known, readings=tuple(readings))
    return tuple(found.values())


def _told_apart(record: CalibrationRecord, alike: Counter[str]) -> str:
    """Its words, with what tells it from other ids that have the same words."""
    words = record.words()
    if alike[words] == 1 or record.origin is None:
        return words
    return f"{words[:-1]}, seed {record.origin.seed}, {record.ids_hash[:23]})"


def joined(found: Calibration, new: CalibrationRecord) -> Calibration:
    """``found`` with one more reading; of the same batches, or of some first ones of them, it is
    one record."""
    if found is None:
        return None  # what else was read is not known
    for index, old in enumerate(found):
        longer, shorter = (old, new) if old.windows >= new.windows else (new, old)
        same = longer.batch_hashes[: len(shorter.batch_hashes)] == shorter.batch_hashes
        if same and (old.origin is None) == (new.origin is None):
            both = replace(longer, readings=(*old.readings, *new.readings))
            return (*found[:index], both, *found[index + 1 :])
    return (*found, new)


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    names = ("fxquant", "torch", "transformers", "datasets", "tokenizers")
    return {name: importlib.metadata.version(name) for name in names}


def version_words(found: Mapping[str, str]) -> str:
    """Such as "torch 2.13.0, transformers 4.57.6"."""
    return ", ".join(f"{name} {version}" for name, version in found.items())
