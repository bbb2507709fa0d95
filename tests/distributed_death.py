"""Run by torchrun in test_distributed: process 1 is killed, or fails, in the second scheme."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any
from unittest import mock

from fxquant.cli.main import main
from fxquant.errors import NonFiniteError
from fxquant.evaluation.perplexity import evaluate
from fxquant.run.distributed import rank

seen = 0


def deadly(*args: Any, **options: Any) -> Any:
    global seen
    seen += 1
    if rank() == 1 and seen == 2:
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise NonFiniteError("layers.0.fc1: computes NaN")
    return evaluate(*args, **options)


if __name__ == "__main__":
    with mock.patch("fxquant.evaluation.converter.evaluate", deadly):
        sys.exit(main(["evaluate", *sys.argv[2:]]))
