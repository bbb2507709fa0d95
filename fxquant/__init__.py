"""fxquant: a torch.fx graph-transformation compiler for post-training quantization."""

from fxquant import exports as exports
from fxquant.analysis import Explanation as Explanation
from fxquant.analysis import explain as explain
from fxquant.analysis import plan as plan
from fxquant.analysis.inspection.inspection import inspect as inspect
from fxquant.checkpoint.save_load import load as load
from fxquant.checkpoint.save_load import save as save
from fxquant.errors import FxquantError as FxquantError
from fxquant.evaluation.front_door import Evaluation as Evaluation
from fxquant.evaluation.front_door import evaluate as evaluate
from fxquant.evaluation.front_door import windows as windows
from fxquant.evaluation.models import load_model as load_model
from fxquant.frontends.streaming import stream as stream
from fxquant.frontends.tracing import trace as trace
from fxquant.pipeline.pipeline import Pass as Pass
from fxquant.pipeline.pipeline import Pipeline as Pipeline
from fxquant.recipes.conversion import convert as convert
from fxquant.recipes.conversion import recipe as recipe
from fxquant.schemes.scheme import Scheme as Scheme
from fxquant.schemes.specs import TensorSpec as TensorSpec

__version__ = "0.1.0"
