"""First weights from a teacher's layers, shipped configurations, loading weights and tokenizers."""

import copy
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import load_golden, run_process
from families import tiny_config
from stand_ins import LAYERS, ROOT, make_model, save_tokenizer

from distil.data.token_files import SpecialIds
from distil.models.architectures import ARCHITECTURES
from distil.models.architectures import architecture_named as row
from distil.models.casing import Casing
from distil.models.first_weights import evenly_spaced_layers, extract_student, load_student_weights
from distil.models.language_model import (
    build_network,
    load_language_model,
    load_network,
    max_input_length,
    read_student_config,
)
from distil.models.names import short_name
from distil.models.tokenizer_roles import special_ids
from distil.models.tokenizers import load_tokenizer, load_tokenizer_of_2019
from utils import InputError

VOCAB = 60
STUDENTS = {"bert": "distilbert", "roberta": "roberta", "gpt2": "gpt2"}


def as_student_config(teacher, num_layers: int, tmp_path: Path):
    """Write and read back a student configuration with a teacher's sizes."""
    config, student_type = teacher.config, STUDENTS[teacher.config.model_type]
    if student_type == "distilbert":
        content = {
            "vocab_size": config.vocab_size,
            "dim": config.hidden_size,
            "n_layers": num_layers,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": config.max_position_embeddings,
        }
    else:
        depth = "n_layer" if student_type == "gpt2" else "num_hidden_layers"
        content = config.to_diff_dict() | {depth: num_layers}
        content = {k: v for k, v in content.items() if k not in ("transformers_version", "dtype")}
    path = tmp_path / "student.json"
    path.write_text(json.dumps(content))
    return read_student_config(student_type, str(path))


def extracted(teacher, layers, tmp_path, **options):
    """Extract layers, save them, and load them into a student of that depth."""
    student_type = STUDENTS[teacher.config.model_type]
    path = tmp_path / "first.pth"
    torch.save(extract_student(teacher, student_type, layers, **options), path)
    student = build_network(row(student_type), as_student_config(teacher, len(layers), tmp_path))
    load_student_weights(student, row(student_type), str(path))
    return student.eval()


@pytest.mark.parametrize("kind", STUDENTS)
def test_all_layers_give_the_teachers_logits(kind, tmp_path):
    teacher = make_model(kind, VOCAB).eval()
    options = {"vocab_transform": True, "fold_token_types": kind == "bert"}
    student = extracted(teacher, range(LAYERS), tmp_path, **options)
    ids = torch.randint(5, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
    # BERT: adding token types to positions first changes the order of a sum of three terms.
    tolerance = 1e-4 if kind == "bert" else 0
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=0, atol=tolerance)


