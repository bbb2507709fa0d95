"""Why a scheme loses what it loses, and what to choose: ``explain`` and ``plan``.

Users and the command line call this room. It measures observed graphs through ``run`` and takes
repairs from recipes; it knows no text, no tokenizer and no file format but its own.
"""

from fxquant.analysis.explanation import explain as explain
from fxquant.analysis.planning import plan as plan
from fxquant.analysis.report import Explanation as Explanation
