"""Any teacher, end to end: extract.py makes a student, train.py trains it; both check input."""

import json
import re
import shutil
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
from distil.evaluation import figures_of, measure, reader_of
from distil.models import tokenizers
from distil.models.tokenizer_roles import special_ids
from lm_seqs_dataset import LmSeqsDataset

FAMILIES = [(name, True) for name in families.MASKED] + [(name, False) for name in families.CAUSAL]


def words(flags: dict) -> list[str]:
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def binarize(folder: Path, teacher: Path, text_file: Path) -> Path:
    flags = {
        "file_path": text_file,
        "tokenizer_type": "auto",
        "tokenizer_name": teacher,
        "dump_file": folder / "ids",
        "num_workers": 1,
    }
    binarized_data.main(words(flags))
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
        "alpha_clm": 0.0,  # a random teacher knows nothing of the text: L_clm leads away from it
    }
    if is_masked:
        flags |= {"alpha_mlm": 0.1, "token_counts": folder / "counts"}
        vocab_size = json.loads((teacher / "config.json").read_text())["vocab_size"]
        counts = {"token_counts_dump": folder / "counts", "vocab_size": vocab_size}
        token_counts.main(words({"data_file": data, **counts}))
    return words(flags) + ["--mlm"] * is_masked


def held_out_kl(student_folder: Path, teacher_folder: Path, data: Path, is_masked: bool) -> float:
    """Return KL(teacher || student) at the predicted positions of the data."""
    auto_class = families.auto_class(is_masked)
    folders = teacher_folder, student_folder
    teacher, student = (auto_class.from_pretrained(folder).eval() for folder in folders)
    kind = tokenizers.resolve_tokenizer("auto", str(teacher_folder))
    tokenizer = tokenizers.load_tokenizer(kind, str(teacher_folder), "--teacher")
    special = special_ids(kind, tokenizer)
    facts = model_facts(teacher.config.vocab_size, "the teacher", special)
    dataset, prepare = LmSeqsDataset.from_file(data, facts), prepare_clm
    if is_masked:
        weights_V = torch.ones(teacher.config.vocab_size)
        mask_id = tokenizer.mask_token_id
        prepare = MlmPreparation(weights_V, mask_id, 0.15, 0.8, 0.1, 0.1, False, 0)
    parts = np.array_split(np.arange(len(dataset)), 12)
    batches = [prepare(k, *dataset.collate(part)) for k, part in enumerate(parts)]
    return figures_of(measure(reader_of(student), reader_of(teacher), batches), True)["kl"]


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
    """Check that the reloaded folder gives the logits of the final weights."""
    loaded = families.auto_class(is_masked).from_pretrained(run).eval()
    trained = families.auto_class(is_masked).from_config(loaded.config).eval()
    trained.load_state_dict(torch.load(run / "checkpoint.pth", weights_only=True))
    ids_BT = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids_BT).logits, trained(ids_BT).logits)


def test_the_students_folder_holds_model_tokenizer_and_first_weights(teachers, tmp_path, capsys):
    folder = tmp_path / "new" / "student"
    flags = words({"teacher": teachers["roberta"], "output": folder})
    extract.main([*flags, "--layers", "0", "3"])
    assert "Took 2 of 4 layers (0 3)" in capsys.readouterr().out
    assert json.loads((folder / "extraction.json").read_text())["layers"] == [0, 3]
    student = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    state = torch.load(folder / "first_weights.pth", weights_only=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in student.state_dict().items())
    teacher = transformers.AutoTokenizer.from_pretrained(teachers["roberta"])
    assert transformers.AutoTokenizer.from_pretrained(folder).get_vocab() == teacher.get_vocab()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["student"]


def test_a_distilbert_is_extracted_from_a_bert(teachers, tmp_path):
    flags = {"teacher": teachers["bert"], "student_type": "distilbert", "num_layers": 4}
    extract.main(words({**flags, "output": tmp_path / "student"}))
    student = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "student").eval()
    teacher = transformers.BertForMaskedLM.from_pretrained(teachers["bert"]).eval()
    assert type(student).__name__ == "DistilBertForMaskedLM" and student.config.n_layers == 4
    ids_BT = torch.arange(5, 25)[None]
    with torch.no_grad():
        # As in 2019, a student extracted without --fold_token_types lacks the token types.
        teacher.bert.embeddings.token_type_embeddings.weight.zero_()
        found, expected = student(ids_BT).logits, teacher(ids_BT).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Refused input
