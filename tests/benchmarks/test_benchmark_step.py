"""The benchmark compares equal functions, counts right and runs; no test asserts a time."""

import ast
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_process
from stand_ins import ROOT

import benchmark
from benchmarks import (
    agreement,
    cpu_pieces,
    jobs,
    launches,
    measuring,
    options,
    reference_step,
    summary,
    training_run,
    workload,
)
from distil.flops import DTYPES, ModelSize, clock_s, nominal_peak, size_of, update_flops
from distil.kernels import cpu
from distil.models.architectures import ARCHITECTURES
from distil.models.language_model import build_network
from distil.system.compiler import check_compiler
from utils import InputError

FLAGS = ["--size", "tiny", "--device", "cpu", "--updates", "2", "--warmup", "1", "--threads", "1"]


def make_job(tmp_path, *flags: str, **changes) -> workload.Job:
    """Write a tiny synthetic store and return the first job of a command line."""
    args = benchmark.parse([*FLAGS, *flags])
    jobs = benchmark.make_jobs(args, str(tmp_path / "store"))
    workload.write_synthetic(jobs, args.mix)
    return dataclasses.replace(jobs[0], **changes)


def base_sizes(pair: str) -> list[ModelSize]:
    """Count teacher and student at base size, without making their weights."""
    job = benchmark.make_jobs(benchmark.parse(["--pair", pair, "--device", "cpu"]), "unused")[0]
    with torch.device("meta"):
        return [
            size_of(build_network(ARCHITECTURES[kind], config))
            for kind, config in workload.configurations(job)
        ]


@pytest.mark.parametrize("pair", workload.PAIR_ROWS)
def test_both_steps_compute_the_same(pair, tmp_path):
    found = agreement.run_check(make_job(tmp_path, "--pair", pair, "--mix", "--length", "40"))
    torch.testing.assert_close(
        torch.tensor(found["losses"]), torch.tensor(found["reference_losses"]), rtol=1e-4, atol=0
    )
    assert found["gradient_cosine"] > 0.9999 and found["gradients_differ_by"] < 1e-4
    assert len(found["losses"]) == 2 and found["objectives"] == list(
        workload.PAIR_ROWS[pair].alphas
    )


@pytest.mark.parametrize("pair", ["bert", "gpt2"])
def test_the_tuned_step_computes_what_the_plain_one_does(pair, tmp_path):
    job = make_job(tmp_path, "--pair", pair, "--mix", "--length", "40", "--tuned")
    assert [job.kind, job.name.split(",")[0]] == ["tuned", "tuned step"]
    batches, found = agreement.checked_batches(workload.make_workload(job)), []
    for step in (reference_step.PlainStep, reference_step.TunedStep):
        teacher, student = workload.make_models(job, has_dropout=False)
        agreement.move_apart(student)
        step(job, teacher, student).accumulate(batches, [0, 1], 2)
        found.append(agreement.flat_gradient(student))
    assert (found[1] - found[0]).norm() < 1e-4 * found[0].norm()
    assert measuring.run_steps(job)["stages_s"]["teacher"] > 0


