"""--plan tells a run's counts and bytes exactly, writes nothing, and refuses what cannot fit."""

import collections
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_process
from stand_ins import ROOT

import train
from distil.system.memory import ADDRESSES, RESIDENT, Limit, memory_limits
from distil.training import plan_verdict, post_mortem, rehearsal
from distil.training.plan_process import watch_child
from distil.training.plan_verdict import FileSizes, Needs, disk_problem, disk_use, memory_problem
from distil.training.planning import naming_limits
from grouped_batch_sampler import PlannedBatch
from utils import InputError, is_out_of_memory

EVERY = {"checkpoint_interval": 7, "log_interval": 5, "gradient_accumulation_steps": 3}
GIVEN = {"plan": "json", "tokens_per_second": 1000}  # nothing is timed


def plan_of(argv: list[str], capsys) -> dict:
    capsys.readouterr()
    train.main(argv)
    return json.loads(capsys.readouterr().out)


def listing(*folders: Path) -> dict[str, tuple]:
    found = [path for folder in folders for path in [folder, *folder.rglob("*")]]
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns, p.lstat().st_ino) for p in found}


def bytes_of_files(folder: Path, *patterns: str) -> int:
    paths = [path for pattern in patterns for path in folder.rglob(pattern)]
    return sum({path.stat().st_ino: path.stat().st_size for path in paths}.values())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param(
            *("bert", {"n_epoch": 2, "keep_checkpoints": 2, "keep_epochs": 1}),
            marks=pytest.mark.long,
        ),
        ("gpt2", {"max_steps": 9, "batch_size": 3}),
        pytest.param(*("bert", {"max_tokens": 300, "eval_interval": 6}), marks=pytest.mark.long),
    ],
)
def test_a_plan_counts_what_the_run_then_does(kind, changes, world, tmp_path, capsys):
    changes = {**EVERY, **changes}
    if "eval_interval" in changes:
        changes["eval_data_file"] = world.data(kind)
    run = tmp_path / "run"
    plan = plan_of(world.flags(kind, run, **changes, **GIVEN), capsys)
    assert not run.exists()
    train.main(world.flags(kind, run, **changes))

    trainer = train.set_up(
        train.parse_config(world.flags(kind, tmp_path / "other", **changes)), train.Runtime()
    )
    batches = list(trainer.sampler.micro_batches(trainer.num_micro_batches))
    ids = [trainer.dataset.collate(batch.sequences) for batch in batches]
    assert plan["micro_batches"] == len(batches)
    assert plan["real_tokens"] == sum(int(lengths_B.sum()) for _, lengths_B in ids)
    assert plan["padded_tokens"] == sum(ids_BT.numel() for ids_BT, _ in ids)
    assert plan["hours"] == pytest.approx(plan["real_tokens"] / 1000 / 3600)

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert plan["updates"] == metrics[-1]["update"]
    assert plan["evaluations"] == sum("eval/loss" in line for line in metrics)
    found = sorted((run / "checkpoints").iterdir())
    sizes = [bytes_of_files(folder, "*.safetensors") for folder in found]
    assert len(found) == plan["disk"]["kept"] and set(sizes) == {plan["checkpoint_bytes"]}
    # The headers of models name their format: some bytes more each.
    whole = bytes_of_files(run, "*.safetensors", "*.pth", "*.bin")
    assert 0 <= whole - plan["disk"]["final"] < 200
    assert plan["disk"]["peak"] >= plan["disk"]["final"]