# --------------------------------------------------------------------------------------------------


def save_config(folder: Path, **content) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def headless(folder: Path, teachers) -> Path:
    transformers.BertModel.from_pretrained(teachers["bert"]).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(teachers["bert"]).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BertForMaskedLM"]
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
def test_unsuitable_teachers_are_refused(name, teachers, tmp_path, status_and_errors):
    make, flags, message = REFUSED[name]
    teacher = make(tmp_path, teachers)
    flags = [*words({"teacher": teacher, "output": tmp_path / "out"}), *flags]
    status, errors = status_and_errors(extract.main, flags)
    assert status == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_an_output_folder_with_files_is_refused_and_kept(teachers, tmp_path, status_and_errors):
    (tmp_path / "mine").write_text("x")
    flags = words({"teacher": teachers["bert"], "num_layers": 2, "output": tmp_path})
    status, errors = status_and_errors(extract.main, flags)
    assert status == 2 and "holds something already" in errors[0]
    assert (tmp_path / "mine").read_text() == "x"


def edited(folder: Path, old: Path) -> Path:
    """Make a student whose tokenizer has two tokens exchanged."""
    transformers.AutoModelForMaskedLM.from_pretrained(old).save_pretrained(folder)
    content = json.loads((old / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [token for token in vocabulary if not token.startswith("[")][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_bytes((old / "tokenizer_config.json").read_bytes())
    return folder


def without_tokenizer(tmp: Path, teachers) -> Path:
    student = transformers.AutoModelForMaskedLM.from_pretrained(teachers["roberta"])
    student.save_pretrained(tmp / "student")
    return tmp / "student"


TRAINING = {
    "another vocabulary": (
        lambda tmp, t: {"student": edited(tmp / "student", t["bert"])},
        r"its vocabulary has \d+ tokens, .* and id \d+ is '.*', the teacher's '",
    ),
    "another tokenizer": (
        lambda tmp, t: {"student": t["roberta"]},
        r"has 320 tokens, the teacher's 200, and id 0 is '<s>', the teacher's '",
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
        "it attends to later tokens|add --mlm",
    ),
}


@pytest.mark.parametrize("name", TRAINING)
def test_unsuitable_students_are_refused(name, world, teachers, tmp_path, status_and_errors):
    make, message = TRAINING[name]
    changes = make(tmp_path, teachers)
    flags = world.flags("bert", tmp_path / "run")
    for flag in ("student_type", "student_config", "student_pretrained_weights"):
        if f"--{flag}" in flags:
            place = flags.index(f"--{flag}")
            del flags[place : place + 2]
    if "mlm" in changes:
        flags.remove("--mlm")
        flags += words({"alpha_mlm": 0, "alpha_clm": 1})
    for flag, value in changes.items():
        flags += [f"--{flag}", str(value)] if value is not None else []
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and errors and re.search(message, "\n".join(errors)), errors
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_an_end_is_refused(teachers, text_file, tmp_path, status_and_errors):
    shutil.copytree(teachers["gpt2"], tmp_path / "endless")
    content = (tmp_path / "endless" / "tokenizer.json").read_text()
    content = content.replace("<|endoftext|>", "<|stop|>")  # a name that says nothing
    (tmp_path / "endless" / "tokenizer.json").write_text(content)
    (tmp_path / "endless" / "tokenizer_config.json").unlink()
    for file in ("config.json", "special_tokens_map.json"):
        (tmp_path / "endless" / file).unlink(missing_ok=True)
    flags = {
        "file_path": text_file,
        "tokenizer_type": "auto",
        "tokenizer_name": tmp_path / "endless",
        "dump_file": tmp_path / "ids",
    }
    status, errors = status_and_errors(binarized_data.main, words(flags))
    assert status == 2 and len(errors) == 1
    assert "has no token for end (sep_token or eos_token)" in errors[0]


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
def test_remote_code_runs_only_with_its_flag(teachers, tmp_path):
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
    flags = words({"teacher": teacher, "num_layers": 2, "output": tmp_path / "student"})
    command = [sys.executable, ROOT / "scripts" / "extract.py", *flags]
    environment = {"HF_HOME": str(tmp_path / "cache")}
    refused = run_process(*command, **environment)
    assert refused.returncode == 2 and "--trust_remote_code" in refused.stderr
    assert not (tmp_path / "cache" / "modules").exists()
    done = run_process(*command, "--trust_remote_code", **environment)
    assert done.returncode == 0 and "Took 2 of 4 layers" in done.stdout, done.stderr
