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
    path: str | os.PathLike, num_panels: int, size: tuple[float, float], **shared: bool
) -> Iterator[tuple]:
    """Yield (figure, its panels from left to right) to draw on; then save the figure as a PNG.

    size: width and height, in inches. shared: sharex or sharey of the panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, num_panels, figsize=size, layout="constrained", squeeze=False, **shared
    )
    try:
        yield figure, list(panels[0])
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=DPI, format="png")
    finally:
        plt.close(figure)
