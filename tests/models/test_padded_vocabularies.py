"""Models with rows beyond their tokenizer's entries: distilled, masked and evaluated without them.

A teacher and a student of one tokenizer may be padded to different sizes. The losses are compared
with those of the whole models' logits, the teacher's cut to the tokenizer's entries.
"""

import collections
import json
import pickle
import random
from pathlib import Path

import families
import pytest
import torch
import transformers
from stand_ins import student_config_of
from test_conventions import FAMILIES, families_at_random, is_small

import binarized_data
import evaluate_lm
import extract_distilbert
import token_counts
import train
from distil import evaluation
from distil.models import checks
from distil.objectives import LOSSES
from utils import InputError, run_program

T = 2.0
PADDINGS = (0, 8, 40)
ALPHAS = {"ce": 5.0, "mse": 0.1}


def words(flags: dict) -> list[str]:
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


class Case:
    """A padded teacher, data and counts of its tokenizer, and a padded student's JSON."""

    def __init__(self, folder: Path, family, paddings, teachers, text_file):
        self.folder, (self.model_type, self.is_masked) = folder, family
        self.teacher = folder / "teacher"
        families.make_teacher(self.teacher, *family, teachers, paddings[0])
        rows = json.loads((self.teacher / "config.json").read_text())["vocab_size"]
        self.num_entries = rows - paddings[0]
        self.num_student_rows = self.num_entries + paddings[1]
        flags = {"file_path": text_file, "tokenizer_type": "auto", "num_workers": 1}
        flags |= {"tokenizer_name": self.teacher, "dump_file": folder / "ids"}
        binarized_data.main(words(flags | {"token_counts_dump": folder / "counts"}))

    def write_student(self) -> Path:
        teacher = transformers.AutoConfig.from_pretrained(self.teacher)
        entries = {k: 0.0 for k, v in teacher.to_dict().items() if "drop" in k and v}
        roles = ("pad_token_id", "bos_token_id", "eos_token_id")
        ids = {name: getattr(teacher, name, None) for name in roles}
        ids = {name: number for name, number in ids.items() if number is not None}
        config = families.tiny_config(self.model_type, self.num_student_rows, **ids)
        config.update(entries)
        path = self.folder / "student.json"
        path.write_text(config.to_json_string())
        return path

    def flags(self, **more) -> list[str]:
        flags = {
            "student_config": self.write_student(),
            "teacher_name": self.teacher,
            "data_file": self.folder / "ids.teacher.pickle",
            "dump_path": self.folder / "run",
            "n_gpu": 0,
            "max_steps": 1,
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "temperature": T,
            "alpha_clm": 0 if self.is_masked else 1,
            "word_rand": 0.1,
        }
        flags |= {f"alpha_{name}": alpha for name, alpha in ALPHAS.items()}
        if self.is_masked:
            flags |= {"alpha_mlm": 2.0, "token_counts": self.folder / "counts"}
        return words(flags | more) + ["--mlm"] * self.is_masked


def is_right(case: Case) -> bool:
    """Compare losses and gradients of a micro-batch with those of the whole models' logits."""
    trainer = train.set_up(train.parse_config(case.flags()), train.Runtime())
    batch = trainer.prepare(0, *trainer.dataset.collate([0, 1, 2]))
    assert int(batch.input_ids_BT.max()) < case.num_entries
    ready = trainer.distiller.ready(batch)
    found_K = trainer.distiller.accumulate([ready], [0], 1)[0, 1:]
    student, teacher = trainer.student.network, trainer.teacher.network
    gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    expected_K = reference(case, trainer.config.active, student, teacher, batch)
    alphas_K = [trainer.config.alphas[name] for name in trainer.config.active]
    sum(a * x for a, x in zip(alphas_K, expected_K, strict=True)).backward()
    pairs = [(found_K, torch.stack(expected_K).detach().to(found_K.dtype))]
    pairs += [
        (gradients.get(n, torch.zeros_like(p)), p.grad)
        for n, p in student.named_parameters()
        if p.grad is not None
    ]
    return all(checks.is_close(a, b) for a, b in pairs)


