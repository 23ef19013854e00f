"""The colors and rc parameters that all figures share, and how a figure is saved and shown.

matplotlib is imported only when a figure is drawn. Figures are plain `Figure` objects created without pyplot, so
drawing one changes no global state.
"""

from __future__ import annotations

import io
import textwrap
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import StoryLLMError, printable
from ..files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Based on the colorblind-safe palette of Okabe and Ito.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#B4538A"
YELLOW, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
INK, MUTED, GREY, GRID = "#26323D", "#55626D", "#7A8791", "#E8ECEF"

RC_PARAMS = {
    **{"font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK},
    **{"axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY},
    **{"xtick.labelcolor": INK, "ytick.labelcolor": INK},
}


def house_style() -> AbstractContextManager[None]:
    """A context in which matplotlib uses the style of this package."""
    import matplotlib

    return matplotlib.rc_context(RC_PARAMS)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, whose axes make room for their labels."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))


def style_axes(axes: Axes) -> None:
    """Adds a light grid and removes the top and right spines."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)


def wrapped(text: str, width: int, max_lines: int = 3) -> str:
    """Untrusted text with control characters and lone surrogates escaped, wrapped to lines of `width` characters."""
    escaped = printable(text[: width * max_lines]).encode(errors="backslashreplace").decode()
    return textwrap.fill(escaped, width, max_lines=max_lines, placeholder=" …")


def finish(figure: Figure, out: str | Path | None) -> Figure:
    """Saves the figure if `out` is given, in the format of its suffix, and lets notebooks display it.

    Raises StoryLLMError if the suffix is unknown or the file cannot be written.
    """
    if out is not None:
        out = Path(out)
        suffix, formats = out.suffix[1:].lower(), figure.canvas.get_supported_filetypes()
        if suffix not in formats:
            raise StoryLLMError(f"out is {str(out)!r}, must end in .{', .'.join(sorted(formats))}")
        with atomic_write(out) as file:
            figure.savefig(file, format=suffix, dpi=200)

    def png() -> bytes:
        buffer = io.BytesIO()
        with house_style():
            figure.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()

    figure._repr_png_ = png  # type: ignore[attr-defined]  # IPython displays only the figures of pyplot otherwise
    return figure
