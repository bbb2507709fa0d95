"""Analysis: where the loss of a quantized model comes from, and which scheme a budget allows."""

from fxquant.analysis.explanation import explain as explain
from fxquant.analysis.planning import plan as plan
from fxquant.analysis.results import Explanation as Explanation