def reference(case: Case, names, student, teacher, batch) -> list[torch.Tensor]:
    """Compute the objectives from whole logits: the teacher's cut, the student's as they are."""
    options = {"attention_mask": batch.attention_mask_BT, **checks.without_cache(student)}
    student_NV = student(batch.input_ids_BT, **options).logits.flatten(0, 1)
    with torch.no_grad():
        teacher_NV = teacher(batch.input_ids_BT, **options).logits.flatten(0, 1)
    if teacher.config.vocab_size != student.config.vocab_size:
        teacher_NV = teacher_NV[:, : case.num_entries]
    losses = []
    for name in names:
        rows_N = batch.rows[LOSSES[name].rows]
        own_NV, others_NE = student_NV[rows_N], teacher_NV[rows_N]
        num = others_NE.shape[1]
        if name == "ce":
            p_NE = (others_NE / T).softmax(-1)
            log_q_NE = (own_NV / T).log_softmax(-1)[:, :num]
            losses.append(T**2 * (p_NE * (p_NE.log() - log_q_NE)).sum(-1).mean())
        elif name == "mse":
            losses.append((own_NV[:, :num] - others_NE).square().sum(-1).mean())
        else:
            labels = batch.labels_BT.flatten()
            labels_N = labels[rows_N + (name == "clm")]
            losses.append(torch.nn.functional.cross_entropy(own_NV, labels_N))
    return losses


def outcome_of(case: Case) -> str:
    """Return "works", "refused" (in one line) or "wrong"."""
    try:
        return "works" if is_right(case) else "wrong"
    except InputError as error:
        return "refused" if "\n" not in str(error) else "wrong"
    except Exception as error:
        return f"crashed {error!r:.150}"


def draw(num: int, seed: int, candidates) -> list[tuple]:
    """Draw families with the paddings of teacher and student, one in eight a student too small."""
    rng = random.Random(seed)
    found = []
    for family in rng.sample(candidates, num):
        too_small = rng.random() < 1 / 8
        found.append((family, (rng.choice(PADDINGS), -8 if too_small else rng.choice(PADDINGS))))
    return found


def run_draw(drawn, teachers, text_file, tmp_path, capsys) -> dict[str, str]:
    """Return the outcome of each drawn case; "wrong" where a student that fits was refused."""
    outcomes = {}
    for number, (family, paddings) in enumerate(drawn):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            assert is_small(*family)
            case = Case(folder, family, paddings, teachers, text_file)
        except Exception:  # the family does not support the sizes
            outcomes[f"{family[0]} {paddings}"] = "not built"
            continue
        found = outcome_of(case)
        if paddings[1] < 0:
            found = "wrong" if found == "works" else found
        outcomes[f"{family[0]} {paddings}"] = found
    with capsys.disabled():
        print(f"\npadded: {dict(collections.Counter(outcomes.values()))}: {outcomes}")
    return outcomes


def test_padded_teachers_and_students_drawn_over_families(teachers, text_file, tmp_path, capsys):
    outcomes = run_draw(draw(5, 1, FAMILIES), teachers, text_file, tmp_path, capsys)
    counts = collections.Counter(outcomes.values())
    assert counts["wrong"] == 0 and counts["works"] >= 4, outcomes


NUM_UNNAMED = 15  # of each kind, in the slow draw


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_padded_vocabularies_of_all_families(teachers, text_file, tmp_path, capsys):
    unnamed = [(n, kind) for kind in (True, False) for n in families_at_random(kind)[:NUM_UNNAMED]]
    drawn = [*draw(len(FAMILIES), 2, FAMILIES), *draw(len(FAMILIES), 3, FAMILIES)]
    drawn += draw(len(unnamed), 4, unnamed)
    outcomes = run_draw(drawn, teachers, text_file, tmp_path, capsys)
    counts = collections.Counter(outcomes.values())
    assert counts["wrong"] == 0 and counts["works"] >= 30, outcomes
    crashed = {name for name, found in outcomes.items() if found.startswith("crashed")}
    assert not crashed, outcomes


