"""vLLM's process, of a stand-in: what it is asked, what it says, and what is said of its end."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import torch

from fxquant.errors import ExportError
from fxquant.exports.runtimes import RUNTIMES
from fxquant.exports.vllm_engine import Vllm, dtype_of

STAND_IN = """
    import json, os, types
    from pathlib import Path

    print("words on stdout, which are no answer")

    class LLM:
        def __init__(self, model, dtype, **options):
            said = json.loads(Path(model, "config.json").read_text())
            if "raises" in said:
                raise NotImplementedError(said["raises"])
            if "dies" in said:
                print("a last word", flush=True)
                os._exit(3)
            assert dtype == said["dtype"] and options["enforce_eager"]
            self.steps = said["steps"]
            held = types.SimpleNamespace(max_model_len=8)
            self.llm_engine = types.SimpleNamespace(model_config=held)

        def generate(self, prompts, asked, use_tqdm):
            print("and more")
            assert asked["prompt_logprobs"] == 0 and asked["max_tokens"] == 1
            return [self.row(each["prompt_token_ids"]) for each in prompts]

        def row(self, ids):
            found = [None]
            for given, token in zip(self.steps, ids[1:]):
                found.append({token: types.SimpleNamespace(logprob=given[token])})
            return types.SimpleNamespace(prompt_logprobs=found)

    def SamplingParams(**options):
        return options
"""
GROUP = {"format": "int-quantized", "input_activations": {}, "targets": ["Linear"]}


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packages" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(STAND_IN))
    (package / "distributed.py").write_text("def cleanup_dist_env_and_memory(): pass\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


def export(folder: Path, said: object, *groups: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"config_groups": {f"group_{n}": group for n, group in enumerate(groups)}}
    text = json.dumps({"quantization_config": config if groups else {}, **dict(said)})  # type: ignore[call-overload]
    (folder / "config.json").write_text(text)
    return folder


def test_losses_are_those_of_the_tokens(tmp_path: Path) -> None:
    logprobs = torch.log_softmax(torch.randn(6, 11, dtype=torch.float64), -1)
    said = {"steps": logprobs.tolist(), "dtype": "float32"}
    losses = RUNTIMES["vllm"].open(export(tmp_path / "one", said, GROUP))
    ids = torch.randint(11, (3, 7))
    expected = -torch.stack([logprobs[torch.arange(6), row[1:]] for row in ids])
    assert torch.equal(losses(ids), expected.float())
    with pytest.raises(ExportError, match=r"windows of 8 are too long.*--length 7 or less"):
        losses(torch.randint(11, (3, 8)))


def test_it_says_what_it_refuses_and_goes_on(tmp_path: Path) -> None:
    engine = Vllm()
    said = {"steps": [[0.0, -1.5]], "dtype": "float32"}
    for _ in range(2):
        with pytest.raises(
            ExportError, match=r"vllm does not load .*one: NotImplementedError: no kernel\\nfor it"
        ):
            engine.open(export(tmp_path / "one", {"raises": "no kernel\nfor it"}, GROUP))
        engine.open(export(tmp_path / "two", said, GROUP))
        assert engine.losses(torch.tensor([[0, 1]])).tolist() == [[1.5]]
    with pytest.raises(ExportError, match="does not run this: IndexError"):
        engine.losses(torch.tensor([[0, 5]]))


def test_its_end_is_said_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"its process ended \(3\): a last word"):
        RUNTIMES["vllm"].open(export(tmp_path / "one", {"dies": 1}, GROUP))


def test_packed_integers_alone_are_run_in_float16(tmp_path: Path) -> None:
    packed = {**GROUP, "format": "pack-quantized", "input_activations": None}
    coded = {**GROUP, "format": "pack-quantized"}
    for groups, expected in (
        ((), "float16"),  # gptq and awq
        ((GROUP, packed), "float16"),
        ((GROUP, coded), "float32"),
        (({"format": "naive-quantized", "input_activations": None},), "float32"),
    ):
        assert dtype_of(export(tmp_path / "one", {}, *groups)) == expected


@pytest.mark.parametrize(
    ("apart", "named"),
    [
        (["m.0.o_proj", "m.0.k_proj"], "m.0.q_proj and m.0.k_proj"),
        (["m.0.v_proj"], "m.0.q_proj and m.0.v_proj"),
        (["m.0.up_proj"], "m.0.gate_proj and m.0.up_proj"),
        (["m.0.o_proj", "m.1.down_proj"], None),
    ],
)
def test_linears_that_are_joined_have_one_spec(
    tmp_path: Path, apart: list[str], named: str | None
) -> None:
    first = {**GROUP, "targets": ["m.0.q_proj", "m.1.k_proj", "m.0.gate_proj"]}
    said = {"steps": [], "dtype": "float32"}
    folder = export(tmp_path / "one", said, first, {**GROUP, "targets": apart})
    if named is None:
        Vllm().open(folder)
        return
    with pytest.raises(ExportError, match=f"joins {named} into one linear.*give them one spec"):
        Vllm().open(folder)
