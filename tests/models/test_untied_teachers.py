"""Teachers whose input and output embeddings are two tables, and first weights made of them."""

import collections
import json
import random
from pathlib import Path

import families
import pytest
import safetensors.torch
import torch
import transformers
from stand_ins import LAYERS, STUDENT_LAYERS, make_model, student_config_of, vocab_size_of
from test_conventions import FAMILIES, families_at_random, ids_of, is_small, logits_of

import extract
import extract_distilbert
import train
from distil.models import checks, first_weights, language_model
from distil.models.architectures import ARCHITECTURES
from utils import InputError

# --------------------------------------------------------------------------------------------------
# Families drawn at random: loaded, all of their layers taken, saved and loaded again
# --------------------------------------------------------------------------------------------------


def as_saved(folder: Path, tensors: dict, config: dict) -> None:
    """Leave the checkpoint as it was saved: every tensor, and the configuration's tie."""


def as_transformers_4(folder: Path, tensors: dict, config: dict) -> None:
    """Save the output bias once, under the name that was not an alias then."""
    for name in [name for name in tensors if name.endswith("decoder.bias")]:
        other = name.replace("decoder.bias", "bias")
        if other in tensors:
            tensors[other] = tensors.pop(name)


def as_declared_tied(folder: Path, tensors: dict, config: dict) -> None:
    """State in the configuration that the embeddings are tied, which they are not."""
    config["tie_word_embeddings"] = True


VARIANTS = (as_saved, as_transformers_4, as_declared_tied)


def save_untied(folder: Path, model_type: str, is_masked: bool, variant) -> torch.nn.Module | None:
    """Save an untied model of a family; None if the family's tables are always one."""
    model = families.tiny_model(model_type, is_masked, tie_word_embeddings=False)
    if not language_model.is_untied(model):
        return None
    model.save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    variant(folder, tensors, config)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return model


def outcome_of(folder: Path, model_type: str, is_masked: bool, variant) -> str:
    """Return "not built", "refused", "works", or "wrong" (works and differs)."""
    try:
        if not is_small(model_type, is_masked):
            return "not built"
        model = save_untied(folder, model_type, is_masked, variant)
    except Exception:  # the family does not support our sizes
        return "not built"
    if model is None:
        return "always tied"
    flag = "--teacher"
    try:
        row = language_model.resolve_by_name(str(folder), flag, is_masked=is_masked)
        teacher = language_model.load_network(row, str(folder), flag)
        student = first_weights.student_of_layers(teacher, range(families.NUM_LAYERS), flag)
        first_weights.student_of_layers(teacher, [0, families.NUM_LAYERS - 1], flag)
    except InputError as error:
        return "refused" if "\n" not in str(error) else "wrong"
    ids_BT = ids_of(model, 2, 16)
    student.save_pretrained(folder / "student")
    again = families.auto_class(is_masked).from_pretrained(folder / "student")
    found = [logits_of(one, ids_BT) for one in (teacher, student, again)]
    is_right = all(checks.is_close(logits, logits_of(model, ids_BT)) for logits in found)
    return "works" if is_right and not student.config.tie_word_embeddings else "wrong"


def run_draw(drawn, tmp_path, capsys) -> collections.Counter:
    outcomes = {}
    for number, (model_type, is_masked, variant) in enumerate(drawn):
        folder = tmp_path / str(number)
        found = outcome_of(folder, model_type, is_masked, variant)
        outcomes[f"{model_type} {variant.__name__}"] = found
    counts = collections.Counter(outcomes.values())
    with capsys.disabled():
        print(f"\nuntied: {dict(counts)}: {outcomes}")
    assert counts["wrong"] == 0, outcomes
    return counts


def test_untied_teachers_drawn_over_families(tmp_path, capsys):
    rng = random.Random(3)
    drawn = [(*family, rng.choice(VARIANTS)) for family in rng.sample(FAMILIES, 8)]
    assert run_draw(drawn, tmp_path, capsys)["works"] >= 6


@pytest.mark.parametrize("variant", [as_transformers_4, as_declared_tied])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta"])
def test_untied_checkpoints_of_other_programs_are_read_right(model_type, variant, tmp_path):
    """Of transformers 4, with one output bias; and of a configuration that says they are tied."""
    assert outcome_of(tmp_path / "x", model_type, True, variant) == "works"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_untied_teachers_of_all_families(tmp_path, capsys):
    unnamed = [(n, kind) for kind in (True, False) for n in families_at_random(kind)[:15]]
    drawn = [(*family, variant) for family in [*FAMILIES, *unnamed] for variant in VARIANTS]
    assert run_draw(drawn, tmp_path, capsys)["works"] >= 40


