"""The schemes that docs/formats_measured.md compares, on SmolLM2-135M."""

from __future__ import annotations

from benchmarks.subjects import smollm2

SUBJECT = smollm2(windows=8, length=512, calibration=16)

# Eight bits: int8 and E4M3 on the same ranges, then MX.
EIGHT = (
    "w8a8-static:absmax",
    "fp8-static",
    "w8a8-dynamic-token",
    "fp8",
    "w8",
    "wfp8",
    "mxfp8",
)
# Four bits, weights alone. Three parts of a format: the numbers of an element, how many share a
# scale, and how that is kept.
NAMED = ("wmxfp4", "wmxfp4-rceil", "wnvfp4", "wmxfp4-even", "wmxfp4-ceil")
PARTS = (
    "we2m1-g16",
    "we2m1-g32",
    "w4-g16-e4m3",
    "w4-g32",
    "w4-g32-e8m0-rceil",
    "w4-g16",
    "w4-g128-asym",
    "we2m1",
    "w4",
)
WIDE = ("w4-g128",)
# As many bits as MXFP4 (4.25) and NVFP4 (4.5), on other grids.
EQUAL = ("w4-g64-fp16", "wnf4-g64-fp16", "w4-g32-fp16", "wnf4-g32-fp16", "wnf4-g16-e4m3")
BOTH = ("mxfp4", "mxfp4-rceil", "nvfp4")
# Repairs of formats of 4.25 and 4.5 bits, in the order in which they were tried.
BASES = ("wnvfp4", "wmxfp4-rceil", "w4-g16-e4m3", *EQUAL)
REPAIRED = tuple(f"{base}+gptq(order=static)" for base in BASES)
GROUPS = {
    "eight": EIGHT,
    "four": (*NAMED, *PARTS, *WIDE, *EQUAL),
    "both": BOTH,
    "repaired": REPAIRED,
}
