"""The recorder: what it writes down, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant.errors import FxquantError, ModelError, TracingError
from fxquant.frontends.recorder.record import record
from fxquant.ir.graph import info
from tests.architectures import build, gpt2, llama, opt, padding_mask, token_ids
from tests.environments import TRANSFORMERS_5, needs_hf_tracer
from tests.more_architectures import MORE


class Small(nn.Module):
    """Embeds, runs ``body`` on [batch, length, 8], and multiplies."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 5)
        self.register_buffer("seen", torch.zeros(8))
        self.body = body

    def forward(self, ids: Tensor) -> Tensor:
        result = self.head(self.body(self, self.embed(ids)))
        assert isinstance(result, Tensor)
        return result


def graph_of(model: nn.Module) -> GraphModule:
    recorded = record(model, lambda shadow, ids, mask: shadow(ids))
    return GraphModule({**dict(model.named_modules()), "": model}[""], recorded.graph)


def in_place(_: Any, x: Tensor) -> Tensor:
    x += 1
    x *= x.mean(-1, keepdim=True)
    return x


def through_a_view(_: Any, x: Tensor) -> Tensor:
    flat = x.view(-1, 8)
    flat.add_(2)
    return x * 3


def an_alias_stays_behind(_: Any, x: Tensor) -> Tensor:
    half = x[..., :4]
    x.mul_(2)
    return torch.cat((half, half), -1)


def written_at_an_index(_: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    y.masked_fill_(y > 1, 0.5)
    return y


def of_sizes(_: Any, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    steps = torch.arange(length // 2 + 3) * (length - 1)
    return x.reshape(batch * length, width).view(batch, -1, width) + steps.sum() / 7


def reflected(_: Any, x: Tensor) -> Tensor:
    return 1 - x / 2 + 2 ** x.clamp(max=1) - (~(x > 0)) * 3


@torch.no_grad()
@pytest.mark.parametrize(
    "body",
    [in_place, through_a_view, an_alias_stays_behind, written_at_an_index, of_sizes, reflected],
)
def test_what_is_recorded_computes_the_same(body: Callable[[Any, Tensor], Tensor]) -> None:
    model = Small(body)
    graph = graph_of(model)
    graph.graph.eliminate_dead_code()
    for shape in ((1, 1), (3, 11), (2, 70)):
        ids = torch.randint(32, shape, generator=torch.Generator().manual_seed(1))
        assert torch.equal(graph(ids, None), model(ids))


def by_values(_: Any, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def by_length(_: Any, x: Tensor) -> Tensor:
    return x if x.shape[1] > 64 else -x


def in_a_loop(_: Any, x: Tensor) -> Tensor:
    return torch.stack([x[:, i] for i in range(x.shape[1])], 1)


def in_chunks(_: Any, x: Tensor) -> Tensor:
    total = torch.zeros_like(x[:, :1])
    for start in range((x.shape[1] + 63) // 64):
        total = total + x[:, start * 64 : start * 64 + 1]
    return x + total


def into_a_buffer(self: Any, x: Tensor) -> Tensor:
    seen: Tensor = self.seen
    seen.add_(x.sum((0, 1)))
    return x + seen


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (by_values, "decides by values"),
        (in_a_loop, "takes the length of its input as a number of Python"),
        (in_chunks, r"length \+ 63"),
        (into_a_buffer, "writes into its own seen"),
    ],
)
def test_what_has_no_graph_is_refused_with_the_reason(
    body: Callable[[Any, Tensor], Tensor], reason: str
) -> None:
    model = Small(body)
    with pytest.raises(TracingError, match=reason):
        graph_of(model)
    assert not bool(model.get_buffer("seen").any())


def test_a_graph_that_holds_up_to_a_length_says_so() -> None:
    model = Small(by_length)
    assert record(model, lambda shadow, ids, mask: shadow(ids)).longest == 64


@torch.no_grad()
@pytest.mark.parametrize("model_of", [opt, gpt2, llama])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_recorded_graph_follows_a_change_of_dtype(
    model_of: Callable[[], Any], dtype: torch.dtype
) -> None:
    model = model_of()
    graph = fxquant.trace(model, frontend="recorder").to(dtype)
    ids, mask = token_ids(3, 17), padding_mask(3, 17, "left")
    wanted = model.to(dtype)(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(graph(ids, mask)[mask.bool()], wanted[mask.bool()])


def test_the_graph_says_who_traced_it() -> None:
    facts = info(fxquant.trace(opt(), frontend="recorder"))
    assert facts.frontend == f"recorder, transformers {hf.__version__}"
    automatic = info(fxquant.trace(opt())).frontend
    assert automatic.startswith("recorder" if TRANSFORMERS_5 else "HFTracer")


@needs_hf_tracer
def test_the_printout_says_why_a_front_end_gave_up() -> None:
    graph = fxquant.convert(MORE["nemotron"](), "w8")
    text = " ".join(str(fxquant.inspect(graph)).split())
    assert "traced by recorder, transformers 4" in text
    assert "(HFTracer: NemotronForCausalLM cannot be traced: module model.layers.0" in text
    assert "traced by" not in str(fxquant.inspect(fxquant.convert(opt(), "w8")))


def test_front_ends_that_are_not_there() -> None:
    with pytest.raises(ModelError, match="'fx': known are 'auto', 'hf', 'recorder'"):
        fxquant.trace(opt(), frontend="fx")
    if TRANSFORMERS_5:
        with pytest.raises(ModelError, match="has no tracer of its own"):
            fxquant.trace(opt(), frontend="hf")


def mamba() -> Any:
    config = hf.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)
    return build(hf.MambaForCausalLM, config, attention="eager")


def rwkv() -> Any:
    config = hf.RwkvConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32
    )
    return build(hf.RwkvForCausalLM, config, attention="eager")


@pytest.mark.parametrize(
    ("model_of", "reason"),
    [
        (mamba, r"backbone\.layers\.0\.mixer: it takes the length of its input as a number"),
        (rwkv, r"writes into its own rwkv\.blocks\.0\.attention\.output\.weight"),
    ],
)
def test_recurrent_models_are_refused_with_the_reason(
    model_of: Callable[[], Any], reason: str
) -> None:
    with pytest.raises(FxquantError, match=reason):
        fxquant.trace(model_of())