def test_a_measured_plan_has_all_parts_and_leaves_no_trace(world, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = listing(tmp_path, world.folder)
    flags = {"plan": True, "price_per_hour": 2, "eval_data_file": world.data("bert")}
    argv = world.flags("bert", tmp_path / "run", **flags)
    train.main(argv)
    lines = capsys.readouterr().out.splitlines()
    names = ["run", "updates", "tokens", "rate", "time", "memory", "checkpoints", "disk", "cost"]
    assert [line.split()[0] for line in lines] == names
    assert "measured over" in lines[3] and "at 2 an hour" in lines[8]

    plan = plan_of([*argv, "--plan", "json"], capsys)
    parts = {"start", "training", "logs", "evaluations", "checkpoints", "end"}
    for times in (plan["time_s"], plan["cpu_s"]):
        assert set(times) == parts
        assert all(times[name] > 0 for name in parts), times
    assert plan["hours"] * 3600 == pytest.approx(sum(plan["time_s"].values()))
    assert plan["cost"] == pytest.approx(2 * plan["hours"])
    assert plan["memory"]["main"] > 1e8
    assert listing(tmp_path, world.folder) == before


def test_the_program_plans_in_a_child_and_writes_nothing(world, tmp_path):
    here, scratch = tmp_path / "here", tmp_path / "scratch"
    here.mkdir()
    scratch.mkdir()
    before = listing(here, world.folder)
    argv = world.flags("gpt2", here / "run", **GIVEN)
    settings = {"cwd": here, "TMPDIR": str(scratch)}
    done = run_process(sys.executable, ROOT / "train.py", *argv, **settings)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["updates"] > 0
    assert listing(here, world.folder) == before and not list(scratch.iterdir())


def test_several_processes_take_larger_updates_and_share_the_time(world, tmp_path, capsys):
    plans = [
        plan_of(world.flags("bert", tmp_path / "run", n_gpu=num, plan="json"), capsys)
        for num in (1, 4)
    ]
    one, four = plans
    assert four["num_processes"] == 4 and four["micro_batches"] == one["micro_batches"]
    assert four["updates"] == -(-one["micro_batches"] // 8) < one["updates"]


def test_a_resumed_run_plans_what_is_left(world, tmp_path, capsys):
    run = tmp_path / "run"
    train.main(world.flags("bert", run, checkpoint_interval=8))
    last = max((run / "checkpoints").iterdir())
    shutil.rmtree(last)
    (run / "pytorch_model.bin").unlink()
    done = json.loads((max((run / "checkpoints").iterdir()) / "state.json").read_text())
    before = listing(run)
    whole = plan_of(world.flags("bert", tmp_path / "new", **GIVEN), capsys)
    left = plan_of(world.flags("bert", run, resume="required", **GIVEN), capsys)
    assert left["micro_batches"] == whole["micro_batches"] - done["micro_batches"] > 0
    assert left["updates"] == whole["updates"] - done["step"]
    assert listing(run) == before


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------


def test_a_full_disk_is_refused_with_the_flag_to_lower(
    world, tmp_path, status_and_errors, monkeypatch, capsys
):
    argv = world.flags("bert", tmp_path / "run", n_epoch=4, **EVERY, **GIVEN)
    argv += ["--keep_checkpoints", "5"]
    plan = plan_of(argv, capsys)
    usage = collections.namedtuple("usage", "total used free")
    for free, named in (
        (plan["disk"]["peak"], None),
        (plan["disk"]["peak"] - 1, "lower --keep_checkpoints to 2"),
        (plan["disk"]["peak"] // 3, "name another volume"),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
        status, errors = status_and_errors(train.main, argv)
        assert status == (0 if named is None else 2)
        assert len(errors) == (named is not None) and all(named in line for line in errors)
        assert not (tmp_path / "run").exists()


def config_of(world, tmp_path, **changes) -> train.TrainConfig:
    return train.parse_config(world.flags("bert", tmp_path / "run", plan="text", **changes))


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        (
            {"max_tokens": 500, "tokens_per_pass": 900, "activation_checkpointing": True},
            "lower --tokens_per_pass (900)",
        ),
        ({"max_tokens": 500}, "lower --max_tokens (500), or add --activation_checkpointing"),
        ({"batch_size": 7}, "lower --batch_size (7), or add --activation_checkpointing"),
        ({"batch_size": 1, "max_length": 40}, "lower --max_length (40), or add"),
        ({"batch_size": 7, "activation_checkpointing": True}, "lower --batch_size (7)"),
    ],
)
def test_too_little_memory_is_refused_with_the_flag_to_lower(changes, flag, world, tmp_path):
    config = config_of(world, tmp_path, **changes)
    limit = Limit("the control group", 10**9, RESIDENT)
    assert memory_problem(config, [limit], Needs({RESIDENT: 10**9})) is None
    said = memory_problem(config, [limit], Needs({RESIDENT: 2 * 10**9}))
    assert said.startswith("--plan: the run takes 2 GB of memory, the control group is 1 GB; ")
    assert said.split("; ")[1].startswith(flag)
    smaller = memory_problem(config, [limit], Needs({RESIDENT: 2 * 10**9}, fixed=15 * 10**8))
    assert "--student_config" in smaller and "--batch_size" not in smaller


def test_a_failed_allocation_becomes_the_verdict(world, tmp_path):
    config = config_of(world, tmp_path)
    with (
        pytest.raises(InputError, match="out of memory.*lower --batch_size"),
        naming_limits(config),
    ):
        torch.empty(2**60, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="other"), naming_limits(config):
        raise RuntimeError("other")


def test_a_measuring_process_is_ended_before_memory_is(world, tmp_path, capsys):
    config = config_of(world, tmp_path)
    limit = Limit("the control group", 150 * 2**20, RESIDENT)
    program = tmp_path / "grows.py"
    program.write_text("import time; kept = [b'x' * 2**24 for _ in range(64)]; time.sleep(60)")
    started = time.monotonic()
    assert watch_child(config, program, [], [limit]) == 2
    assert time.monotonic() - started < 30
    (line,) = capsys.readouterr().err.splitlines()
    assert "the control group is 157 MB; lower --batch_size" in line


def test_a_measuring_process_that_is_killed_is_reported(world, tmp_path, capsys):
    config = config_of(world, tmp_path)
    limit = Limit("the limit of addresses (ulimit -v)", 10**9, ADDRESSES)
    program = tmp_path / "killed.py"
    program.write_text("import os, sys; sys.argv[1:] or os.kill(os.getpid(), 9); sys.exit(7)")
    assert watch_child(config, program, [], [limit]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "out of memory (ended by signal 9) within the limit of addresses (ulimit -v), 1 GB" in line
    )
    assert watch_child(config, program, ["more"], [limit]) == 7


def test_out_of_memory_on_a_cpu_names_the_micro_batch():
    passes = [[PlannedBatch(0, 0, np.array([0, 2]))]]
    with (
        pytest.raises(InputError, match="out of memory in a micro-batch of 2 x 9 = 18"),
        post_mortem.naming_out_of_memory(passes, np.array([3, 5, 9])),
    ):
        torch.empty(2**60, dtype=torch.int8)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


BAD = {
    "a price without a plan": ({"price_per_hour": 3}, "--price_per_hour 3 without --plan: add it"),
    "a rate without a plan": ({"tokens_per_second": 9}, "--tokens_per_second 9 without --plan"),
    "a rate of 0": ({"plan": "text", "tokens_per_second": 0}, "--tokens_per_second 0.0: expected"),
    "a negative price": ({"plan": "text", "price_per_hour": -1}, "--price_per_hour -1.0: expected"),
    "another form": ({"plan": "yaml"}, "invalid choice: 'yaml'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_of_a_plan_are_one_line(name, world, tmp_path, status_and_errors):
    changes, expected = BAD[name]
    argv = world.flags("bert", tmp_path / "run", **changes)
    status, errors = status_and_errors(train.main, argv)
    assert status == 2 and len(errors) == 1 and expected in errors[0]


def test_a_plan_under_a_launcher_names_the_command(world, tmp_path, status_and_errors):
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    argv = world.flags("bert", tmp_path / "run", plan="text")
    status, errors = status_and_errors(train.main, argv)
    assert status == 2 and len(errors) == 1
    assert "python train.py --plan --n_gpu 2" in errors[0]


# --------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------


def test_the_flags_of_a_plan_are_no_flags_of_the_run(world, tmp_path):
    flags = train.as_flags(config_of(world, tmp_path, price_per_hour=1))
    assert not {"plan", "price_per_hour", "tokens_per_second"} & set(flags)


def test_costs_by_shape_are_found_and_never_negative():
    generator = np.random.default_rng(0)
    shapes = generator.integers(1, 200, (40, 2))
    features = rehearsal.features(shapes)
    for truth in ([0.1, 2e-4, 3e-7], [0.0, 1e-4, 0.0], [0.05, 0.0, 0.0]):
        found = rehearsal.fit_costs(features, features @ np.array(truth))
        assert np.allclose(features @ found, features @ np.array(truth), rtol=1e-6)
    falling = rehearsal.fit_costs(features, 10 - features[:, 1] * 1e-5)
    assert (falling >= 0).all()


def test_launches_stand_for_small_and_large_micro_batches():
    sizes = np.stack([np.full(1000, 5), np.arange(1000) % 100 + 10, np.ones(1000, int)], axis=1)
    groups = rehearsal.choose_launches(sizes, 3, 50)
    padded = [int(sizes[places].prod(axis=1).sum()) for places in groups]
    assert len(groups) == 6 and padded == sorted(padded) and padded[-1] > 2 * padded[0]
    assert all(len(places) == 3 for places in groups)
    assert groups != rehearsal.choose_launches(sizes, 3, 50, turn=1)
    updates = rehearsal.choose_launches(sizes, 50, 50)
    assert [places[0] % 50 for places in updates] == [0] * 6
    assert all(places == list(range(places[0], places[0] + 50)) for places in updates)
    assert rehearsal.choose_launches(sizes[:7], 50, 50) == [list(range(7))]


def write_group(root: Path, lines: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": lines, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_tightest_control_group_limits(tmp_path):
    top = "sys/fs/cgroup"
    second = write_group(
        tmp_path / "2",
        "0::/jobs/mine\n",
        {
            f"{top}/jobs/mine/memory.max": "max\n",
            f"{top}/jobs/memory.max": "3000000000\n",
            f"{top}/jobs/memory.current": "900000000\n",
            f"{top}/jobs/memory.stat": "anon 5\ninactive_file 400000000\n",
        },
    )
    first = write_group(
        tmp_path / "1",
        "5:cpu:/\n4:memory:/mine\n",
        {
            f"{top}/memory/mine/memory.limit_in_bytes": "2500000000\n",
            f"{top}/memory/mine/memory.usage_in_bytes": "100000000\n",
            f"{top}/memory/mine/memory.stat": "total_inactive_file 0\n",
            f"{top}/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            f"{top}/memory/memory.usage_in_bytes": "1\n",
            f"{top}/memory/memory.stat": "",
        },
    )
    for root, left in ((second, 2_500_000_000), (first, 2_400_000_000)):
        (limit,) = [one for one in memory_limits(root) if one.name == "the control group"]
        own = limit.num_bytes - left  # what this process has comes on top
        assert limit.field == RESIDENT and 10**7 < own < 10**10
    assert memory_limits(tmp_path / "none") == [
        one for one in memory_limits(tmp_path / "none") if one.field != RESIDENT
    ]


def test_files_of_one_update_count_once_and_old_checkpoints_go_late(world, tmp_path):
    sizes = FileSizes(first_checkpoint=10, checkpoint=30, plain=7, model=8)
    config = config_of(world, tmp_path, keep_checkpoints=2)
    use = disk_use(sizes, [0, 4, 8, 9], [5, 9], config)
    assert use.kept == 2
    assert use.final == 2 * 30 + 2 * 7 + 8  # checkpoint.pth is the last epoch's
    assert use.peak == 3 * 30 + 3 * 7
    between = disk_use(sizes, [0, 4, 9], [5], config)
    assert between.final == 2 * 30 + 2 * 7 + 8 and between.peak == 10 + 2 * 30 + 3 * 7
    assert disk_problem(config, use.peak, use, {}) is None
    assert "name another volume" in disk_problem(config, use.peak - 1, use, {"--x to 1": use})


@pytest.mark.parametrize(
    ("num", "text"), [(999, "999 B"), (1500, "1.5 kB"), (801_234_567, "801 MB"), (2e13, "20 TB")]
)
def test_sizes_have_three_digits(num, text):
    assert plan_verdict.size(num) == text


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't start new thread"), OSError(12, "no memory")]
)
def test_a_program_without_memory_left_ends_with_one_line(error, status_and_errors):
    """Under a limit of addresses a thread (TensorBoard's) may be what finds no room."""

    def main(argv):
        raise error

    status, lines = status_and_errors(main, [])
    assert status == 2 and len(lines) == 1 and "memory" in lines[0]
