"""Runs with objectives on layers: train, stop and resume, default maps, bad input."""

import json
import shutil
import sys

import families
import pytest
import torch
from conftest import run_process
from stand_ins import ROOT, student_config_of, vocab_size_of
from whole_runs import as_words, assert_same_run, masked_flags, read_metrics

import binarized_data
import extract
import train
from distil.data.batches import MicroBatch
from distil.models.compared_layers import EXTRACTION
from distil.objectives import LOSSES
from distil.training import checkpointing, models
from distil.training.post_mortem import NonFiniteError
from distiller import DistillationModel, Distiller

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ALL = {"alpha_rel": 1.0, "alpha_hid": 1.0, "alpha_att": 0.1, "alpha_emb": 0.5, "relation_heads": 4}


@pytest.mark.parametrize("kind, name", [("bert", "rel"), ("gpt2", "hid"), ("bert", "att")])
def test_an_objective_on_layers_is_trained_and_logged_alone(kind, name, world, tmp_path):
    """Learn from the teacher's layers 1 and 3 what a student of its layers 0 and 3 lacks."""
    alphas = dict.fromkeys((f"alpha_{loss}" for loss in LOSSES), 0.0) | {f"alpha_{name}": 1.0}
    changes = {"max_steps": 15, "learning_rate": 5e-3, "log_interval": 6, "batch_size": 8}
    changes |= {"relation_heads": 4, "layer_map": None if name == "rel" else "0:1,1:3"}
    changes |= {"student_pretrained_weights": world.first_weights(kind), "n_gpu": 0}
    train.main(world.flags(kind, tmp_path / "run", **alphas, **changes))
    lines = [line for line in read_metrics(tmp_path / "run") if f"loss_{name}" in line]
    assert 0 < lines[-1][f"loss_{name}"] < 0.9 * lines[0][f"loss_{name}"]
    assert "loss_ce" not in lines[0]


@pytest.mark.parametrize("flag", ["bf16", "activation_checkpointing"])
def test_other_ways_to_compute_an_update_give_the_same_losses(flag, world, tmp_path):
    changes = ALL | {"max_steps": 2, "log_interval": 1, "n_gpu": 0}
    found = []
    for name, more in (("plain", {}), ("other", {flag: True})):
        train.main(world.flags("bert", tmp_path / name, **changes, **more))
        found.append(read_metrics(tmp_path / name)[-1])
    for name in ("rel", "hid", "att", "emb"):
        bound = 0.05 if flag == "bf16" else 1e-6  # bfloat16: 8 bits
        assert found[1][f"loss_{name}"] == pytest.approx(found[0][f"loss_{name}"], rel=bound)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory, teachers, text_file):
    """Make a Qwen2 with its data; return the flags of a student half as wide, and their folder."""
    folder = tmp_path_factory.mktemp("narrow")
    teacher = families.make_teacher(folder / "qwen2", "qwen2", False, teachers)
    flags = {"file_path": text_file, "tokenizer_type": "auto", "tokenizer_name": teacher}
    binarized_data.main(as_words(flags | {"dump_file": folder / "ids", "num_workers": 1}))
    config = json.loads((teacher / "config.json").read_text())
    config |= {"hidden_size": 16, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    (folder / "student.json").write_text(json.dumps(config))
    flags = {"student_config": folder / "student.json", "teacher_name": teacher, "n_gpu": 0}
    flags |= {"data_file": folder / "ids.qwen2.pickle", "gradient_accumulation_steps": 2}
    flags |= {"alpha_hid": 1.0, "alpha_emb": 1.0, "alpha_rel": 1.0, "relation_heads": 2}
    return flags | {"max_steps": 3, "log_interval": 1, "checkpoint_interval": 2}, folder


def test_projections_are_trained_saved_and_resumed_but_not_exported(narrow, tmp_path):
    flags, _ = narrow
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train.main(as_words(flags | {"dump_path": whole}))
    steps = [whole / "checkpoints" / f"step-{step:08d}" for step in (2, 3)]
    weights = [checkpointing.read(step).tensors("objectives") for step in steps]
    assert set(weights[0]) == {"hid.project.weight", "emb.project.weight"}
    for name, weight in weights[0].items():
        assert weight.shape == (32, 16) and not torch.equal(weight, weights[1][name])
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000003")
    train.main([*as_words(flags | {"dump_path": stopped}), "--resume"])
    assert_same_run(whole, stopped)
    again = checkpointing.read(stopped / "checkpoints" / "step-00000003").tensors("objectives")
    assert all(torch.equal(again[name], weight) for name, weight in weights[1].items())
    assert not any("project" in name for name in torch.load(whole / "pytorch_model.bin"))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.long)])
