"""Pictures look alike: labels with units, plain ticks, one look a thing, apart in a grey print."""

import itertools
import json
import math
import re
from pathlib import Path

import matplotlib.figure
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from stand_ins import ROOT

from benchmarks import summary
from benchmarks.measuring import STAGES
from distil.data.tally import draw_lengths
from distil.reporting import plots, report_plot, run_comparison
from distil.reporting.curves import draw_curves

FLAGS = {
    "teacher_type": "bert",
    "teacher_name": "bert-base-uncased",
    "student_type": "distilbert",
    "temperature": 2.0,
    "seed": 7,
}
ROLES = ("teacher", "student", "baseline")
TITLED = "a$_", "数据", "x\udcff", "\U0001f389", "two\nlines"


def write_run(folder: Path, num_lines: int, flags: dict = FLAGS, **figures: float) -> Path:
    """Write a run of 10 updates a line, of 2 micro-batches each; figures: replace those below."""
    folder.mkdir(parents=True)
    (folder / "parameters.json").write_text(json.dumps(flags))
    lines = [
        {"update": 10 * k, "micro_batches": 20 * k, "epoch": k // 3, "loss": 9.0 / k}
        | {"loss_ce": 0.03 / k, "loss_mlm": 6 + 1 / k, "lr": 5e-5 / k, "tokens_per_s": 1.5e6 + k}
        | {"eval/perplexity": 20 + 40000.0 / k**3, "grad_norm": None, "eval/kl": 0.0, **figures}
        for k in range(1, num_lines + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def draw_report(path: Path, names: dict[str, str], **kept: float) -> None:
    tasks = ("SST-2", "CoLA")
    quality = {
        task: {
            "title": task,
            "lower_is_better": False,
            "models": {role: {"num_seeds": 5} for role in names},
            "retention": kept,
        }
        for task in tasks
    }
    report_plot.draw(
        {
            "models": {role: {"name": name, "path": "none"} for role, name in names.items()},
            "quality": quality,
            "glue": {"retention": {}},
            "sizes": {role: {"parameters_base": 9, "weights_bytes": 36} for role in names},
            "speed": None,
        },
        path,
    )


@pytest.fixture(scope="module")
def drawn():
    """Draw with a function; return the figure that it saved."""
    saved, save = [], matplotlib.figure.Figure.savefig

    def keep(figure, *args, **options):
        saved.append(figure)
        return save(figure, *args, **options)

    def draw(function, *args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(matplotlib.figure.Figure, "savefig", keep)
            function(*args, **options)
        return saved.pop()

    return draw


@pytest.fixture(scope="module")
def figures(tmp_path_factory, drawn) -> dict:
    """Every picture of the project: name -> figure."""
    folder = tmp_path_factory.mktemp("pictures")
    runs = [write_run(folder / name, 12) for name in ("distilled", "without_teacher")]
    kl = {"first weights": 0.5, "distilled": 0.02, "without teacher": 0.3}
    rows = json.loads((ROOT / "benchmarks" / "step_cpu.json").read_text())["rows"]
    path = folder / "drawn.png"
    lengths = {length: 3 for length in range(12, 300)}
    return {
        "curves": drawn(draw_curves, path, *runs, "mlm", kl),
        "comparison": drawn(run_comparison.draw, run_comparison.read_runs(runs), path, "update"),
        "report": drawn(draw_report, path, {r: r for r in ROLES}, student=97.0, baseline=-3.0),
        "step": drawn(summary.draw, rows, str(path)),
        "lengths": drawn(draw_lengths, lengths, str(path), {"tokenizer": "bert-base-uncased"}),
    }


def axes_of(figure):
    """Yield the axes of a figure that carry numbers, not names."""
    for panel in figure.axes:
        if panel.get_visible() and panel.axison:
            # The rows of bars have names, and count downwards.
            yield from (panel.xaxis, *([] if panel.yaxis_inverted() else [panel.yaxis]))


def texts_of(figure) -> str:
    of_panels = (
        text
        for panel in figure.axes
        for text in (panel.get_title(loc="left"), panel.get_xlabel(), panel.get_ylabel())
    )
    return "\n".join([figure.get_suptitle(), *of_panels])


PICTURES = ("curves", "comparison", "report", "step", "lengths")


@pytest.mark.parametrize("name", PICTURES)
def test_every_axis_has_a_label_with_a_unit(name, figures):
    labels = [axis.get_label_text() for axis in axes_of(figures[name])]
    assert labels and all(re.fullmatch(r"[^()]+ \(.+\)", one) for one in labels), labels


@pytest.mark.parametrize("name", PICTURES)
def test_ticks_are_plain_numbers(name, figures):
    for axis in axes_of(figures[name]):
        ticks = [label.get_text() for label in axis.get_ticklabels()]
        assert len(ticks) >= 2 and not axis.get_offset_text().get_text(), axis.get_label_text()
        for tick in ticks:
            assert re.fullmatch(r"-?\d{1,3}(,\d{3})*(\.\d+)?( [MBT])?", tick), ticks


def test_ticks_of_lengths_are_powers_of_two_where_they_span_some(figures, drawn, tmp_path):
    def ticks(figure):
        return [label.get_text() for label in figure.axes[0].xaxis.get_ticklabels()]

    assert ticks(figures["lengths"]) == ["16", "32", "64", "128", "256"]
    narrow = drawn(draw_lengths, {n: 1 for n in range(60, 75)}, str(tmp_path / "a.png"), {})
    assert ticks(narrow) == ["60", "65", "70"]
    one = drawn(draw_lengths, {64: 4}, str(tmp_path / "a.png"), {})
    assert ticks(one) == ["64"]
    wide = drawn(draw_lengths, {1: 2, 2**20: 1}, str(tmp_path / "a.png"), {})
    assert ticks(wide)[:3] == ["1", "8", "64"] and ticks(wide)[-1] == "262,144"


def test_bars_of_lengths_hold_every_sequence(drawn, tmp_path):
    for counts in ({1: 5, 2: 1, 700: 2}, {64: 4}, {n: n for n in range(3, 600)}):
        figure = drawn(draw_lengths, counts, str(tmp_path / "a.png"), {})
        heights = sum(bar.get_height() for bar in figure.axes[0].patches)
        assert heights == sum(counts.values())
        assert f"Lengths of {heights:,.0f} sequences" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (32, "32"),
        (12000, "12,000"),
        (1.2e6, "1.2 M"),
        (5e-5, "0.00005"),
        (-0.0, "0"),
        (3e9, "3 B"),
        (1e30, "1e+30"),
    ],
)
def test_a_number_is_written_in_full(value, expected):
    assert plots.written(value) == expected


def test_the_curves_say_kl_and_count_updates(figures):
    for name in ("curves", "comparison"):
        texts = texts_of(figures[name])
        assert "KL" in texts and "loss_" not in texts, texts
    left = figures["curves"].axes[0]
    assert left.get_lines()[0].get_xdata()[-1] == 120 and "updates" in left.get_xlabel()


def test_headings_name_models_seed_and_updates(figures):
    expected = {
        "curves": ["teacher bert bert-base-uncased", "student distilbert", "seed 7", "updates 120"],
        "report": ["teacher teacher", "baseline baseline", "fine-tuning runs a task 5"],
        "step": ["pair bert (base)", "seed 56", "measured updates 8"],
        "lengths": ["864 sequences", "tokenizer bert-base-uncased"],
    }
    for name, words in {**expected, "comparison": expected["curves"]}.items():
        heading = figures[name].get_suptitle()
        assert all(word in heading for word in words), heading


def test_a_report_names_the_students_training(drawn, tmp_path):
    write_run(tmp_path / "run", 1, {**FLAGS, "max_steps": 700})
    models = {"teacher": {"name": "t", "path": "t"}}
    models["student"] = {"name": "s", "path": str(tmp_path / "run" / "model")}
    report = {
        "models": models,
        "quality": {},
        "glue": {"retention": {}},
        "sizes": {},
        "speed": None,
    }
    heading = drawn(report_plot.draw, report, tmp_path / "a.png").get_suptitle()
    assert "distilled with seed 7; updates 700" in heading


# --------------------------------------------------------------------------------------------------
# Looks
# --------------------------------------------------------------------------------------------------


def legend_of(figure) -> dict[str, tuple]:
    """Return what the legend explains: name -> colour."""
    (legend,) = figure.legends
    colors = [
        k.get_facecolor() if isinstance(k, Patch) else k.get_color() for k in legend.legend_handles
    ]
    names = [text.get_text() for text in legend.get_texts()]
    return {name: to_rgb(color) for name, color in zip(names, colors, strict=True)}


def test_a_colour_means_one_thing_in_all_pictures(figures):
    legends = {name: legend_of(figures[name]) for name in PICTURES if figures[name].legends}
    student = to_rgb(plots.LOOKS["student"].color)
    baseline = to_rgb(plots.LOOKS["baseline"].color)
    teacher = to_rgb(plots.LOOKS["teacher"].color)
    assert legends["curves"] == {
        "student, distilled": student,
        "student, without teacher": baseline,
    }
    assert legends["report"] == {"student": student, "baseline": baseline}
    assert legends["step"]["teacher"] == teacher and legends["step"]["student forward"] == student
    line = figures["report"].axes[0].get_lines()[0]
    assert to_rgb(line.get_color()) == teacher
    of_runs = set(legends["comparison"].values())
    assert len(of_runs) == 2 and not of_runs & {to_rgb(k.color) for k in plots.LOOKS.values()}
    assert len({look.color for look in plots.LOOKS.values()}) == len(plots.LOOKS) - 1  # an alias


def test_what_is_drawn_looks_as_its_legend_says(figures):
    """Each picture draws the colours, dashes, and hatches of its looks, none else."""
    looks = [*plots.LOOKS.values(), *map(plots.look_of_run, range(2))]
    lines = {(to_rgb(look.color), look.dashes) for look in looks}
    bars = {(to_rgb(look.color), look.hatch or None) for look in looks}
    for figure in figures.values():
        for panel in figure.axes:
            drawn_lines = [k for k in panel.get_lines() if k.get_marker() not in ("|", "None", "")]
            assert {(to_rgb(k.get_color()), k.get_linestyle()) for k in drawn_lines} <= lines
            assert {(k.get_facecolor()[:3], k.get_hatch() or None) for k in panel.patches} <= bars


def grey(color: str) -> float:
    """Return the lightness of a colour in a grey print, 0 to 255 (ITU-R 601)."""
    return 255 * sum(w * c for w, c in zip((0.299, 0.587, 0.114), to_rgb(color), strict=True))


def test_a_grey_print_tells_models_and_stages_apart():
    models = [plots.LOOKS[name] for name in (*ROLES, "first weights")]
    for one, other in itertools.combinations(models, 2):
        assert abs(grey(one.color) - grey(other.color)) >= 50, (one, other)
    stages = [plots.LOOKS[stage] for stage in STAGES]
    for one, other in itertools.pairwise(stages):  # they touch
        assert abs(grey(one.color) - grey(other.color)) >= 45, (one, other)
    kinds = [(look.hatch, grey(look.color) > 50) for look in stages]
    assert len(set(kinds)) == len(stages)
    assert max(grey(look.color) for look in map(plots.look_of_run, range(20))) < 160  # on white


def test_a_grey_print_tells_twenty_runs_apart():
    looks = [plots.look_of_run(number) for number in range(20)]
    assert len({(look.dashes, look.marker) for look in looks}) == 20


# --------------------------------------------------------------------------------------------------
# Odd figures and names
# --------------------------------------------------------------------------------------------------


def assert_nothing_is_cut_off(figure) -> None:
    """Title, panels and legend lie inside the figure, one below the other."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    inside = figure.bbox
    heading = figure._suptitle.get_window_extent(renderer)
    panels = [k.get_tightbbox(renderer) for k in figure.axes if k.get_visible()]
    legends = [legend.get_window_extent(renderer) for legend in figure.legends]
    for box in (heading, *panels, *legends):
        assert box.x0 >= -1 and box.x1 <= inside.x1 + 1, (box, inside)
        assert box.y0 >= -1 and box.y1 <= inside.y1 + 1, (box, inside)
    for panel in panels:
        assert panel.y1 <= heading.y0 + 1
        assert all(legend.y1 <= panel.y0 + 1 for legend in legends)
        assert panel.height > 100  # pixels


@pytest.mark.parametrize("name", PICTURES)
def test_nothing_is_cut_off(name, figures):
    assert_nothing_is_cut_off(figures[name])


@pytest.mark.parametrize(("num_runs", "num_lines"), [(12, 1), (2, 9)])
def test_many_runs_of_long_names_have_room(num_runs, num_lines, drawn, tmp_path):
    """Names of 100 letters; a run each may lack a metric, or have one point, zeros, NaN."""
    names = [f"{TITLED[k % 5]}{'distilbert-base-' * 6}{k}" for k in range(num_runs)]
    odd = {"loss_cos": math.nan, "lr": 1e300, "mine": math.inf, "loss_mlm": 1e-9}
    folders = [
        write_run(tmp_path / f"{k}", num_lines, **(odd if k % 2 else {})) for k in range(num_runs)
    ]
    runs = [
        run_comparison.Run(name, run.flags, run.lines)
        for name, run in zip(names, run_comparison.read_runs(folders), strict=True)
    ]
    figure = drawn(run_comparison.draw, runs, tmp_path / "a.png", "epoch")
    assert_nothing_is_cut_off(figure)
    shown = [text.get_text().replace("\n", "") for text in figure.legends[0].get_texts()]
    assert len(set(shown)) == num_runs and shown[0].startswith("a$_distilbert")
    empty = [k for k in figure.axes if any(t.get_text() == "no finite figure" for t in k.texts)]
    assert [panel.get_title(loc="left") for panel in empty] == [
        "cosine distance of the last hidden states",
        "gradient norm before clipping",
        "mine",
    ]


def test_bars_without_a_finite_figure_say_so(drawn, tmp_path):
    runs = [write_run(tmp_path / name, 1, loss_ce=math.nan) for name in "ab"]
    kl = {"first weights": math.nan, "distilled": 0.0, "without teacher": math.inf}
    figure = drawn(draw_curves, tmp_path / "a.png", *runs, "mlm", kl)
    assert_nothing_is_cut_off(figure)
    labels = [text.get_text() for text in figure.axes[2].texts]
    assert labels == ["not finite", "0.0000", "not finite"]


@pytest.mark.parametrize("name", TITLED)
def test_any_name_is_drawn_without_a_warning(name, drawn, tmp_path):
    figure = drawn(draw_report, tmp_path / "a.png", dict.fromkeys(ROLES[:2], name * 20), student=1)
    assert_nothing_is_cut_off(figure)
    figure = drawn(draw_lengths, {12: 3, 40: 1}, str(tmp_path / "a.png"), {"file": name * 20})
    assert_nothing_is_cut_off(figure)
