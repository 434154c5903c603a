"""Parameters that get no gradient: what is frozen, what is not, and that nothing else changes."""

import logging

import families
import pytest
import torch
from torch import nn
from whole_runs import assert_same_run, dying_at, masked_flags

import train
from distil.data.batches import MicroBatch
from distil.training.optimizer import make_optimizer
from distil.training.state import load_tensors, state_tensors
from distil.training.unused import fill_missing_gradients, freeze_unused, reaching_all
from distiller import DistillationModel, Distiller
from utils import InputError

ALPHAS = {"ce": 1.0, "mlm": 1.0, "cos": 1.0}


def make_batch(number: int = 0, is_masked: bool = True, length: int = 12) -> MicroBatch:
    generator = torch.Generator().manual_seed(number)
    ids_BT = torch.randint(5, 99, (2, length), generator=generator)
    places = torch.arange(ids_BT.numel())
    kept = places if is_masked else places[places % length != length - 1]
    kinds = {"real": places, "masked" if is_masked else "next": kept, "distilled": kept}
    return MicroBatch(number, ids_BT, None, ids_BT, kinds, ids_BT.numel())


def freeze(student, alphas=ALPHAS, teacher=None, is_masked: bool = True) -> list[str]:
    """Freeze what the objectives do not use; return the names."""
    teacher = student if teacher is None else teacher
    model = DistillationModel(student, alphas, 2.0)
    freeze_unused(model, teacher, make_batch(is_masked=is_masked), "--student x")
    return [name for name, p in student.named_parameters() if not p.requires_grad]


UNUSED = {
    "bert": [],
    "squeezebert": ["transformer.pooler.dense.weight", "transformer.pooler.dense.bias"],
    "esm": ["esm.contact_head.regression.weight", "esm.contact_head.regression.bias"],
    "layoutlm": ["layoutlm.pooler.dense.weight", "layoutlm.pooler.dense.bias"],
}


@pytest.mark.parametrize("model_type", UNUSED)
def test_what_no_objective_reaches_is_frozen_and_named(model_type, caplog):
    student = families.tiny_model(model_type, True)
    with caplog.at_level(logging.INFO):
        assert freeze(student) == UNUSED[model_type]
    lines = [record.getMessage() for record in caplog.records]
    names = ", ".join(UNUSED[model_type])
    text = f"2 parameters get no gradient from this run's losses and are frozen: {names}."
    assert lines == ([text] if UNUSED[model_type] else [])


def test_the_runs_own_objectives_decide():
    """Of hidden states alone nothing reaches the head; a tied embedding is reached."""
    head = [f"cls.predictions.transform.{part}" for part in ("dense", "LayerNorm")]
    expected = {f"{part}.{kind}" for part in head for kind in ("weight", "bias")}
    student = families.tiny_model("bert", True)
    assert set(freeze(student, {"cos": 1.0})) == expected | {"cls.predictions.bias"}
    assert student.bert.embeddings.word_embeddings.weight.requires_grad


def test_nothing_is_left_behind_and_nothing_drawn():
    student = families.tiny_model("squeezebert", True).train()
    weights = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    frozen = freeze(student)
    assert torch.equal(torch.get_rng_state(), state)
    assert student.training and all(p.grad is None for p in student.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in student.state_dict().items())
    assert freeze(student) == frozen  # again, as a resumed run does


def updated(freezes: bool, model_type: str = "bert") -> dict[str, torch.Tensor]:
    """Train two updates with dropout; return the weights."""
    student, teacher = (families.tiny_model(model_type, True, seed=seed) for seed in (1, 0))
    model = DistillationModel(student, ALPHAS, 2.0)
    if freezes:
        freeze_unused(model, teacher, make_batch(), "--student x")
    optimizer = make_optimizer(model, 1e-3, 0.0, 1e-6)
    step = Distiller(model, teacher, optimizer, None, max_grad_norm=5.0, seed=0)
    for number in range(2):
        step.step([make_batch(number)], [number], 1)
    return student.state_dict()


@pytest.mark.parametrize("model_type", ["bert", "squeezebert"])
def test_an_update_is_the_same_to_the_bit(model_type):
    one, two = updated(True, model_type), updated(False, model_type)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


class Experts(nn.Module):
    """Send each token through the expert that a router prefers; others are left out."""

    def __init__(self, dense: nn.Module, num: int):
        super().__init__()
        self.router = nn.Linear(dense.in_features, num)
        self.experts = nn.ModuleList(
            nn.Linear(dense.in_features, dense.out_features) for _ in range(num)
        )
        self.forced = None

    def forward(self, hidden):
        score, chosen = self.router(hidden).softmax(-1).max(-1)
        if self.forced is not None:
            chosen = torch.full_like(chosen, self.forced)
        result = hidden.new_zeros(*hidden.shape[:-1], self.experts[0].out_features)
        for k in chosen.unique().tolist():
            result[chosen == k] = self.experts[k](hidden[chosen == k])
        return result * score[..., None]


