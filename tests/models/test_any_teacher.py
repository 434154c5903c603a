"""Any teacher, end to end: a student extracted by extract.py and trained by train.py, and what both
refuse.
"""

import json
import re
import sys
from pathlib import Path

import families
import numpy as np
import pytest
import torch
import transformers
from conftest import run_process
from stand_ins import ROOT, model_facts

import binarized_data
import extract
import token_counts
import train
from distil.data.batches import MlmPreparation, prepare_clm
from distil.evaluation import evaluate
from distil.models import heads, tokenizers
from distil.models.architectures import architecture_named as row
from lm_seqs_dataset import LmSeqsDataset

FAMILIES = [(name, True) for name in families.MASKED] + [(name, False) for name in families.CAUSAL]


def auto_class(is_masked: bool):
    return transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM


def binarize(folder: Path, teacher: Path, text_file: Path) -> Path:
    flags = [
        "--file_path",
        text_file,
        "--tokenizer_type",
        "auto",
        "--tokenizer_name",
        teacher,
        "--dump_file",
        folder / "ids",
    ]
    binarized_data.main([str(flag) for flag in [*flags, "--num_workers", 1]])
    return folder / f"ids.{teacher.name}.pickle"


def train_flags(
    folder: Path, student: Path, teacher: Path, data: Path, is_masked: bool
) -> list[str]:
    flags = {
        "student": student,
        "teacher_name": teacher,
        "data_file": data,
        "dump_path": folder / "run",
        "n_gpu": 0,
        "max_steps": 30,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "alpha_ce": 5.0,
        "alpha_cos": 1.0,
    }
    if is_masked:
        flags |= {"alpha_mlm": 0.1, "alpha_clm": 0.0, "token_counts": folder / "counts"}
        vocab_size = json.loads((teacher / "config.json").read_text())["vocab_size"]
        counts = [
            "--data_file",
            data,
            "--token_counts_dump",
            folder / "counts",
            "--vocab_size",
            vocab_size,
        ]
        token_counts.main([str(word) for word in counts])
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)] + [
        "--mlm"
    ] * is_masked


def held_out_kl(student_folder: Path, teacher_folder: Path, data: Path, is_masked: bool) -> float:
    """KL(teacher || student) over the real tokens of the data."""
    teacher, student = (
        auto_class(is_masked).from_pretrained(folder).eval()
        for folder in (teacher_folder, student_folder)
    )
    kind = tokenizers.resolve_tokenizer("auto", str(teacher_folder))
    tokenizer = tokenizers.load_tokenizer(row(kind), str(teacher_folder), "--teacher")
    special = tokenizers.special_ids(row(kind), tokenizer)
    dataset = LmSeqsDataset.from_file(
        data, model_facts(teacher.config.vocab_size, "the teacher", special)
    )
    weights_V = torch.ones(teacher.config.vocab_size)
    prepare = (
        MlmPreparation(weights_V, tokenizer.mask_token_id, 0.15, 0.8, 0.1, 0.1, False, 0)
        if is_masked
        else prepare_clm
    )
    batches = [
        prepare(k, *dataset.collate(part))
        for k, part in enumerate(np.array_split(np.arange(len(dataset)), 12))
    ]
    predict = [heads.prediction_head(model) for model in (student, teacher)]
    return evaluate(student, predict[0], teacher, predict[1], batches)["kl"]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "is_masked"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_a_student_of_half_the_layers_learns_from_its_teacher(
    model_type, is_masked, teachers, text_file, tmp_path, capsys
):
    teacher = families.make_teacher(tmp_path / model_type, model_type, is_masked, teachers)
    data = binarize(tmp_path, teacher, text_file)
    student = tmp_path / "student"
    extract.main(["--teacher", str(teacher), "--num_layers", "2", "--output", str(student)])
    train.main(train_flags(tmp_path, student, teacher, data, is_masked))
    before, after = (
        held_out_kl(folder, teacher, data, is_masked) for folder in (student, tmp_path / "run")
    )
    assert after < 0.9 * before
    check_exported(tmp_path / "run", is_masked)


def check_exported(run: Path, is_masked: bool) -> None:
    """The folder, reloaded, gives the logits of the weights that training ended with."""
    loaded = auto_class(is_masked).from_pretrained(run).eval()
    trained = auto_class(is_masked).from_config(loaded.config).eval()
    trained.load_state_dict(torch.load(run / "checkpoint.pth", weights_only=True))
    ids_BT = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids_BT).logits, trained(ids_BT).logits)


