"""A program: run a .pt2 file in a process that knows torch and nothing else.

    python -I fresh.py pt2|aoti FILE THREADS GIVEN FOUND [FOLDER ...]

GIVEN holds a list of inputs by name, FOUND takes the list of logits; torch may lie in a FOLDER that
Python does not look into by itself. It is run by its path, and may import nothing of fxquant, nor
transformers: that the file needs neither is what it shows.
"""

import io
import sys
from pathlib import Path
from typing import Any


def main(kind: str, file: str, threads: str, given: str, found: str, *folders: str) -> None:
    sys.path += folders
    import torch

    torch.set_num_threads(int(threads))
    load: Any = torch._inductor.aoti_load_package if kind == "aoti" else torch.export.load
    program = load(file) if kind == "aoti" else load(file).module()
    with torch.no_grad():
        logits = [program(**inputs) for inputs in torch.load(given, weights_only=True)]
    foreign = sorted({"fxquant", "transformers"} & sys.modules.keys())
    if foreign:
        sys.exit(f"{file} has loaded {' and '.join(foreign)}")
    written = io.BytesIO()
    torch.save(logits, written)
    Path(found).write_bytes(written.getvalue())  # torch's own writer aborts on a full disk


if __name__ == "__main__":
    main(*sys.argv[1:])
