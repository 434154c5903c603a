"""Plot the curves of a distilled student and of its twin trained without the teacher."""

from collections.abc import Mapping
from pathlib import Path

from distil.reporting.plots import picture


def read_scalar(folder: Path, tag: str) -> tuple[list[int], list[float]]:
    """Read one scalar of a run's TensorBoard log: (x, values), both empty where it is missing."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder / "log" / "train"), size_guidance={"scalars": 0})
    log.Reload()
    if tag not in log.Tags()["scalars"]:
        return [], []
    events = log.Scalars(tag)
    return [event.step for event in events], [event.value for event in events]


def draw_curves(
    path: Path, distilled: Path, without_teacher: Path, objective: str, kl: Mapping[str, float]
) -> None:
    """Plot the training losses of two runs' folders, and bars of each student's held-out KL.

    objective: mlm or clm. kl: student's name -> nats a token.
    """
    with picture(path, 3, (14, 4.2)) as (_, (left, middle, right)):
        left.plot(*read_scalar(distilled, "losses/loss_ce"), label="student, distilled")
        left.set(
            title="Student in training: KL to the teacher (T = 2, x T²)",
            xlabel="micro-batches",
            ylabel="KL (nats a token)",
            ylim=(0, None),
        )
        tag = f"losses/loss_{objective}"
        middle.plot(*read_scalar(distilled, tag), label="student, distilled")
        middle.plot(*read_scalar(without_teacher, tag), label="student, without teacher")
        middle.set(
            title="Language-model loss in training",
            xlabel="micro-batches",
            ylabel="cross-entropy (nats a token)",
        )
        middle.legend()
        bars = right.bar(list(kl), list(kl.values()), color=["tab:gray", "tab:blue", "tab:orange"])
        right.bar_label(bars, fmt="%.4f")
        right.margins(y=0.12)
        right.set(title="KL to the teacher, held-out text (T = 1)", ylabel="nats a token")