# --------------------------------------------------------------------------------------------------
# The state dict of 2019, and a DistilBERT of a BERT
# --------------------------------------------------------------------------------------------------


def untied_teacher(folder: Path, kind: str, teachers, **options) -> Path:
    """Save an untied teacher of a named type with its tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(teachers[kind])
    model = make_model(kind, len(tokenizer), tie_word_embeddings=False, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def without_token_types(teacher: torch.nn.Module) -> torch.nn.Module:
    if hasattr(teacher, "bert"):
        teacher.bert.embeddings.token_type_embeddings.weight.data.zero_()
    return teacher


@pytest.mark.parametrize("folds", [False, True])
def test_a_distilbert_of_an_untied_bert_gives_its_logits(folds, teachers, tmp_path):
    """All layers taken: the same distribution, which a tied student cannot give."""
    teacher = untied_teacher(tmp_path / "bert", "bert", teachers)
    flags = ["--teacher", teacher, "--student_type", "distilbert", "--num_layers", LAYERS]
    flags += ["--fold_token_types"] * folds
    extract.main([*map(str, flags), "--output", str(tmp_path / "student")])
    auto = transformers.AutoModelForMaskedLM
    student = auto.from_pretrained(tmp_path / "student").eval()
    assert not student.config.tie_word_embeddings
    teacher = auto.from_pretrained(teacher).eval()
    teacher = teacher if folds else without_token_types(teacher)
    ids_BT = torch.arange(5, 25)[None]
    found, expected = logits_of(student, ids_BT), logits_of(teacher, ids_BT)
    assert checks.is_close(found, expected)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_first_weights_of_an_untied_teacher_need_an_untied_student(
    kind, world, teachers, tmp_path, status_and_errors, capsys
):
    """The message's remedy is followed; then all layers give the teacher's logits."""
    folder = untied_teacher(tmp_path / f"tiny-{kind}", kind, teachers)
    program = extract_distilbert if kind == "bert" else extract
    first = tmp_path / "first.pth"
    flags = {"model_type": kind, "model_name": folder, "dump_checkpoint": first}
    flags = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    program.main([*flags, "--vocab_transform", "--num_layers", str(STUDENT_LAYERS)])
    printed = capsys.readouterr()
    assert 'set "tie_word_embeddings": false' in printed.err
    content = student_config_of(kind, vocab_size_of(folder)) | {"sinusoidal_pos_embds": False}
    content = content if kind == "bert" else {k: v for k, v in content.items() if "sinus" not in k}
    given = {"student_pretrained_weights": first, "teacher_name": folder, "max_steps": 1}
    given |= {"student_config": tmp_path / "student.json"}
    given["student_config"].write_text(json.dumps(content))
    argv = world.flags(kind, tmp_path / "run", **given)
    status, errors = status_and_errors(train.main, argv)
    assert status == 2 and "has another value for" in errors[0]
    assert '"tie_word_embeddings": false' in errors[0]
    given["student_config"].write_text(json.dumps(content | {"tie_word_embeddings": False}))
    trainer = train.set_up(train.parse_config(argv), train.Runtime())
    student, teacher = trainer.student.network, without_token_types(trainer.teacher.network)
    layers = first_weights.evenly_spaced_layers(LAYERS, STUDENT_LAYERS)
    assert first_weights._equals_cut(teacher, student, layers, drops_token_types=False)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_an_untied_student_takes_first_weights_of_a_tied_teacher(kind, world, tmp_path, capsys):
    content = json.loads(Path(world.config(kind)).read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "student.json").write_text(json.dumps(content))
    given = {"student_pretrained_weights": world.first_weights(kind)}
    given |= {"student_config": tmp_path / "student.json"}
    argv = world.flags(kind, tmp_path / "run", **given)
    student = train.set_up(train.parse_config(argv), train.Runtime()).student.network
    state = torch.load(world.first_weights(kind), weights_only=True)
    output = student.get_output_embeddings()
    assert torch.equal(output.weight, student.get_input_embeddings().weight)
    bias = state.get("vocab_projector.bias", state.get("lm_head.bias"))
    assert bias is None or torch.equal(output.bias, bias)


def test_a_pair_whose_student_would_compute_something_else_is_refused(teachers, tmp_path):
    """DistilBERT's layer norm has a fixed epsilon, and it attends to both sides."""
    for entry, value in {"layer_norm_eps": 0.5, "is_decoder": True}.items():
        teacher = make_model("bert", 99, **{entry: value}).eval()
        with pytest.raises(InputError, match=f"computes something else .* hold {entry} {value}"):
            first_weights.student_of_pair(teacher, "distilbert", [0, 2])


