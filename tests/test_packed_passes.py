"""Packed passes: sequences laid into rows, with the losses and gradients of passes apart."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from stand_ins import WIDTH, make_model
from test_distiller import VOCAB
from test_joined_passes import ALONE, EXACT, PAD, Data, largest_difference, results
from test_pending_update import RefuseWaiting
from whole_runs import read_metrics

import train
from distil.data.packing import (
    LAUNCH_TOKENS,
    WIDTH_MULTIPLE,
    choose_rows,
    lay,
    make_pass,
    num_rows,
    pack,
    padded_rows,
    plan_packed,
    width_of,
)
from distil.kernels import logit_gradients
from distil.models.forward import PACKED_POSITIONS, last_hidden_state, packing_problem
from distil.objectives import NORMALIZATIONS
from distil.training.endings import EXIT_NON_FINITE
from distiller import DistillationModel, Distiller
from grouped_batch_sampler import GroupedBatchSampler

PAIRS = ("bert", "roberta", "gpt2")  # the first one's student is a DistilBERT
SHAPE = 6, 48
OF_BERT = "hidden_dropout_prob", "attention_probs_dropout_prob"
DROPOUTS = {
    "bert": ("dropout", "attention_dropout"),
    "roberta": OF_BERT,
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
}


def make_student(kind: str, dropout: float = 0.0):
    options = dict.fromkeys(DROPOUTS[kind], dropout)
    if kind != "bert":
        return make_model(kind, VOCAB, layers=2, **options)
    sizes = {"dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": VOCAB}
    config = transformers.DistilBertConfig(**sizes, **options, max_position_embeddings=64)
    torch.manual_seed(1)
    return transformers.DistilBertForMaskedLM(config)


def make_distiller(kind: str, alphas=None, dropout=0.0, device="cpu", **options) -> Distiller:
    """Make a pair in float64, with all objectives that packed passes serve by default."""
    names = ["ce", "clm" if kind == "gpt2" else "mlm", "cos", "mse", "rkl", "hid"]
    alphas = alphas or {name: ALONE.get(name, 1.0) for name in names}
    student = make_student(kind, dropout).double().to(device)
    teacher = make_model(kind, VOCAB).double().to(device).eval().requires_grad_(False)
    given = {"teacher": teacher, "options": {"layer_map": [(0, 0), (1, 3)]}, "chunk_rows": 50}
    model = DistillationModel(student, alphas, 2.0, **given)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Distiller(model, teacher, optimizer, None, **{"max_grad_norm": 1e9, "seed": 5} | options)


def updates(kind: str, shape, accumulation: int, num: int = 60):
    """Yield (numbers, passes) of a run's updates, packed to a shape; None: apart.

    Some sequences have an id 1 inside, RoBERTa's padding, as masking at random may draw it.
    """
    data = Data(kind != "gpt2", num)
    for ids in data.ids[::3]:
        ids[5] = 1
    sampler = data.make_sampler()
    if shape is not None:
        sampler.packs, sampler.tokens_per_pass = True, shape[0] * shape[1]
        assert sampler.shape == shape
    for update in sampler.updates(len(sampler), accumulation, 0, 1):
        passes = [make_pass(map(data.batch, one), PAD, shape) for one in update.passes]
        yield [batch.number for batch in update.planned], passes


# --------------------------------------------------------------------------------------------------
# Packed equals apart
# --------------------------------------------------------------------------------------------------


def compare(kind, normalization="micro_batches", **options) -> float:
    """Return the largest difference of packed and apart over updates of 12, the last one of 6."""
    distiller, worst = make_distiller(kind, normalization=normalization, **options), 0.0
    for one, two in zip(updates(kind, None, 12), updates(kind, SHAPE, 12), strict=True):
        assert one[0] == two[0] and 1 < len(two[1]) < len(one[1])
        worst = max(worst, largest_difference(results(distiller, *one), results(distiller, *two)))
    return worst


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kind", PAIRS)
def test_packed_passes_give_the_losses_and_gradients_of_passes_apart(kind, normalization):
    assert compare(kind, normalization) < EXACT


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_compiled_objectives_read_packed_passes_exactly(kind, monkeypatch):
    """The code that would be compiled, which needs the rows of a micro-batch in one range."""
    monkeypatch.setattr(logit_gradients, "_compiled", lambda: logit_gradients._fused_terms)
    found = []
    for shape in (None, SHAPE):
        distiller = make_distiller(kind)
        distiller.model.compiles_head = True
        found.append(results(distiller, *next(updates(kind, shape, 12))))
    assert largest_difference(*found) < EXACT


def test_the_comparison_sees_sequences_that_see_each_other(monkeypatch):
    kept = torch.Tensor.__eq__

    def equal(one, two):
        is_mask = one.dim() == 3 and not one.is_floating_point()
        return torch.ones_like(kept(one, two)) if is_mask else kept(one, two)

    distiller, apart = make_distiller("bert"), next(updates("bert", None, 12))
    expected = results(distiller, *apart)
    packed = next(updates("bert", SHAPE, 12))
    monkeypatch.setattr(torch.Tensor, "__eq__", equal)
    assert largest_difference(expected, results(distiller, *packed)) > 1e-4


@pytest.mark.parametrize("kind", PAIRS)
def test_a_packed_sequence_changes_no_other(kind):
    """Hidden states and losses: the others' are equal to the bit."""
    _, (first, *_) = next(updates(kind, SHAPE, 12))
    distiller, student = make_distiller(kind), make_student(kind).double().eval()
    sequences_BT = first.packing.sequences_BT
    hidden_BTD = last_hidden_state(student, first)
    num, sizes = int(sequences_BT.max()) + 1, [len(part.input_ids_BT) for part in first.parts]
    of_sequence = [k for k, size in enumerate(sizes) for _ in range(size)]
    losses_MK = results(distiller, [part.number for part in first.parts], [first])[0]
    assert num > 8 and hidden_BTD.isfinite().all(), "padding too"
    for changed in (0, num // 2, num - 1):
        is_changed = sequences_BT == changed
        ids_BT = first.input_ids_BT.masked_fill(is_changed, 7)
        again = dataclasses.replace(first, input_ids_BT=ids_BT)
        found_BTD = last_hidden_state(student, again)
        assert torch.equal(found_BTD[~is_changed], hidden_BTD[~is_changed])
        assert not torch.equal(found_BTD[is_changed], hidden_BTD[is_changed])
        found_MK = results(distiller, [part.number for part in first.parts], [again])[0]
        others = torch.arange(len(sizes)) != of_sequence[changed]
        torch.testing.assert_close(found_MK[others], losses_MK[others], rtol=0, atol=EXACT)
        assert not torch.equal(found_MK[~others], losses_MK[~others])


FAMILIES = {
    **{name: ("bert", {}) for name in ("electra",)},
    **{name: ("roberta", {"pad_token_id": 1}) for name in ("xlm-roberta", "camembert")},
}


@pytest.mark.parametrize("kind", PACKED_POSITIONS)
def test_every_packed_family_gives_the_hidden_states_of_micro_batches(kind):
    if kind in FAMILIES:
        sizes = make_model("bert", VOCAB).config.to_diff_dict()
        sizes = {k: v for k, v in sizes.items() if k not in ("architectures", "model_type")}
        sizes |= FAMILIES[kind][1] | {"max_position_embeddings": 66}
        config = transformers.AutoConfig.for_model(kind, **sizes)
        model = transformers.AutoModelForMaskedLM.from_config(config)
    else:
        model = make_student("bert") if kind == "distilbert" else make_model(kind, VOCAB)
    model = model.double().eval()
    is_causal = kind == "gpt2"
    assert packing_problem(model, ["ce"], is_causal) is None
    _, (packed, *_) = next(updates(kind, SHAPE, 12))
    assert kind == "gpt2" or (packed.input_ids_BT == 1).any(), "a padding id within a sequence"
    together_ND = last_hidden_state(model, packed).flatten(0, 1)[packed.rows["real"]]
    alone = [
        last_hidden_state(model, part).flatten(0, 1)[part.rows["real"]] for part in packed.parts
    ]
    torch.testing.assert_close(together_ND, torch.cat(alone), rtol=1e-10, atol=1e-11)


def test_models_and_objectives_that_cannot_be_packed_are_named():
    bert, gpt2 = make_model("bert", VOCAB, layers=1), make_model("gpt2", VOCAB, layers=1)
    assert packing_problem(gpt2, ["ce", "clm", "hid"], True) is None
    both = packing_problem(bert, ["ce", "rel", "att"], False)
    assert both == "--alpha_rel and --alpha_att read whole sequences"
    assert packing_problem(bert, ["ce"], True) and packing_problem(gpt2, ["ce"], False)
    bert.set_attn_implementation("eager")
    assert "attention is eager" in packing_problem(bert, ["ce"], False)
    bert.config.model_type = "deberta"
    assert "a deberta model is not known" in packing_problem(bert, ["ce"], False)


def test_dropout_depends_on_the_first_micro_batch_of_a_packed_pass():
    found = []
    for seed in (5, 5, 6):
        distiller = make_distiller("bert", dropout=0.3, seed=seed)
        found.append(results(distiller, *next(updates("bert", SHAPE, 12))))
    assert all(torch.equal(one, two) for one, two in zip(*found[:2], strict=True))
    assert not torch.equal(found[0][0], found[2][0])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kind", PAIRS)
def test_the_host_does_not_wait_during_an_update_of_packed_passes(kind, normalization, monkeypatch):
    """Without the CPU's kernels, as on a GPU."""
    monkeypatch.setattr(logit_gradients, "_compiled", lambda: logit_gradients._fused_terms)
    distiller = make_distiller(kind, normalization=normalization)
    distiller.has_cpu_kernels, distiller.model.compiles_head = False, True
    numbers, passes = next(updates(kind, SHAPE, 12))
    ready = [distiller.ready(one) for one in passes]
    results(distiller, numbers, ready)
    with RefuseWaiting():
        distiller._accumulate(ready, numbers, len(ready), lambda: False)


# --------------------------------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_sequences_are_laid_side_by_side_first_fit_decreasing(seed):
    generator = np.random.default_rng(seed)
    lengths, width = generator.integers(1, 65, 80), 64
    rows, columns = lay(lengths, width)
    taken = np.zeros((rows.max() + 1, width), int)
    for row, column, length in zip(rows, columns, lengths, strict=True):
        assert column + length <= width
        taken[row, column : column + length] += 1
    assert taken.max() == 1
    left = width - taken.sum(1)
    assert ((left[:-1] + left[1:]) < width).all(), "no two rows fit in one"
    bound = -(-lengths.sum() // width)
    assert bound <= len(taken) <= 11 / 9 * bound + 1  # Johnson's bound, of the least there can be


@pytest.mark.parametrize("shape", [(1, 48), (3, 48), (6, 48), (100, 48)])
def test_packed_passes_hold_every_micro_batch_once_within_their_shape(shape):
    generator = np.random.default_rng(1)
    lengths = [generator.integers(12, 41, generator.integers(1, 6)) for _ in range(50)]
    passes = plan_packed(lengths, shape)
    assert [*itertools.chain(*passes)] == list(range(50)), "consecutive"
    rows = [num_rows(np.concatenate([lengths[k] for k in one]), 48) for one in passes]
    assert all(n <= shape[0] or len(one) == 1 for n, one in zip(rows, passes, strict=True))
    assert len(passes) == 1 if shape[0] == 100 else len(passes) > 10
    for one, following in itertools.pairwise(passes):  # none is left half empty
        more = np.concatenate([lengths[k] for k in [*one, following[0]]])
        assert num_rows(more, 48) > shape[0]


def test_a_pass_has_one_of_two_sizes_or_a_multiple():
    sizes = padded_rows(np.arange(1, 22), 10).tolist()
    assert sizes == [3] * 3 + [10] * 7 + [20] * 10 + [30]
    assert [int(padded_rows(n, 1)) for n in (1, 2)] == [1, 2]


def test_a_micro_batch_of_more_rows_takes_a_multiple_of_them():
    _, (first, *_) = next(updates("bert", (100, 48), 12))
    again = pack(first.parts, PAD, (4, 48))
    assert len(again.input_ids_BT) % 4 == 0 < len(again.input_ids_BT) - 4
    assert again.num_tokens == first.num_tokens


@pytest.mark.parametrize("ranks", [1, 3])
def test_packed_passes_are_planned_before_they_are_dealt(ranks):
    def passes_of(ranks: int) -> list:
        sampler = Data(True).make_sampler()
        sampler.packs, sampler.tokens_per_pass = True, 300
        shares = [
            list(sampler.updates(len(sampler), 12 // ranks, rank, ranks)) for rank in range(ranks)
        ]
        numbers = [
            [tuple(b.number for b in one) for rank in update for one in rank.passes]
            for update in zip(*shares, strict=True)
        ]
        return [sorted(one) for one in numbers]

    assert passes_of(ranks) == passes_of(1)


def test_by_default_a_packed_pass_has_the_rows_that_cost_least():
    generator = np.random.default_rng(2)
    lengths = [[generator.integers(12, 65, 5) for _ in range(50)] for _ in range(8)]
    rows = choose_rows(lengths, 64, 1000, ranks=1)

    def cost(num: int) -> float:
        costs = []
        for update in lengths:
            passes = [[update[k] for k in one] for one in plan_packed(update, (num, 64))]
            rows = [padded_rows(num_rows(np.concatenate(one), 64), num) for one in passes]
            costs.append(sum(rows) * 64 + LAUNCH_TOKENS * len(rows))
        return np.mean(costs)

    assert cost(rows) <= 1.02 * min(cost(num) for num in range(100, 250, 5))
    four = choose_rows(lengths, 64, 1000, ranks=4)
    assert rows / 5 < four < rows / 3, "each rank has a pass"
    assert choose_rows(lengths, 64, 7, ranks=1) == 7, "no more than memory allows"


@pytest.mark.parametrize(("shortest", "gains"), [(4, True), (64, False)])
def test_a_gpu_packs_by_default_where_that_is_cheaper(shortest, gains):
    lengths = np.random.default_rng(3).integers(shortest, 65, 4000)
    sampler = GroupedBatchSampler(lengths, 5, 64, group_by_size=True, seed=1)
    sampler.join(None, 50, 10**10, packs=None)
    assert (sampler.shape is not None) == gains
    kept = sampler.passes
    sampler.join(None, 50, 10**10, packs=gains)
    assert sampler.passes == kept
    sampler.join(None, 50, 10**10, packs=True)
    assert sampler.shape is not None, "as asked for"


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        ({}, "cpu", False),
        ({}, "cuda", None),
        ({"pack_sequences": True}, "cpu", True),
        ({"pack_sequences": True}, "cuda", True),
        ({"no-pack_sequences": True}, "cuda", False),
        ({"tokens_per_pass": 0}, "cuda", False),
        ({"alpha_rel": 1.0}, "cuda", False),
    ],
)
def test_where_passes_are_packed(flags, device, expected, world, tmp_path):
    config = train.parse_config(world.flags("bert", tmp_path / "run", **flags))
    models = make_student("bert"), make_model("bert", VOCAB, layers=1)
    assert train.devices.packs_sequences(config, torch.device(device), *models) is expected


def test_the_shape_follows_from_the_tokens_of_a_pass_and_the_longest_sequence():
    sampler = Data(True).make_sampler()
    longest = int(sampler.lengths.max())
    sampler.join(1000, 12, None, packs=True)
    width = width_of(longest)
    assert sampler.shape == (1000 // width, width)
    assert longest <= width < longest + WIDTH_MULTIPLE and width % WIDTH_MULTIPLE == 0
    sampler.join(longest, 12, None, packs=True)
    assert sampler.shape == (1, width)
    sampler.join(None, 12, 10**10, packs=True)
    assert sampler.tokens_per_pass == np.prod(sampler.shape) > 0
    sampler.join(1000, 12, 10**10)
    assert sampler.shape is None


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------

FLAGS = {"batch_size": 6, "gradient_accumulation_steps": 7, "n_epoch": 1, "log_interval": 7}


@pytest.fixture
def shapes(monkeypatch):
    """Record the shapes of all passes that a run trains on."""
    found, kept = [], Distiller._backward

    def backward(self, batch, *arguments):
        found.append(tuple(batch.input_ids_BT.shape))
        return kept(self, batch, *arguments)

    monkeypatch.setattr(Distiller, "_backward", backward)
    return found


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_a_packed_run_of_mixed_lengths_has_two_shapes_and_trains_as_apart(
    kind, world, tmp_path, shapes, capfd
):
    """Without dropout, which is drawn by pass; the last of the updates is a partial one."""
    content = json.loads(Path(world.config(kind)).read_text()) | dict.fromkeys(DROPOUTS[kind], 0.0)
    config = tmp_path / "student.json"
    config.write_text(json.dumps(content))
    flags = FLAGS | {"student_config": config, "warmup_prop": 0}
    train.main(world.flags(kind, tmp_path / "apart", **flags))
    assert len(set(shapes)) > 3
    shapes.clear()
    packed = {"tokens_per_pass": 700, "pack_sequences": True}
    train.main(world.flags(kind, tmp_path / "packed", **flags, **packed))
    rows, width = max(shapes)
    small = -(-rows // 4)
    assert len(shapes) > 6 and set(shapes) <= {(rows, width), (small, width)}
    assert (
        f"packs their sequences into up to {rows} rows of {width} tokens." in capfd.readouterr().err
    )
    one, two = (read_metrics(tmp_path / name) for name in ("apart", "packed"))
    for first, second in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", *(k for k in first if k.startswith("loss_"))):
            assert second[key] == pytest.approx(first[key], rel=1e-4)  # float32, other sums


def only_in_one(packed):
    """Yield (place, id) of each id that only the micro-batch in this place has."""
    ids = [set(part.input_ids_BT.unique().tolist()) for part in packed.parts]
    for place, own in enumerate(ids):
        others = set().union(*(other for other in ids if other is not own))
        yield from ((place, token_id) for token_id in sorted(own - others))


def shares_a_row(packed, place: int, token_id: int) -> bool:
    """Say whether a row that holds the id has sequences of other micro-batches of 2, too."""
    rows = (packed.input_ids_BT == token_id).any(1)
    sequences = packed.packing.sequences_BT[rows].unique()
    return bool((sequences[sequences >= 0] // 2 != place).any())


def test_a_packed_run_names_the_micro_batch_that_became_nan(world, tmp_path, monkeypatch, capfd):
    """In a row NaN spreads from one sequence to all, for 0 x NaN is NaN."""
    kept, culprits = train.Distiller.launch, []

    def launch(self, batches, *arguments, **options):
        (batch,) = batches
        place, bad = next(found for found in only_in_one(batch) if shares_a_row(batch, *found))
        culprits.append(batch.parts[place].number)
        table = self.model.student.get_input_embeddings()

        def spoil(_module, inputs, found):
            return found.masked_fill((inputs[0] == bad)[..., None], float("nan"))

        table.register_forward_hook(spoil)
        return kept(self, [batch], *arguments, **options)

    monkeypatch.setattr(train.Distiller, "launch", launch)
    flags = FLAGS | {"tokens_per_pass": 2000, "pack_sequences": True, "batch_size": 2}
    with pytest.raises(SystemExit) as end:
        train.main(world.flags("bert", tmp_path / "run", **flags))
    said = capfd.readouterr().err
    assert end.value.code == EXIT_NON_FINITE
    assert "or in another of its packed pass; computed apart; micro-batch" in said
    named = set(re.findall(r"micro-batch (\d+): loss_\w+'s gradient", said))
    assert named == {str(number) for number in culprits}
    saved = safetensors.torch.load_file(tmp_path / "run" / "nonfinite-step-0.safetensors")
    assert {name.split("/")[0] for name in saved} == named


def test_what_cannot_be_packed_runs_unpacked_and_says_why(world, tmp_path, shapes, capfd):
    flags = FLAGS | {"tokens_per_pass": 700, "pack_sequences": True, "max_steps": 2}
    flags |= {"alpha_rel": 1.0, "relation_heads": 4}
    train.main(world.flags("bert", tmp_path / "run", **flags))
    said = capfd.readouterr().err
    assert "Sequences are not packed: --alpha_rel read whole sequences." in said
    assert "A pass joins micro-batches up to 700 padded tokens." in said and len(set(shapes)) > 1


def test_packing_passes_of_one_micro_batch_is_refused(world, tmp_path, status_and_errors):
    flags = world.flags("bert", tmp_path / "run", tokens_per_pass=0, pack_sequences=True)
    status, errors = status_and_errors(train.main, flags)
    expected = "--pack_sequences with --tokens_per_pass 0: .* leave one of them out"
    assert status == 2 and len(errors) == 1 and re.search(expected, errors[0]), errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [None, True, False])
def test_the_choice_comes_back_from_a_file_and_from_the_line(value, world, tmp_path):
    path = tmp_path / "parameters.json"
    flags = train.as_flags(train.parse_config(world.flags("bert", tmp_path / "run")))
    path.write_text(json.dumps(flags | {"pack_sequences": value}))
    given = ["--config", str(path), "--dump_path", str(tmp_path / "new")]
    assert train.parse_config(given).pack_sequences is value
    for flag, expected in (("--pack_sequences", True), ("--no-pack_sequences", False)):
        assert train.parse_config([*given, flag]).pack_sequences is expected
