"""The envelope of a saved graph: format, version, and a checksum of every file in the folder.

The manifest is written in one canonical form with a checksum of itself, so that any byte that
changes in any file is noticed before anything is read from it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from fxquant.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT, VERSION = "fxquant", 1


def is_checkpoint(directory: Path) -> bool:
    """Whether ``directory`` holds a manifest of fxquant.save, damaged or not."""
    try:
        data = json.loads((directory / MANIFEST).read_bytes())
    except OSError:
        return False
    except ValueError:
        return (directory / "graph.json").exists()
    return isinstance(data, dict) and data.get("format") == FORMAT


def write_manifest(directory: Path) -> None:
    """Record every file of ``directory``; the manifest itself is the last one written."""
    files = {
        path.relative_to(directory).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _digest(path),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    body = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": {
            name: importlib.metadata.version(name) for name in ("fxquant", "torch", "transformers")
        },
        "files": files,
    }
    (directory / MANIFEST).write_bytes(_canonical(body))


def check_manifest(directory: Path) -> list[str]:
    """Names of the recorded files, all of them intact.

    Raises CheckpointError for a folder that is no checkpoint, for a newer format version, and for
    a file that is missing, truncated or changed.
    """
    path = directory / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{directory} is not a graph saved by fxquant.save: it has no readable {MANIFEST} "
            f"({error.strerror})"
        ) from error
    body = _parse(path, raw)
    _check_version(path, body)
    if _canonical({key: value for key, value in body.items() if key != "sha256"}) != raw:
        raise _damaged(path, "its checksum does not fit its content")
    files = body.get("files")
    if not isinstance(files, dict):
        raise _damaged(path, "it lists no files")
    for name, expected in files.items():
        if not (isinstance(expected, dict) and {"bytes", "sha256"} <= set(expected)):
            raise _damaged(path, f"it has no size and checksum of {name}")
        _check_file(directory, name, expected)
    return list(files)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not JSON: {error}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a manifest of fxquant.save: another program's file")
    return body


def _check_version(path: Path, body: dict[str, Any]) -> None:
    version = body.get("version")
    if not isinstance(version, int) or version < 1:
        raise _damaged(path, f"its format version is {version!r}")
    if version > VERSION:
        writer = body.get("written_by")
        raise CheckpointError(
            f"{path.parent} has format version {version}, this fxquant reads up to {VERSION}: "
            f"upgrade fxquant (it was written by {writer})"
        )


def _check_file(directory: Path, name: str, expected: dict[str, Any]) -> None:
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise CheckpointError(f"{directory / MANIFEST} names {name}, which lies outside its folder")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _damaged(path, f"it is missing or unreadable ({error.strerror})") from error
    if size != expected["bytes"]:
        raise _damaged(path, f"it has {size} bytes, {expected['bytes']} were written")
    if _digest(path) != expected["sha256"]:
        raise _damaged(path, "its sha256 is not the one that was written")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or was changed: {what}; save or copy it again")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _canonical(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, indent=1, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()
