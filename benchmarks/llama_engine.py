"""llama.cpp by its Python binding: a file's logits, each of its products, and its tokenizer.

Products come from the callback that llama.cpp makes after each node of its graph: the weight's
name, the input that the engine read and the output that it made of it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

_FLOAT32: Final = 0  # of enum ggml_type
_OBJECT_SIZE: Final = 32  # what ggml counts for a tensor besides the tensor itself
_WEIGHT: Final = ".weight"


class _Tensor(ctypes.Structure):
    """struct ggml_tensor."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]


@dataclass(frozen=True)
class Product:
    """One product of a weight as the engine made it: ``x`` fp32 [T, K], ``output`` fp32 [T, N]."""

    weight: str
    x: Tensor
    output: Tensor


def engine_version() -> str:
    return f"llama-cpp-python {version('llama_cpp_python')}"


class Engine:
    """A GGUF file in llama.cpp, on the CPU, its cache in float32 and without flash attention: what
    is left that it rounds are the inputs of products."""

    def __init__(self, model: Any, length: int) -> None:
        self.length = length
        self._model = model
        self._products: list[Product] | None = None
        self._failed: BaseException | None = None
        self._names = _library("ggml-base")
        self._names.ggml_op_name.restype = ctypes.c_char_p
        self._names.ggml_tensor_overhead.restype = ctypes.c_size_t
        if self._names.ggml_tensor_overhead() != _OBJECT_SIZE + ctypes.sizeof(_Tensor):
            raise RuntimeError("struct ggml_tensor is another than this file says")
        self._context = self._open()

    @classmethod
    @contextlib.contextmanager
    def of(cls, path: Path, length: int = 0) -> Iterator[Engine]:
        """``length``: the most tokens of a call; 0 for the vocabulary alone."""
        import llama_cpp

        silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        options.vocab_only = not length
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        engine = cls(model, length)
        try:
            yield engine
        finally:
            if engine._context is not None:
                llama_cpp.llama_free(engine._context)
            llama_cpp.llama_model_free(model)
            llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))

    def _open(self) -> Any:
        import llama_cpp

        if not self.length:
            return None
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = self.length
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.type_k = options.type_v = _FLOAT32
        self._called = llama_cpp.ggml_backend_sched_eval_callback(self._node)  # held: C keeps none
        options.cb_eval = self._called
        context = llama_cpp.llama_init_from_model(self._model, options)
        if not context:
            raise RuntimeError("llama.cpp makes no context of the file")
        return context

    def logits(self, ids: Tensor) -> Tensor:
        """fp32 [T, V] of token ids int64 [T]."""
        import llama_cpp

        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for place, number in enumerate(ids.tolist()):
                batch.token[place], batch.pos[place], batch.logits[place] = number, place, True
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            status = llama_cpp.llama_decode(self._context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if self._failed is not None:
            raise self._failed
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        found = llama_cpp.llama_get_logits(self._context)
        return _copied(ctypes.addressof(found.contents), (len(ids), size))

    def products(self, ids: Tensor) -> list[Product]:
        """Those of weights, in the engine's order, for token ids int64 [T]."""
        self._products = []
        try:
            self.logits(ids)
            return self._products
        finally:
            self._products = None

    def _node(self, address: int, asked: bool, _: Any) -> bool:
        """Called before a node, whether it is wanted, and behind it."""
        if self._products is None:
            return not asked
        try:
            node = _Tensor.from_address(address)
            if self._names.ggml_op_name(node.op) != b"MUL_MAT":
                return not asked
            weight, x = (_Tensor.from_address(node.src[number]) for number in (0, 1))
            name = weight.name.decode()
            if name.endswith(_WEIGHT) and not asked:
                self._products.append(Product(name, _values(x), _values(node)))
            return True if not asked else name.endswith(_WEIGHT)
        except BaseException as error:  # none may pass through C
            self._failed = error
            return False

    def token_ids(self, text: str) -> list[int]:
        """With the tokens that the file puts before and behind a text; special tokens that the text
        spells out are read as such."""
        import llama_cpp

        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) + 8))()
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        count = llama_cpp.llama_tokenize(vocabulary, data, len(data), room, len(room), True, True)
        if count < 0:
            raise RuntimeError(f"llama_tokenize returned {count} for {text!r}")
        return list(room[:count])


def dequantized(kind: str, blocks: Tensor, columns: int) -> Tensor:
    """fp32 [N, K] that llama.cpp's own reader makes of blocks uint8 [N, bytes]."""
    read = _library("ggml-base")[f"dequantize_row_{kind.lower()}"]
    blocks = blocks.contiguous()
    found = torch.empty(len(blocks), columns)
    address, count = ctypes.c_void_p(blocks.data_ptr()), ctypes.c_int64(found.numel())
    read(address, ctypes.c_void_p(found.data_ptr()), count)
    return found


def _library(name: str) -> Any:
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    return ctypes.CDLL(str(folder / f"lib{name}.so"))


def _values(tensor: _Tensor) -> Tensor:
    """fp32 [T, K] of a matrix of floats."""
    if tensor.type != _FLOAT32 or tensor.ne[2] * tensor.ne[3] != 1:
        raise RuntimeError(f"{tensor.name.decode()} is no matrix in float32")
    width, rows = tensor.ne[0], tensor.ne[1]
    step = tensor.nb[1] // 4
    return _copied(tensor.data, (rows, step))[:, :width].clone()


def _copied(address: int, shape: tuple[int, int]) -> Tensor:
    count = shape[0] * shape[1]
    buffer = (ctypes.c_float * count).from_address(address)
    return torch.frombuffer(buffer, dtype=torch.float32, count=count).reshape(shape).clone()
