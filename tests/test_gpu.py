"""The same runs on a GPU: one process, and one process under nccl; skipped where there is none."""

import json
import math
import shutil
import sys

import pytest
import torch
from conftest import run_process
from stand_ins import ROOT

from distil.training import checkpointing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
LAUNCHERS = {
    "one process": [sys.executable],
    "nccl": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "1",
    ],
}


def weights(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_gpu_trains_as_the_cpu_does(launcher, kind, world, tmp_path):
    flags = {"max_steps": 3, "student_pretrained_weights": world.first_weights(kind)}
    for name, command in (("gpu", LAUNCHERS[launcher]), ("cpu", [sys.executable])):
        extra = ["--n_gpu", "0"] if name == "cpu" else []
        done = run_process(
            *command, ROOT / "train.py", *world.flags(kind, tmp_path / name, **flags), *extra
        )
        assert done.returncode == 0, done.stderr
        assert ("on the GPU" in done.stderr) == (name == "gpu")
    gpu, cpu = weights(tmp_path / "gpu"), weights(tmp_path / "cpu")
    assert set(gpu) == set(cpu)
    for name in gpu:
        torch.testing.assert_close(
            gpu[name], cpu[name], rtol=0, atol=2e-3
        )  # 3 updates of at most 5e-4, other dropout


def test_batches_are_copied_from_pinned_memory():
    from distil.data.batches import prepare_clm

    batch = prepare_clm(0, torch.arange(20).reshape(2, 10), torch.tensor([10, 7])).pinned()
    tensors = [batch.input_ids_BT, batch.labels_BT, *batch.rows.values()]
    assert all(tensor.is_pinned() for tensor in tensors)
    assert torch.equal(
        batch.input_ids_BT.to("cuda", non_blocking=True).cpu(), torch.arange(20).reshape(2, 10)
    )


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_an_update_waits_for_nothing(kind, amp_dtype):
    """By torch's own account of what waits."""
    from test_pending_update import make_batches, make_distiller

    distiller = make_distiller(kind, None, "cuda", amp_dtype=amp_dtype)
    assert not distiller.waits
    batches = [distiller.ready(batch) for batch in make_batches(kind)]
    distiller.step(batches, [0, 1, 2], 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        begun = distiller.launch(batches, [0, 1, 2], 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert begun.read().grad_norm > 0


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_packed_passes_wait_for_nothing_and_equal_passes_apart(kind):
    """In float64, where attention has no fused kernel, and in bfloat16, where it has one."""
    from test_joined_passes import largest_difference, results
    from test_packed_passes import SHAPE, make_distiller, updates

    apart, (numbers, passes) = (next(updates(kind, shape, 12)) for shape in (None, SHAPE))
    for amp_dtype, bound in ((None, 1e-9), (torch.bfloat16, 0.1)):
        distiller = make_distiller(kind, device="cuda", amp_dtype=amp_dtype)
        if amp_dtype is not None:
            distiller.model.float()
        ready = [distiller.ready(one) for one in passes]
        found = results(distiller, numbers, ready)
        assert largest_difference(results(distiller, *apart), found) < bound
        torch.cuda.set_sync_debug_mode("error")
        try:
            distiller._accumulate(ready, numbers, len(ready), lambda: False)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_objectives_are_compiled_without_being_asked():
    from test_pending_update import make_batches, make_distiller

    distiller = make_distiller("bert", None, "cuda")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    batches = [distiller.ready(batch) for batch in make_batches("bert")]
    distiller.step(batches, [0, 1, 2], 3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_an_update_that_is_not_finite_is_left_out_on_the_gpu():
    from test_pending_update import assert_equal, make_batches, make_distiller, state

    from distil.training.post_mortem import NonFiniteError

    distiller = make_distiller("bert", None, "cuda")
    batches = [distiller.ready(batch) for batch in make_batches("bert")]
    distiller.step(batches[:1], [0], 1)
    before = state(distiller)
    handle = distiller.model.head.projection.bias.register_hook(
        lambda gradient: gradient * float("nan")
    )
    bad = distiller.launch(batches[1:2], [1], 1)
    handle.remove()
    distiller.launch(batches[2:], [2], 1)
    assert_equal(before, state(distiller))
    with pytest.raises(NonFiniteError, match="gradient norm"):
        bad.read()


def test_half_precision_trains_on_a_gpu(world, tmp_path):
    done = run_process(
        sys.executable,
        ROOT / "train.py",
        *world.flags("bert", tmp_path / "run", max_steps=5, fp16=True),
    )
    assert done.returncode == 0, done.stderr
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run").values())


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_goes_on_on_a_gpu(launcher, world, tmp_path):
    """Stopped after its last checkpoint but one, in effect: the newest is taken away."""
    flags = {"batch_size": 12, "checkpoint_interval": 6, "bf16": True}
    command = [
        *LAUNCHERS[launcher],
        ROOT / "train.py",
        *world.flags("bert", tmp_path / "run", **flags),
    ]
    assert run_process(*command).returncode == 0
    whole, (newest, *_) = (
        weights(tmp_path / "run"),
        checkpointing.checkpoints_in(tmp_path / "run" / "checkpoints"),
    )
    shutil.rmtree(newest)
    done = run_process(*command, "--resume")
    assert done.returncode == 0 and "Resuming from" in done.stderr, done.stderr
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(
            tensor, whole[name], rtol=0, atol=1e-4
        )  # kernels sum in no fixed order


def test_a_teacher_is_trained_on_the_gpu(world, tmp_path):
    teacher = world.teachers["bert"]
    flags = ["--data_file", world.data("bert"), "--weights", teacher, "--num_steps", "5"]
    command = [sys.executable, ROOT / "scripts" / "train_teacher.py", *map(str, flags)]
    done = run_process(*command, "--output_dir", tmp_path / "gpu")
    assert done.returncode == 0 and "on the GPU" in done.stderr, done.stderr
    curve = json.loads((tmp_path / "gpu" / "curve.json").read_text())
    assert len(curve) == 5 and all(map(math.isfinite, curve))
