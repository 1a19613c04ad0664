"""What a person looks at: figures, drawn with matplotlib and without a display, and tables for the terminal."""

from jaxmech.report.figures import heat_map, save_figure
from jaxmech.report.tables import accuracy_table, circuit_table

__all__ = ["accuracy_table", "circuit_table", "heat_map", "save_figure"]
