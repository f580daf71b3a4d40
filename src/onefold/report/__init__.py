"""One page that a person can read: what was trained, exported and measured, with every figure's grounds.

page.py         write_report: the page
inputs.py       run folders, results, artifacts: read with patience
groups.py       measurements of the same thing, put together
evidence.py     groups and comparisons: what the inputs add up to
summary.py      the head of the page
predictions.py  the answers of a run, as it kept them
training.py answers.py latencies.py provenance.py      its parts
figures.py      SVG by matplotlib, in the page's colours
html.py words.py style.py                   escaping and tables, numbers in words, the style sheet
"""

from onefold.report.page import write_report as write_report
