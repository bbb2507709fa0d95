"""Altered checkpoints: refused, or the graph as saved, or a graph that only computes."""

from __future__ import annotations

import math
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import fxquant
from fxquant.errors import CheckpointError, FxquantError, NonFiniteError
from fxquant.evaluation import evaluate
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.spelling import spell_site
from tests.architectures import llama, opt
from tests.attack.conftest import SeedOf
from tests.attack.printed_mutations import mutate
from tests.attack.watch import foreign_reads, watched
from tests.fixtures.make_saved import inputs
from tests.hub_format import character_tokenizer

SAVED = Path(__file__).parents[1] / "fixtures" / "saved-0.1.0" / "checkpoints.tar.xz"
BASES = (
    *("llama-two-layers", "opt-head", "llama-gptq-float", "llama-attn8", "llama-rotate", "gpt2"),
    *("llama-outliers", "llama-awq", "opt-insert", "llama-kv4", "today", "llama-kv8", "opt-tensor"),
    *("llama-attn8-qdq", "llama-fp32-gemm-half", "llama-refine", "opt-equalize", "drawn"),
    *("floats", "floats-qdq"),
)
# Every grid and every format of scales, as weights and as inputs.
FLOATS = {
    "scheme": "we2m1-g8-e4m3/ae2m1-dynamic-g16-e4m3",
    "overrides": {
        "*.q_proj": "wnf4-g8", "*.k_proj": "we2m3-g8-e8m0/ae3m2-dynamic-g8-e8m0-even",
        "*.v_proj": "fp8-static", "*.o_proj": "wnf4/a8-dynamic-g16",
        "*.up_proj": "we5m2-tensor/ae4m3-dynamic", "*.gate_proj": "w4-g8-asym/ae4m3-dynamic-token",
        "head": "we3m2-g16-e8m0-rceil/a8-static-asym:absmax", "embeddings": "we4m3-g8-e4m3",
    },
}  # fmt: skip
SHORT, LONG = 100, 2000
TEXT = " ".join(f"Sentence {index} is about the number {index * index}." for index in range(40))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bases")
    with tarfile.open(SAVED) as archive:
        archive.extractall(target, filter="data")
    fxquant.load(target / BASES[0])  # imports what is imported late
    tokenizer = character_tokenizer()
    ids = [inputs()["input_ids"] for _ in range(2)]
    today = "w4-g8/a8-static:absmax+rotate+split_outliers(threshold=2)+attn8+kv4"
    graph = fxquant.convert(llama(num_hidden_layers=1), today, calibration=ids)
    fxquant.save(graph, target / "today", tokenizer)
    text = fxquant.windows(TEXT, tokenizer, count=2, length=16, calibration=2)
    scheme = {"scheme": "w8a8-static+smooth", "overrides": {"head": "w8", "*.fc2": "w4-g8"}}
    graph = fxquant.convert(opt(num_hidden_layers=1), scheme, calibration=text.batches)
    fxquant.save(graph, target / "drawn", tokenizer)
    for name, level in (("floats", "integer"), ("floats-qdq", "qdq")):
        model = llama(num_hidden_layers=1)
        fxquant.save(fxquant.convert(model, FLOATS, level=level, calibration=ids), target / name)
    return target


Claims = tuple[dict[str, str], tuple[Any, ...], dict[tuple[str, str], tuple[Any, ...]]]


def claims(gm: GraphModule) -> Claims:
    """What printouts say is computed: each site's spec, the repairs, each input's scale."""
    facts = gm.meta["fxquant"]
    scheme = Scheme.parse(facts.scheme)
    specs = {each.path: spell_site(scheme.spec_for(each.path, each.role)) for each in facts.sites}
    records = {
        (each.path, each.operand): (each.spec, each.scale, each.zero_point, each.estimator)
        for each in facts.site_records
    }
    return specs, (scheme.fp32_gemm, *scheme.repairs), records


def disagreement(found: Claims, true: Claims) -> str:
    """How a printout differs from what the saved graph computes; a scheme may tell fewer repairs,
    which its history lists."""
    for mine, theirs in ((found[0], true[0]), (found[2], true[2])):
        if mine != theirs:
            return f"{set(mine.items()) ^ set(theirs.items())}"
    rest = iter(true[1])
    return "" if all(each in rest for each in found[1]) else f"repairs {found[1]}"


def outcome(folder: Path, expected: torch.Tensor, true: Claims) -> str:
    """What became of the checkpoint; AssertionError if it did what it may not."""
    gm, refusal = None, str(folder)
    with watched(folder) as seen:
        try:
            gm = fxquant.load(folder)
        except CheckpointError as error:
            refusal = str(error)
        result = "refused" if gm is None else run(gm, expected)
    assert str(folder) in refusal, f"the error does not name the folder: {refusal}"
    assert not seen, f"forbidden: {seen[:4]}"
    assert len(refusal) < 1200, f"a long error: {refusal}"
    assert all(line.isprintable() for line in refusal.splitlines()), f"an odd error: {refusal!a}"
    if gm is not None:
        assert not disagreement(claims(gm), true), f"printed: {disagreement(claims(gm), true)}"
    return result


@torch.no_grad()
def run(gm: GraphModule, expected: torch.Tensor) -> str:
    assert not foreign_reads(gm), f"the code reads {foreign_reads(gm)[:4]}"
    state = {key: value.clone() for key, value in gm.state_dict().items()}
    try:
        found = gm(**inputs())
    except FxquantError:
        return "one clear error when run"
    after = gm.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in state.items()), "state changed"
    if torch.equal(found, expected):
        return "as saved"
    if bool(found.isfinite().all()):
        return "finite"
    try:  # a range of a whole batch may hold each row alone
        loss = evaluate(gm, inputs()["input_ids"]).loss
    except NonFiniteError:
        return "one clear error when run"
    assert math.isfinite(loss)
    return "finite row by row"


def check(seeds: range, bases: Path, tmp_path: Path) -> Counter[str]:
    results: Counter[str] = Counter()
    wrong: list[str] = []
    expected = {}
    for base in BASES:
        with torch.no_grad():
            gm = fxquant.load(bases / base)
            expected[base] = (gm(**inputs()), claims(gm))
    for seed in seeds:
        base = BASES[seed % len(BASES)]
        folder = tmp_path / "case" / base
        shutil.copytree(bases / base, folder)
        changes = mutate(seed, folder)
        try:
            results[outcome(folder, *expected[base])] += 1
        except Exception as error:
            wrong.append(f"seed {seed} ({base}, {changes}): {type(error).__name__}: {error}")
        shutil.rmtree(tmp_path / "case")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(seeds)} wrong; {dict(results)}", *wrong])
    return results


def test_altered_checkpoints_are_refused_or_compute(
    bases: Path, tmp_path: Path, seed_of: SeedOf
) -> None:
    start = seed_of(0)
    results = check(range(start, start + SHORT), bases, tmp_path)
    assert results["refused"] > SHORT // 2


@pytest.mark.slow
def test_many_altered_checkpoints_are_refused_or_compute(
    bases: Path, tmp_path: Path, seed_of: SeedOf
) -> None:
    start = seed_of(SHORT)
    results = check(range(start, start + LONG), bases, tmp_path)
    print(f"seeds {start}..{start + LONG - 1}: {dict(results)}")
    assert results["refused"] > LONG // 2
