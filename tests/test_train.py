"""train.py: flags and defaults, bad input, the run folder, the schedule; every pair learns."""

import dataclasses
import json
import math
import re
import shutil
import sys
from pathlib import Path

import families
import pytest
import safetensors.torch
import torch
import transformers
from conftest import as_uint16, run_process, write_pickle
from stand_ins import ROOT, make_model, save_tokenizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import binarized_data
import train
import train_teacher
from distil.objectives import LOSSES
from distil.training.endings import EXIT_NON_FINITE

KINDS = ("bert", "roberta", "gpt2")
REQUIRED = {
    "dump_path": "new",
    "data_file": __file__,
    "student_type": "gpt2",
    "student_config": __file__,
    "teacher_type": "gpt2",
    "teacher_name": "t",
}
NEEDED = [word for name, value in REQUIRED.items() for word in (f"--{name}", value)]

DEFAULTS = {
    "force": False,
    "student": None,
    "trust_remote_code": False,
    "student_pretrained_weights": None,
    "temperature": 2.0,
    "alpha_ce": 0.5,
    "alpha_mlm": 0.0,
    "alpha_clm": 0.5,
    "alpha_mse": 0.0,
    "alpha_cos": 0.0,
    "alpha_rkl": 0.0,
    "alpha_jsd": 0.0,
    "alpha_rel": 0.0,
    "alpha_hid": 0.0,
    "alpha_att": 0.0,
    "alpha_emb": 0.0,
    "relation_heads": 12,
    "relation_layer": None,
    "layer_map": None,
    "hid_loss": "mse",
    "mlm": False,
    "mlm_mask_prop": 0.15,
    "fp16": False,
    "fp16_opt_level": "O1",
    "local_rank": -1,
    "report_to": ("tensorboard",),
    "log_interval": 500,
    "word_mask": 0.8,
    "word_keep": 0.1,
    "word_rand": 0.1,
    "mlm_smoothing": 0.7,
    "token_counts": None,
    "restrict_ce_to_mask": False,
    "freeze_pos_embs": False,
    "freeze_token_type_embds": False,
    "student_dropout": None,
    "n_epoch": 3,
    "batch_size": 5,
    "group_by_size": True,
    "gradient_accumulation_steps": 50,
    "warmup_prop": 0.05,
    "weight_decay": 0.0,
    "learning_rate": 5e-4,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 5.0,
    "initializer_range": None,
    "n_gpu": 1,
    "seed": 56,
    "checkpoint_interval": 4000,
    "eval_data_file": None,
    "eval_interval": None,
    "max_steps": None,
    "max_length": None,
    "max_tokens": None,
    "tokens_per_pass": None,
    "pack_sequences": None,
    "loss_normalization": "micro_batches",
    "bf16": False,
    "activation_checkpointing": False,
    "compile": False,
    "resume": None,
    "keep_checkpoints": 3,
    "keep_epochs": None,
    "distributed_timeout_s": 600,
}


def test_flags_and_defaults_are_those_of_2019():
    flags = train.as_flags(train.parse_config(NEEDED))
    assert {name: value for name, value in flags.items() if name not in REQUIRED} == DEFAULTS


def test_every_loss_has_its_flag():
    alphas = {name: 0.0 if name == "mlm" else 0.25 for name in LOSSES}
    flags = [word for name, alpha in alphas.items() for word in (f"--alpha_{name}", str(alpha))]
    assert train.parse_config(NEEDED + flags).alphas == alphas


def test_either_flag_controls_grouping_by_length():
    assert train.parse_config([*NEEDED, "--group_by_size"]).group_by_size
    assert not train.parse_config([*NEEDED, "--no-group_by_size"]).group_by_size


@pytest.mark.parametrize("spelling", ["--local-rank=3", "--local_rank=3"])
def test_both_spellings_of_the_launchers_flag_are_parsed(spelling):
    assert train.parse_config([*NEEDED, spelling]).local_rank == 3


