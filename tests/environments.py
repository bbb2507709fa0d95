"""The two environments that the tests run in, and what differs between them.

`.venv` has transformers 4.57, `.venv-5` transformers 5 (`make test-5`). All tests run in the first;
in the second all but the files of NO_MODEL, which no transformers can change. What only one of
the two can do is marked with a name of this file.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import pytest
import torch
import transformers

TRANSFORMERS_5: Final = int(transformers.__version__.partition(".")[0]) >= 5

T = TypeVar("T")


def by_version(four: T, five: T) -> T:
    """What is expected under transformers 4.57 and under 5, where they differ."""
    return five if TRANSFORMERS_5 else four


def patched_by_hf_tracer() -> dict[str, Any]:
    """What the Hugging Face fx tracer replaces while it traces, by name; nothing under 5."""
    if TRANSFORMERS_5:
        return {}
    from transformers.utils import fx

    names = fx.HFTracer._TORCH_METHODS_TO_PATCH
    return {
        **{f"torch.{name}": getattr(torch, name) for name in names},
        "tracer": fx._CURRENT_TRACER,
    }


# Numerics, kernels, spelling, pages, figures and the tests' own bounds: nothing here reads, traces,
# converts or runs a model.
NO_MODEL: Final = (
    "test_bounds.py",
    "test_clipping.py",
    "test_float_formats.py",
    "test_gemm.py",
    "test_gptq.py",
    "test_grammar.py",
    "test_layout.py",
    "test_observers.py",
    "test_operators.py",
    "test_ranges.py",
    "test_repairs_page.py",
    "test_report_browser.py",
    "test_schemes.py",
    "test_statistics.py",
    "test_study.py",
    "test_sweep_tables.py",
    "test_torchao.py",
    "test_triton_kernels.py",
)

# Started first, the longest at the front: a core that came to one of them last would hold up a run.
LONGEST: Final = (
    "test_threads.py",
    "test_scale_repairs.py",
    "test_checkpoint.py",
    "test_triton_kernels.py",
    "test_tracing.py",
    "test_float_graphs.py",
    "test_sweep.py",
    "test_conversion.py",
    "test_streaming.py",
    "test_quantized_attention.py",
    "test_export_refusals.py",
    "test_export_onnx.py",
    "test_provenance.py",
    "test_explain_default.py",
    "test_cuda_fake.py",
    "test_provenance_chains.py",
    "test_exports.py",
    "test_handed_over.py",
    "test_layerwise.py",
    "test_rotate.py",
    "test_export_pt2.py",
    "test_runtimes.py",
    "test_rotate_architectures.py",
    "test_presets.py",
    "test_export_floats.py",
    "test_evaluation.py",
    "test_triton_graphs.py",
    "test_distributed.py",
)

# Pages that print graphs with the nodes of the Hugging Face tracer; run in both, compared in one.
PRINT_HF_GRAPHS: Final = ("saving.md", "writing_a_pass.md")

needs_hf_tracer = pytest.mark.skipif(
    TRANSFORMERS_5, reason="of the Hugging Face fx tracer, which ended with transformers 4.57"
)
# The two front ends name nodes differently, and the recorder has fewer of them.
prints_hf_graph = pytest.mark.skipif(
    TRANSFORMERS_5, reason="its golden shows the nodes of the Hugging Face tracer's graph"
)
reads_its_own = pytest.mark.skipif(
    TRANSFORMERS_5, reason="transformers 5 reads what it writes; 4.57 has to be helped"
)
takes_numbers_for_truth = pytest.mark.skipif(
    TRANSFORMERS_5, reason="transformers 5 refuses a number where a config has true or false"
)
