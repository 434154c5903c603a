"""Updates launched first and read later: the host never waits between, with equal results."""

import functools
import math
import os
import signal
import time

import pytest
import torch
from stand_ins import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from whole_runs import assert_same_run

import train
from distil.data.batches import MlmPreparation, masking_weights, prepare_clm
from distil.kernels import logit_gradients
from distil.models.forward import last_hidden_state
from distil.training import checkpointing
from distil.training.endings import EXIT_NON_FINITE
from distil.training.optimizer import make_moments
from distil.training.post_mortem import NonFiniteError
from distiller import DistillationModel, Distiller

VOCAB, LENGTHS = 60, [[20, 20], [20, 13], [17, 12]]
ALPHAS = {
    "bert": {"ce": 5.0, "mlm": 2.0, "cos": 1.0},
    "gpt2": {"ce": 5.0, "clm": 0.5, "mse": 0.1, "cos": 1.0},
}


def make_batches(kind: str) -> list:
    """Make three micro-batches, the first without padding."""
    prepare = prepare_clm
    if kind != "gpt2":
        weights_V = masking_weights(torch.ones(VOCAB), 0.7, range(5))
        fates = 0.8, 0.1, 0.1
        prepare = MlmPreparation(weights_V, 4, 0.15, *fates, restrict_ce_to_mask=False, seed=7)
    generator, batches = torch.Generator().manual_seed(3), []
    for number, lengths in enumerate(LENGTHS):
        token_ids_BT = torch.randint(5, VOCAB, (len(lengths), max(lengths)), generator=generator)
        token_ids_BT *= torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        batches.append(prepare(number, token_ids_BT, torch.tensor(lengths)))
    return batches


def make_distiller(kind: str, waits: bool | None, device: str = "cpu", **options) -> Distiller:
    student = make_model(kind, VOCAB, layers=2).to(device)
    teacher = make_model(kind, VOCAB).eval().to(device).requires_grad_(False)
    alphas = ALPHAS["gpt2" if kind == "gpt2" else "bert"]
    model = DistillationModel(student, alphas, 2.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, fused=True)
    make_moments(optimizer)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    options |= {"max_grad_norm": 1.0, "seed": 5, "waits": waits}
    return Distiller(model, teacher, optimizer, schedule, **options)


def state(distiller: Distiller) -> dict[str, torch.Tensor]:
    kinds = distiller.tensors().items()
    return {f"{kind}/{name}": x.clone() for kind, content in kinds for name, x in content.items()}


def assert_equal(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


# --------------------------------------------------------------------------------------------------
# One update
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_updates_read_later_give_the_same_results(kind, amp_dtype):
    found = {}
    for waits in (True, False):
        distiller = make_distiller(kind, waits, amp_dtype=amp_dtype)
        batches = [distiller.ready(batch) for batch in make_batches(kind)]
        pending = [distiller.launch([b], [b.number], 1, wants_statistics=True) for b in batches]
        found[waits] = [one.read() for one in pending], state(distiller), distiller.values()
    (first, first_state, first_values), (second, second_state, second_values) = found.values()
    assert_equal(first_state, second_state)
    assert first_values == second_values and first_values["schedule"]["last_epoch"] == 3
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.losses_MK, two.losses_MK)
        assert one.grad_norm == two.grad_norm and one.num_asking == two.num_asking
        assert one.statistics == two.statistics


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_after_a_non_finite_update_none_is_applied_until_it_is_read(what):
    distiller = make_distiller("bert", waits=False)
    batches = make_batches("bert")
    distiller.step([batches[0]], [0], 1)
    before = state(distiller)
    bias = distiller.model.head.projection.bias
    if what == "loss":
        kept = bias.detach().clone()
        bias.data[3] = float("inf")
        before["student/cls.predictions.bias"] = bias.detach().clone()
        bad = distiller.launch([batches[1]], [1], 1)
        bias.data.copy_(kept)
        before["student/cls.predictions.bias"] = kept
    else:
        handle = bias.register_hook(lambda gradient: gradient * float("nan"))
        bad = distiller.launch([batches[1]], [1], 1)
        handle.remove()
    after = distiller.launch([batches[2]], [2], 1)
    assert_equal(before, state(distiller))
    message = "loss_ce .*micro-batch 1" if what == "loss" else "gradient norm .*1 to 1"
    with pytest.raises(NonFiniteError, match=message):
        bad.read()
    assert after.read().grad_norm > 0, "computed from the old weights, but not applied"
    distiller.step([batches[2]], [2], 1)
    now, name = state(distiller), "cls.predictions.bias"
    assert not torch.equal(now[f"student/{name}"], before[f"student/{name}"])
    assert now[f"optimizer/step/{name}"] == 2, "skipped updates are not counted"


