"""aoti: a library that AOTInductor compiles, which torch loads without fxquant, Python or not."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from pathlib import Path
from typing import Any, Final

import torch
from torch._inductor import cpp_builder, cpu_vec_isa, exc
from torch.fx import GraphModule
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.errors import ExportError
from fxquant.exports.folder import Exported, output_folder, write_config, write_export
from fxquant.exports.pt2_file import MODEL, all_of, holds
from fxquant.exports.pt2_program import elsewhere, exported, on_cpu
from fxquant.exports.source import Source, converted, generation_of
from fxquant.exports.target import Target
from fxquant.files.doors import Location, printable
from fxquant.files.native_writers import held_errors
from fxquant.frontends.patching import exclusive, exporting
from fxquant.ir.graph import Level
from fxquant.pipeline.arguments import checked_call
from fxquant.run.batches import Batches
from fxquant.schemes.scheme import SchemeLike

NAME: Final = "aoti"
_CACHE: Final = "TORCHINDUCTOR_CACHE_DIR"
_NO_ROOM: Final = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOTDIR,
)  # fmt: skip
_CAUSE: Final = "compiled kernels sum floats in another order"


def _check_compiler() -> None:
    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, exc.CppCompileError, OSError) as error:
        raise ExportError(
            f"{NAME} needs a C++ compiler, and torch finds none (it asks the variable CXX, then "
            "for g++): install one, or take --to pt2, which needs none"
        ) from error


TARGET: Final = Target(
    NAME,
    Level.INTEGER,
    needs_codes=False,
    check_site=holds,
    check_graph=all_of,
    never={},
    streams=False,
    ready=_check_compiler,
)


@checked_call(path="directory", output="directory")
def aoti(
    source: Source,
    directory: Location,
    *,
    scheme: SchemeLike | None = None,
    calibration: Batches | None = None,
    tokenizer: Tokenizer | None = None,
    generation_config: GenerationConfig | None = None,
    check: bool = True,
) -> Exported:
    """Write model.pt2, compiled for this machine's processor: input_ids and attention_mask int64
    [batch, length], of any size, to logits [batch, length, vocab]; config and tokenizer beside it.

        program = torch._inductor.aoti_load_package("model.pt2")
        logits = program(input_ids=ids, attention_mask=mask)

    Args:
        source: a graph of level qdq or integer, or a float model (or its graph) with a ``scheme``
            ("fp" too), and ``calibration`` where that needs it.
        directory: a folder that is not there, is empty or holds an earlier export.
        check: run it in a fresh process, which knows torch alone, and compare logits, before it is
            put in place.

    Compiled kernels sum floats in another order than the graph; where inputs have codes, some take
    their neighbour by that, and the result says how far noise of that size moves the graph's own
    logits.

    Raises ExportError: no C++ compiler (before any work), or one that fails; a streamed graph; a
    folder that cannot be written; a check that fails. Nothing is written.
    """
    target = output_folder(directory)
    gm = converted(source, TARGET, scheme, calibration)
    return write_export(
        gm,
        target,
        NAME,
        write=lambda folder: _write(gm, folder),
        check=lambda folder: elsewhere(NAME, folder / MODEL, gm, check, "AOTInductor of ", _CAUSE),
        extras=(tokenizer, generation_of(source, generation_config)),
    )


@exclusive  # it replaces functions of torch and the process's stderr for all threads
def _write(gm: GraphModule, folder: Path) -> None:
    program = exported(on_cpu(gm))
    inductor: Any = torch._inductor
    try:  # its progress goes to stderr
        with (
            exporting(),
            torch.no_grad(),
            contextlib.redirect_stderr(io.StringIO()),
            held_errors(folder / MODEL) as file,
        ):
            inductor.aoti_compile_and_package(program, package_path=file)
    except (exc.CppCompileError, exc.InductorError, OSError) as error:
        unwritten = _unwritten(error)
        if unwritten is not None:
            _forget_instructions()
            raise ExportError(
                f"{NAME}: the compiler cannot write its own files: {unwritten}; they lie in "
                f"{os.environ.get(_CACHE, 'the folder that torch chooses')} and in TMPDIR: make "
                f"room there, or name other folders in {_CACHE} and TMPDIR"
            ) from error
        if isinstance(error, OSError):
            raise
        last = (str(error).strip().splitlines() or ["no word"])[-1].strip()
        raise ExportError(
            f"{NAME}: the graph does not compile: {printable(last[:300])}; mend the C++ compiler, "
            "or take --to pt2"
        ) from error
    write_config(gm, folder)


def _unwritten(error: Exception) -> str | None:
    """What is said where one of the compiler's own files cannot be written; None for any other
    error, and for one of a file without a name, which is the export's."""
    inner = getattr(error, "inner_exception", error)
    if isinstance(inner, OSError):
        own = inner is not error or inner.filename
        return printable(str(inner)) if own and inner.errno in _NO_ROOM else None
    words = [os.strerror(number) for number in _NO_ROOM]
    lines = [line.strip() for line in str(error).splitlines()]
    said = (line for line in reversed(lines) if any(word in line for word in words))
    return next((printable(line[:300]) for line in said), None)


def _forget_instructions() -> None:
    """Torch asks the compiler, once a process, which of the processor's instructions it knows: one
    that had no room knew none, and graphs compiled later would be told so."""
    kinds = [cpu_vec_isa.VecISA]
    for kind in kinds:
        kinds += kind.__subclasses__()
        for found in vars(kind).values():
            if hasattr(found, "cache_clear"):
                found.cache_clear()
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
