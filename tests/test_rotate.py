"""rotate: the same logits in another basis, outliers spread, and reasons where it cannot be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from transformers import PreTrainedModel

import fxquant
from benchmarks.outliers import OutlierPlan, plant_outliers
from fxquant.errors import ModelError, VerificationError
from fxquant.evaluation import load_text
from fxquant.ir.graph import info, site_outputs, source_of
from fxquant.ir.leaves import OnlineRotation
from fxquant.ir.legal_forms import verify
from fxquant.numerics.hadamard import orthogonal_factors, paley, random_orthogonal, sylvester
from fxquant.passes import NameSites, Rotate
from fxquant.run.execution import Executor
from fxquant.run.loss import window_losses
from fxquant.structure.residual import residual_stream
from tests.architectures import ARCHITECTURES, gpt2, llama, opt, padding_mask, token_ids
from tests.models import small_opt


def logits(graph: GraphModule) -> Tensor:
    mask = padding_mask(3, 11, "left")
    with torch.no_grad():
        found = graph(input_ids=token_ids(3, 11), attention_mask=mask)
    assert isinstance(found, Tensor)
    return found[mask.bool()]


def online_rotations(graph: GraphModule) -> list[Node]:
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    return [n for n in calls if isinstance(graph.get_submodule(str(n.target)), OnlineRotation)]


def test_the_three_mistakes_that_others_make_on_opt() -> None:
    """A tied head, v_proj's bias, the rotation in front of fc2: each of them by itself."""
    model = opt()
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    graph = fxquant.convert(model, "fp+rotate")
    assert not torch.allclose(
        graph.get_submodule("lm_head").weight,  # type: ignore[arg-type]
        graph.get_submodule("model.decoder.embed_tokens").weight,  # type: ignore[arg-type]
        atol=1e-3,
    )
    layer = "model.decoder.layers.0"
    norm = model.get_submodule(f"{layer}.self_attn_layer_norm")
    for name in ("q_proj", "k_proj", "v_proj"):
        old = model.get_submodule(f"{layer}.self_attn.{name}")
        wanted = old.weight @ norm.bias + old.bias  # once for each consumer, not divided
        assert torch.allclose(
            graph.get_submodule(f"{layer}.self_attn.{name}").bias,  # type: ignore[arg-type]
            wanted,
            atol=1e-5,
        )
    sites = {site.path: node for site, node in site_outputs(graph)}
    for block in info(graph).blocks:
        before_fc2 = source_of(sites[f"{block}.fc2"])
        assert isinstance(graph.get_submodule(str(before_fc2.target)), OnlineRotation)
        assert source_of(sites[f"{block}.self_attn.out_proj"]).op != "call_module"


@pytest.mark.parametrize("biased", [True, False])
def test_a_bias_that_comes_from_a_norm_is_guarded(biased: bool) -> None:
    """OPT's head has none, and no linear of ``enable_bias=False``; a pass that drops one fails."""
    graph = fxquant.convert(opt(enable_bias=biased), "fp+rotate")
    sites = {site.path: site for site in info(graph).sites if site.role != "embeddings"}
    reads_no_norm = () if biased else ("out_proj", "fc2")
    assert {p for p, s in sites.items() if not s.bias} == {
        path for path in sites if path.endswith(reads_no_norm)
    }
    for path in ("lm_head", "model.decoder.layers.0.fc1"):
        changed = copy.deepcopy(graph)
        changed.get_submodule(path).register_parameter("bias", None)
        with pytest.raises(VerificationError, match=f"{path}: .*the site's bias is dropped"):
            verify(changed, "a pass")
    plain = fxquant.convert(ARCHITECTURES["opt-no-bias"](), "fp+rotate")
    assert not any(site.bias for site in info(plain).sites)


def test_norms_are_plain_and_the_stream_has_no_mean() -> None:
    graph = fxquant.convert(gpt2(), "fp+rotate")
    norms = [m for m in graph.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)]
    assert len(norms) == 5
    for norm in norms:
        assert isinstance(norm, nn.RMSNorm)
        assert norm.weight is None
    twice = residual_stream(graph)
    assert all(norm.gain is None for norm in twice.norms)
    assert len(twice.writers) == 2 + 2 * 2
    assert len(twice.norms) == 5


