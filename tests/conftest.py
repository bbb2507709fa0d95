"""Tests run on one thread: the models are tiny, and two test runs at once must not fight."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
