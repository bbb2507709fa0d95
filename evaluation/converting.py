"""Convert one model under one scheme, as the command line asks for it."""

from __future__ import annotations

import argparse

from torch import Tensor
from torch.fx import GraphModule

from fxquant import conversion
from fxquant.errors import DataError
from fxquant.evaluation.data import cut_windows, load_dataset_text, load_text
from fxquant.evaluation.models import check_device, load_model, resolve_dtype
from fxquant.pipeline import AfterPass
from fxquant.schemes import Scheme


def convert_as_asked(options: argparse.Namespace, after_pass: AfterPass | None) -> GraphModule:
    """Load ``options.model``, calibrate where ``options.scheme`` needs it, convert.

    ``options`` holds what ``arguments.add_model_arguments`` and ``add_text_arguments`` add, and
    ``scheme`` and ``level``. Raises FxquantError, before the model is loaded where it can.
    """
    scheme = Scheme.parse(options.scheme)
    check_device(options.device)
    resolve_dtype(options.dtype, options.device)
    if options.calibration_windows < 0 or options.length < 2:
        raise DataError(
            f"need at least 0 calibration windows of 2 tokens, got {options.calibration_windows} "
            f"of {options.length}"
        )
    available = [Tensor()] if options.calibration_windows else None
    conversion.recipe(scheme, calibration=available, level=options.level)
    loaded = load_model(
        options.model, dtype=options.dtype, device=options.device, revision=options.revision
    )
    batches = None
    if options.calibration_windows and (scheme.needs_calibration or scheme.repairs):
        text = options.text
        source = load_text(text) if options.dataset is None else load_dataset_text(options.dataset)
        windows = cut_windows(
            source,
            loaded.tokenizer,
            count=1,
            length=options.length,
            calibration=options.calibration_windows,
            seed=options.seed,
        )
        batches = windows.calibration.split(1)
    pipeline = conversion.recipe(
        scheme, calibration=batches, level=options.level, progress=True, after_pass=after_pass
    )
    return conversion.convert(loaded.model, scheme, pipeline=pipeline)
