"""Plants activation outliers in a causal LM and leaves its float function as it was.

Small models lack the few huge, fixed channels that make large ones hard to quantize (LLM.int8,
Dettmers et al., arXiv:2208.07339; SmoothQuant, Xiao et al., arXiv:2211.10438). The identities by
which SmoothQuant and Outlier Suppression+ (Wei et al., arXiv:2304.09145) take outliers out of a
model put them in when run backwards:

    shift   norm's bias[j] plus c,                 consumers' biases minus column j times c
    gain    norm's weight[j] and bias[j] times k,  consumers' column j divided by k
    relu    fc1's row j and bias[j] times k,       fc2's column j divided by k

k is a power of two: `gain` and `relu` change no bit of the logits. `shift` changes their rounding.
A channel with a shift and a gain carries k (x + c). Gains stress rounding; shifts stress clipping,
which breaks the cancellation of c.
"""

import copy
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

Kind = Literal["shift", "gain", "relu"]  # in the order in which they are planted
ModelT = TypeVar("ModelT", bound=nn.Module)

# In bfloat16 a shift would be coarser than the activations it moves (steps of 0.25 at 60).
_DTYPES: Final = (torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class OutlierPlan:
    """Which outliers to plant. One plan and one model always give the same outliers.

    Attributes:
        seed: of layers, channels and values.
        kinds: the transformations; one that a model cannot take (a shift where there are no biases)
            is left out, unless nothing would remain.
        channel_share: share of a tensor's channels, rounded, at least one unless 0. The channels
            and the signs of their shifts are the same at every norm, as in real models.
        layer_share: share of the decoder blocks, rounded, at least one unless 0.
        gain_range: smallest and largest k of `gain` and `relu`, powers of two from 2 up.
        shift_range: smallest and largest |c|; a norm's other outputs are about 1.

    Raises:
        ValueError: a value is outside what is said here.
    """

    seed: int = 0
    kinds: tuple[Kind, ...] = ("shift", "gain")
    channel_share: float = 0.003
    layer_share: float = 1.0
    gain_range: tuple[int, int] = (2, 8)
    shift_range: tuple[float, float] = (20.0, 60.0)

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - set(get_args(Kind))
        if unknown:
            raise ValueError(f"kinds: unknown {sorted(unknown)}; known: {list(get_args(Kind))}")
        for name in ("channel_share", "layer_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        low, high = self.gain_range
        if not 2 <= low <= high or any(k & (k - 1) for k in self.gain_range):
            raise ValueError(f"gain_range must be two powers of two from 2, not {self.gain_range}")
        if not 0 < self.shift_range[0] <= self.shift_range[1] < math.inf:
            raise ValueError(f"shift_range must be positive and rising, not {self.shift_range}")


@dataclass(frozen=True)
class PlantedOutlier:
    """One planted outlier: output channel `channel` of the module at `path`.

    `value` is the factor k for `gain` and `relu`, the offset c for `shift`.
    """

    path: str
    channel: int
    kind: Kind
    value: float


def plant_outliers(model: ModelT, plan: OutlierPlan) -> tuple[ModelT, tuple[PlantedOutlier, ...]]:
    """A copy of `model` with outliers in its activations, and the list of them.

    The copy computes the same float function: bit by bit under `gain` and `relu`, to the rounding
    of the model's dtype under `shift`. In float16 a shifted channel moves in steps of 1/32 from
    |c| = 32 up, so plant shifts in float32 where that matters.

    Args:
        model: a causal LM with OPT's pre-LayerNorm blocks or Llama's, in float16, float32 or
            float64; left untouched.
        plan: what to plant.

    Returns:
        The changed deep copy, and what was planted, in the order of the model's modules.

    Raises:
        ValueError: the blocks are of no known form, the plan would plant nothing, or a value would
            leave the range in which the model's dtype is exact.
    """
    changed = copy.deepcopy(model)
    blocks = _find_blocks(changed)
    draw = random.Random(plan.seed)
    layers = draw.sample(range(len(blocks)), _count(plan.layer_share, len(blocks)))
    norm_channels = _draw_channels(plan, blocks[0][0], draw)
    planted: list[PlantedOutlier] = []
    with torch.no_grad():
        for link in (link for layer in sorted(layers) for link in blocks[layer]):
            is_norm = link.feeding_norm is None
            channels = norm_channels if is_norm else _draw_channels(plan, link, draw)
            here = tuple(_plant(link, channels, plan, draw))
            if here:
                _check_outputs_fit(link)
            planted += here
    if not planted:
        possible = sorted({kind for block in blocks for link in block for kind in link.kinds})
        raise ValueError(
            f"this plan would plant nothing: {type(model).__name__} can take {possible}, and the "
            f"plan is {plan}"
        )
    return changed, tuple(planted)


# Finding the places -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _BlockForm:
    """A kind of pre-norm decoder block: the exact paths of its modules, producers and consumers.

    Exact, because one more norm or branch means that a norm has other consumers than those listed.
    """

    modules: frozenset[str]
    links: Mapping[str, tuple[str, ...]]


_QKV: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OPT: Final = _BlockForm(
    modules=frozenset(
        ("self_attn_layer_norm", "self_attn", *_QKV, "self_attn.out_proj", "final_layer_norm")
    )
    | {"fc1", "activation_fn", "fc2"},
    links={"self_attn_layer_norm": _QKV, "final_layer_norm": ("fc1",), "fc1": ("fc2",)},
)
_LLAMA: Final = _BlockForm(
    modules=frozenset(
        ("input_layernorm", "self_attn", *_QKV, "self_attn.o_proj", "post_attention_layernorm")
    )
    | {"mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.act_fn", "mlp.down_proj"},
    links={
        "input_layernorm": _QKV,
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    },
)
# These come after the projections, whose outputs stay as they are.
_OPTIONAL: Final = frozenset(("self_attn.q_norm", "self_attn.k_norm", "self_attn.rotary_emb"))


@dataclass(frozen=True)
class _Link:
    """A producer whose output channel j reaches nothing but column j of its consumers."""

    path: str
    producer: nn.Module
    consumers: tuple[nn.Linear, ...]
    kinds: frozenset[Kind]
    feeding_norm: nn.Module | None  # of fc1; None where the producer is itself a norm


def _find_blocks(model: nn.Module) -> list[tuple[_Link, ...]]:
    """The links of each decoder block, in the model's order."""
    blocks = [(path, m) for path, m in model.named_modules() if hasattr(m, "self_attn")]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no module with a child `self_attn`; outliers can be "
            "planted in OPT's pre-LayerNorm blocks and in Llama's"
        )
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    links = [tuple(_find_links(path, block)) for path, block in blocks]
    for link in (link for block in links for link in block):
        for module in (link.producer, *link.consumers):
            for name, parameter in module.named_parameters():
                if parameter.dtype not in _DTYPES:
                    raise ValueError(f"{link.path}: {name} is {parameter.dtype}, not in {_DTYPES}")
                if owners[id(parameter)] > 1:
                    raise ValueError(
                        f"{link.path}: it or a consumer shares its {name} with another module, "
                        "which would change with it"
                    )
    return links


def _find_links(path: str, block: nn.Module) -> Iterator[_Link]:
    modules = {name: module for name, module in block.named_modules() if name}
    form = next((f for f in (_OPT, _LLAMA) if modules.keys() - _OPTIONAL == f.modules), None)
    if form is None:
        raise ValueError(
            f"{path}: this {type(block).__name__} is neither OPT's block nor Llama's; its modules "
            f"are {sorted(modules)}"
        )
    if form is _OPT and getattr(block, "do_layer_norm_before", None) is not True:
        raise ValueError(
            f"{path}: a post-LayerNorm block (do_layer_norm_before is not True); its norms feed "
            "the residual stream as well, so that an outlier there would change the function"
        )
    for name, consumer_names in form.links.items():
        consumers = tuple(m for c in consumer_names if isinstance(m := modules[c], nn.Linear))
        if len(consumers) != len(consumer_names):
            raise ValueError(f"{path}: not every one of {consumer_names} is an nn.Linear")
        feeder = next((modules[n] for n, c in form.links.items() if name in c), None)
        kinds = _possible_kinds(modules[name], consumers, block, is_norm=feeder is None)
        yield _Link(f"{path}.{name}", modules[name], consumers, kinds, feeder)


def _possible_kinds(
    producer: nn.Module, consumers: tuple[nn.Linear, ...], block: nn.Module, *, is_norm: bool
) -> frozenset[Kind]:
    if not is_norm:
        relu = isinstance(producer, nn.Linear) and isinstance(block.activation_fn, nn.ReLU)
        return frozenset[Kind](["relu"] if relu else [])
    kinds: set[Kind] = set()
    if _scales_with_its_parameters(producer, consumers[0].in_features):
        kinds.add("gain")
    biased = all(consumer.bias is not None for consumer in consumers)
    if isinstance(producer, nn.LayerNorm) and producer.bias is not None and biased:
        kinds.add("shift")
    return frozenset(kinds)


def _scales_with_its_parameters(norm: nn.Module, width: int) -> bool:
    """Whether twice the parameters give twice the output: not so in Gemma, x * (1 + weight)."""
    parameters = dict(norm.named_parameters())
    if not parameters:
        return False
    with torch.no_grad():
        some = next(iter(parameters.values()))
        x = torch.linspace(-1, 2, width, dtype=some.dtype, device=some.device)
        doubled = {name: 2 * parameter for name, parameter in parameters.items()}
        return torch.equal(functional_call(norm, doubled, (x,)), 2 * norm(x))


# Changing the weights -----------------------------------------------------------------------------


def _count(share: float, total: int) -> int:
    return max(1, round(share * total)) if share else 0


def _draw_channels(plan: OutlierPlan, link: _Link, draw: random.Random) -> dict[int, int]:
    """Input channels of the link's consumers, and the sign of a shift at each."""
    width = link.consumers[0].in_features
    channels = sorted(draw.sample(range(width), _count(plan.channel_share, width)))
    return {channel: draw.choice((-1, 1)) for channel in channels}


def _plant(
    link: _Link, channels: Mapping[int, int], plan: OutlierPlan, draw: random.Random
) -> Iterator[PlantedOutlier]:
    for channel, sign in channels.items():
        exponent = draw.randint(*(k.bit_length() - 1 for k in plan.gain_range))
        offset = sign * draw.uniform(*plan.shift_range)
        for kind in get_args(Kind):
            if kind not in plan.kinds or kind not in link.kinds:
                continue
            if kind == "shift":
                value = _shift(link, channel, offset)
            else:
                value = float(2**exponent)
                _scale(link, channel, value)
            yield PlantedOutlier(link.path, channel, kind, value)


def _scale(link: _Link, channel: int, factor: float) -> None:
    for parameter in link.producer.parameters():
        _multiply_exactly(parameter[channel], factor, f"{link.path}, channel {channel}")
    for consumer in link.consumers:
        column = consumer.weight[:, channel]
        _multiply_exactly(column, 1 / factor, f"consumers of {link.path}, column {channel}")


def _multiply_exactly(values: Tensor, factor: float, where: str) -> None:
    product = values * factor
    if not torch.equal(product / factor, values):
        raise ValueError(
            f"{where}: times {factor} does not fit {values.dtype} without loss; choose a smaller "
            "gain_range, or plant in float32"
        )
    values.copy_(product)


def _shift(link: _Link, channel: int, offset: float) -> float:
    """Shift one channel by about `offset`; the offset as it came out after rounding the bias."""
    bias = link.producer.bias
    assert isinstance(bias, Tensor)
    shifted = bias[channel] + offset
    moved = shifted.double() - bias[channel].double()
    bias[channel] = shifted
    for consumer in link.consumers:
        consumer.bias.copy_(consumer.bias.double() - consumer.weight[:, channel].double() * moved)
    return moved.item()


def _check_outputs_fit(link: _Link) -> None:
    """Refuse a producer whose output could overflow its dtype, whatever the input.

    The vector that a norm scales has a length of at most sqrt(width); Cauchy-Schwarz does the rest.
    """
    norm = link.feeding_norm or link.producer
    parameters = {name: parameter.double() for name, parameter in norm.named_parameters()}
    zero = link.consumers[0].weight.new_zeros((), dtype=torch.float64)
    gain = parameters.get("weight", zero + 1)
    offset = parameters.get("bias", zero)
    width = link.consumers[0].in_features
    if isinstance(link.producer, nn.Linear):
        width = link.producer.in_features
        weight = link.producer.weight.double()
        offset = weight @ offset.expand(width)
        if link.producer.bias is not None:
            offset = offset + link.producer.bias.double()
        gain = torch.linalg.vector_norm(weight * gain, dim=1)
    largest = (gain.abs() * math.sqrt(width) + offset.abs()).max().item()
    dtype = next(link.producer.parameters()).dtype
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"{link.path}: outputs may reach {largest:.3g}, more than {dtype} holds; choose a "
            "smaller gain_range, or plant in float32"
        )
