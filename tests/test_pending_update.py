"""An update that the device was given and that is read later: nothing on the way asks the device,
and nothing is lost by it.
"""

import functools
import os
import signal
import time

import pytest
import torch
from runs import assert_same_run
from stand_ins import make_model
from torch.utils._python_dispatch import TorchDispatchMode

import train
from distil.data.batches import MlmPreparation, masking_weights, prepare_clm
from distil.kernels import head as head_kernels
from distil.models.forward import last_hidden_state
from distil.training import checkpointing
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
        prepare = MlmPreparation(
            weights_V, 4, 0.15, 0.8, 0.1, 0.1, restrict_ce_to_mask=False, seed=7
        )
    generator, batches = torch.Generator().manual_seed(3), []
    for number, lengths in enumerate(LENGTHS):
        token_ids_BT = torch.randint(5, VOCAB, (len(lengths), max(lengths)), generator=generator)
        token_ids_BT *= torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        batches.append(prepare(number, token_ids_BT, torch.tensor(lengths)))
    return batches


def make_distiller(kind: str, waits: bool | None, device: str = "cpu", **options) -> Distiller:
    student, teacher = (
        make_model(kind, VOCAB, layers=2).to(device),
        make_model(kind, VOCAB).eval().to(device),
    )
    teacher.requires_grad_(False)
    alphas = ALPHAS["gpt2" if kind == "gpt2" else "bert"]
    model = DistillationModel(student, alphas, 2.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, fused=True)
    make_moments(optimizer)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
    return Distiller(
        model,
        teacher,
        optimizer,
        schedule,
        max_grad_norm=1.0,
        seed=5,
        waits=waits,
        **options,
    )


def state(distiller: Distiller) -> dict[str, torch.Tensor]:
    return {
        f"{kind}/{name}": x.clone()
        for kind, content in distiller.tensors().items()
        for name, x in content.items()
    }


def assert_equal(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


# --------------------------------------------------------------------------------------------------
# One update
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_updates_read_later_are_the_same_updates(kind, amp_dtype):
    found = {}
    for waits in (True, False):
        distiller = make_distiller(kind, waits, amp_dtype=amp_dtype)
        batches = [distiller.ready(batch) for batch in make_batches(kind)]
        begun = [
            distiller.launch([batch], [batch.number], 1, wants_statistics=True) for batch in batches
        ]
        found[waits] = [one.read() for one in begun], state(distiller), distiller.values()
    (first, first_state, first_values), (second, second_state, second_values) = found.values()
    assert_equal(first_state, second_state)
    assert first_values == second_values and first_values["schedule"]["last_epoch"] == 3
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.losses_MK, two.losses_MK)
        assert (one.grad_norm, one.statistics, one.num_asking) == (
            two.grad_norm,
            two.statistics,
            two.num_asking,
        )


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_from_an_update_that_is_not_finite_on_none_is_applied_until_it_is_read(what):
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
    with pytest.raises(
        NonFiniteError,
        match="loss_ce .*micro-batch 1" if what == "loss" else "gradient norm .*1 to 1",
    ):
        bad.read()
    assert after.read().grad_norm > 0, "it was computed, from the weights of before, and left out"
    distiller.step([batches[2]], [2], 1)
    now = state(distiller)
    assert not torch.equal(
        now["student/cls.predictions.bias"], before["student/cls.predictions.bias"]
    )
    assert now["optimizer/step/cls.predictions.bias"] == 2, "updates left out are not counted"


def test_who_must_wait_does(tmp_path):
    half = {"amp_dtype": torch.float16}
    assert make_distiller("bert", None).waits, "on a CPU there is nothing to gain"
    assert make_distiller("bert", False, **half).waits, "an overflow keeps the schedule where it is"
    distiller = make_distiller("bert", False)
    sgd = torch.optim.SGD(distiller.model.parameters(), lr=0.1)
    again = Distiller(
        distiller.model, distiller.teacher, sgd, None, max_grad_norm=1.0, seed=5, waits=False
    )
    assert again.waits, "this optimizer cannot leave an update out"
    assert not distiller.waits


class Refusing(TorchDispatchMode):
    """Refuses what makes the host wait for a device, or gives a shape that depends on what is in a
    tensor.
    """

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
        masks = (
            [
                x
                for x in (args[1] if name.startswith(("index", "_index")) and len(args) > 1 else [])
                or []
                if isinstance(x, torch.Tensor) and x.dtype == torch.bool
            ]
            if name != "index_add_"
            else []
        )
        assert not name.startswith(self.WAITING), f"{name} waits for the device"
        assert not masks, f"{name} by a mask: the number of rows is not known"
        return function(*args, **(kwargs or {}))


def test_what_is_refused_is_seen():
    x = torch.arange(4.0)
    for waiting in (
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x.nonzero(),
        lambda: x.unique(),
        lambda: x[x > 1],
    ):
        with pytest.raises(AssertionError, match="waits|by a mask"), Refusing():
            waiting()


