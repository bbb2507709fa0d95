"""The two environments that the tests run in, and what differs between them.

`.venv` has transformers 4.57, `.venv-5` transformers 5 (`make test-5`). All tests run in the first;
in the second all but the files of NO_MODEL, which no transformers can change. What only one of
the two can do is marked with a name of this file.
"""

from __future__ import annotations

from typing import Final

import pytest
import transformers

TRANSFORMERS_5: Final = int(transformers.__version__.partition(".")[0]) >= 5

# Numerics, spelling, pages and figures: nothing here reads, traces, converts or runs a model.
NO_MODEL: Final = (
    "test_comparison.py",
    "test_gemm.py",
    "test_gptq.py",
    "test_layout.py",
    "test_observers.py",
    "test_operators.py",
    "test_ranges.py",
    "test_repairs_page.py",
    "test_report_browser.py",
    "test_schemes.py",
    "test_statistics.py",
    "test_study.py",
)

needs_hf_tracer = pytest.mark.skipif(
    TRANSFORMERS_5, reason="of the Hugging Face fx tracer, which ended with transformers 4.57"
)