def test_a_bert_is_copied_exactly_only_with_folded_token_types(tmp_path):
    teacher = make_model("bert", VOCAB).eval()
    student = extracted(teacher, range(LAYERS), tmp_path, vocab_transform=True)
    ids = torch.arange(5, 25)[None]
    assert (student(ids).logits - teacher(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize("kind", STUDENTS)
def test_chosen_layers_become_the_students_first(kind, tmp_path):
    teacher = make_model(kind, VOCAB).eval()
    student = extracted(teacher, [1, 3], tmp_path, vocab_transform=True)
    shallow = copy.deepcopy(teacher)
    layers = shallow.get_submodule(ARCHITECTURES[kind].layers.rstrip("."))
    kept = torch.nn.ModuleList([layers[1], layers[3]])
    parent, name = ARCHITECTURES[kind].layers.rstrip(".").rsplit(".", 1)
    setattr(shallow.get_submodule(parent), name, kept)
    shallow.config.num_hidden_layers = 2
    if kind == "bert":
        shallow.bert.embeddings.token_type_embeddings.weight.data.zero_()
    ids = torch.arange(5, 25)[None]
    options = {"use_cache": False} if kind == "gpt2" else {}
    expected, tolerance = shallow(ids, **options).logits, 1e-4 if kind == "bert" else 0
    torch.testing.assert_close(student(ids).logits, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "kind, plain, transformed", [("bert", 102, 106), ("roberta", 103, 107), ("gpt2", 77, 77)]
)
def test_twelve_layers_give_the_tensors_of_2019(kind, plain, transformed):
    teacher = make_model(kind, VOCAB, layers=12)
    layers = evenly_spaced_layers(12, 6)
    assert layers == [0, 2, 4, 7, 9, 11]
    assert len(extract_student(teacher, STUDENTS[kind], layers)) == plain
    state = extract_student(teacher, STUDENTS[kind], layers, vocab_transform=True)
    assert len(state) == transformed


def test_evenly_spaced_layers_keep_first_and_last():
    assert evenly_spaced_layers(24, 12)[0] == 0 and evenly_spaced_layers(24, 12)[-1] == 23
    assert evenly_spaced_layers(4, 4) == [0, 1, 2, 3] and evenly_spaced_layers(12, 1) == [0]


CONFIGURATIONS = {  # file -> type, parameters of the base model in millions, vocabulary, positions
    "distilbert-base-uncased": ("distilbert", 66.36, 30522, 512),
    "distilbert-base-cased": ("distilbert", 65.19, 28996, 512),
    "distilbert-base-multilingual-cased": ("distilbert", 134.73, 119547, 512),
    "distilbert-base-german-cased": ("distilbert", 66.8, 31102, 512),
    "distilroberta-base": ("roberta", 82.12, 50265, 514),
    "distilgpt2": ("gpt2", 81.91, 50257, 1024),
}


def test_every_shipped_configuration_is_tested():
    assert {path.stem for path in (ROOT / "training_configs").glob("*.json")} == set(CONFIGURATIONS)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_shipped_configurations_have_the_papers_sizes(name):
    kind, millions, vocab_size, positions = CONFIGURATIONS[name]
    config = read_student_config(kind, str(ROOT / "training_configs" / f"{name}.json"))
    with torch.device("meta"):
        base = transformers.AutoModel.from_config(config)
        whole = build_network(row(kind), config)
    num = sum(parameter.numel() for parameter in base.parameters())
    error = 0.06 if name == "distilbert-base-german-cased" else 0.006  # as many digits as published
    assert num / 1e6 == pytest.approx(millions, abs=error)
    assert config.vocab_size == vocab_size and config.max_position_embeddings == positions
    assert config.num_hidden_layers == 6 and config.num_attention_heads == 12
    assert config.hidden_size == 768 and config.initializer_range == 0.02
    assert whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    dropouts = {module.p for module in whole.modules() if isinstance(module, torch.nn.Dropout)}
    assert dropouts == {0.1}
    assert bool(getattr(config, "sinusoidal_pos_embds", False)) == (kind == "distilbert")
    if kind != "distilbert":
        assert {m.eps for m in base.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


# --------------------------------------------------------------------------------------------------
# First weights that do not fit
# --------------------------------------------------------------------------------------------------


def break_missing_layer(state):
    del state["distilbert.transformer.layer.1.ffn.lin1.weight"]


def break_missing_embeddings(state):
    del state["distilbert.embeddings.word_embeddings.weight"], state["vocab_projector.weight"]


def break_unexpected(state):
    state["distilbert.transformer.layer.7.ffn.lin1.weight"] = torch.zeros(2)


def break_shape(state):
    state["distilbert.embeddings.LayerNorm.bias"] = torch.zeros(5)


def break_values(state):
    state["distilbert.embeddings.LayerNorm.bias"][0] = float("nan")


BREAKS = {
    break_missing_layer: "lacks distilbert.transformer.layer.1.ffn.lin1.weight",
    break_missing_embeddings: "lacks distilbert.embeddings.word_embeddings.weight",
    break_unexpected: "has unexpected distilbert.transformer.layer.7.ffn.lin1.weight",
    break_shape: (
        r"has another shape for distilbert.embeddings.LayerNorm.bias \[5\] \(the student's is \[32"
    ),
    break_values: "LayerNorm.bias hold NaN",
}


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda function: function.__name__)
def test_first_weights_that_do_not_fit_are_named_and_not_loaded(break_it, tmp_path):
    teacher = make_model("bert", VOCAB)
    state = extract_student(teacher, "distilbert", [0, 3], vocab_transform=True)
    break_it(state)
    torch.save(state, tmp_path / "first.pth")
    student = build_network(row("distilbert"), as_student_config(teacher, 2, tmp_path))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(InputError, match=BREAKS[break_it]) as caught:
        load_student_weights(student, row("distilbert"), str(tmp_path / "first.pth"))
    assert "first.pth" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_an_absent_head_transform_is_a_warning_only(tmp_path, caplog):
    teacher = make_model("roberta", VOCAB)
    torch.save(extract_student(teacher, "roberta", [0, 3]), tmp_path / "first.pth")
    student = build_network(row("roberta"), as_student_config(teacher, 2, tmp_path))
    load_student_weights(student, row("roberta"), str(tmp_path / "first.pth"))
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "lm_head.dense.weight" in warnings[0] and "decoder.bias" not in warnings[0]


def test_gpt2s_old_causal_buffers_are_skipped(tmp_path, caplog):
    teacher = make_model("gpt2", VOCAB)
    state = extract_student(teacher, "gpt2", [0, 3])
    for layer in (0, 1):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, tmp_path / "first.pth")
    student = build_network(row("gpt2"), as_student_config(teacher, 2, tmp_path))
    load_student_weights(student, row("gpt2"), str(tmp_path / "first.pth"))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_student_whose_weights_are_loaded_does_not_draw_them(kind, is_tied, tmp_path):
    config = tiny_config(kind, VOCAB)
    config.tie_word_embeddings = is_tied
    drawn = build_network(row(kind), config)
    torch.save(drawn.state_dict(), tmp_path / "first.pth")
    before = torch.random.get_rng_state()
    student = build_network(row(kind), config, draws=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    load_student_weights(student, row(kind), str(tmp_path / "first.pth"))
    for own, other in [
        (student.state_dict(), drawn.state_dict()),
        (dict(student.named_buffers()), dict(drawn.named_buffers())),
    ]:
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)
    assert dict(student.named_parameters()).keys() == dict(drawn.named_parameters()).keys()


def test_a_head_transform_that_is_absent_is_drawn_from_the_seed(tmp_path):
    teacher = make_model("bert", VOCAB)
    torch.save(extract_student(teacher, "distilbert", [0, 3]), tmp_path / "first.pth")
    config = as_student_config(teacher, 2, tmp_path)

    def build(draws=True):
        torch.manual_seed(5)
        return build_network(row("distilbert"), config, draws=draws)

    expected, student = build(), build(draws=False)
    load_student_weights(expected, row("distilbert"), str(tmp_path / "first.pth"))
    load_student_weights(student, row("distilbert"), str(tmp_path / "first.pth"), build)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_loaded_positions_replace_the_sinusoid(tmp_path):
    teacher = make_model("bert", VOCAB)
    torch.save(extract_student(teacher, "distilbert", [0, 3]), tmp_path / "first.pth")
    config = as_student_config(teacher, 2, tmp_path)
    config.sinusoidal_pos_embds = True
    student = build_network(row("distilbert"), config)
    sinusoid = student.distilbert.embeddings.position_embeddings.weight.clone()
    assert sinusoid[3, :2].tolist() == pytest.approx([0.1411, -0.9900], abs=1e-4)  # sin 3, cos 3
    load_student_weights(student, row("distilbert"), str(tmp_path / "first.pth"))
    given = student.distilbert.embeddings.position_embeddings.weight
    assert torch.equal(given, teacher.bert.embeddings.position_embeddings.weight)


@pytest.mark.parametrize("content", [b"no checkpoint", b""])
def test_a_file_that_is_no_state_dict_is_named(content, tmp_path):
    path = tmp_path / "first.pth"
    path.write_bytes(content)
    config = as_student_config(make_model("bert", VOCAB), 2, tmp_path)
    student = build_network(row("distilbert"), config)
    with pytest.raises(InputError, match="first.pth"):
        load_student_weights(student, row("distilbert"), str(path))


# --------------------------------------------------------------------------------------------------
# Teachers and tokenizers
# --------------------------------------------------------------------------------------------------


def test_a_teacher_without_its_prediction_head_is_refused(tmp_path):
    make_model("bert", VOCAB).bert.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="has no weights for .*cls.predictions"):
        load_network(row("bert"), str(tmp_path / "base"), "--teacher_name")


