"""The envelope of a saved graph: format, version, and a checksum of every file in the folder.

The manifest is written in one canonical form with a checksum of itself, so that any byte that
changes in any file is noticed before anything is read from it. It is the folder: what lies there
unlisted, and what is no regular file, is refused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from fxquant.checkpoint.saved_names import check_texts
from fxquant.errors import CheckpointError
from fxquant.files.doors import parse_json, printable, reason
from fxquant.files.whole_file import file_hash

MANIFEST = "manifest.json"
FORMAT, VERSION = "fxquant", 2
_FIELDS = {"format", "version", "written_by", "files", "sha256"}
_SHA256 = re.compile("[0-9a-f]{64}")
_LONGEST_NAME = 400
READ_LIMIT = 2**28  # bytes of a file that is read as a whole: the graph of 400 layers is 10 MB


def is_checkpoint(directory: Path) -> bool:
    """Whether ``directory`` holds a manifest of fxquant.save, damaged or not."""
    try:
        data = parse_json(read_regular(directory / MANIFEST))
    except (OSError, CheckpointError):
        return False
    except ValueError:
        return (directory / "graph.json").exists()
    return isinstance(data, dict) and data.get("format") == FORMAT


def write_manifest(directory: Path) -> None:
    """Record every file of ``directory``; the manifest itself is the last one written."""
    files = {
        path.relative_to(directory).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_hash(path),
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


def check_manifest(directory: Path) -> dict[str, str]:
    """Each recorded file's sha256 by name: the regular files of the folder, all of them, intact.

    Raises CheckpointError for a folder that is no checkpoint, for a newer format version, for a
    file that is missing, truncated or changed, and for whatever lies there unrecorded.
    """
    path = directory / MANIFEST
    try:
        raw = read_regular(path)
    except OSError as error:
        raise CheckpointError(
            f"{directory} is not a graph saved by fxquant.save: it has no readable {MANIFEST} "
            f"({error.strerror})"
        ) from error
    body = _parse(path, raw)
    _check_version(path, body)
    if set(body) != _FIELDS:
        raise _damaged(path, f"it does not hold exactly {', '.join(sorted(_FIELDS))}")
    if _canonical({key: value for key, value in body.items() if key != "sha256"}) != raw:
        raise _damaged(path, "its checksum does not fit its content")
    files = body.get("files")
    if not isinstance(files, dict):
        raise _damaged(path, "it lists no files")
    for name, expected in files.items():
        if len(name) > _LONGEST_NAME:
            raise _damaged(path, f"it lists {name[:40]}..., which no file is called")
        sizes = expected if isinstance(expected, dict) and len(expected) == 2 else {}
        whole, digest = type(sizes.get("bytes")) is int, sizes.get("sha256")
        if not (whole and isinstance(digest, str) and _SHA256.fullmatch(digest)):
            raise _damaged(path, f"it has no size and checksum of {name[:80]}")
    try:
        found = _listing(directory, files)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be listed: {error}") from error
    for name, expected in files.items():
        if name not in found:
            raise _damaged(directory / name, "it is missing")
        if found[name] != expected["bytes"]:
            what = f"it has {found[name]} bytes, {expected['bytes']} were written"
            raise _damaged(directory / name, what)
    for name, expected in files.items():
        _check_digest(directory / name, expected)
    return {name: expected["sha256"] for name, expected in files.items()}


def read_regular(path: Path, sha256: str | None = None) -> bytes:
    """The content of a regular file, which is not a link; OSError where it cannot be read.

    Raises CheckpointError for anything else (a link, a pipe, a device), without waiting for it,
    for more than READ_LIMIT bytes, and where the content is not what ``sha256`` is of.
    """
    with _open_regular(path) as file:
        content = file.read(READ_LIMIT + 1)
    if len(content) > READ_LIMIT:
        raise CheckpointError(f"{path} has more than {READ_LIMIT} bytes: no graph needs as many")
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise _damaged(path, "its sha256 is not the one that was written")
    return content


def _open_regular(path: Path) -> BufferedReader:
    # Not following a link and not waiting for a pipe's other end: opening alone must be harmless.
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    if not stat.S_ISREG(path.lstat().st_mode):
        raise _not_regular(path)
    file = open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _not_regular(path)
    return file


def _not_regular(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{printable(str(path))} is no regular file (a link, a pipe or a device): a saved graph "
        "holds files only; copy the folder with its links resolved, or save it again"
    )


def _listing(directory: Path, listed: dict[str, Any]) -> dict[str, int]:
    """Size of each file below ``directory`` but the manifest; CheckpointError for a stranger."""
    found: dict[str, int] = {}
    waiting = [directory]
    while waiting:
        for entry in os.scandir(waiting.pop()):
            name = Path(entry.path).relative_to(directory).as_posix()
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            elif name not in (MANIFEST, *listed):
                raise CheckpointError(
                    f"{printable(entry.path)} is not among the files that were saved "
                    f"({MANIFEST} lists them), and might change what the graph computes: move it "
                    "elsewhere"
                )
            elif not entry.is_file(follow_symlinks=False):
                raise _not_regular(Path(entry.path))
            elif name != MANIFEST:
                found[name] = entry.stat(follow_symlinks=False).st_size
    return found


def _check_digest(path: Path, expected: dict[str, Any]) -> None:
    try:
        with _open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _damaged(path, f"it is missing or unreadable ({error.strerror})") from error
    if digest != expected["sha256"]:
        raise _damaged(path, "its sha256 is not the one that was written")


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        body = parse_json(raw, strict=True, unique=True)
        check_texts(body)
    except (ValueError, CheckpointError) as error:
        raise _damaged(path, f"it is not JSON: {reason(error)}") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a manifest of fxquant.save: another program's file")
    return body


def _check_version(path: Path, body: dict[str, Any]) -> None:
    version = body.get("version")
    if type(version) is not int or version < 1:
        raise _damaged(path, f"its format version is {str(version)[:40]}")
    if version > VERSION:
        writer = body.get("written_by")
        raise CheckpointError(
            f"{path.parent} has format version {str(version)[:40]}, this fxquant reads up to "
            f"{VERSION}: upgrade fxquant (it was written by {str(writer)[:200]})"
        )


def _damaged(path: Path, what: str) -> CheckpointError:
    said = f"{printable(str(path))} is damaged or was changed: {what}; save or copy it again"
    return CheckpointError(said)


def _canonical(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, indent=1, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()
