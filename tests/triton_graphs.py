"""Graphs by Triton's kernels against the plain operators, in a process of its own.

TRITON_INTERPRET=1 python -m tests.triton_graphs
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch

import fxquant
from fxquant.numerics.kernels import table
from fxquant.passes import FuseKernels
from tests.architectures import llama, opt, token_ids
from tests.fused_calls import same


def graphs() -> None:
    """Every fused operator by Triton, as on CUDA, from the table to the logits."""
    rows = tuple(
        replace(row, device="cpu", why_not=lambda *_: "")
        for row in table.TABLE
        if row.device == "cuda"
    )
    ids, count = token_ids(2, 7), 0
    for build in (opt, llama):
        traced = fxquant.trace(build(num_hidden_layers=1))
        for scheme in (
            "w8a8-dynamic-token-asym",
            "w4-g12-asym/a8-static+attn8",
            "w8a8-dynamic",
            "w4-g12+attn8",
        ):
            plain = fxquant.convert(traced, scheme, calibration=[token_ids(2, 9)])
            with torch.no_grad(), mock.patch.object(table, "TABLE", rows):
                found = FuseKernels()(plain)(ids)
            with torch.no_grad():
                assert same(found, plain(ids)), (build, scheme)
            count += 1
    print(f"{count} graphs agree")


if __name__ == "__main__":
    graphs()
