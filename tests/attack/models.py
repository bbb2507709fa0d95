"""Small models changed at random, as users change theirs: what each change must lead to."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import PreTrainedModel

from tests.architectures import build, gpt2, llama, opt
from tests.reference import linears_of


class Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight.t())
        return y if self.bias is None else y + self.bias


class Named(nn.Linear):
    """Only another name."""


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Negative(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -weight


@dataclass
class Mutant:
    """A model, what was done to it, which linears must stay float, and how it may be refused."""

    model: PreTrainedModel
    rng: random.Random
    done: list[str] = field(default_factory=list)
    floats: set[str] = field(default_factory=set)
    refusals: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def linear(self, kinds: tuple[type, ...] = (nn.Linear,)) -> tuple[str, Any] | None:
        """One that nothing was done to yet."""
        free = [
            (path, module)
            for path, module in linears_of(self.model).items()
            if type(module) in kinds and not any(path.startswith(used) for used in self.used)
        ]
        if not free:
            return None
        path, module = self.rng.choice(free)
        self.used.add(path)
        return path, module


def _as_class(kind: type[nn.Linear]) -> Callable[[Mutant], bool]:
    def change(mutant: Mutant) -> bool:
        found = mutant.linear()
        if found is None:
            return False
        found[1].__class__ = kind
        if kind is Tripled:
            mutant.floats.add(found[0])
        return True

    return change


def _on_linear(apply: Callable[[nn.Linear], object], refusal: str = "") -> Callable[[Mutant], bool]:
    def change(mutant: Mutant) -> bool:
        found = mutant.linear()
        if found is None:
            return False
        apply(found[1])
        if refusal:
            mutant.refusals.append(rf"{found[0]}\S*.*{refusal}")
        return True

    return change


def _factors(mutant: Mutant) -> bool:
    found = mutant.linear()
    if found is None:
        return False
    path, linear = found
    rank = mutant.rng.choice([1, 3, 8])
    pair = nn.Sequential(
        nn.Linear(linear.in_features, rank, bias=False),
        nn.Linear(rank, linear.out_features, bias=linear.bias is not None),
    )
    mutant.model.set_submodule(path, pair.to(linear.weight.dtype))
    return True


def _wrapped(mutant: Mutant) -> bool:
    found = mutant.linear((nn.Linear, hf.pytorch_utils.Conv1D))
    if found is not None:
        mutant.model.set_submodule(found[0], Wrapped(found[1]))
    return found is not None


def _shared(mutant: Mutant) -> bool:
    """The last block uses a linear of the first."""
    found = mutant.linear((nn.Linear, hf.pytorch_utils.Conv1D))
    if found is None or ".0." not in found[0]:
        return False
    other = found[0].replace(".0.", ".1.", 1)
    if any(other.startswith(used) for used in mutant.used):
        return False
    mutant.model.set_submodule(other, found[1])
    mutant.used.add(other)
    mutant.floats |= {found[0], other}
    return True


def _missing_bias(linear: Any) -> None:
    linear.bias = None


def _added_bias(linear: Any) -> None:
    linear.bias = nn.Parameter(torch.randn(linear.out_features).to(linear.weight.dtype))


def _pruned(linear: nn.Linear) -> None:
    with torch.no_grad():
        prune.l1_unstructured(linear, "weight", 0.5)
        linear.get_parameter("weight_orig").mul_(1.5)  # what was computed is stale


def _resized(mutant: Mutant) -> bool:
    rows = mutant.rng.choice([129, 131, 160])
    mutant.model.resize_token_embeddings(rows, mean_resizing=False)
    return True


def _tied(mutant: Mutant) -> bool:
    head, embedding = mutant.model.get_output_embeddings(), mutant.model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(torch.randn_like(head.weight) / 6)
    else:
        head.weight = embedding.weight
    return True


def _dtype(dtype: torch.dtype) -> Callable[[Mutant], bool]:
    def change(mutant: Mutant) -> bool:
        mutant.model.to(dtype)
        return True

    return change


def _odd_dtype(linear: nn.Linear) -> None:
    linear.to(torch.float64 if linear.weight.dtype == torch.float32 else torch.float32)


def _odd(mutant: Mutant) -> bool:
    changed = _on_linear(_odd_dtype)(mutant)
    if changed:
        mutant.refusals.append("itself fails on token ids")
    return changed


def _frozen(mutant: Mutant) -> bool:
    for parameter in mutant.model.parameters():
        parameter.requires_grad_(mutant.rng.random() < 0.5)
    return True


def _patched(linear: Any) -> None:
    original = linear.forward
    linear.forward = lambda x: original(x) + 1


def _spoiled(linear: nn.Linear) -> None:
    linear.weight.data[0, 0] = float("nan")


def _training(mutant: Mutant) -> bool:
    mutant.model.train()
    return True


# Changes of the whole model come first: what follows is of its dtype.
WHOLE: dict[str, Callable[[Mutant], bool]] = {
    "bfloat16": _dtype(torch.bfloat16),
    "float64": _dtype(torch.float64),
    "resized": _resized,
    "tied or untied": _tied,
    "frozen": _frozen,
    "training": _training,
}
PARTS: dict[str, Callable[[Mutant], bool]] = {
    "transposed": _as_class(Transposed),
    "named": _as_class(Named),
    "tripled": _as_class(Tripled),
    "factors": _factors,
    "wrapped": _wrapped,
    "shared": _shared,
    "missing bias": _on_linear(_missing_bias),
    "added bias": _on_linear(_added_bias),
    "pruned": _on_linear(_pruned),
    "parametrized": _on_linear(
        lambda linear: parametrize.register_parametrization(linear, "weight", Negative())
    ),
    "weight norm": _on_linear(parametrizations.weight_norm),
    "odd dtype": _odd,
    "hook": _on_linear(
        lambda linear: linear.register_forward_hook(lambda *args: 2 * args[2]), "forward hook"
    ),
    "pre-hook": _on_linear(
        lambda linear: linear.register_forward_pre_hook(lambda *args: (2 * args[1][0],)),
        "forward pre-hook",
    ),
    "patched": _on_linear(_patched, "forward was replaced"),
    "spoiled": _on_linear(_spoiled, "NaN or infinity"),
}
REFUSED = ("odd dtype", "hook", "pre-hook", "patched", "spoiled")


def mutant(seed: int) -> Mutant:
    """One model with one to four changes; every fifth has one that must be refused."""
    rng = random.Random(seed)
    kind = rng.choice(["opt", "llama", "gpt2", "falcon", "neox"])
    width = rng.choice([64, 50, 37])
    made = Mutant(_built(kind, width, seed), rng, [f"{kind} {width}"])
    for name in rng.sample(sorted(WHOLE), rng.randint(0, 2)):
        if not (name == "float64" and "bfloat16" in made.done) and WHOLE[name](made):
            made.done.append(name)
    wanted = sorted(set(PARTS) - set(REFUSED))
    parts = rng.sample(wanted, rng.randint(1, 3))
    if seed % 5 == 0:
        parts.append(rng.choice(REFUSED))
    for name in parts:
        if PARTS[name](made):
            made.done.append(name)
    return made


def _built(kind: str, width: int, seed: int) -> PreTrainedModel:
    if kind == "opt":
        return opt(seed, ffn_dim=width)
    if kind == "llama":
        return llama(seed, intermediate_size=width)
    if kind == "gpt2":
        return gpt2(seed, n_inner=width)
    common = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
    if kind == "falcon":
        config: Any = hf.FalconConfig(**common, num_attention_heads=4, ffn_hidden_size=width)
        return build(hf.FalconForCausalLM, config, seed=seed)
    config = hf.GPTNeoXConfig(**common, num_attention_heads=4, intermediate_size=width)
    return build(hf.GPTNeoXForCausalLM, config, seed=seed)