def as_on_the_hub(kind: str, state: dict) -> dict:
    """Rename and extend a teacher's weights to the checkpoints of 2018 and 2019."""
    tied_names = {
        "bert": "cls.predictions.decoder.bias",
        "gpt2": "lm_head",
        "roberta": "lm_head.decoder",
    }
    tied = tied_names[kind]
    state = {name: tensor for name, tensor in state.items() if not name.startswith(tied)}
    if kind == "gpt2":
        extra = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(LAYERS)}
        return {name.removeprefix("transformer."): tensor for name, tensor in state.items()} | extra
    extra = {
        f"{kind}.pooler.dense.weight": torch.zeros(32, 32),
        f"{kind}.embeddings.position_ids": torch.arange(64)[None],
    }
    if kind == "bert":
        extra["cls.seq_relationship.weight"] = torch.zeros(2, 32)
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, name in old.items():
            state = {key.replace(new, name): tensor for key, tensor in state.items()}
    return state | extra


@pytest.mark.parametrize("kind", STUDENTS)
def test_old_checkpoints_of_the_hub_are_loaded(kind, tmp_path):
    teacher = make_model(kind, VOCAB).eval()
    teacher.config.save_pretrained(tmp_path)
    torch.save(as_on_the_hub(kind, teacher.state_dict()), tmp_path / "pytorch_model.bin")
    ids = torch.arange(5, 25)[None]
    loaded = load_network(row(kind), str(tmp_path), "--teacher_name")
    assert torch.equal(loaded(ids).logits, teacher(ids).logits)


