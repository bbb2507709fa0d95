"""fxquant: a torch.fx graph-transformation compiler for post-training quantization."""

from fxquant.analysis import Explanation as Explanation
from fxquant.analysis import explain as explain
from fxquant.analysis import plan as plan
from fxquant.checkpoint import load as load
from fxquant.checkpoint import save as save
from fxquant.conversion import convert as convert
from fxquant.conversion import recipe as recipe
from fxquant.errors import FxquantError as FxquantError
from fxquant.evaluation.front_door import Evaluation as Evaluation
from fxquant.evaluation.front_door import evaluate as evaluate
from fxquant.evaluation.front_door import windows as windows
from fxquant.evaluation.models import load_model as load_model
from fxquant.inspection import inspect as inspect
from fxquant.pipeline import Pass as Pass
from fxquant.pipeline import Pipeline as Pipeline
from fxquant.schemes import Scheme as Scheme
from fxquant.specs import TensorSpec as TensorSpec
from fxquant.tracing import trace as trace

__version__ = "0.1.0"