def test_ranks_train_relations_and_projections_as_one_does(num_ranks, narrow, tmp_path):
    one, several = (
        narrow[0] | {"dump_path": tmp_path / name, "gradient_accumulation_steps": 6 // ranks}
        for name, ranks in (("one", 1), ("several", num_ranks))
    )
    train.main(as_words(one))
    done = run_process(*TORCHRUN, num_ranks, ROOT / "train.py", *as_words(several))
    assert done.returncode == 0, done.stderr[-3000:]
    for file in ("student", "objectives"):
        expected, found = (
            checkpointing.newest(tmp_path / run / "checkpoints").tensors(file)
            for run in ("one", "several")
        )
        for name, tensor in expected.items():
            # float32 sums in another order, then Adam, which divides by the gradient's own size
            torch.testing.assert_close(tensor, found[name], rtol=0, atol=2e-5)


def test_a_projection_of_another_shape_is_not_resumed(narrow, tmp_path, status_and_errors):
    flags, _ = narrow
    flags = as_words(flags | {"dump_path": tmp_path / "run", "max_steps": 2})
    train.main(flags)
    newest = checkpointing.newest(tmp_path / "run" / "checkpoints").path
    tensors = {name: torch.zeros(32, 8) for name in ("hid.project.weight", "emb.project.weight")}
    state = json.loads((newest / "state.json").read_text())
    files = {k: checkpointing.read(newest).tensors(k) for k in ("student", "optimizer")}
    shutil.rmtree(newest)
    checkpointing.write(newest.parent, 2, files | {"objectives": tensors}, state, 3)
    status, errors = status_and_errors(train.main, [*flags, "--resume"])
    assert status == 2 and len(errors) == 1
    assert "project.weight: [32, 8] float32 in the checkpoint, [32, 16] float32 in" in errors[0]


def test_without_cosines_a_student_may_be_narrower(world, tmp_path, status_and_errors):
    sizes = {"dim": 16, "hidden_dim": 32}
    config = student_config_of("bert", vocab_size_of(world.teachers["bert"])) | sizes
    (tmp_path / "student.json").write_text(json.dumps(config))
    changes = {"student_config": tmp_path / "student.json", "max_steps": 1, "n_gpu": 0}
    changes |= {"alpha_hid": 1.0, "alpha_rel": 1.0, "relation_heads": 4}
    flags = world.flags("bert", tmp_path / "run", **changes)
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and "width is 16, the teacher's is 32; they must be equal" in errors[0]
    train.main([*flags, "--alpha_cos", "0"])
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["dim"] == 16


def test_a_loss_that_is_not_finite_is_named():
    teacher, student = (families.tiny_model("bert", True, seed=seed) for seed in (0, 1))
    teacher.requires_grad_(False)
    alphas, options = {"hid": 1.0, "rel": 1.0}, {"relation_heads": 4, "layer_map": [(0, 0)]}
    model = DistillationModel(student, alphas, 2.0, teacher=teacher, options=options)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller = Distiller(model, teacher, optimizer, None, max_grad_norm=1.0, seed=0)
    with torch.no_grad():
        student.bert.encoder.layer[3].attention.self.query.weight[0, 0] = torch.nan
    ids_BT = torch.arange(5, 29).reshape(2, 12)
    rows = {"real": torch.arange(24)}
    batch = MicroBatch(7, ids_BT, torch.ones_like(ids_BT), ids_BT, rows, 24)
    with pytest.raises(NonFiniteError, match="loss_rel became nan in micro-batch 7"):
        distiller.step([batch], [7], 1)


# --------------------------------------------------------------------------------------------------
# Which layers
# --------------------------------------------------------------------------------------------------


def options_of(flags: list[str], teacher) -> dict:
    config = train.parse_config(flags)
    return models.objective_options(
        config, models.find_student_config(config), models.load_teacher(config).network.config
    )


def test_a_students_own_layers_are_the_default_map(teachers, world, tmp_path):
    teacher = teachers["roberta"]
    flags = ["--teacher", str(teacher), "--layers", "1", "2", "--output", str(tmp_path / "student")]
    extract.main(flags)
    from_folder = {"student": tmp_path / "student", "student_config": None}
    first = tmp_path / "student" / "first_weights.pth"
    from_file = {"student_pretrained_weights": first}
    for changes, layers in (({}, [0, 3]), (from_folder, [1, 2]), (from_file, [1, 2])):
        flags = world.flags("roberta", tmp_path / "run", alpha_hid=1.0, **changes)
        assert options_of(flags, teacher)["layer_map"] == list(enumerate(layers))
    (tmp_path / "student" / EXTRACTION).write_text('{"teacher": "x", "layers": [5], "of": 6}')
    flags = world.flags("roberta", tmp_path / "run", alpha_hid=1.0, **from_folder)
    assert options_of(flags, teacher)["layer_map"] == [(0, 0), (1, 3)], "it is of other models"


def test_a_map_that_changed_is_not_resumed(teachers, world, tmp_path, status_and_errors):
    folder = tmp_path / "student"
    flags = ["--teacher", str(teachers["roberta"]), "--layers", "1", "2", "--output", str(folder)]
    extract.main(flags)
    changes = {"student": folder, "student_config": None, "alpha_hid": 1.0, "max_steps": 1}
    flags = world.flags("roberta", tmp_path / "run", **changes, n_gpu=0)
    train.main(flags)
    (folder / EXTRACTION).unlink()
    status, errors = status_and_errors(train.main, [*flags, "--resume"])
    assert status == 2 and len(errors) == 1
    expected = "--layer_map: layers [[0, 0], [1, 3]] are compared, "
    assert errors[0].startswith(expected) and "was made with [[0, 1], [1, 2]]" in errors[0]


# name -> (flags, what the one line says)
BAD = {
    "relation layer": (
        {"alpha_rel": 1, "relation_layer": 4},
        "--relation_layer 4: the teacher has no layer 4, only 0 to 3",
    ),
    "relation layer without relations": (
        {"relation_layer": 1},
        "--relation_layer 1 without --alpha_rel: weigh one, or leave it out",
    ),
    "relation heads": (
        {"alpha_rel": 1, "relation_heads": 12},
        "--relation_heads 12: does not divide the width 32 of the student's queries",
    ),
    "no relation heads": (
        {"alpha_rel": 1, "relation_heads": 0},
        "--relation_heads 0: expected at least 1",
    ),
    "student's layer": (
        {"alpha_hid": 1, "layer_map": "0:1,2:3"},
        "--layer_map 0:1,2:3: the student has no layer 2, only 0 to 1",
    ),
    "teacher's layer": (
        {"alpha_att": 1, "layer_map": "1:4"},
        "--layer_map 1:4: the teacher has no layer 4, only 0 to 3",
    ),
    "student's layer twice": (
        {"alpha_hid": 1, "layer_map": "0:1,0:3"},
        "--layer_map 0:1,0:3: names layer 0 of the student twice; leave one entry out",
    ),
    "teacher's layer twice": (
        {"alpha_hid": 1, "layer_map": "0:3,1:3"},
        "--layer_map 0:3,1:3: names layer 3 of the teacher twice; leave one entry out",
    ),
    "no map": (
        {"alpha_hid": 1, "layer_map": "0-3"},
        "--layer_map 0-3: '0-3' is not two layers; write STUDENT:TEACHER,..",
    ),
    "map without an objective": (
        {"layer_map": "0:3"},
        "--layer_map 0:3 without --alpha_hid or --alpha_att: weigh one, or leave it out",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_layers_and_heads_give_one_line(name, world, tmp_path, status_and_errors):
    changes, expected = BAD[name]
    status, errors = status_and_errors(
        train.main, world.flags("bert", tmp_path / "run", n_gpu=0, **changes)
    )
    assert status == 2 and len(errors) == 1
    assert errors[0].startswith(expected), errors[0]
    assert not (tmp_path / "run").exists()


def test_unequal_head_counts_are_refused(world, tmp_path, status_and_errors):
    config = student_config_of("bert", vocab_size_of(world.teachers["bert"])) | {"n_heads": 2}
    (tmp_path / "student.json").write_text(json.dumps(config))
    changes = {"student_config": tmp_path / "student.json", "alpha_att": 1.0, "n_gpu": 0}
    status, errors = status_and_errors(train.main, world.flags("bert", tmp_path / "run", **changes))
    expected = "--alpha_att: the student's layer 0 has 2 heads, the teacher's 0 4; they must be"
    assert status == 2 and len(errors) == 1 and errors[0].startswith(expected)


def test_a_family_whose_attention_cannot_be_read_is_refused(
    teachers, text_file, tmp_path, status_and_errors
):
    teacher = families.make_teacher(tmp_path / "deberta", "deberta-v2", True, teachers)
    flags = masked_flags(tmp_path, teacher, text_file, alpha_rel=1.0, dump_path=tmp_path / "run")
    status, errors = status_and_errors(train.main, flags)
    expected = "--alpha_rel: the attention of layer 3 of a DebertaV2ForMaskedLM cannot be read: it"
    assert status == 2 and len(errors) == 1 and errors[0].startswith(expected)
    assert not (tmp_path / "run").exists()