def test_an_entry_that_a_distilbert_cannot_hold_is_named(caplog):
    teacher = make_model("bert", 99, layer_norm_eps=1e-11).eval()
    first_weights.student_of_pair(teacher, "distilbert", [0, 2])
    assert "cannot hold layer_norm_eps 1e-11 (a distilbert's is 1e-12)" in caplog.text


# Entries of a BERT's configuration without effect on a DistilBERT's logits and training.
WITHOUT_EFFECT = {
    "num_hidden_layers",  # of the layers taken
    "type_vocab_size",  # token types are dropped or folded
    "use_cache",
    *transformers.PreTrainedConfig().to_dict(),
} - {"tie_word_embeddings"}


def test_every_entry_of_a_berts_configuration_is_carried_fixed_or_without_effect():
    pair = first_weights.PAIRS["bert", "distilbert"]
    known = {*pair.config_entries.values(), *pair.fixed_entries} | WITHOUT_EFFECT
    assert set(transformers.BertConfig().to_dict()) <= known
    of_student = set(transformers.DistilBertConfig().to_dict())
    own = {"n_layers", "sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout"}
    assert of_student <= {*pair.config_entries, *own} | WITHOUT_EFFECT


@pytest.mark.parametrize("entry", ["hidden_act", "pad_token_id", "hidden_dropout_prob"])
def test_a_distilbert_carries_its_teachers_entries(entry):
    value = {"hidden_act": "relu", "pad_token_id": 3, "hidden_dropout_prob": 0.3}[entry]
    teacher = make_model("bert", 99, **{entry: value}).eval()
    student = first_weights.student_of_pair(teacher, "distilbert", [0, 2])
    names = {t: s for s, t in first_weights.PAIRS["bert", "distilbert"].config_entries.items()}
    assert getattr(student.config, names[entry]) == value


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_exported_untied_student_holds_one_bias_under_both_names(
    kind, world, teachers, tmp_path
):
    """transformers 4 reads either name; transformers 5 trains one of two."""
    teacher = untied_teacher(tmp_path / f"tiny-{kind}", kind, teachers)
    flags = ["--teacher", str(teacher), "--num_layers", "2", "--output", str(tmp_path / "student")]
    extract.main(flags)
    argv = world.flags(kind, tmp_path / "run", teacher_name=teacher, max_steps=3)
    argv = [word for word in argv if word not in ("--student_type", world.STUDENTS[kind])]
    place = argv.index("--student_config")
    argv[place : place + 2] = ["--student", str(tmp_path / "student"), "--learning_rate", "0.01"]
    train.main([word for word in argv if word not in ("--teacher_type", kind)])
    states = [safetensors.torch.load_file(tmp_path / "student" / "model.safetensors")]
    states.append(torch.load(tmp_path / "run" / "pytorch_model.bin", weights_only=True))
    for state in states:
        (used,) = (name for name in state if name.endswith("decoder.bias"))
        assert torch.equal(state[used], state[used.replace("decoder.bias", "bias")])
    assert not torch.equal(states[0][used], states[1][used])  # trained


# --------------------------------------------------------------------------------------------------
# Layer maps
# --------------------------------------------------------------------------------------------------


def test_a_default_file_name_of_other_layers_is_said(teachers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    extract.main(["--model_name", str(teachers["roberta"])])
    assert "default name is of other layers than it holds (0 3)" in capsys.readouterr().err


def test_the_default_file_of_a_large_roberta_holds_the_layers_of_its_name(
    teachers, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    model = make_model("roberta", vocab_size_of(teachers["roberta"]), layers=24)
    model.save_pretrained(tmp_path / "roberta-large")
    extract.main([])
    printed = capsys.readouterr()
    assert "Took 6 layers (0 4 8 13 17 23)" in printed.out
    assert "default name" not in printed.err
    state = torch.load("serialization_dir/tf_roberta_048131723.pth", weights_only=True)
    prefix, weight = ARCHITECTURES["roberta"].layers, "attention.self.query.weight"
    for new, old in enumerate([0, 4, 8, 13, 17, 23]):
        found = state[f"{prefix}{new}.{weight}"]
        assert torch.equal(found, model.state_dict()[f"{prefix}{old}.{weight}"])


@pytest.mark.parametrize("flags", [["--student_type", "distilbert"], []])
def test_folding_is_refused_where_token_types_stay(flags, teachers, tmp_path, status_and_errors):
    kind = "roberta" if flags else "bert"
    argv = ["--teacher", str(teachers[kind]), "--output", str(tmp_path / "out"), *flags]
    status, errors = status_and_errors(extract.main, [*argv, "--fold_token_types"])
    assert status == 2 and errors[0].startswith("--fold_token_types")
    assert not (tmp_path / "out").exists()