def with_experts(num: int = 4):
    """Make a BERT with experts, of which a first sequence chooses one; and a pooler."""
    student = families.tiny_model("bert", True, seed=1)
    torch.manual_seed(5)
    layer = student.bert.encoder.layer[1]
    layer.intermediate.dense = Experts(layer.intermediate.dense, num)
    student.bert.extra = nn.Linear(2, 2)
    return student, layer.intermediate.dense


def test_experts_that_no_token_chose_stay_trained(caplog):
    student, experts = with_experts()
    experts.forced = 2
    with caplog.at_level(logging.INFO):
        assert freeze(student) == ["bert.extra.weight", "bert.extra.bias"]
    assert (
        "6 parameters got no gradient from the longest sequence; such gradients count as 0: "
        in caplog.text
    )


def test_an_absent_gradient_is_one_of_zero():
    student, experts = with_experts()
    used, unused = experts.experts[1].weight, experts.experts[3].weight
    loss = used.square().sum()
    parameters = [used, unused, student.bert.extra.weight.requires_grad_(False)]
    total = reaching_all(loss, parameters)
    total.backward()
    assert torch.equal(total, loss) and torch.equal(used.grad, 2 * used)
    assert torch.equal(unused.grad, torch.zeros_like(unused)) and parameters[2].grad is None
    assert reaching_all(loss, [used]) is loss, "nothing is added where nothing is absent"
    unused.grad = None
    fill_missing_gradients(parameters)
    assert torch.equal(unused.grad, torch.zeros_like(unused)) and parameters[2].grad is None


def test_an_update_without_an_expert_moves_it_by_its_momentum():
    """As where all experts are one tensor, and as on several ranks."""
    student, experts = with_experts()
    teacher, model = families.tiny_model("bert", True), DistillationModel(student, ALPHAS, 2.0)
    freeze_unused(model, teacher, make_batch(), "--student x")
    optimizer = make_optimizer(model, 1e-3, 0.0, 1e-6)
    step = Distiller(model, teacher, optimizer, None, max_grad_norm=5.0, seed=0)
    weights = []
    for number, experts.forced in enumerate([1, 2, 2]):
        step.step([make_batch(number)], [number], 1)
        weights.append(experts.experts[1].weight.detach().clone())
    assert not torch.equal(weights[1], weights[2])
    assert optimizer.state[experts.experts[1].weight]["step"] == 3


def test_a_model_that_fails_in_backward_is_refused_in_one_line():
    student = families.tiny_model("bert", True)

    def broken(module, given, output):
        return output.exp().add_(1)  # needs its result in backward

    student.bert.encoder.layer[0].output.register_forward_hook(broken)
    with pytest.raises(InputError, match="--student x: the model cannot be trained on 12 tokens"):
        freeze(student)


def test_buffers_that_training_changes_are_refused_on_several_ranks():
    """I-BERT keeps the range of its activations; a batch norm keeps means."""
    student = families.tiny_model("bert", True)
    student.bert.embeddings.LayerNorm = nn.Sequential(ByFeature(32))
    model = DistillationModel(student, ALPHAS, 2.0).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    freeze_unused(model, student, make_batch(), "--student x")
    with pytest.raises(
        InputError, match=r"--student x: 3 buffers change in training \(bert\..*one"
    ):
        freeze_unused(model, student, make_batch(), "--student x", world_size=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    model = DistillationModel(families.tiny_model("bert", True), ALPHAS, 2.0)
    freeze_unused(model, student, make_batch(), "--student x", world_size=2)


class ByFeature(nn.BatchNorm1d):
    def forward(self, hidden_BTD):
        return super().forward(hidden_BTD.mT).mT


def test_moments_of_what_is_frozen_by_now_are_accepted():
    """A checkpoint made before unused parameters were frozen holds their moments."""
    models = [families.tiny_model("squeezebert", True) for _ in range(2)]
    old = state_tensors(models[0], nn.ModuleDict(), make_optimizer(models[0], 1e-3, 0.0, 1e-6))
    freeze(models[1])
    optimizer = make_optimizer(models[1], 1e-3, 0.0, 1e-6)
    load_tensors(models[1], nn.ModuleDict(), optimizer, old)
    for parameter in models[1].parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    assert torch.equal(*(model.transformer.pooler.dense.weight for model in models))


@pytest.mark.slow
def test_a_run_with_unused_parameters_resumes_bit_for_bit(
    teachers, text_file, tmp_path, monkeypatch, capfd
):
    teacher = families.make_teacher(tmp_path / "squeezebert", "squeezebert", True, teachers)
    changes = {"weight_decay": 0.1, "log_interval": 2, "checkpoint_interval": 2}
    flags = masked_flags(tmp_path, teacher, text_file, batch_size=30, **changes)
    train.main([*flags, "--dump_path", str(tmp_path / "whole")])
    assert "2 parameters get no gradient" in capfd.readouterr().err
    flags += ["--dump_path", str(tmp_path / "died")]
    with monkeypatch.context() as patch:
        dying = dying_at(train.RunFolder.save_checkpoint, 3)
        patch.setattr(train.RunFolder, "save_checkpoint", dying)
        with pytest.raises(KeyboardInterrupt):
            train.main(flags)
    train.main([*flags, "--resume", "auto"])
    assert_same_run(tmp_path / "whole", tmp_path / "died")
