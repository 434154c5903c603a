"""train_teacher.py --weights: a head fitted to an encoder, and training continued, with --bf16."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from stand_ins import LAYERS, make_lines, make_model, vocab_size_of

import train
import train_teacher
from distil.models.language_model import load_language_model, resolve_by_name
from grouped_batch_sampler import GroupedBatchSampler
from lm_seqs_dataset import LmSeqsDataset, make_preparation


def words(*flags: object) -> list[str]:
    return [str(flag) for flag in flags]


def save_encoder(folder: Path, teacher: Path) -> Path:
    """Save a random encoder without a prediction head, with a teacher's tokenizer."""
    transformers.AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    encoder = transformers.BertModel(make_model("bert", vocab_size_of(teacher)).config)
    encoder.save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(teachers, tmp_path) -> Path:
    return save_encoder(tmp_path / "encoder", teachers["bert"])


def train_from(weights: Path, data: str, output: Path, *more: object) -> list[float]:
    """Run the program; return the loss of each update."""
    flags = words("--weights", weights, "--data_file", data, "--output_dir", output, *more)
    train_teacher.main(flags)
    return json.loads((output / "curve.json").read_text())


@torch.no_grad()
def held_out_loss(model, tokenizer) -> float:
    """Compute a masked model's loss on text that no training saw, at every seventh token."""
    lines = make_lines(280)[240:]  # the first 240 are the data of `world`
    batch = tokenizer(lines, padding=True, truncation=True, max_length=64, return_tensors="pt")
    places = torch.arange(batch["input_ids"].numel()).view(batch["input_ids"].shape)
    is_asked = (places % 7 == 3) & batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(~is_asked, -100)
    batch["input_ids"] = batch["input_ids"].masked_fill(is_asked, tokenizer.mask_token_id)
    return model.eval()(**batch, labels=labels).loss.item()


