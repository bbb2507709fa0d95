"""The class of every graph: a GraphModule that says what it is where it is taken for the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import GenerationMixin, PreTrainedModel

from fxquant.errors import CheckpointError, GraphAttributeError, GraphCallError
from fxquant.ir.graph import info
from fxquant.ir.streamed import check_present
from fxquant.run.encodings import TAKEN as _INPUTS
from fxquant.run.uncomputable import uncomputable

# What instances of transformers' models have besides their class's attributes.
_OF_A_MODEL = ("config", "generation_config", "name_or_path", "logits", "loss", "past_key_values")
_WHAT_IT_IS = (
    "this is a graph: graph(input_ids=ids, attention_mask=mask) returns the logits, a tensor "
    "[batch, length, vocab], and has no cache, so it scores text and does not generate (README, "
    "'What it does not do')"
)
_INSTEAD = {
    "generate": "generate with the float model",
    "config": "fxquant.inspect(graph) says what the graph is; the config is the model's",
    "logits": "the graph's result is the logits",
    "device": "ask a parameter or buffer of it",
    "dtype": "ask a parameter or buffer of it",
    "labels": "the loss is torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), "
    "ids[:, 1:].flatten())",
    "past_key_values": "pass all tokens at each call",
    "use_cache": "leave it out: there is no cache",
    "return_dict": "leave it out: the result is the tensor of logits",
    "position_ids": "leave it out: positions follow from attention_mask",
}


class ScoringGraph(GraphModule):
    """A GraphModule that names what it lacks of a Hugging Face model, and computes like any other.

    ``graph(**tokenizer(text, return_tensors="pt"))`` works; ``token_type_ids``, which some
    tokenizers return, is let go: causal models do not read it.

    Raises GraphAttributeError (an AttributeError, so ``hasattr`` is False) and GraphCallError (a
    TypeError), also for ids that no table has, dtypes that torch has no kernel for, values that an
    operator does not take, and tensors of the graph that were moved or cast by themselves;
    GraphError for those on meta. Copies and checkpoints keep the class. A pickle cannot hold a
    graph (torch.fx would trace its code anew, without sites, levels and history): pickling one, by
    ``torch.save`` too, raises
    CheckpointError, which names ``fxquant.save``.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        raise CheckpointError(
            "a graph cannot be pickled (pickle, torch.save, another process's arguments): "
            "fxquant.save(graph, folder) writes it, fxquant.load(folder) reads it; "
            "torch.save(graph.state_dict(), file) keeps its tensors alone"
        )

    def __copy__(self) -> ScoringGraph:
        other = ScoringGraph(self, self.graph, self.__class__.__name__)
        other.meta = self.meta
        return other.train(self.training)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:  # first, for the forward's sake
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not _of_a_model(name):
                raise
        raise GraphAttributeError(f"no attribute {name!r}: {_what_to_do(name)}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("token_type_ids", None)
        for name in kwargs:
            if name not in _INPUTS:
                raise GraphCallError(f"no input {name!r}: {_what_to_do(name)}")
        given = [*_INPUTS[: len(args)], *kwargs]
        if "input_ids" not in given or len(args) > len(_INPUTS) or len(set(given)) < len(given):
            raise GraphCallError(f"input_ids is needed, and each input once: {_WHAT_IT_IS}")
        for name, value in (*zip(_INPUTS, args, strict=False), *kwargs.items()):
            if isinstance(value, Mapping | list | tuple | str):
                raise GraphCallError(
                    f"a {type(value).__name__} as {name}: {_WHAT_IT_IS}; it takes what "
                    'tokenizer(text, return_tensors="pt") returns: graph(**that)'
                )
        if not torch.compiler.is_compiling():
            self._check_values(args[0] if args else kwargs["input_ids"])
        try:
            return super().__call__(*args, **kwargs)
        except IndexError as error:
            raise self._beyond_its_tables(error, *args, **kwargs) from error
        except NotImplementedError as error:  # of a kernel: the message names it and the dtype
            raise GraphCallError(f"torch cannot compute the graph here: {error}") from error
        except RuntimeError as error:
            if (said := uncomputable(self, error)) is None:
                raise
            raise GraphCallError(f"a node of the graph cannot be computed: {said}") from error

    def _check_values(self, input_ids: Any) -> None:
        """GraphError for tensors on meta, with which torch computes linears of what memory holds;
        a graph as a whole may be there, with its input."""
        if not (isinstance(input_ids, Tensor) and input_ids.is_meta):
            check_present(self)

    def _beyond_its_tables(
        self, error: IndexError, input_ids: Tensor, *_: Any, **__: Any
    ) -> GraphCallError:
        """What a table's raw error means."""
        ids, facts = input_ids, info(self)
        low, high = (int(end) for end in torch.aminmax(ids)) if ids.numel() else (0, 0)
        return GraphCallError(
            f"a row is read that its table does not have ({error}): ids {low} to {high} in rows of "
            f"{ids.shape[-1]} tokens, the graph takes 0 to {facts.vocab_size - 1} and "
            f"{facts.max_positions or 'any number of'} tokens a row"
        )


def _of_a_model(name: str) -> bool:
    if name.startswith("_"):
        return False
    return name in _OF_A_MODEL or hasattr(PreTrainedModel, name) or hasattr(GenerationMixin, name)


def _what_to_do(name: str) -> str:
    return "; ".join(filter(None, (_WHAT_IT_IS, _INSTEAD.get(name))))