@pytest.mark.parametrize("pair", ["bert", "gpt2"])
def test_joined_passes_compute_the_same_and_are_a_variant(pair, tmp_path):
    flags = ["--pair", pair, "--mix", "--length", "40", "--micro_batches", "6"]
    args = benchmark.parse([*FLAGS, *flags, "--tokens_per_pass", "0", "400", "--pack_sequences"])
    jobs = benchmark.make_jobs(args, str(tmp_path / "store"))
    assert [(job.tokens_per_pass, job.packs) for job in jobs] == [
        (0, False),
        (400, False),
        (400, True),
    ]
    checks = benchmark.make_checks(args, jobs[0])
    assert list(checks) == ["fp32", "fp32 (joined to 400)", "fp32 (packed to 400)"]
    workload.write_synthetic(jobs, args.mix)
    for check in checks.values():
        found = agreement.run_check(check)
        assert found["gradient_cosine"] > 0.9999 and found["gradients_differ_by"] < 1e-4
    apart, *fewer = (workload.make_workload(job).updates(job, 2) for job in jobs)
    assert [len(update.passes) for update in apart] == [6, 6]
    assert all(len(update.passes) < 6 for updates in fewer for update in updates)
    tokens = [measuring.run_steps(job)["tokens"] for job in jobs]
    assert tokens[0] == tokens[1] == tokens[2]
    assert "--pack_sequences" in training_run.training_command(jobs[2], tmp_path, 2, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # raised by torch's compiler
def test_a_joined_update_launches_fewer_kernels(tmp_path):
    """A pass costs the launches of its models once; of the objectives, again where eager."""
    job = make_job(tmp_path, "--mix", "--length", "40", "--micro_batches", "8")
    apart, joined = launches.count(job, 0), launches.count(job, 800)
    assert apart["passes"] == 8 and joined["passes"] <= 3
    assert joined["launches"] < 0.7 * apart["launches"]
    for found, most in ((apart, 1.0), (joined, 0.8)):
        assert found["objectives compiled"] < most * found["launches"]
    assert launches.count(job, 0) == apart
    packed = launches.count(job, 800, packs=True)
    assert packed["shapes"] <= 2 and packed["N"] == "800, packed"
    assert packed["launches"] < 1.1 * joined["launches"]
    with launches.LaunchCounter() as counter:
        torch.ones(2, 3).t() + torch.ones(3, 2)  # two fills, a view, a sum
    assert counter.num == 3


def test_half_precision_computes_nearly_the_same(tmp_path):
    found = agreement.run_check(make_job(tmp_path, precision="bf16"))
    assert 1e-5 < found["gradients_differ_by"] < 0.1 and found["gradient_cosine"] > 0.99


@pytest.mark.long
@pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning"
)  # torch's own, when it loads its compiler
def test_a_compiled_step_is_checked_and_timed_by_stage(tmp_path):
    job = make_job(tmp_path, "--length", "20", kind="distiller", compiles=True)
    found = agreement.run_check(job)
    assert found["gradient_cosine"] > 0.9999 and found["gradients_differ_by"] < 1e-4
    times = measuring.run_steps(job)
    assert len(times["step_s"]) == 2 and min(times["stages_s"].values()) > 0


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_parts_of_a_compiled_step_are_compiled_and_the_references_are_not(tmp_path):
    job = make_job(tmp_path, compiles=True)
    step = workload.make_distiller(job, *workload.make_models(job))
    assert (
        measuring.entrance(step.teacher.base_model)
        == measuring.entrance(step.model.student.base_model)
        == "_compiled_call_impl"
    )
    plain = reference_step.PlainStep(job, *workload.make_models(job))
    assert measuring.entrance(plain.student.base_model) == "forward"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_reference_under_autocast_keeps_its_weights_and_computes_nearly_the_same(
    precision, tmp_path
):
    job = make_job(tmp_path, kind="reference", precision=precision)
    batches = agreement.checked_batches(workload.make_workload(job))
    found = {}
    for one in (job, dataclasses.replace(job, precision="fp32")):
        step = reference_step.PlainStep(one, *workload.make_models(one, has_dropout=False))
        found[one.precision] = step.launch(iter(batches), [0, 1], 2).read()
        assert {p.dtype for model in (step.teacher, step.student) for p in model.parameters()} == {
            torch.float32
        }
        assert all(torch.isfinite(p).all() for p in step.student.parameters())
    rounded, exact = (found[name].losses_MK for name in (precision, "fp32"))
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(
        rounded, exact, rtol=0.05, atol=0.05
    )  # 8 bits (bf16) in each product, over a sum of many
    assert found[precision].grad_norm == pytest.approx(
        found["fp32"].grad_norm, rel=0.1
    )  # fp16's is unscaled


def test_variants_are_those_asked_for():
    flags = (
        "--batch_size 2 --length 20 --precision fp32 bf16 --reference --reference_precision bf16"
        " --compile --end_to_end"
    )
    jobs = benchmark.make_jobs(benchmark.parse([*FLAGS, *flags.split()]), "unused")
    assert [job.name.removesuffix(", 1 x 2 x 20") for job in jobs] == [
        "2019 step, fp32",
        "2019 step in autocast, bf16",
        *(
            f"Distiller.step{how}, {precision}"
            for precision in ("fp32", "bf16")
            for how in ("", " compiled")
        ),
        *(
            f"train.py{how}, {precision}"
            for precision in ("fp32", "bf16")
            for how in ("", " compiled")
        ),
    ]
    for job in jobs[-4:]:
        command = training_run.training_command(job, tmp := Path("nowhere"), 1, 1)
        assert str(tmp / "run") in command and ("--compile" in command) == job.compiles
    plain = benchmark.make_jobs(benchmark.parse([*FLAGS, "--reference"]), "unused")
    assert [(job.kind, job.precision, job.compiles) for job in plain] == [
        ("reference", "fp32", False),
        ("distiller", "fp32", False),
    ]


