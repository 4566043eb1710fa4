"""`halve report`: one page about an output, and a model card, from what is recorded.

Nothing here measures, and nothing imports torch. Data flows one way: `gather` reads
records and headers into `Facts`; `render` makes the page of them, the same bytes from
the same facts; `write` puts it on the disk.
"""

from halve.reporting.card import render_card, render_eval_results
from halve.reporting.facts import Facts, dense_name
from halve.reporting.gather import gather_facts, output_folder
from halve.reporting.page import render
from halve.reporting.write import write_report

__all__ = [
    "Facts",
    "dense_name",
    "gather_facts",
    "output_folder",
    "render",
    "render_card",
    "render_eval_results",
    "write_report",
]
