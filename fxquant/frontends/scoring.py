"""The class of every graph: a GraphModule that says what it is where it is taken for the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Proxy
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers import GenerationMixin, PreTrainedModel

from fxquant.errors import CheckpointError, GraphAttributeError, GraphCallError, GraphError
from fxquant.files.tensor_file import FLOATS
from fxquant.ir.graph import device_of, info
from fxquant.ir.streamed import check_present
from fxquant.run.batches import check_mask
from fxquant.run.encodings import TAKEN as _INPUTS
from fxquant.run.encodings import UNUSED
from fxquant.run.uncomputable import uncomputable

# What instances of transformers' models have besides their class's attributes.
_OF_A_MODEL = ("config", "generation_config", "name_or_path", "logits", "loss", "past_key_values")
_LET_GO = UNUSED - {"labels"}  # which ask for a loss
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

    ``graph(**tokenizer(text, return_tensors="pt"))`` works; what tokenizers return besides, such as
    ``token_type_ids``, is let go: causal models do not read it. ``input_ids`` are integers of any
    dtype; ``attention_mask`` has their shape and holds 0 and 1 of any dtype, which is looked at on
    the CPU alone, since a CUDA device would be waited for.

    Raises GraphAttributeError (an AttributeError, so ``hasattr`` is False) and GraphCallError (a
    TypeError) for any other input, also for ids that no table has, inputs on another device, dtypes
    that torch has no kernel for, values that an operator does not take, and tensors of the graph
    that were moved or cast by themselves; GraphError for those on meta. Copies and checkpoints keep
    the class. A pickle cannot hold a graph (torch.fx would trace its code anew, without sites,
    levels and history): pickling one, by ``torch.save`` too, raises
    CheckpointError, which names ``fxquant.save``.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        raise CheckpointError(
            "a graph cannot be pickled (pickle, torch.save, another process's arguments): "
            "fxquant.save(graph, folder) writes it, fxquant.load(folder) reads it; "
            "torch.save(graph.state_dict(), file) keeps its tensors alone"
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As of any module; GraphError for codes of another dtype, which torch would cast."""
        own = self.state_dict()
        for name, value in state_dict.items():
            given, held = getattr(value, "dtype", None), getattr(own.get(name), "dtype", None)
            if None not in (given, held) and given != held and not {given, held} <= FLOATS:
                raise GraphError(
                    f"{name} is of {given} there and of {held} in this graph: the state of a "
                    "graph under another scheme, or of the float model; fxquant.load reads a graph"
                )
        return super().load_state_dict(state_dict, strict, assign)

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
        return self.called(super().__call__, *args, **kwargs)

    def called(self, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """What ``run``, which computes the graph in its own way, makes of a call of the graph: the
        same inputs are taken and refused, and what it raises is said alike."""
        for name in _LET_GO & kwargs.keys():
            del kwargs[name]
        for name in kwargs:
            if name not in _INPUTS:
                raise GraphCallError(f"no input {name!r}: {_what_to_do(name)}")
        given = [*_INPUTS[: len(args)], *kwargs]
        if "input_ids" not in given or len(args) > len(_INPUTS) or len(set(given)) < len(given):
            raise GraphCallError(f"input_ids is needed, and each input once: {_WHAT_IT_IS}")
        inputs = dict(zip(_INPUTS, args, strict=False)) | kwargs
        if not (torch.compiler.is_compiling() or isinstance(inputs["input_ids"], Proxy)):
            inputs = self._checked(**inputs)
            args = tuple(inputs[name] for name in _INPUTS[: len(args)])
            kwargs = {name: inputs[name] for name in kwargs}
        try:
            return run(*args, **kwargs)
        except IndexError as error:
            raise self._beyond_its_tables(error, inputs["input_ids"]) from error
        except NotImplementedError as error:  # of a kernel: the message names it and the dtype
            raise GraphCallError(f"torch cannot compute the graph here: {error}") from error
        except RuntimeError as error:
            if (said := self._elsewhere(error, inputs)) is not None:
                raise GraphCallError(said) from error
            if (said := uncomputable(self, error)) is None:
                raise
            raise GraphCallError(f"a node of the graph cannot be computed: {said}") from error

    def _checked(self, input_ids: Any, attention_mask: Any = None) -> dict[str, Any]:
        """The inputs, with ids of int64; GraphCallError for what are none.

        GraphError for tensors of the graph on meta, with which torch computes linears of what
        memory holds; a graph as a whole may be there, with its input.
        """
        ids = _tokens(input_ids)
        if attention_mask is not None:
            _check_mask(attention_mask, ids)
        if not ids.is_meta:
            check_present(self)
        return {"input_ids": ids, "attention_mask": attention_mask}

    def _elsewhere(self, error: RuntimeError, inputs: dict[str, Any]) -> str | None:
        """What ``error`` comes of, if it comes of an input that is not where the graph is."""
        device = device_of(self)  # without an index where the user gave none
        for name, value in inputs.items():
            if value is None or not _OF_DEVICES.search(str(error)):
                continue
            if value.device.type != device.type or device.index not in (None, value.device.index):
                return f"{name} is on {value.device}, the graph on {device}: {name}.to('{device}')"
        return None

    def _beyond_its_tables(self, error: IndexError, ids: Tensor) -> GraphCallError:
        """What a table's raw error means."""
        facts = info(self)
        low, high = (int(end) for end in torch.aminmax(ids))
        return GraphCallError(
            f"a row is read that its table does not have ({error}): ids {low} to {high} in rows of "
            f"{ids.shape[-1]} tokens, the graph takes 0 to {facts.vocab_size - 1} and "
            f"{facts.max_positions or 'any number of'} tokens a row"
        )


_OF_DEVICES = re.compile(r"\bdevices?\b", re.IGNORECASE)


def _tokens(ids: Any) -> Tensor:
    """int64 [batch, length], or GraphCallError."""
    _check_dense("input_ids", ids)
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise GraphCallError(f"input_ids must be integers, got {ids.dtype}: {_WHAT_IT_IS}")
    if ids.dim() != 2 or not ids.numel():
        one = "; ids[None] is a batch of one row" if ids.dim() == 1 else ""
        raise GraphCallError(
            f"input_ids must be [batch, length] and hold a token, got {list(ids.shape)}{one}"
        )
    return ids.to(torch.int64)  # type: ignore[no-any-return]


def _check_mask(mask: Any, ids: Tensor) -> None:
    _check_dense("attention_mask", mask)
    traced = torch._C._get_tracing_state() is not None or get_proxy_mode() is not None
    known = type(mask) is Tensor and mask.device.type == "cpu" and not traced
    if known and not torch._C._functorch.is_functorch_wrapped_tensor(mask):
        check_mask(mask, ids, "this call", GraphCallError)
    elif mask.shape != ids.shape:
        raise GraphCallError(
            f"attention_mask {list(mask.shape)} does not fit input_ids {list(ids.shape)}"
        )


def _check_dense(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise GraphCallError(
            f"a {type(value).__name__} as {name}: {_WHAT_IT_IS}; it takes what "
            'tokenizer(text, return_tensors="pt") returns: graph(**that)'
        )
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        raise GraphCallError(f"{name} must be a dense tensor: {_WHAT_IT_IS}")


def _of_a_model(name: str) -> bool:
    if name.startswith("_"):
        return False
    return name in _OF_A_MODEL or hasattr(PreTrainedModel, name) or hasattr(GenerationMixin, name)


def _what_to_do(name: str) -> str:
    return "; ".join(filter(None, (_WHAT_IT_IS, _INSTEAD.get(name))))