def test_the_distiller_waits_where_it_must(tmp_path):
    half = {"amp_dtype": torch.float16}
    assert make_distiller("bert", None).waits, "a CPU gains nothing from launching early"
    assert make_distiller("bert", False, **half).waits, "the schedule skips overflows"
    distiller = make_distiller("bert", False)
    assert not distiller.waits
    sgd = torch.optim.SGD(distiller.model.parameters(), lr=0.1)
    parts = distiller.model, distiller.teacher, sgd, None
    again = Distiller(*parts, max_grad_norm=1.0, seed=5, waits=False)
    assert again.waits, "SGD cannot skip an update on the device"


class RefuseWaiting(TorchDispatchMode):
    """Refuse operations for which the host waits, or whose shape depends on a tensor's values."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique",
        "unique_dim",
        "is_nonzero",
        "equal",
        "bincount",
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        indexes = name.startswith(("index", "_index")) and name != "index_add_"
        indices = (args[1] if indexes and len(args) > 1 else None) or []
        tensors = [index for index in indices if isinstance(index, torch.Tensor)]
        assert not name.startswith(self.WAITING), f"{name} waits for the device"
        assert all(index.dtype != torch.bool for index in tensors), (
            f"{name} by a mask: the number of rows is not known"
        )
        return function(*args, **(kwargs or {}))


WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "mask": lambda x: x[x > 1],
}


@pytest.mark.parametrize("name", WAITING)
def test_operations_that_wait_are_detected(name):
    x = torch.arange(4.0)
    with pytest.raises(AssertionError, match="waits|by a mask"), RefuseWaiting():
        WAITING[name](x)


@pytest.mark.parametrize("head", ["eager", "joined"])
@pytest.mark.parametrize("normalization", ["micro_batches", "tokens"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_the_host_does_not_wait_during_an_update(kind, normalization, head, monkeypatch):
    """Without the CPU's kernels, as on a GPU; with padded and unpadded batches."""
    # The code that would be compiled:
    monkeypatch.setattr(logit_gradients, "_compiled", lambda: logit_gradients._fused_terms)
    distiller = make_distiller(kind, waits=False, normalization=normalization)
    distiller.has_cpu_kernels, distiller.model.compiles_head = False, head == "joined"
    batches = [distiller.ready(batch) for batch in make_batches(kind)]
    distiller.launch(batches, [0, 1, 2], 3).read()
    with RefuseWaiting():
        pending = distiller.launch(batches, [0, 1, 2], 3)
    assert pending.read().grad_norm > 0


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_expanded_masks_give_the_models_own_hidden_states(kind):
    model = make_model(kind, VOCAB).eval()
    for batch in make_batches(kind):
        inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
        whole = model.base_model(**inputs).last_hidden_state
        assert torch.equal(last_hidden_state(model, batch), whole)
        model.set_attn_implementation("eager")  # takes the mask as numbers
        torch.testing.assert_close(last_hidden_state(model, batch), whole)
        model.set_attn_implementation("sdpa")


