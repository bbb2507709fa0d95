"""Who may import whom, what the wheel holds, how many names are public."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fxquant

ROOT = Path(__file__).parent.parent
# Each row may import the rows above it and its own members.
ORDER: tuple[tuple[str, ...], ...] = (
    ("errors", "signals"),
    ("doors", "locks", "line_file", "whole_file"),
    ("formats",),
    ("quantization",),
    (
        "records",
        "calibration",
        "token_runs",
        "dataclass_json",
        "tensor_file",
        "manifest",
        "saved_names",
    ),
    ("pickled",),
    ("weight_files",),
    ("target",),
    (
        "specs",
        "spelling",
        "schemes",
        "gemm",
        "operators",
        "observers",
        "quantizer",
        "ranges",
        "loss",
        "distributed",
    ),
    (
        "graph",
        "snapshot",
        "streamed",
        "execution",
        "levels",
        "context",
        "options",
        "outcome",
        "pipeline",
        "encodings",
        "batches",
        "recording",
        "attention",
        "patching",
        "hub",
        "scoring",
        "size",
        "repair",
        "certificate",
        "blocks",
        "operands",
        "vocabulary",
    ),
    ("sequential", "weights", "scale_paths", "hadamard", "residual"),
    ("channels",),
    ("absorption",),
    ("rescaling",),
    ("shapes", "formulas", "printer", "suggest", "history", "folding", "summary", "summary_text"),
    ("site_view", "dot", "inspection"),
    ("model_config", "weight_names"),
    ("pretrained",),
    ("tracing", "streaming"),
    ("passes",),
    (
        "repairs",
        "conversion",
        "module_json",
        "graph_json",
        "rehearsal",
        "stored_values",
        "saved_info",
        "saved_graph",
        "checkpoint",
    ),
    ("analysis",),
    ("evaluation",),
    ("analysis_commands", "convert_command", "inspect_command", "terminal"),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def modules() -> list[tuple[str, Path]]:
    found = [(path.stem, path) for path in (ROOT / "fxquant").glob("*.py")]
    for package in ("passes", "evaluation"):
        found += [(package, path) for path in (ROOT / package).rglob("*.py")]
    found += [("formats", path) for path in (ROOT / "fxquant" / "formats").glob("*.py")]
    found += [("analysis", path) for path in (ROOT / "fxquant" / "analysis").glob("*.py")]
    found = [("cli" if path.stem == "__main__" else name, path) for name, path in found]
    return [
        (name, path) for name, path in found if name != "__init__" or path.parent.name != "fxquant"
    ]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fxquant"):
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fxquant.")}
    return names


@pytest.mark.parametrize(
    ("name", "path"), modules(), ids=lambda v: v.name if isinstance(v, Path) else v
)
def test_imports_point_downwards(name: str, path: Path) -> None:
    assert name in RANK, f"{name} has no place in the order"
    wrong = {other for other in imported(path) if RANK[other] > RANK[name]}
    assert not wrong, f"{path.name} imports {wrong}"


def test_numerics_need_only_torch() -> None:
    code = (ROOT / "fxquant" / "quantization.py").read_text()
    heads = {
        line.split()[1].split(".")[0] for line in code.splitlines() if re.match("import|from", line)
    }
    assert heads == {"__future__", "typing", "torch", "fxquant"}


def test_public_names_are_few() -> None:
    code = ast.parse((ROOT / "fxquant" / "__init__.py").read_text())
    names = [a.asname for n in ast.walk(code) if isinstance(n, ast.ImportFrom) for a in n.names]
    assert None not in names
    assert len(names) <= 20
    assert all(hasattr(fxquant, name) for name in names if name)


def test_wheel_holds_each_file_once(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"  # setuptools leaves build folders behind
    copy.mkdir()
    for folder in ("fxquant", "passes", "evaluation"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, copy],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    tracked = [f"fxquant/{p.name}" for p in (ROOT / "fxquant").glob("*.py")] + ["fxquant/py.typed"]
    for package in ("passes", "evaluation"):
        tracked += [f"fxquant/{p.relative_to(ROOT)}" for p in (ROOT / package).rglob("*.py")]
    page = ROOT / "evaluation" / "report" / "page"
    tracked += [f"fxquant/{p.relative_to(ROOT)}" for p in page.rglob("*") if p.is_file()]
    formats = (ROOT / "fxquant" / "formats").glob("*.py")
    tracked += [f"fxquant/formats/{p.name}" for p in formats]
    analysis = (ROOT / "fxquant" / "analysis").glob("*.py")
    tracked += [f"fxquant/analysis/{p.name}" for p in analysis]
    assert sorted(packed) == sorted(tracked)
