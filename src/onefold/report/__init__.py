"""One HTML page of what was trained, exported and measured, written from the files that the other verbs leave."""

from onefold.report.figures import require_matplotlib as require_matplotlib
from onefold.report.load_results import ACCURACY_FILE as ACCURACY_FILE
from onefold.report.load_results import GATES_FILE as GATES_FILE
from onefold.report.page import write_report as write_report
