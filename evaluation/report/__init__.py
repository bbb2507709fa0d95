"""``fxquant report``: a results folder as one self-contained HTML page."""

from fxquant.evaluation.report.page import Report as Report
from fxquant.evaluation.report.page import write_report as write_report