def test_each_piece_of_the_cpu_kernels_is_a_variant_and_a_check():
    flags = "--length 20 --precision fp32 bf16 --compile --end_to_end --without tied dropout tied"
    args = benchmark.parse([*FLAGS, *flags.split()])
    jobs = benchmark.make_jobs(args, "unused")
    names = [job.name.split(",")[0] for job in jobs if job.precision == "bf16"]
    assert names == [
        "Distiller.step",
        "Distiller.step compiled",
        "Distiller.step without tied",
        "Distiller.step without dropout",
        "train.py",
        "train.py compiled",
    ]
    checks = benchmark.make_checks(args, jobs[0])
    ways = ["", " (compiled)", " (without tied)", " (without dropout)"]
    assert list(checks) == [f"{precision}{way}" for precision in ("fp32", "bf16") for way in ways]
    assert [job.without for job in checks.values()] == [None, None, "tied", "dropout"] * 2
    assert {job.kind for job in checks.values()} == {"check"}


def pieces_called() -> list[str]:
    """Call what the pieces handle, as a model does; name the piece of each call that it handled."""
    inputs, weight = torch.ones(2, 3, requires_grad=True), torch.ones(3, 3)
    heads = torch.ones(1, 2, 3, 4, requires_grad=True)
    with cpu.faster():
        results = [
            ("dropout", F.dropout(inputs, 0.5)),
            ("attention", F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5)),
            ("products", F.linear(inputs, weight)),
            ("products", torch.addmm(torch.ones(3), inputs, weight)),
        ]
    ours = torch.autograd.function.BackwardCFunction  # of an autograd.Function in Python
    return [piece for piece, result in results if isinstance(result.grad_fn, ours)]


def test_the_flags_offer_what_the_tables_have():
    assert list(options.PAIRS) == list(workload.PAIR_ROWS)
    assert list(options.PRECISIONS) == list(DTYPES)
    assert list(options.PIECES) == list(cpu_pieces.PIECES)


@pytest.mark.parametrize("piece", cpu_pieces.PIECES)
def test_a_piece_that_is_off_is_not_called_and_the_others_are(piece, tmp_path, monkeypatch):
    look_ups = []
    look_up = cpu.TiedGradient.look_up

    def counted(*args, **kwargs):
        look_ups.append(args)
        return look_up(*args, **kwargs)

    monkeypatch.setattr(cpu.TiedGradient, "look_up", counted)
    monkeypatch.setattr(cpu, "MKL_IS_FASTER", False)
    handled = ["dropout", "attention", "products", "products"]
    job = make_job(tmp_path, "--length", "20", without=piece)
    with cpu_pieces.without(piece):
        assert pieces_called() == [one for one in handled if one != piece]
        found = agreement.run_check(job)
    assert found["gradient_cosine"] > 0.9999 and found["gradients_differ_by"] < 1e-4
    assert bool(look_ups) == (piece != "tied")
    assert pieces_called() == handled and workload.DistillationModel.tied_weight is not None


def test_switching_a_piece_off_on_a_gpu_is_refused():
    args = benchmark.parse([*FLAGS, "--without", "tied"])
    args.device = "cuda"
    assert benchmark.number_problems(args, 512) == [
        "--without tied: serves a CPU only; leave it out, or take --device cpu"
    ]


def test_a_cpu_is_warmed_up_by_three_updates_unless_told_otherwise():
    flags = ["--device", "cpu"]
    assert (
        benchmark.parse(flags).warmup == 3
        and benchmark.parse([*flags, "--warmup", "0"]).warmup == 0
    )


def test_a_reference_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        reference_step.PlainStep,
        "_cosine",
        lambda self, student, teacher, real: student.square().mean(),
    )
    with pytest.raises(InputError, match="nothing is timed"):
        agreement.run_check(make_job(tmp_path))


@pytest.mark.parametrize(("pair", "expected"), [("bert", 640), ("mbert", 1188)])
def test_model_flops_are_those_counted_by_hand(pair, expected):
    teacher, student = base_sizes(pair)
    vocab_size, lengths_B = workload.teacher_config(pair, "base").vocab_size, np.full(3, 256)
    layer, head = 2 * 12 * 768**2 + 4 * 256 * 768, 2 * (768**2 + vocab_size * 768)
    by_hand = (12 * layer + head) + 3 * (6 * layer + head)
    assert update_flops(teacher, student, lengths_B) / lengths_B.sum() == by_hand
    assert abs(by_hand / 1e6 - expected) < 1


