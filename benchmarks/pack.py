"""What a GPU machine without a network needs, in parts that are easily carried.

    python -m benchmarks.pack FOLDER [--wheels WHEELHOUSE] [--model DIR] [--part 60]

Packs the committed source (``git archive``), a folder of wheels (``pip download`` fills one) and a
model's folder into FOLDER/fxquant.tar.part-00000 and so on, none larger than ``--part`` MiB, with
their checksums beside them. Links are packed as what they lead to. There:

    sha256sum -c SHA256SUMS && cat fxquant.tar.part-* | tar x && tar xf source.tar
    pip install --no-index --find-links wheels '.[cuda]' && python -m benchmarks.cuda --model model
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import IO, cast

ROOT = Path(__file__).parent.parent
MIB = 2**20
NAME, SUMS = "fxquant.tar.part-", "SHA256SUMS"


class Parts:
    """A file to write to, cut into parts of at most ``size`` bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size, self._left = folder, size, 0
        self.paths: list[Path] = []
        self._file: IO[bytes] | None = None

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            if not self._left or self._file is None:
                self.close()
                self.paths.append(self._folder / f"{NAME}{len(self.paths):05}")
                self._file, self._left = self.paths[-1].open("xb"), self._size
            piece, rest = rest[: self._left], rest[self._left :]
            self._file.write(piece)
            self._left -= len(piece)
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def pack(folder: Path, things: dict[str, Path], size: int) -> list[Path]:
    """Write the parts and SHA256SUMS to ``folder``, which is new; ``things`` by name inside."""
    folder.mkdir(parents=True)
    parts = Parts(folder, size)
    opened = cast("IO[bytes]", parts)
    # A folder of the hub's cache holds links to files elsewhere.
    with tarfile.open(fileobj=opened, mode="w|", dereference=True) as archive:
        for name, path in things.items():
            archive.add(path, name)
    parts.close()
    sums = ((hashlib.sha256(path.read_bytes()).hexdigest(), path.name) for path in parts.paths)
    (folder / SUMS).write_text("".join(f"{found}  {name}\n" for found, name in sums))
    return parts.paths


def why_not(folder: Path, things: dict[str, Path], part: int) -> str:
    """What is wrong with what is asked for; "" if it can be packed."""
    if part < 1:
        return f"--part {part}: a part takes 1 MiB or more"
    if folder.exists() or folder.is_symlink():
        return f"{folder} is there already: name a new folder"
    for name, path in things.items():
        if not path.is_dir():
            return f"--{name} {path} is no folder"
        if path.resolve() in folder.resolve().parents:
            return f"{folder} lies in --{name} {path} and would be packed into itself"
        inside = (
            Path(top) / leaf
            for top, folders, files in os.walk(path, followlinks=True)
            for leaf in (*folders, *files)
        )
        lost = next((each for each in inside if not each.exists()), None)
        if lost is not None:
            return f"--{name}: {lost} is a link that leads nowhere"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder for the parts")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels")
    parser.add_argument("--model", type=Path, help="the folder of a model")
    parser.add_argument("--part", type=int, default=60, help="largest part in MiB")
    options = parser.parse_args()
    given = {"wheels": options.wheels, "model": options.model}
    things = {name: path for name, path in given.items() if path is not None}
    if wrong := why_not(options.folder, things, options.part):
        parser.error(wrong)
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "source.tar"
        command = ["git", "-C", str(ROOT), "archive", "-o", str(source), "HEAD"]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            parser.error(f"the source is packed from a git checkout: {error}")
        parts = pack(options.folder, {"source.tar": source, **things}, options.part * MIB)
    print(f"{len(parts)} parts of at most {options.part} MiB in {options.folder}")
    print(f"left out: {', '.join(given.keys() - things.keys()) or 'nothing'}")


if __name__ == "__main__":
    main()
