"""The reference tables, run again: each a sweep with the published figures beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from fxquant.errors import DataError, FxquantError
from fxquant.evaluation.datasets import NAMED, how_to_get, open_source
from fxquant.evaluation.fingerprint import identify_model
from fxquant.evaluation.job import Job
from fxquant.evaluation.published import GPTQ_TABLE, LADDER, LENGTH, SMOOTHQUANT_TABLE, Published
from fxquant.evaluation.result_notes import tokenizer_notes
from fxquant.evaluation.sweep import Sweep, SweepOutcome, check_processes, run_sweep
from fxquant.evaluation.sweep_tables import format_results, groups


@dataclass(frozen=True)
class Preset:
    """A table to reproduce: its models, setting and published figures.

    The schemes are those of ``published``. ``differs``: what setting and schemes leave different.
    """

    title: str
    models: tuple[str, ...]
    published: tuple[Published, ...]
    dataset: str
    calibration_dataset: str
    windows: int | None
    calibration_windows: int
    calibration_length: int
    differs: tuple[str, ...]

    @property
    def schemes(self) -> tuple[str, ...]:
        """Ours for the figures of any model, in the table's order."""
        return tuple(dict.fromkeys(f.scheme for f in self.published if f.scheme is not None))

    def sweep(self, changes: Mapping[str, Any]) -> Sweep:
        """The sweep to run; ``changes`` replaces models, dataset, seeds or fields of Job.

        A shorter ``length`` is that of the calibration windows too, unless they have one of theirs.
        """
        options = {name: value for name, value in changes.items() if value is not None}
        if "windows" not in changes:
            options["windows"] = self.windows
        elif changes["windows"] is None:
            options["windows"] = None
        models = tuple(options.pop("models", self.models))
        dataset = options.pop("dataset", self.dataset)
        seeds = tuple(options.pop("seeds", (0,)))
        preset = {
            "length": LENGTH,
            "calibration_dataset": self.calibration_dataset,
            "calibration_windows": self.calibration_windows,
            # Shorter windows are for a model or a machine that longer ones do not fit.
            "calibration_length": min(self.calibration_length, options.get("length", LENGTH)),
        }
        job = Job(model=models[0], schemes=self.schemes, **{**preset, **options})
        return Sweep(models, (dataset,), seeds, job)


PRESETS: Final[Mapping[str, Preset]] = {
    "opt-1.3b-ladder": Preset(
        title="OPT-1.3B: weights cost nothing, dynamic W8A8 a little, static W8A8 everything",
        models=("facebook/opt-1.3b",),
        published=LADDER,
        dataset="wikitext2",
        calibration_dataset="wikitext2",
        windows=64,
        calibration_windows=16,
        calibration_length=LENGTH,
        differs=("the reference's text is not named: compare the differences, not the losses",),
    ),
    "gptq-table": Preset(
        title="Weight-only quantization of OPT, WikiText-2 (GPTQ table 3, OmniQuant table A20)",
        models=tuple(f"facebook/{size}" for size in ("opt-125m", "opt-350m", "opt-1.3b")),
        published=tuple(f for f in GPTQ_TABLE if f.dataset == "wikitext2"),
        dataset="wikitext2",
        calibration_dataset="c4-new",
        windows=None,
        calibration_windows=128,
        calibration_length=LENGTH,
        differs=(
            "calibrated as GPTQ is, on 128 windows of C4; AWQ's authors calibrate on the Pile",
            "gptq has the paper's min-max ranges and float inputs within a block, where ours by "
            "default searches ranges and works layer by layer; in groups its ranges are those of "
            "the float weights, the authors' code takes them from weights already updated",
            "awq has the paper's plain sum of squares, where ours by default weighs large tokens "
            "less; its scales are searched on 2048 tokens of the calibration, the authors' on all",
        ),
    ),
    "smoothquant-table": Preset(
        title="W8A8 of OPT-6.7B, WikiText-2 (CushionCache table 1)",
        models=("facebook/opt-6.7b",),
        published=SMOOTHQUANT_TABLE,
        dataset="wikitext2",
        calibration_dataset="c4-new",
        windows=None,
        calibration_windows=512,
        calibration_length=512,
        differs=(
            "calibrated on 512 windows of 512 tokens of C4, where SmoothQuant's are of the Pile",
            "attention's own products stay in float, where SmoothQuant's O1 to O3 quantize them",
        ),
    ),
}