def test_an_outlier_channel_is_spread() -> None:
    """One channel of the stream 30 times the others: its share of the energy falls to about 1/d."""
    model = llama()
    for name, module in model.named_modules():
        if name.endswith("embed_tokens") or name.endswith(("o_proj", "down_proj")):
            weight = module.weight.data
            weight[:, 5] *= 30 if name.endswith("embed_tokens") else 1
            weight[5] *= 1 if name.endswith("embed_tokens") else 30
    plain, rotated = (fxquant.convert(model, scheme) for scheme in ("fp", "fp+rotate"))

    def share(graph: GraphModule) -> float:
        """Largest channel's share of the energy at the first norm's input."""
        stream: list[Tensor] = []
        first = next(n for n in graph.graph.nodes if str(n.target).endswith("embed_tokens"))

        def keep(node: Node, value: Any) -> Any:
            if node is first:
                stream.append(value)
            return value

        with torch.no_grad():
            Executor(graph).run(keep, input_ids=token_ids(2, 9))
        energy = stream[0].square().mean((0, 1))
        return float(energy.max() / energy.sum())

    assert share(plain) > 0.9
    assert share(rotated) < 3 / 32


@pytest.mark.parametrize("scheme", ["w4a8-dynamic-token", "w8a8-static", "w4-g16-asym"])
def test_its_codes_are_no_worse(scheme: str) -> None:
    """A wrong lowering would leave an error of the logits' own size; plain codes leave 1 to 18%."""
    data = [token_ids(4, 16)]
    for build, repairs in ((llama, "rotate"), (opt, "rotate+gptq")):
        expected = logits(fxquant.convert(build(), "fp"))
        plain = logits(fxquant.convert(build(), scheme, calibration=data))
        found = logits(fxquant.convert(build(), f"{scheme}+{repairs}", calibration=data))
        assert (found - expected).norm() < 1.2 * (plain - expected).norm()


def relative_error(model: PreTrainedModel, scheme: str) -> float:
    expected = logits(fxquant.convert(model, "fp"))
    data = [token_ids(4, 16, seed=seed) for seed in range(2)]
    found = logits(fxquant.convert(model, scheme, calibration=data))
    return float((found - expected).norm() / expected.norm())


def test_it_wins_where_the_stream_has_outlier_channels() -> None:
    """Three of 256 channels 20 times the others; folding the gains alone leaves all the error."""
    model = llama(hidden_size=256)
    for name, module in model.named_modules():
        if name.endswith("embed_tokens"):
            module.weight.data[:, [5, 17, 80]] *= 20
        elif name.endswith(("o_proj", "down_proj")):
            module.weight.data[[5, 17, 80]] *= 20
    rotated = relative_error(model, "w8/a4-dynamic-token+rotate(online=false)")
    assert rotated < 0.6 * relative_error(model, "w8/a4-dynamic-token")


def test_the_online_rotation_wins_where_the_mlp_has_an_outlier_channel() -> None:
    """64 times the others, taken back by down_proj's column: the stream's rotation is no help."""
    model = llama()
    for name, module in model.named_modules():
        if name.endswith("up_proj"):
            module.weight.data[3] *= 64
        elif name.endswith("down_proj"):
            module.weight.data[:, 3] /= 64
    offline, online = (
        relative_error(model, f"w8a8-static:absmax+rotate(online={o})") for o in ("false", "true")
    )
    assert online < 0.4 * offline
    assert offline > 0.8 * relative_error(model, "w8a8-static:absmax")


def test_it_repairs_a_trained_model_with_outliers() -> None:
    """The small OPT with outliers planted behind its norms, which go into the readers' weights:
    loss +0.2 with absmax ranges, +0.001 rotated."""
    model, tokenizer = small_opt()
    planted, _ = plant_outliers(model, OutlierPlan(kinds=("shift", "gain", "relu")))
    tokens = torch.tensor(tokenizer(load_text("builtin").evaluation)["input_ids"][: 12 * 128])
    calibration, windows = tokens.view(12, 128).split([4, 8])

    def loss(scheme: str) -> float:
        graph = fxquant.convert(planted, scheme, calibration=[calibration])
        losses = torch.cat(list(window_losses(lambda x: graph(input_ids=x), windows, 8)))
        return float(losses.double().mean())

    floating = loss("fp")
    worse = loss("w8a8-static:absmax") - floating
    assert worse > 0.1
    assert loss("w8a8-static:absmax+rotate") - floating < 0.1 * worse


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "build", [opt, llama, *(ARCHITECTURES[name] for name in ("gemma2-eager", "gemma3", "olmo2"))]
)
def test_half_precision(build: Callable[[], PreTrainedModel], dtype: torch.dtype) -> None:
    """Rotated weights and factors are rounded once more; the model's own rounding is as large."""
    expected = logits(fxquant.convert(build(), "fp"))
    model = build().to(dtype)
    plain, rotated = (logits(fxquant.convert(model, s)) for s in ("fp", "fp+rotate"))
    assert rotated.dtype == dtype
    assert (rotated.float() - expected).norm() < 2 * (plain.float() - expected).norm()
    coded = logits(fxquant.convert(model, "w8a8-dynamic-token+rotate")).float()
    assert (coded - expected).norm() < 0.1 * expected.norm()


