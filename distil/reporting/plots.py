"""Pictures of figures: one look for all programs, drawn without a display.

matplotlib is imported only where a program draws: its import takes a second.
"""

import contextlib
import os
from collections.abc import Iterator

from distil.system.files import atomic_path

DPI = 110


@contextlib.contextmanager
def picture(
    path: str | os.PathLike,
    num_panels: int,
    size: tuple[float, float],
    columns: int | None = None,
    **shared: bool,
) -> Iterator[tuple]:
    """Yield (figure, its panels from left to right) to draw on; then save the figure as a PNG.

    size: width and height, in inches. columns: panels in a row; None: all. shared: sharex or sharey
    of the panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(columns or num_panels, num_panels)
    shape = -(-num_panels // columns), columns
    figure, panels = plt.subplots(
        *shape, figsize=size, layout="constrained", squeeze=False, **shared
    )
    for panel in panels.flat[num_panels:]:
        panel.set_visible(False)
    try:
        yield figure, list(panels.flat[:num_panels])
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=DPI, format="png")
    finally:
        plt.close(figure)
