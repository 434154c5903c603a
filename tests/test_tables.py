"""train.py trains with a new objective, or a new pair of model types, once a table has its row."""

import shutil
import sys

import torch
import transformers
from conftest import run_process
from stand_ins import ROOT, logged
from whole_runs import assert_same_run

import train
from distil import objectives
from distil.models import forward
from distil.reporting import model_card
from distil.training import checkpointing


def absolute_error(student_NV, teacher_NV, labels_N, temperature: float) -> torch.Tensor:
    return (student_NV - teacher_NV).abs().sum()


def test_an_objective_is_one_row_of_one_table(world, tmp_path, monkeypatch):
    row = objectives.Loss(
        absolute_error, "logits", "distilled", True, 0.0, "absolute error of the logits"
    )
    monkeypatch.setitem(objectives.LOSSES, "toy", row)
    flags = world.flags(
        "bert", tmp_path / "run", max_steps=3, batch_size=6, alpha_toy=0.25, log_interval=2, n_gpu=0
    )
    train.main(flags)
    values = {}
    for tag, x, value in logged(tmp_path / "run"):
        if tag.startswith("losses/") and tag != "losses/cum_avg_loss_epoch":
            values.setdefault(x, {})[tag.removeprefix("losses/")] = float(value.strip("[]"))
    weights = {"loss_ce": 5.0, "loss_mlm": 2.0, "loss_cos": 1.0, "loss_toy": 0.25}
    for found in values.values():
        assert found["loss_toy"] > 0
        expected = sum(weight * found[name] for name, weight in weights.items())
        torch.testing.assert_close(
            torch.tensor(found["loss"]), torch.tensor(expected), rtol=1e-4, atol=1e-4
        )
    assert values
    text = model_card.training_text(str(tmp_path / "run"), datasets=None)
    assert "* 0.25 x absolute error of the logits (`alpha_toy`)" in text


class Projected(torch.nn.Module):
    """A linear map of hidden states, for an objective with parameters."""

    def __init__(self, student, teacher):
        super().__init__()
        torch.manual_seed(0)
        width = student.config.hidden_size, teacher.config.hidden_size
        self.map = torch.nn.Linear(*width, bias=False)


def projected_error(student_ND, teacher_ND, labels_N, temperature, module) -> torch.Tensor:
    return (module.map(student_ND) - teacher_ND).square().sum()


def test_an_objectives_parameters_are_trained_saved_and_restored(world, tmp_path, monkeypatch):
    row = objectives.Loss(
        projected_error, "hidden", "real", True, 0.0, "projected error", make_module=Projected
    )
    monkeypatch.setitem(objectives.LOSSES, "toy", row)
    options = {"batch_size": 6, "alpha_toy": 0.25, "n_gpu": 0, "max_steps": 3, "log_interval": 1}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train.main(world.flags("bert", whole, checkpoint_interval=2, **options))
    weights = [
        checkpointing.read(whole / "checkpoints" / f"step-{step:08d}").tensors("objectives")
        for step in (2, 3)
    ]
    assert set(weights[0]) == {"toy.map.weight"}
    assert not torch.equal(weights[0]["toy.map.weight"], weights[1]["toy.map.weight"])
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000003")
    train.main([*world.flags("bert", stopped, checkpoint_interval=2, **options), "--resume"])
    assert_same_run(whole, stopped)
    again = checkpointing.read(stopped / "checkpoints" / "step-00000003").tensors("objectives")
    assert torch.equal(again["toy.map.weight"], weights[1]["toy.map.weight"])
    assert not any("toy" in name for name in torch.load(whole / "pytorch_model.bin"))


TOY_PAIR = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
from distil.models import architectures
from distil.system import files
import utils
architectures.PAIRS["bert", "bert"] = architectures.Pair()
import train
from distil.models.language_model import load_network
from distil.models.first_weights import extract_student
teacher, first, *flags = sys.argv[1:]
teacher = load_network(architectures.ARCHITECTURES["bert"], teacher, "--teacher_name")
files.save_weights(first, extract_student(teacher, "bert", [0, 3], vocab_transform=True))
utils.run_program(lambda: train.main(flags))
"""


def test_a_pair_is_one_row_of_one_table(world, teachers, tmp_path):
    config = transformers.BertConfig.from_pretrained(teachers["bert"])
    config.num_hidden_layers = 2
    config.to_json_file(tmp_path / "student.json", use_diff=False)
    changes = {
        "student_type": "bert",
        "student_config": tmp_path / "student.json",
        "n_gpu": 0,
        "max_steps": 2,
    }
    flags = world.flags(
        "bert", tmp_path / "run", student_pretrained_weights=tmp_path / "first.pth", **changes
    )
    done = run_process(
        sys.executable, "-c", TOY_PAIR, teachers["bert"], tmp_path / "first.pth", *flags
    )
    assert done.returncode == 0, done.stderr
    student = transformers.BertForMaskedLM.from_pretrained(tmp_path / "run")
    assert student.config.num_hidden_layers == 2


def layers_error(student_NLD, teacher_NLD, labels_N, temperature) -> torch.Tensor:
    """Compare the student's layers 1, 2 with the teacher's 2, 4; 0 is the embeddings' output."""
    return (student_NLD[:, 1:] - teacher_NLD[:, [2, 4]]).square().sum()


def test_an_objective_on_other_outputs_is_a_row_of_losses_and_a_row_of_readings(
    world, tmp_path, monkeypatch
):
    reading = forward.Reading(
        lambda output: torch.stack(output.hidden_states, dim=2), {"output_hidden_states": True}
    )
    monkeypatch.setitem(forward.READINGS, "layers", reading)
    row = objectives.Loss(layers_error, "layers", "real", True, 0.0, "squared error of layers")
    monkeypatch.setitem(objectives.LOSSES, "toy", row)
    flags = world.flags("bert", tmp_path / "run", max_steps=2, batch_size=6, alpha_toy=1.0, n_gpu=0)
    trainer = train.set_up(train.parse_config(flags), train.Runtime())
    student, teacher = trainer.student.network, trainer.teacher.network
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    (batch,) = trainer._prepared(trainer.sampler.micro_batches(1))
    losses_MK = trainer.distiller.accumulate([batch], [0], 1)
    found = losses_MK[0, 1 + list(trainer.distiller.model.alphas).index("toy")]
    options = {"attention_mask": batch.attention_mask_BT, "output_hidden_states": True}
    with torch.no_grad():
        of_student, of_teacher = (
            model.base_model(batch.input_ids_BT, **options).hidden_states
            for model in (student.eval(), teacher)
        )
    real_BT = batch.attention_mask_BT.bool()
    pairs = [(of_student[1], of_teacher[2]), (of_student[2], of_teacher[4])]
    expected = sum((s - t)[real_BT].square().sum() for s, t in pairs) / batch.num_tokens
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)
