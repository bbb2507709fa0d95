"""``fxquant report``: what a results folder holds, as one HTML page.

One file adapts each format to the page's tables; the page itself is in ``page/``.
"""

from fxquant.evaluation.report.page import Report as Report
from fxquant.evaluation.report.page import write_report as write_report