def test_help_names_every_option_once(capsys):
    with pytest.raises(SystemExit):
        train.parse_config(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(train.TrainConfig):
        assert field.name == "alphas" or len(re.findall(rf"\n  --{field.name}\b", text)) == 1


# --------------------------------------------------------------------------------------------------
# Bad input: one line per problem, exit status 2, no file touched
# --------------------------------------------------------------------------------------------------

BAD_FLAGS = {
    "causal loss with mlm": (
        {"alpha_mlm": 0.0, "alpha_clm": 0.5},
        ["--alpha_clm 0.5 with --mlm: set --alpha_clm 0"],
    ),
    "nothing to learn": (
        {"alpha_mlm": 0.0, "alpha_ce": 0.0, "alpha_cos": 0.0},
        ["their sum is not above 0"],
    ),
    "weight without mlm": (
        {"mlm": None},
        [
            "--alpha_mlm 2.0 without --mlm",
            "--student_type distilbert without --mlm",
            "--teacher_type bert without --mlm",
        ],
    ),
    "max length": ({"max_length": 11}, ["--max_length 11: expected above 11"]),
    "both language models": ({"alpha_clm": 0.5}, ["--alpha_mlm 2.0 and --alpha_clm 0.5"]),
    "no counts": (
        {"token_counts": None},
        ["--mlm with --mlm_smoothing 0.7, without --token_counts"],
    ),
    "missing counts": ({"token_counts": "nowhere"}, ["--token_counts nowhere: no such file"]),
    "missing data": ({"data_file": "nowhere"}, ["--data_file nowhere: no such file"]),
    "a folder": ({"student_config": "."}, ["--student_config .: is a folder"]),
    "pair": (
        {"student_type": "roberta"},
        ["--teacher_type bert with --student_type roberta: no such pair"],
    ),
    "share": ({"word_mask": 0.7}, ["--word_mask + --word_keep + --word_rand: their sum is 0.9"]),
    "proportion": ({"mlm_mask_prop": 1.5}, ["--mlm_mask_prop 1.5: expected at least 0, at most 1"]),
    "temperature": ({"temperature": 0}, ["--temperature 0.0: expected above 0"]),
    "nan": ({"alpha_ce": "nan"}, ["--alpha_ce nan", "their sum is not above 0"]),
    "negative": ({"alpha_cos": -1.0}, ["--alpha_cos -1.0: expected a finite number, 0 or more"]),
    "accumulation": (
        {"gradient_accumulation_steps": 0},
        ["--gradient_accumulation_steps 0: expected at least 1"],
    ),
    "token types": (
        {"freeze_token_type_embds": True},
        ["--freeze_token_type_embds with --student_type distilbert"],
    ),
    "unknown flag": (
        {"alpha_cee": 1.0},
        ["unknown argument --alpha_cee; did you mean --alpha_ce?"],
    ),
    "no number": ({"batch_size": "many"}, ["argument --batch_size: invalid int value: 'many'"]),
    "no choice": ({"teacher_type": "t5"}, ["argument --teacher_type: invalid choice: 't5'"]),
    "all at once": (
        {"alpha_clm": 0.5, "temperature": -1, "n_epoch": 0, "data_file": "nowhere"},
        ["--temperature", "--n_epoch", "--alpha_mlm 2.0 and", "--data_file"],
    ),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_give_one_line_each(name, world, tmp_path, status_and_errors):
    changes, expected = BAD_FLAGS[name]
    status, errors = status_and_errors(train.main, world.flags("bert", tmp_path / "run", **changes))
    assert status == 2 and not (tmp_path / "run").exists()
    assert len(errors) >= len(expected)
    for text in expected:
        assert sum(text in line for line in errors) == 1, (text, errors)


def edit_json(path: str, target: Path, **changes) -> str:
    target.write_text(json.dumps(json.loads(Path(path).read_text()) | changes))
    return str(target)


def bad_vocabulary(world, tmp):
    changed = edit_json(world.config("bert"), tmp / "c.json", vocab_size=77)
    return {"student_config": changed}, "vocabulary is 77, the teacher's is"


def bad_width(world, tmp):
    changed = edit_json(world.config("bert"), tmp / "c.json", dim=40)
    return {"student_config": changed}, "width is 40, the teacher's is 32"


def bad_positions(world, tmp):
    changed = edit_json(world.config("bert"), tmp / "c.json", max_position_embeddings=99)
    return {"student_config": changed}, "number of positions is 99, the teacher's is 64"


def bad_heads(world, tmp):
    changed = edit_json(world.config("bert"), tmp / "c.json", n_heads=5)
    return {"student_config": changed}, "--student_config"


def bad_activation(world, tmp):
    changed = edit_json(world.config("bert"), tmp / "c.json", activation="foo")
    return {"student_config": changed}, "c.json: cannot build a model"


def bad_layers(world, tmp):
    changed = edit_json(world.config("bert"), tmp / "c.json", n_layers=0)
    return {"student_config": changed}, "c.json: has 0 layers"


def bad_forward(world, tmp):
    changed = edit_json(world.config("bert"), tmp / "c.json", n_heads=-4)
    return {"student_config": changed}, "c.json: the model fails on"


def bad_tied_weights(world, tmp):
    state = torch.load(world.first_weights("bert"), weights_only=True)
    state["vocab_projector.weight"] = state["vocab_projector.weight"] + 1
    torch.save(state, tmp / "first.pth")
    changed = {"student_pretrained_weights": str(tmp / "first.pth")}
    return changed, "first.pth: has another value for"


def bad_teacher_layers(world, tmp):
    shutil.copytree(world.teachers["bert"], tmp / "cut")
    edit_json(str(tmp / "cut" / "config.json"), tmp / "cut" / "config.json", num_hidden_layers=2)
    return {"teacher_name": str(tmp / "cut")}, "do not fit its config.json"


def bad_tokenizer_files(world, tmp):
    shutil.copytree(world.teachers["bert"], tmp / "broken")
    (tmp / "broken" / "tokenizer_config.json").write_text("{")
    return {"teacher_name": str(tmp / "broken")}, "tokenizer_config.json: is no readable JSON"


def bad_config_type(world, tmp):
    changed = edit_json(world.config("bert"), tmp / "c.json", model_type="gpt2")
    return {"student_config": changed}, "is for a gpt2 model"


def bad_config_text(world, tmp):
    (tmp / "c.json").write_text("{not json")
    return {"student_config": str(tmp / "c.json")}, "c.json: is no readable JSON"


def bad_token_id(world, tmp):
    data = write_pickle(tmp / "data.pickle", as_uint16([[2, *range(5, 20), 9999, 3]]))
    return {"data_file": data}, "data.pickle: token id 9999 is outside the vocabulary"


def bad_boundaries(world, tmp):
    data = write_pickle(tmp / "data.pickle", as_uint16([range(5, 25)]))
    return {"data_file": data}, "data.pickle: sequence 0 begins with"


def bad_tokenizer_type(world, tmp):
    return {"data_file": world.data("roberta")}, "binarize"


def bad_filtered(world, tmp):
    data = write_pickle(tmp / "d.pickle", as_uint16([[2, 7, 3]] * 9))
    return {"data_file": data}, "none of its 9 sequences is left"


def bad_counts_length(world, tmp):
    counts = write_pickle(tmp / "counts.pickle", [1, 2, 3])
    return {"token_counts": counts}, "counts.pickle: has 3 entries, the vocabulary of"


def bad_counts_content(world, tmp):
    counts = write_pickle(tmp / "counts.pickle", {"a": 1})
    return {"token_counts": counts}, "expected a list of counts"


def bad_empty_data(world, tmp):
    (tmp / "empty.pickle").touch()
    return {"data_file": str(tmp / "empty.pickle")}, "empty.pickle: the file is empty"


def bad_data(world, tmp):
    (tmp / "text.pickle").write_text("some text")
    return {"data_file": str(tmp / "text.pickle")}, "text.pickle: not a readable pickle"


def bad_teacher_type(world, tmp):
    return {"teacher_name": str(world.teachers["roberta"])}, "--teacher_name"


def bad_teacher(world, tmp):
    return {"teacher_name": str(tmp / "no-teacher")}, "neither a local folder nor a model"


def bad_first_weights(world, tmp):
    changed = {"student_pretrained_weights": world.first_weights("gpt2")}
    return changed, "has unexpected transformer."


BAD_FILES = [value for name, value in globals().copy().items() if name.startswith("bad_")]


@pytest.mark.parametrize("make", BAD_FILES, ids=lambda function: function.__name__)
def test_bad_files_give_one_line_and_leave_the_old_run(make, world, tmp_path, status_and_errors):
    old = tmp_path / "run"
    old.mkdir()
    (old / "parameters.json").write_text("{}")
    changes, expected = make(world, tmp_path)
    status, errors = status_and_errors(train.main, world.flags("bert", old, force=True, **changes))
    assert status == 2 and any(expected in line for line in errors), errors
    assert [path.name for path in old.iterdir()] == ["parameters.json"]
    assert not list(tmp_path.glob("run.old*"))


def test_a_roberta_student_needs_its_teachers_padding_id(world, tmp_path, status_and_errors):
    config = edit_json(world.config("roberta"), tmp_path / "c.json", pad_token_id=0)
    flags = world.flags("roberta", tmp_path / "run", student_config=config)
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and "c.json: padding id is 0, the teacher's is 1" in errors[0]


def test_an_existing_run_folder_is_refused_without_force(world, tmp_path, status_and_errors):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    status, errors = status_and_errors(train.main, world.flags("bert", tmp_path / "run"))
    assert status == 2 and len(errors) == 1
    assert "exists already" in errors[0] and "--force" in errors[0]


@pytest.mark.parametrize("where", ["foreign", "data", "cwd", "file", "link", "below a file"])
def test_force_never_harms_other_folders(where, world, tmp_path, status_and_errors, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    changes, dump_path = {}, target
    if where == "data":
        (target / "parameters.json").write_text("{}")
        changes["data_file"] = shutil.copy(world.data("bert"), target / "data.pickle")
    elif where == "cwd":
        (target / "parameters.json").write_text("{}")
        monkeypatch.chdir(target)
        dump_path = "."
    elif where == "file":
        dump_path = target / "thesis.txt"
    elif where == "below a file":
        dump_path = target / "thesis.txt" / "run"
    elif where == "link":
        (tmp_path / "link").symlink_to(target)
        dump_path = f"{tmp_path / 'link'}/"
    flags = world.flags("bert", dump_path, force=True, **changes)
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and len(errors) == 1 and "--dump_path" in errors[0]
    assert (target / "thesis.txt").read_text() == "years of work"


def test_force_moves_an_old_run_aside(world, tmp_path):
    train.main(world.flags("bert", tmp_path / "run", max_steps=1))
    (tmp_path / "run" / "mark").touch()
    train.main(world.flags("bert", tmp_path / "run", max_steps=1, force=True))
    aside = list(tmp_path.glob("run.old-*"))
    assert len(aside) == 1 and (aside[0] / "mark").exists()
    assert not (tmp_path / "run" / "mark").exists()


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> dict[str, Path]:
    """One finished run of each pair from first weights, with epochs, logs and checkpoints."""
    folders = {}
    for kind in KINDS:
        folders[kind] = tmp_path_factory.mktemp("runs") / kind
        changes = {"student_pretrained_weights": world.first_weights(kind)}
        changes |= {"n_epoch": 3, "log_interval": 20, "checkpoint_interval": 50}
        changes |= {"learning_rate": 2e-3, "alpha_mse": 0.01, "freeze_pos_embs": True}
        train.main(world.flags(kind, folders[kind], **changes))
    return folders


def scalars(folder: Path, run: str = "train") -> dict[str, list]:
    log = EventAccumulator(str(folder / "log" / run), size_guidance={"scalars": 0})
    log.Reload()
    return {tag: log.Scalars(tag) for tag in log.Tags()["scalars"]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_folder_holds_the_files_of_2019(kind, runs):
    names = {path.name for path in runs[kind].iterdir()}
    expected = {"parameters.json", "git_log.json", "config.json", "tokenizer.json", "log"}
    expected |= {"checkpoint.pth", "pytorch_model.bin", "model"}
    expected |= {f"model_epoch_{epoch}.pth" for epoch in range(3)}
    assert expected <= names
    assert not [name for name in names if name.startswith(".") or name.endswith(".tmp")]
    facts = json.loads((runs[kind] / "git_log.json").read_text())
    assert set(facts) == {"repo_id", "repo_sha", "repo_branch"}
    parameters = json.loads((runs[kind] / "parameters.json").read_text())
    assert parameters["alpha_mse"] == 0.01 and parameters["freeze_pos_embs"] is True
    assert parameters["torch_version"] == torch.__version__ and parameters["num_processes"] == 1
    config = json.loads((runs[kind] / "config.json").read_text())
    assert config["architectures"] == [type(load_auto(kind, runs[kind])).__name__]
    assert not config.get("output_hidden_states")


PROJECTIONS = {
    "bert": "vocab_projector.weight",
    "roberta": "lm_head.decoder.weight",
    "gpt2": "lm_head.weight",
}


def load_auto(kind: str, folder: Path):
    auto_class = families.auto_class(is_masked=kind != "gpt2")
    model, report = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_loads_with_equal_logits_and_tokenizer(kind, runs, world, lines):
    from_folder = load_auto(kind, runs[kind])
    plain = type(from_folder)(from_folder.config).eval()
    state = torch.load(runs[kind] / "pytorch_model.bin", weights_only=True)
    plain.load_state_dict(state, strict=True)
    assert not any(name.startswith("module.") for name in state)
    assert PROJECTIONS[kind] in state
    tokenizer = transformers.AutoTokenizer.from_pretrained(runs[kind])
    ids = tokenizer(lines[0], return_tensors="pt")["input_ids"][:, :40]
    assert torch.equal(from_folder(ids).logits, plain(ids).logits)
    teachers = transformers.AutoTokenizer.from_pretrained(world.teachers[kind])
    assert tokenizer(lines[:9])["input_ids"] == teachers(lines[:9])["input_ids"]
    last = torch.load(runs[kind] / "model_epoch_2.pth", weights_only=True)
    assert all(torch.equal(last[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", KINDS)
def test_distillation_brings_every_pair_closer_to_its_teacher(kind, runs):
    losses = [event.value for event in scalars(runs[kind])["losses/loss_ce"]]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_tensorboard_has_the_tags_of_2019(kind, runs, world):
    """Those of parameters and gradients in a run of their own: 418 of 429 hid the others."""
    found, of_parameters = (scalars(runs[kind], run) for run in ("train", "parameters"))
    own = {"ce", "mse", "cos", "clm" if kind == "gpt2" else "mlm"}
    expected = {
        "losses/cum_avg_loss_epoch",
        "losses/loss",
        *(f"losses/loss_{name}" for name in own),
        "learning_rate/lr",
        "global/memory_usage",
        "global/speed",
        "global/tokens_per_s",
        "global/grad_norm",
        "epoch/loss",
    }
    student = load_auto(kind, runs[kind])
    names = {name for name, _ in student.named_parameters()}
    frozen = {name for name in names if "position_embeddings" in name or "wpe" in name}
    assert set(found) == expected and len(frozen) == 1
    expected = {f"parameter_{what}/{name}" for what in ("mean", "std") for name in names}
    expected |= {f"grad_{what}/{name}" for what in ("mean", "std") for name in names - frozen}
    assert set(of_parameters) == expected
    log = EventAccumulator(str(runs[kind] / "log" / "train"))
    log.Reload()
    texts = {f"config/{part}/text_summary" for part in ("training", "student")}
    assert set(log.Tags()["tensors"]) == texts
    assert [event.step for event in found["epoch/loss"]] == [0, 1, 2]
    steps = [event.step for event in found["losses/loss"]]
    assert steps[:3] == [20, 40, 60]
    assert all([event.step for event in events] == steps for events in of_parameters.values())
    assert all(math.isfinite(event.value) for events in found.values() for event in events)
    assert 100 < found["global/memory_usage"][0].value < 1e7


def test_only_frozen_positions_are_unchanged(runs, world):
    positions = {
        "bert": "distilbert.embeddings.position_embeddings.weight",
        "gpt2": "transformer.wpe.weight",
    }
    for kind, name in positions.items():
        before = torch.load(world.first_weights(kind), weights_only=True)
        after = torch.load(runs[kind] / "pytorch_model.bin", weights_only=True)
        assert torch.equal(before[name], after[name])
        moved = [n for n in before if not torch.equal(before[n], after[n])]
        assert len(moved) == len(before) - 1


def test_sinusoidal_positions_are_frozen_without_the_flag(world, tmp_path):
    train.main(world.flags("bert", tmp_path / "run", max_steps=3))
    after = torch.load(tmp_path / "run" / "pytorch_model.bin", weights_only=True)
    positions = after["distilbert.embeddings.position_embeddings.weight"]
    assert positions[3, :2].tolist() == pytest.approx([math.sin(3), math.cos(3)], abs=1e-6)


def test_a_run_is_reproducible_bit_for_bit(world, tmp_path):
    states = []
    for name in ("one", "two"):
        train.main(world.flags("bert", tmp_path / name, max_steps=4))
        states.append(torch.load(tmp_path / name / "pytorch_model.bin", weights_only=True))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("epochs, accumulation", [(1, 7), (3, 7), (2, 1000)])
def test_updates_rates_and_epochs_follow_the_schedule(epochs, accumulation, world, tmp_path):
    changes = {"n_epoch": epochs, "gradient_accumulation_steps": accumulation}
    changes |= {"log_interval": 1, "warmup_prop": 0.3}
    train.main(world.flags("bert", tmp_path / "run", **changes))
    found = scalars(tmp_path / "run")
    batches = 48  # 240 sequences, 5 a batch
    steps = [event.step for event in found["learning_rate/lr"]]
    assert steps == [*range(accumulation, batches * epochs, accumulation), batches * epochs]
    num = batches * epochs // accumulation + 1
    warmup = math.ceil(0.3 * num)
    expected = [
        5e-4 * (k / warmup if k < warmup else max(num - k, 0) / max(num - warmup, 1))
        for k in range(1, len(steps) + 1)
    ]
    rates = [event.value for event in found["learning_rate/lr"]]
    assert rates == pytest.approx(expected, rel=1e-5)
    names = {path.name for path in (tmp_path / "run").glob("model_epoch*")}
    assert names == {f"model_epoch_{epoch}.pth" for epoch in range(epochs)}


def test_the_first_update_has_a_learning_rate_of_zero(world, tmp_path):
    changes = {"max_steps": 1, "student_pretrained_weights": world.first_weights("bert")}
    train.main(world.flags("bert", tmp_path / "run", **changes))
    before = torch.load(world.first_weights("bert"), weights_only=True)
    after = torch.load(tmp_path / "run" / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_logged_losses_are_means_since_the_last_log(world, tmp_path):
    train.main(world.flags("bert", tmp_path / "often", max_steps=6, log_interval=2))
    train.main(world.flags("bert", tmp_path / "rarely", max_steps=6, log_interval=6))
    for tag in ("losses/loss", "losses/loss_ce", "losses/loss_mlm"):
        logs = [scalars(tmp_path / name)[tag] for name in ("often", "rarely")]
        often, rarely = ([event.value for event in log] for log in logs)
        assert rarely == pytest.approx([sum(often[:3]) / 3, sum(often[3:]) / 3], rel=1e-5)
    epoch = [e.value for e in scalars(tmp_path / "often")["losses/cum_avg_loss_epoch"]]
    losses = [e.value for e in scalars(tmp_path / "often")["losses/loss"]]
    assert epoch == pytest.approx([sum(losses[:k]) / k for k in range(1, 7)], rel=1e-5)


def test_a_run_of_few_updates_logs_a_warning(world, tmp_path):
    flags = world.flags("bert", tmp_path / "run", max_steps=2)
    done = run_process(sys.executable, ROOT / "train.py", *flags)
    assert done.returncode == 0 and "Only 2 update(s)" in done.stderr


@pytest.mark.parametrize("where", ["teacher", "gradient"])
def test_a_nan_stops_the_run_and_saves_its_batches(where, world, tmp_path, monkeypatch, capfd):
    if where == "teacher":
        kept = train.set_up

        def set_up(*arguments):
            parts = kept(*arguments)
            parts.distiller.teacher.cls.predictions.bias.data[7] = float("nan")
            return parts

        monkeypatch.setattr(train, "set_up", set_up)
    else:
        kept = train.models.make_student

        def make(*arguments):
            student = kept(*arguments)
            bias = student.network.vocab_projector.bias
            bias.register_hook(lambda gradient: gradient * float("inf"))
            return student

        monkeypatch.setattr(train.models, "make_student", make)
    with pytest.raises(SystemExit) as end:
        train.main(world.flags("bert", tmp_path / "run"))
    assert end.value.code == EXIT_NON_FINITE != 0
    message = capfd.readouterr().err
    assert ("loss_ce became nan" if where == "teacher" else "gradient norm became") in message
    assert "update 0: " in message and "micro-batch 0" in message
    assert "on rank 0, sequences " in message
    if where == "gradient":
        assert re.search("loss_(ce|mlm)'s gradient for vocab_projector.bias", message)
    batches = safetensors.torch.load_file(tmp_path / "run" / "nonfinite-step-0.safetensors")
    names = ("input_ids", "labels", "sequences", "attention_mask")
    assert set(batches) == {f"{number}/{name}" for number in (0, 1) for name in names}
    assert not (tmp_path / "run" / "pytorch_model.bin").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000000"]


def test_a_teacher_that_gives_nan_is_refused_before_training(world, tmp_path, status_and_errors):
    teacher = tmp_path / "huge"
    shutil.copytree(world.teachers["bert"], teacher)
    model = transformers.BertForMaskedLM.from_pretrained(teacher)
    model.bert.embeddings.LayerNorm.weight.data.fill_(3e38)
    model.save_pretrained(teacher)
    flags = world.flags("bert", tmp_path / "run", teacher_name=str(teacher))
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and "gives NaN or infinite values before any training" in errors[0]
    assert not (tmp_path / "run").exists()


def test_output_options_of_a_configuration_are_ignored(world, tmp_path):
    changes = {"output_hidden_states": True, "output_attentions": True}
    config = edit_json(world.config("bert"), tmp_path / "c.json", **changes)
    train.main(world.flags("bert", tmp_path / "run", max_steps=1, student_config=config))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert not saved.get("output_hidden_states") and not saved.get("output_attentions")


def test_initializer_range_overrides_the_configuration(world, tmp_path):
    train.main(world.flags("bert", tmp_path / "run", max_steps=1, initializer_range=0.5))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["initializer_range"] == 0.5
    state = torch.load(tmp_path / "run" / "pytorch_model.bin", weights_only=True)
    std = state["vocab_transform.weight"].std().item()
    assert std == pytest.approx(0.5, rel=0.1)  # 1024 draws: standard error 2 %


def test_max_length_cuts_sequences(world, tmp_path):
    config = train.parse_config(world.flags("bert", tmp_path / "run", max_length=20))
    parts = train.set_up(config, train.Runtime())
    assert parts.dataset.lengths.max() == 20


def test_max_steps_equal_to_the_epochs_gives_the_same_weights(world, tmp_path):
    train.main(world.flags("bert", tmp_path / "epochs", n_epoch=1, gradient_accumulation_steps=8))
    train.main(world.flags("bert", tmp_path / "steps", max_steps=6, gradient_accumulation_steps=8))
    files = [tmp_path / name / "pytorch_model.bin" for name in ("epochs", "steps")]
    one, two = (torch.load(file, weights_only=True) for file in files)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_half_precision_trains(world, tmp_path):
    train.main(world.flags("bert", tmp_path / "run", max_steps=4, fp16=True, log_interval=2))
    assert all(math.isfinite(event.value) for event in scalars(tmp_path / "run")["losses/loss"])


def test_a_cased_bare_vocabulary_stays_cased_through_a_run(world, tmp_path, text_file):
    teacher = tmp_path / "cased"
    teacher.mkdir()
    save_tokenizer("bert", teacher, text_file, lowercase=False)
    vocabulary = json.loads((teacher / "tokenizer.json").read_text())["model"]["vocab"]
    for path in teacher.iterdir():
        path.unlink()
    tokens = "\n".join(sorted(vocabulary, key=vocabulary.get))
    (teacher / "vocab.txt").write_text(f"{tokens}\n", encoding="utf-8")
    make_model("bert", len(vocabulary)).save_pretrained(teacher)
    flags = ["--file_path", str(text_file), "--tokenizer_name", str(teacher)]
    binarized_data.main([*flags, "--dump_file", str(tmp_path / "d")])
    counts = write_pickle(tmp_path / "counts.pickle", [1] * len(vocabulary))
    config = edit_json(world.config("bert"), tmp_path / "c.json", vocab_size=len(vocabulary))
    changes = {"teacher_name": teacher, "student_config": config, "token_counts": counts}
    changes |= {"data_file": tmp_path / "d.cased.pickle", "max_steps": 1}
    train.main(world.flags("bert", tmp_path / "run", **changes))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.encode("Da") != tokenizer.encode("da")


# --------------------------------------------------------------------------------------------------
# The token store
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(world, text_file, tmp_path_factory) -> str:
    """Write the data of the BERT pair as a store; return its path without suffix."""
    folder = tmp_path_factory.mktemp("store")
    flags = ["--file_path", str(text_file), "--tokenizer_name", str(world.teachers["bert"])]
    binarized_data.main([*flags, "--dump_file", str(folder / "data"), "--format", "store"])
    return str(folder / "data.tiny-bert")


def test_a_run_from_a_store_equals_the_run_from_a_pickle(world, store, tmp_path):
    data_files = {"pickle": world.data("bert"), "store": store, "named_by_bin": f"{store}.bin"}
    for name, data_file in data_files.items():
        train.main(world.flags("bert", tmp_path / name, data_file=data_file, max_steps=4))
    files = [tmp_path / name / "pytorch_model.bin" for name in data_files]
    states = [torch.load(file, weights_only=True) for file in files]
    assert all(torch.equal(states[0][key], state[key]) for state in states for key in states[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_budget_trains(kind, world, tmp_path):
    config = train.parse_config(world.flags(kind, tmp_path / "run", max_tokens=300))
    parts = train.set_up(config, train.Runtime())
    sizes = [parts.dataset.collate(batch)[0].numel() for batch in parts.sampler.epoch_batches(0)]
    assert max(sizes) <= 300 and sum(sizes) / len(sizes) > 200
    train.main(world.flags(kind, tmp_path / "run", max_tokens=300, max_steps=2))
    assert (tmp_path / "run" / "pytorch_model.bin").exists()


def test_damage_found_while_training_stops_the_run(world, store, tmp_path, status_and_errors):
    damaged = tmp_path / "data.tiny-bert"
    for suffix in (".idx", ".json", ".bin"):
        content = bytearray(Path(f"{store}{suffix}").read_bytes())
        if suffix == ".bin":
            content[3000] ^= 1
        Path(f"{damaged}{suffix}").write_bytes(content)
    flags = world.flags("bert", tmp_path / "run", data_file=damaged)
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and len(errors) == 1 and "data.tiny-bert.bin: bytes 0 to" in errors[0]


def test_data_of_another_vocabulary_is_refused(world, store, tmp_path, status_and_errors):
    teacher = tmp_path / "other-bert"
    shutil.copytree(world.teachers["bert"], teacher)
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    flags = world.flags("bert", tmp_path / "run", teacher_name=teacher, data_file=store)
    status, errors = status_and_errors(train.main, flags)
    assert status == 2
    assert "was made with the tokenizer" in errors[0] and "other-bert: its vocabulary" in errors[0]


BAD_STORE_FLAGS = {
    "budget": ({"max_tokens": 20}, "--max_tokens 20: the longest sequence has"),
    "budget without groups": (
        {"max_tokens": 300, "no-group_by_size": True},
        "--max_tokens with --no-group_by_size",
    ),
    "no budget": ({"max_tokens": 0}, "--max_tokens 0: expected at least 1"),
    "no store": ({"data_file": "/nowhere/data"}, "--data_file /nowhere/data: no such file"),
    "half a store": ({"data_file": "{tmp}/half"}, "half.bin: no such file"),
}


@pytest.mark.parametrize("name", BAD_STORE_FLAGS)
def test_bad_data_flags_give_one_line(name, world, store, tmp_path, status_and_errors):
    shutil.copy(f"{store}.idx", tmp_path / "half.idx")
    changes, expected = BAD_STORE_FLAGS[name]
    changes = {
        key: value.format(tmp=tmp_path) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    status, errors = status_and_errors(train.main, world.flags("bert", tmp_path / "run", **changes))
    assert status == 2 and len(errors) == 1 and expected in errors[0], errors
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------
# Precision, normalization, memory
# --------------------------------------------------------------------------------------------------


def losses_of(folder: Path) -> list[float]:
    return [event.value for event in scalars(folder)["losses/loss"]]


def test_bfloat16_follows_the_loss_curve_of_float32(world, tmp_path):
    for name, flags in (("fp32", {}), ("bf16", {"bf16": True})):
        flags |= {
            "max_steps": 50,
            "log_interval": 2,
            "learning_rate": 1e-3,
            "student_pretrained_weights": world.first_weights("bert"),
        }
        train.main(world.flags("bert", tmp_path / name, **flags))
    exact, rounded = losses_of(tmp_path / "fp32"), losses_of(tmp_path / "bf16")
    assert len(exact) == 50 and exact[-1] < 0.9 * exact[0]
    # bfloat16 has 8 bits of mantissa: 1 in 256, several roundings deep.
    assert max(abs(x - y) / x for x, y in zip(exact, rounded, strict=True)) < 0.03


@pytest.mark.parametrize(
    "flags", [{"activation_checkpointing": True}, {"loss_normalization": "tokens"}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_ways_to_compute_an_update_train(flags, kind, world, tmp_path):
    train.main(world.flags(kind, tmp_path / "run", max_steps=2, **flags))
    state = torch.load(tmp_path / "run" / "pytorch_model.bin")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_normalization_by_tokens_is_independent_of_the_batch_size(world, tmp_path):
    """Without masks and dropout, which depend on the number of the micro-batch."""
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    student = edit_json(world.config("gpt2"), tmp_path / "student.json", **dropout)
    # Without groups the first 4 updates hold the same sequences for both batch sizes.
    flags = {"student_config": student, "no-group_by_size": True, "max_steps": 4}
    flags |= {"loss_normalization": "tokens", "warmup_prop": 0.0}
    for name, size, accumulation in (("whole", 8, 1), ("parts", 2, 4)):
        flags |= {"batch_size": size, "gradient_accumulation_steps": accumulation}
        train.main(world.flags("gpt2", tmp_path / name, **flags))
    files = [tmp_path / name / "pytorch_model.bin" for name in ("whole", "parts")]
    whole, parts = (torch.load(file) for file in files)
    for name in whole:  # AdamW enlarges rounding errors; the learning rate is 5e-4
        torch.testing.assert_close(whole[name], parts[name], rtol=0, atol=2e-5)


def test_two_precisions_at_once_are_refused(world, tmp_path, status_and_errors):
    flags = world.flags("bert", tmp_path / "run", bf16=True, fp16=True)
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and errors == ["--bf16 and --fp16: two precisions; leave one of them out"]


def test_out_of_memory_names_the_micro_batch_and_the_flags(
    world, tmp_path, status_and_errors, monkeypatch
):
    def fail(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train.Distiller, "launch", fail)
    status, errors = status_and_errors(train.main, world.flags("bert", tmp_path / "run"))
    assert status == 2 and len(errors) == 1
    pattern = r"out of memory in a micro-batch of 5 x \d+ = \d+ padded tokens; lower --max_tokens"
    assert re.match(pattern, errors[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_papers_ablation_without_a_language_modelling_loss_runs(kind, world, tmp_path):
    changes = {"alpha_mlm": 0.0, "alpha_clm": 0.0, "max_steps": 2, "n_gpu": 0}
    train.main(world.flags(kind, tmp_path / "run", **changes))
    log = EventAccumulator(str(tmp_path / "run" / "log" / "train")).Reload()
    tags = set(log.Tags()["scalars"])
    assert {"losses/loss_ce", "losses/loss_cos"} <= tags
    assert not {"losses/loss_mlm", "losses/loss_clm"} & tags


def test_without_smoothing_token_counts_change_nothing(world, tmp_path):
    for name, counts in (("with", world.counts("bert")), ("without", None)):
        changes = {"mlm_smoothing": 0, "token_counts": counts, "max_steps": 2, "n_gpu": 0}
        train.main(world.flags("bert", tmp_path / name, **changes))
    weights = [(tmp_path / name / "pytorch_model.bin").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("kind, name", [("bert", "cos"), ("roberta", "mse"), ("gpt2", "cos")])
def test_one_distance_from_the_teacher_is_trained_and_evaluated_alone(kind, name, world, tmp_path):
    alphas = dict.fromkeys((f"alpha_{loss}" for loss in LOSSES), 0.0) | {f"alpha_{name}": 1.0}
    masks = {} if kind == "gpt2" else {"mlm_smoothing": 0, "token_counts": None}
    held_out = {"eval_data_file": world.data(kind), "max_steps": 2, "n_gpu": 0}
    train.main(world.flags(kind, tmp_path / "run", **alphas, **masks, **held_out))
    log = EventAccumulator(str(tmp_path / "run" / "log" / "train")).Reload()
    losses = {tag for tag in log.Tags()["scalars"] if tag.startswith("losses/loss_")}
    assert losses == {f"losses/loss_{name}"} and (tmp_path / "run" / "best").is_dir()


def test_a_teacher_is_trained_alike_without_token_counts(world, tmp_path):
    teacher = world.teachers["bert"]
    for name, counts in {"with": ["--token_counts", world.counts("bert")], "without": []}.items():
        flags = ["--config", teacher / "config.json", "--tokenizer_name", teacher]
        flags += ["--data_file", world.data("bert"), "--output_dir", tmp_path / name, *counts]
        train_teacher.main([str(flag) for flag in [*flags, "--num_steps", "2"]])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
