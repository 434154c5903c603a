"""What a model's files ask for is bounded: sizes, archives, code from the hub, failing patterns."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from stand_ins import make_model, student_config_of

import binarized_data
from distil.models.architectures import ARCHITECTURES
from distil.models.export import save_folder
from distil.models.first_weights import load_student_weights
from distil.models.hub import load_config
from distil.models.language_model import build_network, load_network, read_student_config
from utils import InputError

SIZES = {
    "layers": ({"n_layers": 10**9}, "n_layers is 1000000000, expected at most 1000"),
    "width": ({"dim": 4 * 10**7}, "its weights would take "),
    "vocabulary": ({"vocab_size": 10**12}, "its weights would take "),
    "positions": ({"max_position_embeddings": 10**9}, "expected at most 65536 sinusoidal ones"),
    "a text": ({"vocab_size": "9"}, "vocab_size is '9', expected a whole number"),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_student_that_no_machine_holds_is_refused_before_it_is_built(name, tmp_path):
    changes, expected = SIZES[name]
    path = tmp_path / "student.json"
    path.write_text(json.dumps(student_config_of("bert", 300) | changes))
    with pytest.raises(InputError) as error:
        config = read_student_config("distilbert", str(path))
        build_network(ARCHITECTURES["distilbert"], config, f"--student_config {path}")
    assert str(path) in str(error.value) and expected in str(error.value)


def test_an_archive_that_unpacks_to_more_than_it_has_is_not_unpacked(tmp_path):
    student = make_model("gpt2", 300, 1)
    path, packed = tmp_path / "whole.pth", tmp_path / "packed.pth"
    torch.save(student.state_dict() | {"more": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name in whole.namelist():
            file.writestr(name, whole.read(name))
    with pytest.raises(InputError, match=r"packed.pth: has [\d,]+ bytes and unpacks to 4,"):
        load_student_weights(student, ARCHITECTURES["gpt2"], str(packed))
    with pytest.raises(InputError, match="has unexpected more"):
        load_student_weights(student, ARCHITECTURES["gpt2"], str(path))
    folder = tmp_path / "teacher"
    student.config.save_pretrained(folder)
    shutil.copy(packed, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin: has [\d,]+ bytes and unpacks to"):
        load_network(ARCHITECTURES["gpt2"], str(folder), "--teacher_name")


def edited(folder: Path, copy: Path, file: str, **changes) -> Path:
    """Copy a model's folder with entries of a JSON file changed."""
    shutil.copytree(folder, copy)
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


KERNELS = ("kernels-community/flash-attn2", "evil/kernel:run", "flash_attention_3", {"": "a/b"}, 7)


def test_kernels_that_a_configuration_names_are_not_loaded_untrusted(teachers, tmp_path, caplog):
    for number, name in enumerate(KERNELS):
        for key in ("attn_implementation", "_attn_implementation"):
            folder = tmp_path / f"{number}{key}"
            folder = edited(teachers["bert"], folder, "config.json", **{key: name})
            config = load_config(None, str(folder), "--teacher_name")
            assert config._attn_implementation is None
    trusted = load_config(None, str(tmp_path / "0attn_implementation"), "--teacher_name", True)
    assert trusted._attn_implementation == KERNELS[0]
    network = load_network(ARCHITECTURES["bert"], str(folder), "--teacher_name")
    assert network.config._attn_implementation == "sdpa"
    path = tmp_path / "student.json"
    path.write_text(json.dumps({**student_config_of("gpt2", 300), "attn_implementation": "a/b"}))
    assert read_student_config("gpt2", str(path))._attn_implementation is None


def test_names_of_code_are_no_part_of_what_is_published(teachers, tmp_path):
    code = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForMaskedLM": "evil.Model"}}
    path = tmp_path / "student.json"
    path.write_text(json.dumps(student_config_of("bert", 300) | code))
    config = read_student_config("distilbert", str(path))
    student = build_network(ARCHITECTURES["distilbert"], config, "")
    student.config.auto_map = code["auto_map"]  # as of a student's folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(teachers["bert"])
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    save_folder(student, tokenizer, tmp_path / "out")
    assert not hasattr(config, "auto_map") or config is student.config
    for file in (tmp_path / "out").glob("*.json"):
        assert "auto_map" not in file.read_text() and "evil" not in file.read_text(), file


PANICS = {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"Regex": "(\\w+)+$"},
        "behavior": "Isolated",
        "invert": False,
    },
}


@pytest.mark.parametrize("part", PANICS)
def test_a_tokenizer_that_panics_is_named(part, teachers, tmp_path, status_and_errors):
    folder = edited(teachers["bert"], tmp_path / "t", "tokenizer.json", **{part: PANICS[part]})
    text = tmp_path / "text.txt"
    text.write_text("a line\n" + "a" * 60 + "!\n")
    flags = ["--file_path", text, "--tokenizer_type", "auto", "--tokenizer_name", folder]
    flags = [*map(str, flags), "--dump_file", str(tmp_path / "data")]
    status, errors = status_and_errors(binarized_data.main, flags)
    named = folder if part == "normalizer" else f"{text}: from line 1 on: its tokenizer fails (Onig"
    assert status == 2 and len(errors) == 1 and str(named) in errors[0], errors