def test_gpt2s_attention_without_masks_is_equal_and_not_saved(tmp_path):
    model, batch = make_model("gpt2", VOCAB, layers=2).eval(), make_batches("gpt2")[1]
    before = model.base_model(batch.input_ids_BT).last_hidden_state
    distiller = make_distiller("gpt2", waits=False)
    student = distiller.model.student.eval()
    assert student.config._attn_implementation == "sdpa_causal"
    assert torch.equal(last_hidden_state(student, batch), before)
    student.save_pretrained(tmp_path)
    assert "sdpa" not in (tmp_path / "config.json").read_text()


# --------------------------------------------------------------------------------------------------
# A run
# --------------------------------------------------------------------------------------------------

FLAGS = {"batch_size": 12, "n_epoch": 2, "log_interval": 15, "checkpoint_interval": 25}


@pytest.fixture
def reads_later(monkeypatch):
    """Make train.py's distiller read later, as on a GPU; return its ("launch" | "read", number)."""
    events = []

    class ReadLater(train.PendingUpdate):
        def read(self):
            events.append(("read", self.number))
            return super().read()

    class Later(Distiller):
        def launch(self, *arguments, **options):
            later = ReadLater(super().launch(*arguments, **options)._read)
            later.number = sum(kind == "launch" for kind, _ in events)
            events.append(("launch", later.number))
            return later

    monkeypatch.setattr(train, "Distiller", functools.partial(Later, waits=False))
    return events


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_run_that_reads_later_gives_the_same_results(kind, world, tmp_path, request):
    train.main(world.flags(kind, tmp_path / "waits", **FLAGS))
    events = request.getfixturevalue("reads_later")
    train.main(world.flags(kind, tmp_path / "later", **FLAGS))
    assert_same_run(tmp_path / "waits", tmp_path / "later")
    read_at = {number: place for place, (kind, number) in enumerate(events) if kind == "read"}
    launched_at = {number: place for place, (kind, number) in enumerate(events) if kind == "launch"}
    never = len(events)
    late = [n for n in launched_at if launched_at.get(n + 1, never) < read_at[n]]
    assert len(late) > len(launched_at) / 2, "between logs, updates are read after the next launch"
    assert all(read_at[n] < launched_at.get(n + 2, never) for n in launched_at), "one behind"


def test_a_stop_is_at_most_one_update_late_and_loses_nothing(
    world, tmp_path, reads_later, monkeypatch
):
    options = FLAGS | {"checkpoint_interval": 8}
    train.main(world.flags("bert", tmp_path / "whole", **options))
    stopped = world.flags("bert", tmp_path / "stopped", **options)
    kept, calls = train.Distiller.func.launch, []

    def launch(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # a thread receives it
        return kept(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train.Distiller.func, "launch", launch)
        with pytest.raises(SystemExit) as end:
            train.main(stopped)
    assert end.value.code == 143
    assert checkpointing.newest(tmp_path / "stopped" / "checkpoints").step in (3, 4)
    train.main([*stopped, "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("update", [2, 3])
def test_a_run_names_the_non_finite_update_not_the_next_one(
    update, world, tmp_path, reads_later, monkeypatch, capfd
):
    kept, calls = train.Distiller.func.launch, []

    def launch(self, *arguments, **options):
        calls.append(1)
        factor = math.nan if len(calls) == update + 1 else 1.0
        bias = self.model.head.projection.bias
        handle = bias.register_hook(lambda gradient: gradient * factor)
        pending = kept(self, *arguments, **options)
        handle.remove()
        return pending

    monkeypatch.setattr(train.Distiller.func, "launch", launch)
    with pytest.raises(SystemExit) as end:
        train.main(world.flags("bert", tmp_path / "run", **{**FLAGS, "checkpoint_interval": 2}))
    assert end.value.code == EXIT_NON_FINITE
    assert f"update {update}: the gradient norm became nan" in capfd.readouterr().err
    assert (tmp_path / "run" / f"nonfinite-step-{update}.safetensors").exists()
    assert checkpointing.newest(tmp_path / "run" / "checkpoints").step <= update