@pytest.fixture(scope="module")
def case(teachers, text_file, tmp_path_factory) -> Case:
    """Make a BERT of 40 rows more than its tokenizer's, and a student of 8 more."""
    folder = tmp_path_factory.mktemp("padded")
    return Case(folder, ("bert", True), (40, 8), teachers, text_file)


def test_a_student_of_other_rows_is_trained_saved_and_evaluated(case, tmp_path, capsys):
    """Each model keeps its rows; the counts are the tokenizer's."""
    held_out = {"eval_data_file": case.folder / "ids.teacher.pickle", "eval_interval": 1}
    train.main(case.flags(dump_path=tmp_path / "run", **held_out))
    assert "further rows are never asked for" in capsys.readouterr().err
    exported = tmp_path / "run"
    exported = exported / "model" if (exported / "model").exists() else exported
    student = transformers.AutoModelForMaskedLM.from_pretrained(exported)
    assert student.get_output_embeddings().weight.shape[0] == case.num_entries + 8
    assert len(pickle.loads((case.folder / "counts").read_bytes())) == case.num_entries
    figures = {}
    for name, flags in {
        "pair": {"model": exported, "teacher": case.teacher},
        "student": {"model": exported},
        "teacher": {"model": case.teacher},
    }.items():
        flags |= {"data_file": case.folder / "ids.teacher.pickle", "device": "cpu"}
        flags |= {"token_counts": case.folder / "counts", "output": tmp_path / f"{name}.json"}
        evaluate_lm.main(words(flags))
        scores = json.loads((tmp_path / f"{name}.json").read_text())
        figures[name] = scores["runs"][0]["metrics"]
    assert figures["pair"]["loss"] == figures["student"]["loss"]
    assert figures["pair"]["teacher_loss"] == figures["teacher"]["loss"]
    assert figures["pair"]["drawn_loss"] == figures["student"]["drawn_loss"]
    assert 0 < figures["pair"]["kl"] < 100


