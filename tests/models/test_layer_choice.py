"""Layers chosen by measurement: the figures, the greedy steps, and the program."""

import json

import families
import pytest
import torch
import transformers
from torch import nn

import extract
from distil.data.batches import MicroBatch, prepare_clm
from distil.evaluation import FixedMasks
from distil.models.first_weights import student_of_layers
from distil.models.layer_choice import (
    block_influence,
    choose_by_measurement,
    num_measurements,
)
from utils import InputError

LENGTHS_B = torch.tensor([12, 9, 5])
IDS_BT = torch.randint(5, 99, (3, 12), generator=torch.Generator().manual_seed(3))
FAMILIES = [*((name, True) for name in families.MASKED), *((n, False) for n in families.CAUSAL)]


def batches_of(is_masked: bool) -> list[MicroBatch]:
    """Make the passes over a few sequences, one of them padded."""
    ids_BT = IDS_BT.masked_fill(torch.arange(12) >= LENGTHS_B[:, None], 0)
    if is_masked:
        return list(FixedMasks(4, [0, 1, 2])(0, ids_BT, LENGTHS_B))
    return [prepare_clm(0, ids_BT, LENGTHS_B)]


def slow_kl(teacher, student, batches: list[MicroBatch], is_masked: bool) -> float:
    """Average KL(teacher || student) over the asked positions, one at a time."""
    total, number = 0.0, 0
    for batch in batches:
        inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
        with torch.no_grad():
            p, q = (m(**inputs).logits.double().flatten(0, 1) for m in (teacher, student))
        for row in batch.rows["masked" if is_masked else "next"].tolist():
            log_p, log_q = p[row].log_softmax(0), q[row].log_softmax(0)
            total += float((log_p.exp() * (log_p - log_q)).sum())
            number += 1
    return total / number


@pytest.mark.parametrize("model_type, is_masked", [("bert", True), ("qwen3", False)])
def test_a_layers_cost_is_the_kl_of_the_student_without_it(model_type, is_masked):
    teacher, batches = families.tiny_model(model_type, is_masked), batches_of(is_masked)
    choice = choose_by_measurement(teacher, 2, batches, "--teacher t")
    first, second = choice.removals
    for removal, there in ((first, [0, 1, 2, 3]), (second, sorted(set(range(4)) - {first.layer}))):
        assert list(removal.without) == there
        for layer, found in removal.without.items():
            student = student_of_layers(teacher, [k for k in there if k != layer], "t").eval()
            expected = slow_kl(teacher, student, batches, is_masked)
            assert found == pytest.approx(expected, rel=1e-4)  # float32 against float64
        assert removal.kl == min(removal.without.values())
    assert choice.kept == sorted({0, 1, 2, 3} - {first.layer, second.layer})


def test_a_layer_that_changes_nothing_is_left_out_first_and_has_no_influence():
    teacher, batches = families.tiny_model("gpt2", False), batches_of(False)
    with torch.no_grad():
        for name, parameter in teacher.transformer.h[2].named_parameters():
            if "c_proj" in name:
                parameter.zero_()
    choice = choose_by_measurement(teacher, 3, batches, "--teacher t")
    assert choice.kept == [0, 1, 3] and abs(choice.removals[0].kl) < 1e-6
    assert abs(choice.influence[2]) < 1e-6 < min(choice.influence[k] for k in choice.kept)


def test_block_influence_is_one_minus_the_cosine_of_input_and_output():
    """Of real tokens only, against hidden states that transformers returns."""
    teacher, batches = families.tiny_model("bert", True), batches_of(True)
    found = block_influence(teacher, batches)
    cosines = []
    for batch in batches:
        inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
        with torch.no_grad():
            states = teacher(**inputs, output_hidden_states=True).hidden_states
        real = batch.attention_mask_BT.bool()
        pairs = zip(states, states[1:], strict=False)
        cosines.append([nn.functional.cosine_similarity(a[real], b[real]) for a, b in pairs])
    for layer in range(4):
        expected = 1 - torch.cat([one[layer] for one in cosines]).double().mean().item()
        assert found[layer] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model_type, is_masked", FAMILIES)
def test_any_family_is_measured_or_refused(model_type, is_masked):
    teacher, batches = families.tiny_model(model_type, is_masked), batches_of(is_masked)
    try:
        choice = choose_by_measurement(teacher, 3, batches, "--teacher t")
        student = student_of_layers(teacher, choice.kept, "--teacher t").eval()
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return
    found = slow_kl(teacher, student, batches, is_masked)
    assert choice.removals[0].kl == pytest.approx(found, rel=1e-3)


def test_measurements_are_counted():
    assert num_measurements(12, 6) == 12 + 11 + 10 + 9 + 8 + 7


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def flags(world, folder, *more: str) -> list[str]:
    return ["--teacher", str(world.teachers["bert"]), "--output", str(folder), *more]


def test_the_program_writes_the_student_with_what_each_layer_costs(world, tmp_path, capsys):
    folder, data = tmp_path / "student", world.data("bert")
    extract.main(flags(world, folder, "--choose_layers", data, "--num_layers", "2"))
    content = json.loads((folder / "extraction.json").read_text())
    removed = [step["layer"] for step in content["choice"]["removals"]]
    assert sorted([*content["layers"], *removed]) == [0, 1, 2, 3] and len(removed) == 2
    assert (folder / "layers.md").read_text().strip() in capsys.readouterr().out
    assert (folder / "layers.png").stat().st_size > 1000
    teacher = transformers.AutoModelForMaskedLM.from_pretrained(world.teachers["bert"]).eval()
    student = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    expected = student_of_layers(teacher, content["layers"], "t").eval()
    with torch.no_grad():
        assert torch.equal(student(IDS_BT).logits, expected(IDS_BT).logits)


@pytest.mark.parametrize(
    "more, line",
    [
        ([], "--choose_layers: needs --num_layers"),
        (["--num_layers", "2", "--layers", "0"], "--choose_layers: needs --num_layers"),
        (["--num_layers", "9"], "--num_layers 9: expected 1 to 4"),
    ],
)
def test_bad_flags_are_refused(more, line, world, tmp_path):
    given = flags(world, tmp_path / "student", "--choose_layers", world.data("bert"), *more)
    with pytest.raises(InputError, match=line):
        extract.main(given)
    assert not (tmp_path / "student").exists()


def test_choosing_is_for_whole_students(world):
    with pytest.raises(InputError, match="--choose_layers: needs --teacher and --output"):
        extract.main(["--choose_layers", world.data("bert"), "--num_layers", "2"])