def test_a_head_is_fitted_to_an_encoder_that_stays_bit_equal_and_makes_a_teacher(
    encoder, world, tmp_path, capsys
):
    output = tmp_path / "teacher"
    train_from(encoder, world.data("bert"), output, "--train_head_only", "--num_steps", 60)
    new = [line for line in capsys.readouterr().err.splitlines() if "begin at random" in line]
    parts = ["bias", "transform.LayerNorm.bias", "transform.LayerNorm.weight"]
    parts += ["transform.dense.bias", "transform.dense.weight"]
    assert len(new) == 1 and new[0].endswith(
        ": " + ", ".join(f"cls.predictions.{part}" for part in parts) + "."
    )
    given, found = load_file(encoder / "model.safetensors"), load_file(output / "model.safetensors")
    kept = {name: given[name] for name in given if not name.startswith("pooler.")}
    assert all(torch.equal(found[f"bert.{name}"], kept[name]) for name in kept)
    assert len(kept) == 16 * LAYERS + 5 and len(found) == len(kept) + len(parts)
    model = transformers.AutoModelForMaskedLM.from_pretrained(output)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    first = transformers.BertForMaskedLM.from_pretrained(encoder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert held_out_loss(model, tokenizer) < held_out_loss(first, tokenizer) - 0.5
    train.main(world.flags("bert", tmp_path / "run", teacher_name=output, max_steps=2, n_gpu=0))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_new_head_is_drawn_by_the_seed(encoder, world, tmp_path):
    names = {"first": 1, "again": 1, "other": 2}
    for name, seed in names.items():
        more = ["--num_steps", 1, "--train_head_only", "--seed", seed]
        train_from(encoder, world.data("bert"), tmp_path / name, *more)
    heads = [load_file(tmp_path / name / "model.safetensors") for name in names]
    first, again, other = (head["cls.predictions.transform.dense.weight"] for head in heads)
    assert torch.equal(first, again) and (first - other).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_training_continues_from_the_given_loss(kind, teachers, world, tmp_path):
    folder = tmp_path / "given"
    transformers.AutoTokenizer.from_pretrained(teachers[kind]).save_pretrained(folder)
    kinds = {"bert": ["hidden_dropout_prob", "attention_probs_dropout_prob"]}
    names = kinds.get(kind, ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
    size = vocab_size_of(teachers[kind])
    make_model(kind, size, **dict.fromkeys(names, 0.0)).save_pretrained(folder)
    more = ["--num_steps", 20, "--learning_rate", 3e-3]
    curve = train_from(folder, world.data(kind), tmp_path / "out", *more)
    model = load_language_model(resolve_by_name(str(folder), "--model"), str(folder), "--model")
    dataset = LmSeqsDataset.from_file(world.data(kind), model, 64)
    sampler = GroupedBatchSampler(dataset.lengths, 8, 64, group_by_size=True, seed=56)
    planned = next(iter(sampler.micro_batches(1)))
    prepare = make_preparation(model, None, 0.0, 56, 0.3)
    batch = prepare(planned.number, *dataset.collate(planned.sequences))
    inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
    own = model.network(**inputs, labels=batch.labels_BT).loss.item()
    assert curve[0] == pytest.approx(own, rel=1e-5) and curve[-1] < curve[0] - 0.3


def test_bfloat16_computes_the_same_loss_but_for_its_rounding(world, teachers, tmp_path):
    curves = {}
    for name in ("--bf16", "--force"):
        more = ["--num_steps", 2, name]
        curves[name] = train_from(teachers["bert"], world.data("bert"), tmp_path / name, *more)
    wide, narrow = curves["--force"], curves["--bf16"]
    assert narrow != wide and narrow == pytest.approx(wide, rel=0.02)
    written = load_file(tmp_path / "--bf16" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}


def without_a_layer(folder: Path, weights: dict) -> dict:
    return {name: x for name, x in weights.items() if not name.startswith("encoder.layer.2.")}


def without_embeddings(folder: Path, weights: dict) -> dict:
    return {name: x for name, x in weights.items() if "word_embeddings" not in name}


def of_another_width(folder: Path, weights: dict) -> dict:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    return weights


@pytest.mark.parametrize(
    "change, named",
    [
        (without_a_layer, "has no weights for bert.encoder.layer.2."),
        (without_embeddings, "has no weights for bert.embeddings.word_embeddings.weight"),
        (of_another_width, "do not fit its config.json"),
    ],
)
def test_an_encoder_that_is_not_whole_is_refused(
    change, named, encoder, world, tmp_path, status_and_errors
):
    changed = change(encoder, load_file(encoder / "model.safetensors"))
    save_file(changed, encoder / "model.safetensors", metadata={"format": "pt"})
    flags = words("--weights", encoder, "--data_file", world.data("bert"))
    flags += words("--output_dir", tmp_path / "out")
    status, errors = status_and_errors(train_teacher.main, flags)
    assert status == 2 and len(errors) == 1 and named in errors[0], errors
    assert f"--weights {encoder}" in errors[0] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, named",
    [
        ([], "one of the arguments --config --weights is required"),
        (["--config", "a.json", "--weights", "b"], "not allowed with argument --config"),
        (["--config", "a.json", "--tokenizer_name", "b", "--train_head_only"], "with --weights"),
        (["--config", "a.json"], "--tokenizer_name: expected with --config"),
    ],
)
def test_flags_that_name_no_start_are_refused(flags, named, tmp_path, status_and_errors):
    flags = [*flags, *words("--data_file", "none", "--output_dir", tmp_path / "out")]
    status, errors = status_and_errors(train_teacher.main, flags)
    assert status == 2 and len(errors) == 1 and named in errors[0], errors


def test_a_head_without_parameters_is_not_trained_alone(
    teachers, world, tmp_path, status_and_errors
):
    flags = words("--weights", teachers["gpt2"], "--data_file", world.data("gpt2"))
    flags += words("--output_dir", tmp_path / "out", "--train_head_only")
    status, errors = status_and_errors(train_teacher.main, flags)
    assert status == 2 and "leave out --train_head_only" in errors[0], errors