@torch.no_grad()
def test_two_models_of_other_rows_are_compared_over_the_tokenizers_entries():
    student, teacher = (families.tiny_model("gpt2", False, rows, rows) for rows in (208, 240))
    ids_BT = torch.arange(20, 60).view(2, 20)
    readers = evaluation.reader_of(student), evaluation.reader_of(teacher, 200)
    batches = evaluation.next_tokens(0, ids_BT, torch.tensor([20, 20]))
    figures = evaluation.figures_of(evaluation.measure(*readers, batches), True)
    own_NV, others_NV = (model(ids_BT).logits[:, :-1].flatten(0, 1) for model in (student, teacher))
    p_NE = others_NV[:, :200].double().softmax(-1)
    log_q_NV, labels_N = own_NV.double().log_softmax(-1), ids_BT[:, 1:].flatten()
    kl = (p_NE * (p_NE.log() - log_q_NV[:, :200])).sum(-1).mean().item()
    agreement = (p_NE.argmax(-1) == own_NV.argmax(-1)).double().mean().item()
    teacher_loss = torch.nn.functional.cross_entropy(others_NV.double(), labels_N).item()
    expected = {"kl": kl, "agreement": agreement, "teacher_loss": teacher_loss}
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def errors_of(main, argv: list[str], capsys) -> list[str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_program(lambda: main(argv))
    assert end.value.code == 2
    printed = capsys.readouterr().err.splitlines()
    return [line.split("error: ", 1)[1] for line in printed if ": error: " in line]


def test_a_student_with_fewer_rows_than_the_tokenizer_is_refused(case, capsys):
    student = json.loads(case.write_student().read_text())
    student["vocab_size"] = case.num_entries - 1
    (case.folder / "small.json").write_text(json.dumps(student))
    (error,) = errors_of(train.main, case.flags(student_config=case.folder / "small.json"), capsys)
    assert (
        f"vocabulary is {case.num_entries - 1}, the teacher's is {case.num_entries + 40}" in error
    )
    assert f"set vocab_size {case.num_entries} or more" in error
    student["vocab_size"] = case.num_entries  # as the message says
    (case.folder / "small.json").write_text(json.dumps(student))
    train.main(case.flags(student_config=case.folder / "small.json", dump_path=case.folder / "s"))


def test_first_weights_of_other_rows_name_the_size_to_set(case, tmp_path, capsys):
    """A state dict has its teacher's rows; the message's remedy is followed."""
    first = tmp_path / "first.pth"
    flags = {"model_type": "bert", "model_name": case.teacher, "dump_checkpoint": first}
    extract_distilbert.main([*words(flags), "--num_layers", "2"])
    content = student_config_of("bert", case.num_entries + 8) | {"n_layers": 2}
    content |= {"model_type": "distilbert", "max_position_embeddings": 80}
    given = {"student_config": tmp_path / "student.json", "student_pretrained_weights": first}
    given |= {"dump_path": tmp_path / "run"}
    flags = case.flags(**given)
    (tmp_path / "student.json").write_text(json.dumps(content))
    (error,) = errors_of(train.main, flags, capsys)
    assert "set the sizes of these weights in the student's JSON" in error
    content["vocab_size"] = case.num_entries + 40
    (tmp_path / "student.json").write_text(json.dumps(content | {"hidden_dim": 48}))
    train.main(flags)


COUNTS = {
    "fewer": (lambda counts: counts[:-1], "entries, the vocabulary of"),
    "more than the model": (lambda counts: [*counts, *[0] * 41], "entries, the vocabulary of"),
    "of padding": (lambda counts: [*counts, 0, 3], "counts the id"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_other_entries_are_refused_with_a_remedy_that_works(name, case, tmp_path, capsys):
    change, message = COUNTS[name]
    counts = pickle.loads((case.folder / "counts").read_bytes())
    (tmp_path / "counts").write_bytes(pickle.dumps(change(counts)))
    flags = {"token_counts": tmp_path / "counts", "dump_path": tmp_path / "run"}
    (error,) = errors_of(train.main, case.flags(**flags), capsys)
    assert message in error and f"--vocab_size {case.num_entries}" in error
    data = {"data_file": case.folder / "ids.teacher.pickle", "vocab_size": case.num_entries}
    token_counts.main(words(data | {"token_counts_dump": tmp_path / "again"}))
    assert pickle.loads((tmp_path / "again").read_bytes()) == counts
    train.main(case.flags(**flags | {"token_counts": tmp_path / "again"}))


def test_counts_of_as_many_entries_as_the_model_has_rows_are_accepted(case, tmp_path):
    """As token_counts.py --vocab_size and 2019 made them."""
    counts = pickle.loads((case.folder / "counts").read_bytes())
    (tmp_path / "counts").write_bytes(pickle.dumps([*counts, *[0] * 40]))
    flags = {"token_counts": tmp_path / "counts", "dump_path": tmp_path / "run"}
    train.main(case.flags(**flags))


def test_a_trained_student_of_other_rows_needs_a_tokenizer_that_shows_it(case, tmp_path, capsys):
    ids = {"pad_token_id": 0}
    student = families.tiny_model("bert", True, case.num_entries + 8, **ids)
    student.save_pretrained(tmp_path / "student")
    flags = case.flags(dump_path=tmp_path / "run")
    place = flags.index("--student_config")
    flags[place : place + 2] = ["--student", str(tmp_path / "student")]
    (error,) = errors_of(train.main, flags, capsys)
    assert "copy the teacher's tokenizer files into it" in error
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "student" / file).write_bytes((case.teacher / file).read_bytes())
    train.main(flags)