def test_a_teacher_of_another_type_is_refused(teachers):
    with pytest.raises(InputError, match="is a gpt2 model, expected bert"):
        load_network(row("bert"), str(teachers["gpt2"]), "--teacher_name")


def test_a_half_precision_teacher_is_loaded_in_float32(tmp_path):
    make_model("bert", VOCAB).half().save_pretrained(tmp_path / "half")
    loaded = load_network(row("bert"), str(tmp_path / "half"), "--teacher_name")
    assert loaded.dtype == torch.float32


def test_a_teacher_does_not_train(teachers):
    teacher = load_language_model(row("bert"), str(teachers["bert"]), "--teacher_name").network
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def load_2019(kind: str, folder: Path):
    return load_tokenizer_of_2019(row(kind), str(folder), "--tokenizer_name", Casing())


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("wrong", STUDENTS)
def test_a_tokenizer_of_another_type_is_refused(kind, wrong, teachers):
    if kind == wrong:
        assert len(load_2019(kind, teachers[kind])) > 100
    else:
        with pytest.raises(InputError, match=f"--tokenizer_name .*{wrong}"):
            load_2019(wrong, teachers[kind])


@pytest.mark.parametrize("kind", STUDENTS)
def test_bare_vocabularies_of_another_type_are_refused(kind, teachers, tmp_path):
    for other in STUDENTS:
        folder = tmp_path / f"{kind}-{other}"
        shutil.copytree(teachers[kind], folder)
        (folder / "tokenizer_config.json").unlink()  # which declares the type
        if other == kind:
            load_2019(other, folder)
        else:
            with pytest.raises(InputError, match="--tokenizer_name"):
                load_2019(other, folder)


def test_a_roberta_vocabulary_with_gpt2s_special_token_is_refused_for_gpt2(teachers, tmp_path):
    shutil.copytree(teachers["roberta"], tmp_path / "both")
    (tmp_path / "both" / "tokenizer_config.json").unlink()
    path = tmp_path / "both" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["<|endoftext|>"] = len(content["model"]["vocab"])
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="its vocabulary has <mask>"):
        load_2019("gpt2", tmp_path / "both")


