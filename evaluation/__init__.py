"""Losses of models on texts: windows, perplexity, sweeps, tables, published figures, reports.

The command line and users call this room; no room but the command line knows it, and it knows no
argparse.
"""

from fxquant.evaluation.data import cut_windows as cut_windows
from fxquant.evaluation.data import load_text as load_text
from fxquant.evaluation.job import Job as Job
from fxquant.evaluation.job import run as run
from fxquant.evaluation.models import load_model as load_model
from fxquant.evaluation.perplexity import evaluate as evaluate
from fxquant.evaluation.token_windows import Windows as Windows