def test_model_flops_of_the_parts_and_of_the_other_pairs():
    teacher, student = base_sizes("bert")
    one_B = np.array([256])
    assert (
        round(teacher.forward_flops(one_B) / 256e6) == 227
        and round(3 * student.forward_flops(one_B) / 256e6) == 413
    )
    for pair, has_transform in (("roberta", True), ("gpt2", False)):
        for size in base_sizes(pair):
            vocab_size = workload.teacher_config(pair, "base").vocab_size
            assert size.in_layers == size.num_layers * 12 * 768**2
            assert size.in_head == 768 * vocab_size + 768**2 * has_transform


@pytest.mark.parametrize(
    ("kind", "precision"), [("distiller", "fp32"), ("distiller", "bf16"), ("reference", "fp32")]
)
def test_a_variant_is_timed_whole_and_by_stage(kind, precision, tmp_path):
    job = make_job(
        tmp_path, "--micro_batches", "2", "--length", "20", kind=kind, precision=precision
    )
    found = measuring.run_steps(job)
    assert (
        found["tokens"] == [2 * 5 * 20] * 2
        and len(found["step_s"]) == 2
        and found["skipped_updates"] == 0
    )
    assert set(found["stages_s"]) == set(measuring.STAGES) and min(found["stages_s"].values()) > 0
    assert 0 < found["memory"]["models"] <= found["memory"]["peak"]


def test_time_inside_another_stage_is_counted_once():
    watch = measuring.Stopwatch("cpu")
    inner = watch.wrap("inner", lambda: sum(range(10**5)))
    whole = watch.wrap("whole", watch.wrap("outer", lambda: [inner(), inner()]))
    started = clock_s("cpu")
    assert whole()[0] == sum(range(10**5))
    elapsed = clock_s("cpu") - started
    assert (
        set(watch.seconds) == {"inner", "outer", "whole"}
        and 0 < sum(watch.seconds.values()) <= elapsed
    )


def test_shares_and_ratios_come_from_medians(tmp_path):
    rows = []
    for kind, step_s in (("reference", [2.0, 4.0, 8.0]), ("distiller", [1.0, 1.0, 9.0])):
        job = dataclasses.replace(make_job(tmp_path), kind=kind)
        one = {
            "step_s": step_s,
            "tokens": [100] * 3,
            "flops": [800] * 3,
            "skipped_updates": 0,
            "stages_s": None,
            "memory": None,
        }
        rows.append(summary.merged(job, [one, one]))
    summary.add_shares(
        rows, {"fp32": {"matmul_flops": {"256": 1000.0, "512": 1600.0}}}, "NVIDIA H100 80GB HBM3"
    )
    assert [row["ratio"] for row in rows] == [1.0, 4.0] and [
        row["mfu_measured"] for row in rows
    ] == [0.125, 0.5]
    assert [row["ratio_autocast"] for row in rows] == [
        None,
        None,
    ] and "in autocast" not in summary.main_table(rows)
    assert rows[1]["mfu_nominal"] == 800 / 67e12 and rows[0]["tokens_s"] == {
        "median": 25.0,
        "min": 12.5,
        "max": 50.0,
    }
    assert nominal_peak("NVIDIA H200", "bf16") == 989e12 and nominal_peak("cpu", "fp32") is None


def test_ratios_to_the_reference_under_autocast_are_of_the_same_precision(tmp_path):
    rates = {
        ("reference", "fp32"): 10,
        ("reference", "bf16"): 25,
        ("distiller", "fp32"): 30,
        ("distiller", "bf16"): 50,
        ("distiller", "fp16"): 40,
    }
    rows = []
    for (kind, precision), rate in rates.items():
        job = make_job(tmp_path, kind=kind, precision=precision)
        one = {
            "step_s": [1.0],
            "tokens": [rate],
            "flops": [1],
            "skipped_updates": 0,
            "stages_s": None,
            "memory": None,
        }
        rows.append(summary.merged(job, [one]))
    summary.add_shares(rows, {p: {"matmul_flops": {"256": 1.0}} for p in DTYPES}, "cpu")
    assert [row["ratio"] for row in rows] == [1, 2.5, 3, 5, 4]
    assert [row["ratio_autocast"] for row in rows] == [None, 1, None, 2, None]
    head, _, *lines = summary.main_table(rows).splitlines()
    assert head.rstrip(" |").endswith("x reference in autocast")
    assert [line.split("|")[-2].strip() for line in lines] == ["-", "1.00", "-", "2.00", "-"]


