"""What a person looks at: figures, drawn with matplotlib and without a display."""

from jaxmech.report.figures import heat_map, save_figure

__all__ = ["heat_map", "save_figure"]