def test_the_students_folder_holds_all_that_is_needed(teachers, tmp_path, capsys):
    extract.main(
        [
            "--teacher",
            str(teachers["roberta"]),
            "--layers",
            "0",
            "3",
            "--output",
            str(tmp_path / "new" / "student"),
        ]
    )
    folder = tmp_path / "new" / "student"
    assert "Took 2 of 4 layers (0 3)" in capsys.readouterr().out
    assert json.loads((folder / "extraction.json").read_text())["layers"] == [0, 3]
    student = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    state = torch.load(folder / "first_weights.pth", weights_only=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in student.state_dict().items())
    teacher = transformers.AutoTokenizer.from_pretrained(teachers["roberta"])
    assert transformers.AutoTokenizer.from_pretrained(folder).get_vocab() == teacher.get_vocab()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["student"]


def test_a_distilbert_of_a_bert_stays_possible(teachers, tmp_path):
    flags = [
        "--teacher",
        str(teachers["bert"]),
        "--student_type",
        "distilbert",
        "--num_layers",
        "4",
    ]
    extract.main([*flags, "--output", str(tmp_path / "student")])
    student = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "student").eval()
    teacher = transformers.BertForMaskedLM.from_pretrained(teachers["bert"]).eval()
    assert type(student).__name__ == "DistilBertForMaskedLM" and student.config.n_layers == 4
    table = teacher.bert.embeddings
    with (
        torch.no_grad()
    ):  # what --fold_token_types does, here to the teacher: 2019 leaves token types out
        table.token_type_embeddings.weight.zero_()
        ids_BT = torch.arange(5, 25)[None]
        torch.testing.assert_close(
            student(ids_BT).logits, teacher(ids_BT).logits, rtol=1e-4, atol=1e-5
        )


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------


