"""What a result is known by before it is computed: model, text, scheme, setting, versions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fxquant.evaluation.data import Source
from fxquant.evaluation.job import Job
from fxquant.evaluation.models import model_directory, versions, weights_hash
from fxquant.evaluation.provenance import architecture
from fxquant.exports.runtimes import Runtime
from fxquant.exports.table import FORMATS
from fxquant.files.whole_file import file_hash
from fxquant.frontends.hub import hub_is_reachable
from fxquant.frontends.pretrained import read_config
from fxquant.ir.graph import Level
from fxquant.recipes.repairs import reads_calibration
from fxquant.recipes.running import running_level
from fxquant.schemes.scheme import Scheme


@dataclass(frozen=True)
class Identity:
    """A model without its weights: ``revision`` is the hub's commit or a hash of all its files."""

    name: str
    revision: str
    architecture: str


def identify_model(name: str, revision: str | None = None) -> Identity:
    """Find a model and what identifies it, without loading weights. Raises ModelError."""
    directory = model_directory(name)
    source = str(directory) if directory.is_dir() else name
    offline = directory.is_dir() or not hub_is_reachable()
    config = read_config(source, revision, offline=offline)
    found = _directory_hash(directory) if directory.is_dir() else str(config._commit_hash)
    return Identity(name, found, architecture(config))


def _directory_hash(directory: Path) -> str:
    """One sha256 over weights, configuration and tokenizer."""
    digest = hashlib.sha256(weights_hash(directory).encode())
    small = {
        path for end in ("json", "txt", "model", "jinja") for path in directory.glob(f"*.{end}")
    }
    for path in sorted(small):
        digest.update(f"{path.name} {file_hash(path)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def depends_on_seed(scheme: Scheme, runtime: Runtime | None = None) -> bool:
    """Whether calibration windows, which the seed draws, may matter to the scheme, or to what is
    written for ``runtime`` under it."""
    return reads_calibration(scheme) or (
        runtime is not None and FORMATS[runtime.target].target.reads_calibration(scheme)
    )


def fingerprint(
    job: Job,
    scheme: Scheme,
    model: Identity,
    source: Source,
    calibration: Source | None,
    runtime: Runtime | None = None,
) -> str:
    """sha256 over everything that determines one scheme's figures (but the number of threads,
    which may change the last digits of floating-point sums)."""
    facts: dict[str, object] = {
        "model": asdict(model),
        "scheme": str(scheme),
        "text": {"name": source.name, "hash": source.digest, "recipe": asdict(source.recipe)},
        "windows": [job.windows, job.length, job.length if job.stride is None else job.stride],
        # What is left over for calibration does not change what is evaluated.
        "calibration": _calibration(job, calibration or source)
        if depends_on_seed(scheme, runtime)
        else None,
        "batch_size": job.batch_size,
        "device": job.device,
        "dtype": job.dtype,
        "versions": versions(),
    }
    level = running_level(job.level, job.device)
    if level != Level.INTEGER:  # results that were kept before there was a choice are of that one
        facts["level"] = level
    if runtime is not None:
        facts["engine"] = runtime.engine()
    return _hash(facts)


def _calibration(job: Job, drawn: Source) -> dict[str, object]:
    length = job.length if job.calibration_length is None else job.calibration_length
    facts: dict[str, object] = {
        "seed": job.seed,
        "windows": [job.calibration_windows, length],
        "text": {"name": drawn.name, "hash": drawn.digest, "recipe": asdict(drawn.recipe)},
    }
    if drawn.calibration_digest is not None:
        facts["documents"] = drawn.calibration_digest
    return facts


def unavailable(job: Job, scheme: Scheme, reason: str, runtime: Runtime | None = None) -> str:
    """The fingerprint of a cell whose model, weights or text cannot be read.

    It is tried again next time: under its own fingerprint there is no result.
    """
    seed = job.seed if depends_on_seed(scheme, runtime) else None
    ran = [] if runtime is None else [runtime.engine()]
    return _hash([job.model, str(scheme), job.dataset, seed, reason, *ran])


def _hash(facts: object) -> str:
    text = json.dumps(facts, sort_keys=True, allow_nan=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
