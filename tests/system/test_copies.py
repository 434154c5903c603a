"""srun and mpirun without torchrun: one line with the command; shells of a job are left alone."""

import pytest

import run_task
import train
from distil.system import copies
from distil.system.launch import read_launcher, start_runtime
from distil.system.versions import version_notice
from utils import InputError, setup_logging

# What SLURM 20 to 25 set: in a task of `srun -n 4`, and in the script of `sbatch -n 4`.
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NNODES": "1"}
BATCH = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1"}
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}
TORCHRUN |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}

REFUSED = {
    "srun": (STEP, "srun started 4 copies", "srun --ntasks=1 --ntasks-per-node=1 torchrun"),
    "two machines": (
        STEP | {"SLURM_STEP_NUM_NODES": "2"},
        "srun started 4 copies",
        "srun --ntasks=2 --ntasks-per-node=1 torchrun --nnodes=2 --rdzv_backend=c10d"
        " --rdzv_endpoint=FIRST_MACHINE:29500 --nproc_per_node=2 ",
    ),
    "a step of a larger job": (
        STEP | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"},
        "srun started 2 copies",
        "torchrun --standalone --nproc_per_node=2 ",
    ),
    "sbatch": (
        BATCH,
        "SLURM_NTASKS is 4, this is one process",
        "torchrun --standalone --nproc_per_",
    ),
    "Open MPI": (
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
        "MPI started 2 copies",
        "`torchrun --standalone --nproc_per_node=2 ",
    ),
    "MPICH": (
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
        "MPI started 2 copies",
        "`torchrun --standalone ",
    ),
}
ALONE = {
    "no SLURM": {},
    "a task of one": STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
    "sbatch of one": BATCH | {"SLURM_NTASKS": "1"},
    "sbatch without tasks": {name: v for name, v in BATCH.items() if name != "SLURM_NTASKS"},
    "salloc on the login machine": JOB,
    "salloc with an interactive step": STEP | {"SLURM_STEP_NUM_TASKS": "1"},
    "srun --pty": STEP | {"SLURM_PTY_PORT": "40000"},
    "runs that are independent": {name: v for name, v in STEP.items() if name != "SLURM_PROCID"},
    "nonsense": {"SLURM_PROCID": "zero", "SLURM_NTASKS": "4(x2)", "PMI_SIZE": "", "PMI_RANK": "-"},
    "mpirun of one": {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_copies_are_refused_with_the_command_to_start_instead(name):
    environment, what, command = REFUSED[name]
    with pytest.raises(InputError) as caught:
        read_launcher(environment, -1)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(what) and "without RANK and LOCAL_RANK each runs alone; start `" in line
    assert command in line


@pytest.mark.parametrize("name", ALONE)
def test_shells_of_a_job_and_single_tasks_run_alone(name):
    assert read_launcher(ALONE[name], -1) is None


@pytest.mark.parametrize("name", REFUSED)
def test_torchrun_within_a_job_is_followed(name):
    assert read_launcher(REFUSED[name][0] | TORCHRUN, -1) == (0, 4, 0, 4)


def test_the_first_copy_alone_says_it(world, tmp_path, monkeypatch, status_and_errors, capsys):
    monkeypatch.setattr(copies, "FIRST_COPY_S", 0)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    flags = world.flags("bert", tmp_path / "run", n_gpu=0)
    status, (error,) = status_and_errors(train.main, flags)
    assert status == 2 and error.startswith("srun started 4 copies")
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(SystemExit) as caught:
        train.main(flags)
    assert caught.value.code == 2 and capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


def test_fine_tuning_is_refused_as_training_is(monkeypatch, status_and_errors):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    status, (error,) = status_and_errors(run_task.main, ["--task", "sst2"])
    assert status == 2 and error.startswith("srun started 4 copies")


def test_other_versions_than_those_tested_are_named_once(tmp_path, monkeypatch, capfd):
    setup_logging()
    start_runtime(0, -1)
    assert "tested" not in capfd.readouterr().err and version_notice() is None
    for name, version in (("transformers", "4.57.1"), ("torch", "2.12.0+cpu")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    start_runtime(0, -1)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "tested" in line]
    assert "torch 2.12.0+cpu (tested: 2.13.0), transformers 4.57.1 (tested: 5.23.0)" in line


def test_a_local_build_is_the_version_and_no_file_is_no_notice(tmp_path):
    (tmp_path / "some.txt").write_text("transformers==0.0.1\ntorch==2.13.0\n")
    assert "torch" not in version_notice(tmp_path / "some.txt")
    assert "transformers" in version_notice(tmp_path / "some.txt")
    assert version_notice(tmp_path / "none.txt") is None
