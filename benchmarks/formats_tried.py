"""The schemes that docs/formats_measured.md compares, on SmolLM2-135M."""

from __future__ import annotations

from benchmarks.subjects import smollm2

SUBJECT = smollm2(windows=8, length=512, calibration=16)

# Eight bits: int8 and E4M3 on the same ranges, then MX.
EIGHT = (
    "w8",
    "wfp8",
    "w8a8-static:absmax",
    "fp8-static",
    "w8a8-dynamic-token",
    "fp8",
    "we4m3/ae5m2-static:absmax",
    "mxfp8",
    "mxfp8-rceil",
)
# Four bits, weights alone: what each format changes is one part of the scheme.
GRIDS = {"e2m1": "E2M1", "4": "int4", "nf4": "NF4"}
SIZES = (16, 32)
NAMED = ("wmxfp4", "wmxfp4-ceil", "wmxfp4-rceil", "wmxfp4-even", "wnvfp4")
EXACT_SCALES = tuple(f"w{grid}-g{size}" for grid in GRIDS for size in SIZES)
CHANNELS = tuple(f"w{grid}" for grid in GRIDS)
BYTE_SCALES = (
    "w4-g32-e8m0",
    "w4-g32-e8m0-rceil",
    "w4-g16-e4m3",
    "w4-g32-e4m3",
    "we2m1-g32-e4m3",
    "wnf4-g16-e4m3",
    "wnf4-g32-e4m3",
)
WIDE = ("w4-g128", "w4-g64", "w4-g128-asym", "w4-g32-asym", "wnf4-g64")
BOTH = ("mxfp4", "mxfp4-rceil", "nvfp4")
# Repairs of formats of 4.25 and 4.5 bits, in the order in which they were tried.
REPAIRS = ("gptq", "gptq(order=static)", "gptq(order=static)+refine")
BASES = ("wnvfp4", "wmxfp4-rceil", "w4-g16-e4m3", "w4-g128-asym")
REPAIRED = (
    *(f"{base}+{repair}" for repair in REPAIRS for base in BASES),
    "wmxfp4+gptq(order=static)",
)
GROUPS = {
    "eight": EIGHT,
    "four": (*NAMED, *EXACT_SCALES, *CHANNELS, *BYTE_SCALES, *WIDE),
    "both": BOTH,
    "repaired": REPAIRED,
}