def save_config(folder: Path, **content) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def headless(folder: Path, teachers) -> Path:
    transformers.BertModel.from_pretrained(teachers["bert"]).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(teachers["bert"]).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {
        "architectures": ["BertForMaskedLM"]
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


REFUSED = {
    "a layer beyond": (
        lambda tmp, t: t["bert"],
        ["--layers", "0", "4"],
        "--layers 4: the teacher has layers 0 to 3",
    ),
    "too many layers": (
        lambda tmp, t: t["bert"],
        ["--num_layers", "5"],
        "--num_layers 5: expected 1 to 4",
    ),
    "shared layers": (
        lambda tmp, t: families.make_teacher(tmp / "albert", "albert", True, t),
        ["--num_layers", "2"],
        "has no list of layers to choose from",
    ),
    "an encoder-decoder": (
        lambda tmp, t: save_config(tmp / "bart", model_type="bart"),
        ["--num_layers", "2"],
        "bart is an encoder-decoder",
    ),
    "no language model": (
        lambda tmp, t: save_config(tmp / "vit", model_type="vit"),
        ["--num_layers", "2"],
        "is a vit model; expected a masked or causal language model",
    ),
    "remote code": (
        lambda tmp, t: save_config(
            tmp / "own", model_type="own", auto_map={"AutoConfig": "own.Config"}
        ),
        ["--num_layers", "2"],
        "which would run with all your rights (remote code)",
    ),
    "no head": (
        lambda tmp, t: headless(tmp / "headless", t),
        ["--num_layers", "2"],
        "has no weights for cls.predictions",
    ),
    "nothing": (
        lambda tmp, t: tmp / "nowhere",
        ["--num_layers", "2"],
        "neither a local folder nor a model",
    ),
    "another student type": (
        lambda tmp, t: t["gpt2"],
        ["--num_layers", "2", "--student_type", "distilbert"],
        "no student of a gpt2 teacher",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_teachers_that_no_student_can_be_made_of(name, teachers, tmp_path, status_and_errors):
    make, flags, message = REFUSED[name]
    teacher = make(tmp_path, teachers)
    status, errors = status_and_errors(
        extract.main, ["--teacher", str(teacher), *flags, "--output", str(tmp_path / "out")]
    )
    assert status == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_folder_that_holds_something_stays(teachers, tmp_path, status_and_errors):
    (tmp_path / "mine").write_text("x")
    flags = ["--teacher", str(teachers["bert"]), "--num_layers", "2", "--output", str(tmp_path)]
    status, errors = status_and_errors(extract.main, flags)
    assert (
        status == 2
        and "holds something already" in errors[0]
        and (tmp_path / "mine").read_text() == "x"
    )


def edited(folder: Path, old: Path) -> Path:
    """A student whose tokenizer has two tokens exchanged."""
    transformers.AutoModelForMaskedLM.from_pretrained(old).save_pretrained(folder)
    content = json.loads((old / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [token for token in vocabulary if not token.startswith("[")][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_bytes((old / "tokenizer_config.json").read_bytes())
    return folder


def without_tokenizer(tmp: Path, teachers) -> Path:
    transformers.AutoModelForMaskedLM.from_pretrained(teachers["roberta"]).save_pretrained(
        tmp / "student"
    )
    return tmp / "student"


TRAINING = {
    "another vocabulary": (
        lambda tmp, t: {"student": edited(tmp / "student", t["bert"])},
        r"its vocabulary has \d+ tokens, .* and id \d+ is '.*', there",
    ),
    "another tokenizer": (
        lambda tmp, t: {"student": t["roberta"]},
        r"has 320 tokens, the teacher's 200, and id 0 is '<s>', there",
    ),
    "another size": (
        lambda tmp, t: {"student": without_tokenizer(tmp, t)},
        r"vocabulary is 320, the teacher's is 200",
    ),
    "student twice": (
        lambda tmp, t: {"student": t["bert"], "student_config": t["bert"] / "config.json"},
        "--student_config .* with --student .*: the folder holds configuration and weights",
    ),
    "no student": (
        lambda tmp, t: {"student": None},
        "--student, --student_config: neither is given",
    ),
    "no causal model": (
        lambda tmp, t: {"student": t["bert"], "teacher_type": "auto", "mlm": None},
        "it sees the tokens that come|add --mlm",
    ),
}


@pytest.mark.parametrize("name", TRAINING)
def test_students_that_do_not_fit(name, world, teachers, tmp_path, status_and_errors):
    make, message = TRAINING[name]
    changes = make(tmp_path, teachers)
    flags = world.flags("bert", tmp_path / "run")
    for flag in ("student_type", "student_config", "student_pretrained_weights"):
        if f"--{flag}" in flags:
            place = flags.index(f"--{flag}")
            del flags[place : place + 2]
    if "mlm" in changes:
        flags = [word for word in flags if word != "--mlm"] + [
            "--alpha_mlm",
            "0",
            "--alpha_clm",
            "1",
        ]
    for flag, value in changes.items():
        flags += [f"--{flag}", str(value)] if value is not None else []
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and errors and re.search(message, "\n".join(errors)), errors
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_an_end_is_refused(teachers, text_file, tmp_path, status_and_errors):
    tokenizer = families.causal_tokenizer(teachers["gpt2"])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    flags = [
        "--file_path",
        str(text_file),
        "--tokenizer_type",
        "auto",
        "--tokenizer_name",
        str(tmp_path / "endless"),
    ]
    status, errors = status_and_errors(
        binarized_data.main, [*flags, "--dump_file", str(tmp_path / "ids")]
    )
    assert (
        status == 2
        and len(errors) == 1
        and "has no token for end (sep_token or eos_token)" in errors[0]
    )


REMOTE = {
    "configuration_own.py": (
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type ="
        " 'own'\n"
    ),
    "modeling_own.py": (
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    ),
}


@pytest.mark.slow
def test_remote_code_runs_where_it_is_asked_for(teachers, tmp_path):
    teacher = families.make_teacher(tmp_path / "own", "llama", False, teachers)
    for name, text in REMOTE.items():
        (teacher / name).write_text(text)
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    config = json.loads((teacher / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (teacher / "config.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        ROOT / "scripts" / "extract.py",
        "--teacher",
        teacher,
        "--num_layers",
        "2",
        "--output",
    ]
    environment = {"HF_HOME": str(tmp_path / "cache")}
    refused = run_process(*command, tmp_path / "student", **environment)
    assert (
        refused.returncode == 2
        and "--trust_remote_code" in refused.stderr
        and not (tmp_path / "cache" / "modules").exists()
    )
    done = run_process(*command, tmp_path / "student", "--trust_remote_code", **environment)
    assert done.returncode == 0 and "Took 2 of 4 layers" in done.stdout, done.stderr
