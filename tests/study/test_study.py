"""A study's variants, trainings and summary; the whole program at the smallest size (slow)."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
from conftest import run_process
from stand_ins import ROOT

import study
from distil.models.architectures import ARCHITECTURES
from distil.models.language_model import load_language_model
from distil.study import runs
from distil.study.measures import HeldOutText, costs
from distil.study.options import chosen, parse
from distil.study.runs import Job, log_of, run_jobs
from distil.study.summary import Row, Spread, conclusion, table, verdict
from distil.study.variants import NO_TEACHER, REFERENCE, Variant, train_flags, variants
from distil.system.locks import lock_file
from distil.training.config import parse_config
from lm_seqs_dataset import LmSeqsDataset
from utils import InputError

NEEDED = ["--teacher", "t", "--data_file", "d", "--held_out", "h"]
VARIANTS = [(is_masked, name) for is_masked in (True, False) for name in variants(is_masked)]


@pytest.mark.parametrize("is_masked, name", VARIANTS)
def test_each_variants_flags_are_flags_of_train_py(is_masked, name, world, tmp_path):
    kind = "bert" if is_masked else "gpt2"
    variant = variants(is_masked)[name]
    words = runs.words_of(
        {
            **{"--dump_path": tmp_path / "run", "--data_file": world.data(kind)},
            **{"--teacher_name": world.teachers[kind], "--student": world.teachers[kind]},
            **({"--token_counts": world.counts(kind)} if is_masked else {}),
            **train_flags(variant, is_masked),
        }
    )
    config = parse_config(words)
    assert {k: v for k, v in config.alphas.items() if v} == variant.alphas
    assert config.mlm == is_masked


def test_the_reference_is_the_readmes_triple_and_comes_first():
    assert next(iter(variants(is_masked=True).items())) == (
        REFERENCE,
        Variant("triple loss", {"ce": 5.0, "mlm": 2.0, "cos": 1.0}),
    )
    args = parse([*NEEDED, "--variants", "mse_alone"])
    assert [*chosen(args, is_masked=True)] == [REFERENCE, NO_TEACHER, "mse_alone"]


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--variants", "mse_alon"], "--variants mse_alon: expected some of triple, "),
        (["--seeds", "1", "--max_steps", "0"], "--max_steps 0: expected at least 1"),
        (["--learning_rates", "1e-4", "2"], "--learning_rates 2.0: expected above 0"),
        (["--num_held_out", "1"], "--num_held_out 1: expected at least 2"),
        (["--extract_flags", "--layers '0"], "--extract_flags --layers '0: No closing quotation"),
        (["--train_flags", 'a"b'], '--train_flags a"b: No closing quotation'),
        (["--tasks", "sst2"], "--data_dir: needed with --tasks"),
        (["--own", "a"], "--own a: no flag; expected flags of train.py"),
        (["--own", "a=1 --alpha_hid 1"], "--own a=1 --alpha_hid 1: 1 is no flag; expected NAME="),
        (["--own", "triple=--fp16"], "--own triple=--fp16: expected NAME=FLAGS, a name of letters"),
        (["--own", "half=--fp16"], "--own half=--fp16: expected NAME=FLAGS"),
        (["--own", "a=--fp16", "a=--bf16"], "--own a a: a name occurs twice"),
        (["--own", "a=--seed 3"], "--own a=--seed 3: --seed; expected flags of train.py that are"),
        (
            ["--own", "a=--alpha_hidd 1"],
            "--own a: unknown argument --alpha_hidd; did you mean --al",
        ),
        (["--own", "a=--alpha_hid"], "--own a: argument --alpha_hid: expected one argument; see"),
        (
            ["--train_flags=--bf15"],
            "--train_flags: unknown argument --bf15; did you mean --bf16",
        ),
        (["--own", "a=--layers '0"], "--own a=--layers '0: No closing quotation"),
    ],
)
def test_bad_flags_are_one_line(flags, line):
    with pytest.raises(InputError, match=line):
        parse([*NEEDED, *flags])


def test_variants_of_the_other_kind_of_model_are_refused():
    args = parse([*NEEDED, "--variants", "smoothing_0"])
    with pytest.raises(InputError, match="--variants smoothing_0: not for a causal teacher"):
        chosen(args, is_masked=False)


def test_a_row_of_ones_own_is_the_triple_but_for_its_flags():
    text = "own=--alpha_mlm 0 --alpha_hid=1 --layers 0 2 --restrict_ce_to_mask"
    args = parse([*NEEDED, "--variants", "mse_alone", "--own", text])
    own = chosen(args, is_masked=True)["own"]
    assert own.title == f"triple with {text.partition('=')[2].replace('=', ' ')}"
    flags = train_flags(own, is_masked=True)
    wanted = {"--alpha_ce": 5.0, "--alpha_mlm": ["0"], "--alpha_hid": ["1"], "--mlm": None}
    assert wanted.items() <= flags.items()
    assert runs.words_of(flags)[-1] == "--restrict_ce_to_mask" and "--layers" not in flags
    assert own.student == "own" and own.extract_flags(6, "data") == {"--layers": ["0", "2"]}
    assert Variant("triple", {}).extract_flags(6, "data") == {"--num_layers": 3}


def test_a_row_of_ones_own_keeps_its_flags_once_begun(tmp_path):
    flags = [*NEEDED, "--output", str(tmp_path), "--own"]
    args = parse([*flags, "a=--alpha_hid 1"])
    state = {"identity": {name: getattr(args, name) for name in study.IDENTITY}, "own": args.own}
    state |= {name: {} for name in study.PARTS} | {"rows": {"a/56/0.0005": {"variant": "a"}}}
    (tmp_path / study.MARKER).write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(InputError, match="--own a: the study in .* has it with --alpha_hid 1; giv"):
        study.Study(parse([*flags, "a=--alpha_hid 2"]))


def test_costs_know_a_rows_masks_and_micro_batches(world, tmp_path):
    """By model FLOPs: logits at masks only, of 30 or of 15 % of the tokens; two micro-batches."""
    teacher = load_language_model(ARCHITECTURES["bert"], str(world.teachers["bert"]), "--teacher")
    dataset = LmSeqsDataset.from_file(str(world.data("bert")), teacher)
    needed = train_flags(variants(is_masked=True)[REFERENCE], is_masked=True)
    needed |= {"--dump_path": tmp_path / "run", "--data_file": world.data("bert")}
    needed |= {"--teacher_name": world.teachers["bert"], "--student": world.teachers["bert"]}
    needed |= {"--mlm_smoothing": 0}
    added = {
        **{"all": {}, "at_15": {"--restrict_ce_to_mask": None}},
        "at_30": {"--restrict_ce_to_mask": None, "--mlm_mask_prop": 0.3},
        "twice": {"--gradient_accumulation_steps": 100},
        "tokens": {"--max_tokens": 5 * round(dataset.lengths.mean())},  # about 5 sequences
        "of_both": {"--max_tokens": 10 * round(dataset.lengths.mean()), "--batch_size": 77},
    }
    configs = {name: parse_config(runs.words_of(needed | own)) for name, own in added.items()}
    found = costs(configs, dict.fromkeys(configs, teacher.network), teacher, dataset)
    assert found["all"] == 1 and found["twice"] == 2
    assert math.isclose(found["tokens"], 1, rel_tol=0.05)
    assert math.isclose(found["of_both"], 2, rel_tol=0.05)
    in_head = (found["at_30"] - found["at_15"]) / 0.15
    assert 0 < in_head < 1
    assert math.isclose(found["all"] - found["at_15"], 0.85 * in_head, rel_tol=0.02)


@pytest.mark.parametrize("num", [None, 2, 9, 10**6])
def test_held_out_sequences_are_evenly_spaced_and_those_that_tune_apart(num, world):
    teacher = load_language_model(ARCHITECTURES["bert"], str(world.teachers["bert"]), "--teacher")
    dataset = LmSeqsDataset.from_file(str(world.data("bert")), teacher)
    total = len(dataset.lengths)
    text = HeldOutText(dataset, teacher, num)
    tuning, reported = (np.sort(np.concatenate(text.parts[k])) for k in ("tuning", "reported"))
    expected = np.unique(np.linspace(0, total - 1, min(num or total, total)).round())
    assert np.array_equal(tuning, expected[::4])
    assert np.array_equal(reported, np.setdiff1d(expected, tuning))


# --------------------------------------------------------------------------------------------------
# Summary
# --------------------------------------------------------------------------------------------------


def row(name: str, *kl: float, seeds=(1, 2, 3)) -> Row:
    """Make a row from its KL by seed."""
    figures = ({"kl": value, "loss": 2.0 + value, "accuracy": 0.4} for value in kl)
    figures = ({**one, "agreement": 0.9} for one in figures)
    by_seed = dict(zip(seeds, figures, strict=False))
    return Row(name, Variant(name, {}), 5e-4, by_seed, 1.0)


def test_an_interval_is_students():
    """1, 2, 3, 4: mean 2.5, deviation 1.2910, t(3) = 3.182."""
    spread = Spread.of([1.0, 2.0, 3.0, 4.0])
    assert spread.mean == 2.5
    assert math.isclose(spread.half, 3.182 * 1.2909944 / 2, rel_tol=1e-6)
    assert Spread.of([1.0]) == Spread(1.0, None)


def test_differences_are_taken_seed_by_seed():
    """Seeds that move both alike leave no spread in the difference."""
    reference, other = row(REFERENCE, 0.1, 0.2, 0.4), row("a", 0.08, 0.16, 0.32)
    difference = other.against(reference)
    assert math.isclose(difference.mean, -0.2) and difference.half < 1e-12
    only_second = row("b", 0.1, seeds=(2,))
    assert only_second.against(reference) == Spread(-0.5, None)


def test_the_verdict_asks_for_more_than_the_spread():
    alone = row(NO_TEACHER, 0.50, 0.52, 0.51)
    assert verdict(row("a", 0.10, 0.12, 0.11), alone) == "yes"
    assert verdict(row("a", 0.40, 0.80, 0.30), alone) == "no"
    assert verdict(row("a", 0.60, 0.62, 0.61), alone) == "no"
    assert verdict(row("a", 0.10), alone) == "yes, one seed"
    assert verdict(row("a", 0.60), alone) == "no"
    assert verdict(alone, alone) == verdict(row("a", 0.10), None) == ""


def test_the_table_holds_deltas_gaps_and_what_is_kept():
    rows = [row(REFERENCE, 0.2, 0.2), row("a", 0.1, 0.1), row(NO_TEACHER, 0.4, 0.4)]
    first = {"half": {"kl": 0.8, "loss": 3.0, "accuracy": 0.1, "agreement": 0.2}}
    teacher = {"loss": 1.5, "accuracy": 0.5}
    lines = table(rows, first, teacher).splitlines()
    best = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert best[0] == "a (`a`)" and best[4:7] == ["0.1000 ± 0.0000", "-50.0% ± 0.0%", "87.5%"]
    assert best[9:] == ["80.0%", "90.00% ± 0.00%", "yes"]
    assert "100.00%" in lines[-1] and " 20.00% " in lines[-2]
    assert conclusion(rows, teacher).startswith("Closest to the teacher: a (`a`), its KL -50.0%")


def test_a_row_with_a_first_student_of_its_own_starts_from_that():
    short = row("short", 0.4)
    short = dataclasses.replace(short, variant=Variant("short", {}, student="third"))
    drawn = row("random_start", 0.6)
    drawn = dataclasses.replace(drawn, variant=Variant("drawn", {}, student="random"))
    start = {"loss": 3.0, "accuracy": 0.1, "agreement": 0.2}
    first = {kind: {**start, "kl": kl} for kind, kl in (("half", 0.8), ("third", 1.6), ("b", 9))}
    rows = [row(REFERENCE, 0.2), short, drawn]
    lines = table(rows, first, {"loss": 1.5, "accuracy": 0.5}).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [cell[6] for cell in cells[:3]] == ["75.0%", "75.0%", "25.0%"]
    names = [cell[0] for cell in cells[3:]]
    assert names == ["first weights", "first weights of `third`", "teacher"]
    assert [cell[4] for cell in cells[3:5]] == ["0.8000", "1.6000"]


def test_a_teacher_that_is_never_right_and_a_perfect_start_have_no_shares():
    rows = [row(REFERENCE, 0.2), row(NO_TEACHER, 0.0)]
    first = {"half": {"kl": 0.0, "loss": 3.0, "accuracy": 0.0, "agreement": 1.0}}
    teacher = {"loss": 3.0, "accuracy": 0.0}
    last = [line.split("|")[10].strip() for line in table(rows, first, teacher).splitlines()]
    assert last[0] == "kept" and set(last[2:]) == {"-"}
    assert "student without teacher: no (KL +nan%)" in conclusion(rows, teacher)


def test_the_conclusion_names_the_closest_even_where_it_is_the_reference():
    rows = [row(REFERENCE, 0.1), row(NO_TEACHER, 0.4)]
    first, *answers = conclusion(rows, {"loss": 2.2}).splitlines()
    assert first.startswith(f"Closest to the teacher: {REFERENCE} (`{REFERENCE}`); next: ")
    assert first.endswith("its KL +300.0% against the triple's, with one seed.")
    assert [line for line in answers if line] == [
        "- Closer to the teacher than the student without teacher: yes, one seed (KL -75.0%)",
        "- Better on the text than the student without teacher: yes, one seed (loss -12.5%)",
        "- Teacher better on the text than that student: yes (loss 2.2000 against 2.4000)",
    ]
    assert "that student: no (loss 2.5000" in conclusion(rows, {"loss": 2.5})
    assert "next" not in conclusion([row(REFERENCE, 0.4), row("a", 0.1)], {"loss": 2.2})


# --------------------------------------------------------------------------------------------------
# Trainings
# --------------------------------------------------------------------------------------------------


def test_a_failed_training_is_named_with_its_line_and_the_others_end(tmp_path):
    words = [["--mistyped"], ["--dump_path", "x"], ["--mistyped"]]
    jobs = [Job("a", seed, 1e-3, 1, w, tmp_path / f"r{seed}") for seed, w in enumerate(words)]
    with pytest.raises(InputError, match=r"train.py \(a/\d/0.001\) ended with status 2: train.py"):
        run_jobs(jobs, 2, lambda job, elapsed_s: None)


def test_the_next_training_starts_before_the_last_one_is_measured(tmp_path):
    jobs = [Job("a", seed, 1e-3, 1, ["--help"], tmp_path / f"run-{seed}") for seed in range(2)]
    seen = []
    run_jobs(jobs, 1, lambda job, _: seen.append((job.seed, log_of(jobs[1]).exists())))
    assert seen == [(0, True), (1, True)]


@pytest.mark.long
def test_the_program_compares_continues_and_adds_a_seed(world, tmp_path):
    out, data = tmp_path / "out", world.data("bert")
    command = [sys.executable, ROOT / "scripts/study.py", "--teacher", world.teachers["bert"]]
    command += ["--data_file", data, "--held_out", data, "--output", out, "--max_steps", "3"]
    command += ["--variants", "mse_alone", "--processes", "2", "--seeds"]
    assert run_process(*command, "1").returncode == 0
    before = json.loads((out / "study.json").read_text())
    assert set(before["rows"]) == {f"{n}/1/0.0005" for n in (REFERENCE, NO_TEACHER, "mse_alone")}
    before["first"]["third"] = before["first"]["half"]  # of a variant that is not asked for
    (out / "study.json").write_text(json.dumps(before))
    done = run_process(*command, "1", "2")
    assert done.returncode == 0, done.stderr
    after = json.loads((out / "study.json").read_text())
    assert len(after["rows"]) == 6 and before["rows"].items() <= after["rows"].items()
    assert "mse_alone" in (out / "DISTILLATION.md").read_text()
    assert (out / "out.png").stat().st_size > 1000
    other = run_process(*command, "1", "--max_length", "20")
    assert other.returncode == 2 and "the study in" in other.stderr


@pytest.mark.slow
def test_a_variant_that_cannot_be_trained_ends_the_study_before_the_first_training(
    world, tmp_path, status_and_errors
):
    out, data = tmp_path / "out", world.data("bert")
    flags = ["--teacher", str(world.teachers["bert"]), "--data_file", data, "--held_out", data]
    flags += ["--output", str(out), "--max_steps", "3", "--variants", "rel_alone"]
    status, lines = status_and_errors(study.main, [*flags, "--train_flags", "--relation_heads 7"])
    assert status == 2 and len(lines) == 1
    assert "--relation_heads 7: does not divide" in lines[0] and "variant rel_alone" in lines[0]
    assert not (out / "runs").exists()
    with lock_file(out / study.LOCK, "held by this test"):
        status, lines = status_and_errors(study.main, flags)
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith(f"--output {out}: another study works in it; stop that run")
