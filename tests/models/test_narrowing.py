"""Narrower students: all kept is the same model, what is left out is the least important."""

import dataclasses
import json

import families
import pytest
import torch
import transformers

import extract
from distil.data.batches import MicroBatch, prepare_clm
from distil.evaluation import FixedMasks
from distil.models.layer_readings import blocks_of
from distil.models.narrowing import (
    FAMILIES,
    Importance,
    Sizes,
    choose,
    importance_by_activations,
    importance_by_weights,
    narrowed,
    parts_of,
    wanted_sizes,
)
from utils import InputError

LENGTHS_B = torch.tensor([12, 9, 5])
IDS_BT = torch.randint(5, 99, (3, 12), generator=torch.Generator().manual_seed(3))
TYPES = [name for name in FAMILIES if name != "mistral"]  # as Llama


def model_of(model_type: str):
    """Make a tiny model whose heads, neurons and width have unlike sizes."""
    return families.tiny_model(model_type, model_type in families.MASKED)


def batches_of(is_masked: bool) -> list[MicroBatch]:
    """Make passes over a few sequences, of which two are padded."""
    ids_BT = IDS_BT.masked_fill(torch.arange(12) >= LENGTHS_B[:, None], 0)
    if is_masked:
        return list(FixedMasks(4, [0, 1, 2])(0, ids_BT, LENGTHS_B))
    return [prepare_clm(0, ids_BT, LENGTHS_B)]


@pytest.mark.parametrize("model_type", TYPES)
def test_all_kept_is_the_same_model(model_type):
    model = model_of(model_type)
    sizes = wanted_sizes(model.config, None, None, None, "t")
    student = narrowed(model, sizes, importance_by_weights(model), "t").eval()
    with torch.no_grad():
        assert torch.equal(student(IDS_BT).logits, model(IDS_BT).logits)


@pytest.mark.parametrize("model_type", TYPES)
def test_fewer_neurons_and_heads_are_the_model_with_the_others_silent(model_type):
    """`narrowed` proves it; here it is told apart from a wrong cut."""
    model = model_of(model_type)
    own = Sizes.of(model.config)
    has_head_width = "head_dim" in type(model.config)().to_dict()
    heads = own.heads // 2 if has_head_width and model_type not in ("bert", "modernbert") else None
    wanted = wanted_sizes(model.config, None, own.intermediate // 2, heads, "t")
    student = narrowed(model, wanted, importance_by_weights(model), "t").eval()
    assert Sizes.of(student.config) == wanted and wanted.intermediate == own.intermediate // 2
    with torch.no_grad():
        assert not torch.allclose(student(IDS_BT).logits, model(IDS_BT).logits, atol=1e-3)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_narrower_width_is_taken_from_the_embeddings_and_loads(model_type, tmp_path):
    model = model_of(model_type)
    own = Sizes.of(model.config)
    wanted = wanted_sizes(model.config, own.hidden // 2, None, None, "t")
    student = narrowed(model, wanted, importance_by_weights(model), "t").eval()
    assert Sizes.of(student.config) == wanted
    student.save_pretrained(tmp_path)
    loaded = families.auto_class(model_type in families.MASKED).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(student(IDS_BT).logits, loaded(IDS_BT).logits)
        kept = choose(importance_by_weights(model), own, wanted).hidden_D
        table = model.get_input_embeddings().weight[:, kept]
        assert torch.equal(student.get_input_embeddings().weight, table)


def test_what_matters_is_kept():
    """Neurons, heads and width are ranked by activations, against a slow loop."""
    model, batches = model_of("bert"), batches_of(True)
    found = importance_by_activations(model, batches)
    layer, inputs = blocks_of(model)[1], []
    down = layer.get_submodule(parts_of(model).down)
    handle = down.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    squares = torch.zeros(12, down.in_features, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT)
            for one, mask in zip(inputs.pop(), batch.attention_mask_BT, strict=True):
                for place in range(len(mask)):
                    if mask[place]:
                        squares[place] += one[place].double() ** 2
    handle.remove()
    expected = squares.sqrt().mean(0)
    torch.testing.assert_close(found.neurons[1], expected, rtol=1e-5, atol=1e-6)  # float32 inputs
    own = Sizes.of(model.config)
    kept = choose(found, own, dataclasses.replace(own, intermediate=5))
    assert set(kept.neurons[1].tolist()) == set(expected.topk(5).indices.tolist())


def test_heads_that_share_keys_go_together():
    model = model_of("qwen3")
    own = Sizes.of(model.config)
    assert (own.heads, own.key_heads) == (4, 2)
    scores = torch.tensor([9.0, 0.0, 5.0, 5.0])  # the second pair has the larger norm
    scores_F, scores_D = torch.ones(own.intermediate), torch.ones(own.hidden)
    importance = Importance(scores_D, [scores_F] * 4, [scores] * 4)
    wanted = wanted_sizes(model.config, None, None, 2, "t")
    assert wanted.key_heads == 1
    assert choose(importance, own, wanted).heads[0].tolist() == [0, 1]
    kept = choose(dataclasses.replace(importance, heads=[scores.flip(0)] * 4), own, wanted)
    assert kept.heads[0].tolist() == [2, 3]


@pytest.mark.parametrize(
    "model_type, sizes, line",
    [
        ("bert", (40, None, None), "--hidden_size 40: expected 1 to 32"),
        ("bert", (None, 0, None), "--intermediate_size 0: expected 1 to 48"),
        ("bert", (None, None, 2), "give --hidden_size 16"),
        ("bert", (20, None, None), "heads keep their width 8"),
        ("qwen3", (None, None, 3), "expected a multiple of 2"),
        ("deberta-v2", (16, None, None), "cannot make a deberta-v2 narrower"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(model_type, sizes, line):
    config = families.tiny_config(model_type, 99)
    with pytest.raises(InputError, match=line):
        wanted_sizes(config, *sizes, "--teacher t")


def test_the_program_writes_a_narrower_student(world, tmp_path):
    flags = ["--teacher", str(world.teachers["bert"]), "--output", str(tmp_path / "student")]
    flags += ["--num_layers", "2", "--hidden_size", "16", "--intermediate_size", "20"]
    extract.main([*flags, "--importance_file", world.data("bert")])
    student = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "student")
    sizes = Sizes.of(student.config)
    assert (sizes.hidden, sizes.intermediate, sizes.heads) == (16, 20, 2)
    content = json.loads((tmp_path / "student" / "extraction.json").read_text())
    assert content["layers"] == [0, 3] and content["sizes"]["hidden"] == 16


def test_an_importance_file_without_sizes_is_refused(world, tmp_path):
    flags = ["--teacher", str(world.teachers["bert"]), "--output", str(tmp_path / "student")]
    with pytest.raises(InputError, match="--importance_file: needs --hidden_size"):
        extract.main([*flags, "--num_layers", "2", "--importance_file", world.data("bert")])