def check_available(name: str, sweep: Sweep) -> None:
    """Raise one DataError that lists every model and dataset that is missing, what to download and
    where to put it."""
    missing = []
    for model in sweep.models:
        try:
            identify_model(model, sweep.job.revision)
        except FxquantError as error:
            folder = model.rsplit("/", 1)[-1]
            missing.append(
                f"model {model}: {error}\n    on a machine with network: hf download {model} "
                f"--local-dir {folder}; then here: fxquant reproduce {name} --model {folder}"
            )
    for dataset in dict.fromkeys((*sweep.datasets, str(sweep.job.calibration_dataset))):
        try:
            open_source(dataset, sweep.job.data)
        except FxquantError as error:
            if dataset not in NAMED:
                raise
            reason = str(error).split(". ", 1)[0]
            missing.append(f"dataset {dataset}: {reason}\n    {how_to_get(dataset)}")
    if missing:
        raise DataError("\n  ".join([f"{name} cannot be run here yet:", *missing]))


def reproduce(
    name: str,
    changes: Mapping[str, Any],
    folder: Path,
    *,
    retry_failed: bool = False,
    say: Callable[[str], None] = print,
) -> SweepOutcome:
    """Run a preset's sweep into ``folder``/results.jsonl (going on where it stopped) and print our
    figures beside the published ones, with what differs between the two settings.

    Raises DataError before any work for an unknown preset and where models or texts are missing,
    DistributedError under torchrun.
    """
    check_processes()
    if name not in PRESETS:
        raise DataError(f"unknown preset {name!r}: known are {', '.join(PRESETS)}")
    preset = PRESETS[name]
    sweep = preset.sweep(changes)
    check_available(name, sweep)
    outcome = run_sweep(sweep, folder / "results.jsonl", retry_failed=retry_failed, say=say)
    say(f"\n{preset.title}\n")
    say(format_results(outcome.results, "github", preset.published, unmatched=True))
    say("")
    for note in notes(preset, sweep, outcome):
        say(f"- {note}")
    return outcome


_NOT_COMPARED: Final = ("model", "data", "device", "output", "stream", "revision", "cache")


def notes(preset: Preset, sweep: Sweep, outcome: SweepOutcome) -> list[str]:
    """What keeps our figures from being the published ones' equals: setting, model, tokenizer."""
    said = list(preset.differs)
    plain = preset.sweep({})
    for field in fields(Job):
        ours, theirs = getattr(sweep.job, field.name), getattr(plain.job, field.name)
        compared = field.compare and field.name not in _NOT_COMPARED
        if compared and ours != theirs:
            said.append(f"{field.name} is {_word(ours)}, the preset's is {_word(theirs)}")
    if sweep.datasets != plain.datasets:
        said.append(f"the text is {sweep.datasets[0]}, the preset's is {plain.datasets[0]}")
    for group in groups(outcome.results, preset.published, unmatched=True):
        made = group.provenance
        if not any(figure.architecture == made.architecture for figure in preset.published):
            said.append(f"{made.model} is {made.architecture}: nothing was published for it here")
        elif not any(line.published for line in group.lines):
            said.append(f"{made.model}: no published figure is under this protocol")
        if made.dtype != "float16":
            said.append(f"{made.model} was run in {made.dtype}, the published figures in float16")
    return list(dict.fromkeys([*said, *tokenizer_notes(outcome.results)]))


def _word(value: object) -> str:
    return "all" if value is None else str(value)