def test_an_empty_folder_is_refused_as_a_tokenizer(tmp_path):
    with pytest.raises(InputError, match="has neither tokenizer.json nor vocab.txt"):
        load_2019("bert", tmp_path)
    with pytest.raises(InputError, match="has neither tokenizer.json nor a vocabulary"):
        load_tokenizer(row("bert"), str(tmp_path), "--tokenizer_name")


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_bare_vocabulary_is_lower_cased_only_without_capitals(lowercase, text_file, tmp_path):
    save_tokenizer("bert", tmp_path, text_file, lowercase=lowercase)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    bare = tmp_path / "bare"
    bare.mkdir()
    tokens = "\n".join(sorted(vocabulary, key=vocabulary.get))
    (bare / "vocab.txt").write_text(f"{tokens}\n", encoding="utf-8")
    declared = load_tokenizer(row("bert"), str(tmp_path), "--tokenizer_name")
    found = load_tokenizer(row("bert"), str(bare), "--tokenizer_name")
    assert found.encode("Dake Fi go") == declared.encode("Dake Fi go")
    assert (found.encode("Da") == found.encode("da")) == lowercase
    forced = load_tokenizer(row("bert"), str(bare), "--tokenizer_name", Casing(True))
    assert forced.encode("DA") == forced.encode("da")


def test_special_ids_follow_the_roles_of_the_type(teachers):
    bert = load_tokenizer(row("bert"), str(teachers["bert"]), "")
    ids = (bert.cls_token_id, bert.sep_token_id, bert.pad_token_id, bert.unk_token_id)
    assert special_ids(row("bert"), bert) == SpecialIds(*ids)
    gpt2 = load_tokenizer(row("gpt2"), str(teachers["gpt2"]), "")
    assert special_ids(row("gpt2"), gpt2) == SpecialIds(*[gpt2.bos_token_id] * 4)


def test_the_longest_input_is_the_smaller_of_tokenizer_and_positions(teachers):
    for kind, reserved in (("bert", 0), ("roberta", 2), ("gpt2", 0)):
        tokenizer = load_tokenizer(row(kind), str(teachers[kind]), "")
        config = make_model(kind, VOCAB).config
        assert config.max_position_embeddings - reserved == 64
        assert max_input_length(row(kind), tokenizer, config) == 64
        tokenizer.model_max_length = 20
        assert max_input_length(row(kind), tokenizer, config) == 20


@pytest.mark.parametrize("name", ["my-bert", "/models/my-bert/", "owner/my-bert", "my-bert/."])
def test_a_short_name_is_the_last_component(name):
    assert short_name(name) == "my-bert"


def test_the_model_folder_of_a_run_has_the_run_s_name(tmp_path):
    folder = tmp_path / "my-run" / "model"
    folder.mkdir(parents=True)
    assert short_name(str(folder)) == "model"
    (tmp_path / "my-run" / "parameters.json").touch()
    assert short_name(str(folder)) == short_name(str(tmp_path / "my-run")) == "my-run"


REAL_VOCABULARIES = os.environ.get("DISTIL_VOCABULARIES")


@pytest.mark.skipif(not REAL_VOCABULARIES, reason="needs DISTIL_VOCABULARIES, a folder of them")
@pytest.mark.parametrize("name", load_golden("tokens.json")["ids"])
def test_real_vocabularies_give_the_ids_of_2019(name, tmp_path):
    import binarized_data
    from distil.data.token_files import open_token_file

    golden = load_golden("tokens.json")
    kind = {"roberta-base": "roberta", "gpt2": "gpt2"}.get(name, "bert")
    (tmp_path / "text.txt").write_text("\n".join(golden["lines"]), encoding="utf-8")
    vocabulary = f"{REAL_VOCABULARIES}/{name}/"
    for file_format, path in (("pickle", f"out.{name}.pickle"), ("store", f"out.{name}")):
        flags = ["--file_path", str(tmp_path / "text.txt"), "--dump_file", str(tmp_path / "out")]
        flags += ["--tokenizer_type", kind, "--tokenizer_name", vocabulary]
        binarized_data.main([*flags, "--format", file_format])
        tokens = open_token_file(tmp_path / path)
        ids_M = torch.from_numpy(tokens.ids_M[:].astype("int64"))
        found = [ids.tolist() for ids in ids_M.split(tokens.lengths_N[:].tolist())]
        assert sorted(found) == sorted(golden["ids"][name])


def test_training_a_vocabulary_is_reproducible(text_file):
    program = (
        "from distil.models.tokenizers import train_word_pieces;"
        f" print(sorted(train_word_pieces({str(text_file)!r}, 200).items()))"
    )
    printed = {run_process(sys.executable, "-c", program, cwd=ROOT).stdout for _ in range(3)}
    assert len(printed) == 1 and "[MASK]" in printed.pop()
