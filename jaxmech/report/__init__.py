"""What a person looks at: figures, drawn with matplotlib and without a display, tables for the terminal, and a page.

style.py      sizes, colours, and the writing of figures
figures.py    heat maps of all heads
bars.py       accuracies and scores
curves.py     scatter, curves and grids
words.py      numbers as text
measures.py   what they are of, and their units
headline.py   what was found in a sentence or two, and what makes it doubtful
parts.py      what a section is made of
circuit_sections.py, criteria_sections.py, patching_sections.py   what the page says and shows of each result
html.py       the page, by template.html
tables.py     tables for the terminal
"""

from jaxmech.report.figures import heat_map
from jaxmech.report.headline import doubts
from jaxmech.report.html import report_files, write_report
from jaxmech.report.measures import CHANGED
from jaxmech.report.style import save_figure
from jaxmech.report.tables import accuracy_table, circuit_table, deviation_tables, prompts_table, study_tables

__all__ = [
    "CHANGED",
    "accuracy_table",
    "circuit_table",
    "deviation_tables",
    "doubts",
    "heat_map",
    "prompts_table",
    "report_files",
    "save_figure",
    "study_tables",
    "write_report",
]
