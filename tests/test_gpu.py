"""The same runs on a GPU: one process, and one process under nccl; skipped where there is none."""

import shutil
import sys

import pytest
import torch
from conftest import run_process
from stand_ins import ROOT

import checkpointing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
LAUNCHERS = {
    "one process": [sys.executable],
    "nccl": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"],
}


def weights(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_gpu_trains_as_the_cpu_does(launcher, kind, world, tmp_path):
    flags = {"max_steps": 3, "student_pretrained_weights": world.first_weights(kind)}
    for name, command in (("gpu", LAUNCHERS[launcher]), ("cpu", [sys.executable])):
        extra = ["--n_gpu", "0"] if name == "cpu" else []
        done = run_process(*command, ROOT / "train.py", *world.flags(kind, tmp_path / name, **flags), *extra)
        assert done.returncode == 0, done.stderr
        assert ("on the GPU" in done.stderr) == (name == "gpu")
    gpu, cpu = weights(tmp_path / "gpu"), weights(tmp_path / "cpu")
    assert set(gpu) == set(cpu)
    for name in gpu:
        torch.testing.assert_close(gpu[name], cpu[name], rtol=0, atol=2e-3)  # 3 updates of at most 5e-4, other dropout


def test_batches_are_copied_from_pinned_memory():
    from distiller import prepare_clm

    batch = prepare_clm(0, torch.arange(20).reshape(2, 10), torch.tensor([10, 7])).pinned()
    tensors = [batch.input_ids_BT, batch.labels_BT, *batch.rows.values()]
    assert all(tensor.is_pinned() for tensor in tensors)
    assert torch.equal(batch.input_ids_BT.to("cuda", non_blocking=True).cpu(), torch.arange(20).reshape(2, 10))


def test_half_precision_trains_on_a_gpu(world, tmp_path):
    done = run_process(sys.executable, ROOT / "train.py", *world.flags("bert", tmp_path / "run", max_steps=5, fp16=True))
    assert done.returncode == 0, done.stderr
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run").values())


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_goes_on_on_a_gpu(launcher, world, tmp_path):
    """Stopped after its last checkpoint but one, in effect: the newest is taken away."""
    flags = {"batch_size": 12, "checkpoint_interval": 6, "bf16": True}
    command = [*LAUNCHERS[launcher], ROOT / "train.py", *world.flags("bert", tmp_path / "run", **flags)]
    assert run_process(*command).returncode == 0
    whole, (newest, *_) = weights(tmp_path / "run"), checkpointing.exist(tmp_path / "run" / "checkpoints")
    shutil.rmtree(newest)
    done = run_process(*command, "--resume")
    assert done.returncode == 0 and "Going on from" in done.stderr, done.stderr
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-4)  # kernels sum in no fixed order