def test_codes_come_after_rotation() -> None:
    with pytest.raises(ModelError, match="its codes are chosen already"):
        fxquant.convert(opt(), "w4+gptq+rotate", calibration=[token_ids(4, 16)])


def test_without_the_online_rotation() -> None:
    model = llama()
    graph = fxquant.convert(model, "fp+rotate(online=false)")
    assert not online_rotations(graph)
    expected = logits(fxquant.convert(model, "fp"))
    assert (logits(graph) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_users_model_stays() -> None:
    model = opt()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = NameSites()(fxquant.trace(model))
    rotated = Rotate()(graph)
    assert [record.name for record in info(rotated).history[1:]] == [
        "fold_norms",
        "rotate",
        "rotate_inputs",
    ]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


PRIMES = (4, 8, 12, 20, 24, 28, 36, 44, 60, 68, 72, 76, 84, 384)
POWERS = (52, 100, 252, 344)  # 2 (5^2 + 1), 2 (7^2 + 1), 2 (5^3 + 1), 7^3 + 1


@pytest.mark.parametrize("order", [*PRIMES, *POWERS])
def test_paley_matrices_are_hadamard(order: int) -> None:
    matrix = paley(order)
    assert matrix is not None
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_paley_says_where_it_has_none() -> None:
    assert [order for order in range(1, 41) if order % 4 == 0 and paley(order) is None] == [16, 40]


@pytest.mark.parametrize("width", [1, 2, 12, 32, 40, 56, 64, 96, 576, 768, 1536, 2048, 5, 92, 33])
def test_factors_are_orthogonal_and_hadamard_where_there_is_one(width: int) -> None:
    left, right, hadamard = orthogonal_factors(width, 0)
    whole = torch.kron(left, right)
    assert torch.allclose(whole @ whole.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert hadamard == (width not in (5, 92, 33))
    if hadamard:
        assert torch.allclose(whole.abs(), torch.full_like(whole, width**-0.5))


@pytest.mark.parametrize("width", [2048, 4096, 8192, 16384, 11008, 14336, 13824, 28672, 18944])
def test_no_factor_is_large(width: int) -> None:
    """Widths of OPT, Llama and Qwen2: two Hadamard factors of at most 512 (11008 = 344 * 32)."""
    left, right, hadamard = orthogonal_factors(width, 0)
    assert len(left) * len(right) == width
    assert max(len(left), len(right)) <= 512
    assert hadamard
    for factor in (left, right):
        identity = torch.eye(len(factor), dtype=torch.float64)
        assert torch.allclose(factor @ factor.T, identity, atol=1e-12)
        assert torch.allclose(factor.abs(), torch.full_like(factor, len(factor) ** -0.5))


def test_a_wide_layer_keeps_its_function(tmp_path: Path) -> None:
    """down_proj of 8192 inputs: 128 * 64, not 8192 * 8192; also saved and streamed."""
    model = llama(intermediate_size=8192)
    expected = logits(fxquant.convert(model, "fp"))
    graph = fxquant.convert(model, "fp+rotate")
    assert (logits(graph) - expected).abs().max() <= 1e-5 * expected.abs().max()
    tables = [b for m in graph.modules() if isinstance(m, OnlineRotation) for b in m.buffers()]
    assert sum(b.numel() for b in tables) == 128**2 + 64**2
    fxquant.save(graph, tmp_path / "saved")
    for stream in (False, True):
        loaded = fxquant.load(tmp_path / "saved", stream=stream)
        assert torch.equal(logits(loaded), logits(graph))


def test_online_rotation_is_the_kronecker_product() -> None:
    left, right = random_orthogonal(3, 0).float(), (sylvester(4) / 2).float()
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    expected = x @ torch.kron(left, right)
    assert torch.allclose(OnlineRotation(left, right)(x), expected, atol=1e-6)