def test_running_out_of_memory_names_the_micro_batch_and_the_flag(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)
    assert jobs.is_out_of_memory(caught.value) and not jobs.is_out_of_memory(
        RuntimeError("shapes differ")
    )
    said = jobs.out_of_memory(make_job(tmp_path, "--batch_size", "7", "--length", "20"))
    assert "micro-batches of up to 140 tokens" in said and "lower --batch_size" in said


BAD_FLAGS = {
    "pair": (["--pair", "t5"], "invalid choice: 't5'"),
    "length": (["--length", "513"], "--length 513: expected 12 to 512"),
    "roberta's length": (
        ["--pair", "roberta", "--length", "513"],
        "--length 513: expected 12 to 512",
    ),
    "short length": (["--length", "11"], "--length 11: expected 12 to 512"),
    "batch size": (["--batch_size", "4", "0"], "--batch_size 0: expected at least 1"),
    "passes": (
        ["--length", "64", "--tokens_per_pass", "0", "63"],
        "--tokens_per_pass 63: expected 0, or 64, the longest sequence, or more",
    ),
    "packing": (
        ["--pack_sequences"],
        "--pack_sequences: packs joined passes; give --tokens_per_pass",
    ),
    "rounds": (["--rounds", "0"], "--rounds 0: expected at least 1"),
    "updates": (["--updates", "-1"], "--updates -1: expected at least 1"),
    "warm-up": (["--warmup", "-1"], "--warmup -1: expected 0 or more"),
    "data file": (["--data_file", "nowhere"], "--data_file nowhere"),
    "plot": (["--plot", "plot.pdf"], "--plot plot.pdf: expected a name that ends in .png"),
    "json": (["--json", "/"], "--json /: is a folder"),
    "reference's precision": (
        ["--reference_precision", "bf16"],
        "--reference_precision without --reference: add it",
    ),
    "piece": (["--without", "loss"], "invalid choice: 'loss'"),
    "unknown flag": (["--referense"], "did you mean --reference?"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_are_one_line(name, status_and_errors):
    flags, message = BAD_FLAGS[name]
    status, errors = status_and_errors(benchmark.main, ["--device", "cpu", *flags])
    assert status == 2 and len(errors) == 1 and message in errors[0]


def test_what_the_machine_lacks_is_one_line(status_and_errors):
    if not torch.cuda.is_available():
        assert status_and_errors(benchmark.main, ["--device", "cuda"])[1][0].startswith(
            "--device cuda: torch finds no GPU"
        )
    if "fp16" not in benchmark.precisions_of("cpu"):
        status, errors = status_and_errors(
            benchmark.main, ["--device", "cpu", "--precision", "fp16"]
        )
        assert status == 2 and errors == [
            "--precision fp16: this CPU does not compute in it; take bf16, or a GPU"
        ]


def test_a_machine_that_cannot_compile_is_one_line(status_and_errors, monkeypatch):
    def fail(function):
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(torch, "compile", fail)
    status, errors = status_and_errors(benchmark.main, [*FLAGS, "--compile"])
    assert status == 2 and len(errors) == 1
    assert (
        errors[0].startswith("--compile: torch.compile fails on this machine (")
        and "or leave it out" in errors[0]
    )


PAIRS = ["bert", "mbert", "gpt2", "roberta"]
NOTING = """#!/usr/bin/env bash
case "$*" in
    *check_compiler*) exit "$CAN_NOT_COMPILE" ;;
    scripts/benchmark.py*) echo "$*" >> "$NOTED" ;;
esac
"""


TYPED = ["bert-as-typed", "bert-packed"]


@pytest.mark.parametrize("can_compile", [True, False])
@pytest.mark.parametrize(
    "device, stage, names",
    [
        ("cpu", None, [*TYPED, "bert", "bert-end-to-end"]),
        ("cuda", None, [*TYPED, *PAIRS, "bert-mix", "bert-end-to-end"]),
        ("cuda", 1, TYPED),
        ("cuda", 4, ["gpt2"]),
        ("cuda", 6, ["bert-mix"]),
    ],
)
def test_the_command_lines_of_the_gpu_script_are_right(device, stage, names, can_compile, tmp_path):
    """A stub of the interpreter writes the command lines down; the benchmark parses them."""
    for name in (
        "scripts/benchmark_gpu.sh",
        "scripts/environment.sh",
        "requirements.txt",
        "requirements-dev.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(NOTING)
    python.chmod(0o755)
    flags = ["--cpu"] if device == "cpu" else []
    flags += [] if stage is None else ["--stage", str(stage)]
    done = run_process(
        "bash",
        tmp_path / "scripts" / "benchmark_gpu.sh",
        *flags,
        tmp_path / "out",
        timeout_s=60,
        NOTED=str(tmp_path / "noted"),
        CAN_NOT_COMPILE=str(int(not can_compile)),
    )
    assert done.returncode == (0 if can_compile else 2), done.stderr
    lines = [line.split()[1:] for line in (tmp_path / "noted").read_text().splitlines()]
    assert [Path(line[line.index("--json") + 1]).stem for line in lines] == names
    for name, line in zip(names, lines, strict=True):
        assert line[line.index("--device") + 1] == device
        args = benchmark.parse([*line, "--device", "cpu"])  # the last one counts
        is_compiled = can_compile and not (device == "cpu" and name in TYPED)
        assert args.compile == is_compiled and args.end_to_end == (name == "bert-end-to-end")
        assert args.pack_sequences == (name == "bert-packed")
        assert args.reference == (name in (*PAIRS, "bert-mix"))
        assert args.reference_precision == (["fp32", "bf16"] if args.reference else ["fp32"])


def test_what_the_gpu_script_imports_is_there():
    script = (ROOT / "scripts" / "benchmark_gpu.sh").read_text(encoding="utf-8")
    lines = re.findall(r"-c '(import [^']*check_compiler[^']*)'", script)
    assert len(lines) == 1
    imports = [n for n in ast.walk(ast.parse(lines[0])) if isinstance(n, ast.ImportFrom)]
    assert [(n.module, n.names[0].name) for n in imports] == [
        (check_compiler.__module__, check_compiler.__name__)
    ]


@pytest.mark.slow
def test_a_file_of_another_vocabulary_is_one_line(tmp_path, status_and_errors):
    args = benchmark.parse(["--device", "cpu", "--length", "20"])
    workload.write_synthetic(benchmark.make_jobs(args, str(tmp_path / "store")))
    status, errors = status_and_errors(
        benchmark.main, [*FLAGS, "--data_file", str(tmp_path / "store")]
    )
    assert (
        status == 2
        and len(errors) == 1
        and "--data_file" in errors[0]
        and "--pair bert" in errors[0]
    )


@pytest.mark.slow
def test_the_whole_program_prints_and_writes(tmp_path, capsys):
    paths = {"json": tmp_path / "found.json", "plot": tmp_path / "found.png"}
    outputs = ["--json", str(paths["json"]), "--plot", str(paths["plot"])]
    benchmark.main(
        [
            *FLAGS,
            "--length",
            "24",
            "--mix",
            "--sweep",
            "--batch_size",
            "3",
            "--precision",
            "fp32",
            "--reference",
            "--without",
            "tied",
            "--end_to_end",
            *outputs,
        ]
    )
    found = json.loads(paths["json"].read_text())
    assert [(row["kind"], row["without"]) for row in found["rows"]] == [
        ("reference", None),
        ("distiller", None),
        ("distiller", "tied"),
        ("train.py", None),
    ]
    assert set(found["check"]) == {"fp32", "fp32 (without tied)"}
    assert all(
        row["ratio"] > 0 and row["mfu_measured"] > 0 and row["mfu_nominal"] is None
        for row in found["rows"]
    )
    assert (
        found["rows"][0]["tokens"] == found["rows"][1]["tokens"]
        and len(found["rows"][3]["step_s"]) == 3
    )
    assert paths["plot"].read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for words in (
        "Distiller in fp32 and the 2019 step",
        "Ceilings, fp32",
        "| 2019 step, fp32",
        "| train.py, fp32",
        "separate pass",
    ):
        assert words in printed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", DTYPES)
def test_a_gpu_is_measured(precision, tmp_path):
    job = make_job(tmp_path, kind="distiller", precision=precision, device="cuda")
    agreement.run_check(job)
    found, ceilings = measuring.run_steps(job), measuring.run_ceilings(job)
    assert (
        found["memory"]["peak"] > found["memory"]["models"] > 0
        and min(ceilings["matmul_flops"].values()) > 0
    )