@pytest.mark.parametrize("head", ["eager", "joined"])
@pytest.mark.parametrize("normalization", ["micro_batches", "tokens"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_the_host_asks_the_device_nothing_during_an_update(kind, normalization, head, monkeypatch):
    """With batches that are ready: padded and not. A CPU's own shortcuts are off, for a GPU has
    them not.
    """
    # As it is before it is compiled:
    monkeypatch.setattr(head_kernels, "_compiled", lambda: head_kernels._fused_terms)
    distiller = make_distiller(kind, waits=False, normalization=normalization)
    distiller.has_cpu_kernels, distiller.model.compiles_head = False, head == "joined"
    batches = [distiller.ready(batch) for batch in make_batches(kind)]
    distiller.launch(batches, [0, 1, 2], 3).read()
    with Refusing():
        begun = distiller.launch(batches, [0, 1, 2], 3)
    assert begun.read().grad_norm > 0


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_masks_made_ready_are_the_models_own(kind):
    model = make_model(kind, VOCAB).eval()
    for batch in make_batches(kind):
        whole = model.base_model(
            batch.input_ids_BT, attention_mask=batch.attention_mask_BT
        ).last_hidden_state
        assert torch.equal(last_hidden_state(model, batch), whole)
        model.set_attn_implementation("eager")  # takes the mask as numbers
        torch.testing.assert_close(last_hidden_state(model, batch), whole)
        model.set_attn_implementation("sdpa")


def test_gpt2_attends_as_before_and_its_files_say_nothing_of_it(tmp_path):
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
    """Have train.py's distiller read later, as on a GPU; return the updates begun, and read, in
    order.
    """
    events = []

    class ReadLater(train.PendingUpdate):
        def read(self):
            events.append(("read", self.number))
            return super().read()

    class Later(Distiller):
        def launch(self, *arguments, **options):
            begun = super().launch(*arguments, **options)
            later = ReadLater(begun._read)
            later.number = sum(kind == "begun" for kind, _ in events)
            events.append(("begun", later.number))
            return later

    monkeypatch.setattr(train, "Distiller", functools.partial(Later, waits=False))
    return events


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_run_that_reads_later_is_the_same_run(kind, world, tmp_path, request):
    train.main(world.flags(kind, tmp_path / "waits", **FLAGS))
    events = request.getfixturevalue("reads_later")
    train.main(world.flags(kind, tmp_path / "later", **FLAGS))
    assert_same_run(tmp_path / "waits", tmp_path / "later")
    read_at = {number: place for place, (kind, number) in enumerate(events) if kind == "read"}
    begun_at = {number: place for place, (kind, number) in enumerate(events) if kind == "begun"}
    late = [
        number
        for number in begun_at
        if number + 1 in begun_at and read_at[number] > begun_at[number + 1]
    ]
    assert len(late) > len(begun_at) / 2, (
        "between logs an update is read when the next one has been begun"
    )
    assert all(read_at[number] < begun_at.get(number + 2, len(events)) for number in begun_at), (
        "one behind, never two"
    )


def test_a_stop_is_one_update_late_at_most_and_loses_nothing(
    world, tmp_path, reads_later, monkeypatch
):
    train.main(world.flags("bert", tmp_path / "whole", **FLAGS | {"checkpoint_interval": 8}))
    kept, calls = train.Distiller.func.launch, []

    def launch(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # the system gives it to a thread
        return kept(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train.Distiller.func, "launch", launch)
        with pytest.raises(SystemExit) as end:
            train.main(
                world.flags("bert", tmp_path / "stopped", **FLAGS | {"checkpoint_interval": 8})
            )
    assert end.value.code == 143 and checkpointing.newest(
        tmp_path / "stopped" / "checkpoints"
    ).step in (3, 4)
    train.main(
        [
            *world.flags("bert", tmp_path / "stopped", **FLAGS | {"checkpoint_interval": 8}),
            "--resume",
        ]
    )
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("update", [2, 3])
def test_a_run_names_the_update_that_was_not_finite_not_the_one_after(
    update, world, tmp_path, reads_later, monkeypatch, capfd
):
    kept, calls = train.Distiller.func.launch, []

    def launch(self, *arguments, **options):
        calls.append(1)
        bias = self.model.head.projection.bias
        handle = (
            bias.register_hook(lambda gradient: gradient * float("nan"))
            if len(calls) == update + 1
            else None
        )
        begun = kept(self, *arguments, **options)
        if handle is not None:
            handle.remove()
        return begun

    monkeypatch.setattr(train.Distiller.func, "launch", launch)
    with pytest.raises(SystemExit) as end:
        train.main(world.flags("bert", tmp_path / "run", **{**FLAGS, "checkpoint_interval": 2}))
    assert end.value.code == train.EXIT_NON_FINITE
    assert f"update {update}: the gradient norm became nan" in capfd.readouterr().err
    assert (tmp_path / "run" / f"nonfinite-step-{update}.safetensors").exists()
    assert checkpointing.newest(tmp_path / "run" / "checkpoints").step <= update
