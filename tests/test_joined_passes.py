"""Micro-batches joined in one pass: the plan of passes, and losses and gradients as apart."""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from stand_ins import make_model
from test_distiller import VOCAB, make_preparation
from test_pending_update import RefuseWaiting
from whole_runs import read_metrics

import train
from distil.data.batches import join, prepare_clm
from distil.kernels import logit_gradients
from distil.models.forward import last_hidden_state
from distil.objectives import LOSSES, NORMALIZATIONS
from distil.training.endings import EXIT_NON_FINITE
from distil.training.post_mortem import NonFiniteError
from distiller import DistillationModel, Distiller
from grouped_batch_sampler import (
    BYTES_PER_TOKEN,
    MAX_TOKENS_PER_PASS,
    PASS_TOKENS,
    GroupedBatchSampler,
    plan_passes,
)
from utils import InputError

PAD = 0
EXACT = 1e-12  # in float64, of the largest figure: another order of sums
ALONE = {"ce": 5.0, "mlm": 2.0, "clm": 0.5, "mse": 0.1, "cos": 1.0}


def objectives_of(is_masked: bool) -> list[str]:
    """List the objectives that a pair can have."""
    return [name for name in LOSSES if name != ("clm" if is_masked else "mlm")]


def make_networks(is_masked: bool, dropout: float = 0.0) -> tuple:
    """Make a student of two layers and its teacher, in float64."""
    kind = "bert" if is_masked else "gpt2"
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    names = names if is_masked else ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    student = make_model(kind, VOCAB, layers=2, **dict.fromkeys(names, dropout)).double()
    return student, make_model(kind, VOCAB).double().eval().requires_grad_(False)


def make_distiller(is_masked: bool, alphas=None, *, dropout=0.0, fast_head=True, **options):
    alphas = alphas or {name: ALONE.get(name, 1.0) for name in objectives_of(is_masked)}
    student, teacher = make_networks(is_masked, dropout)
    layers = {"relation_heads": 4, "layer_map": [(0, 0), (1, 3)]}
    given = {"teacher": teacher, "options": layers, "chunk_rows": 50, "fast_head": fast_head}
    model = DistillationModel(student, alphas, 2.0, **given)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Distiller(model, teacher, optimizer, None, **{"max_grad_norm": 1e9, "seed": 5} | options)


class Data:
    """Sequences of random ids, of which every fifth micro-batch draws no mask, and their plan."""

    def __init__(self, is_masked: bool, num: int = 130, batch_size: int = 2, grouped=True):
        generator = np.random.default_rng(3)
        self.lengths = generator.integers(12, 40, num)
        self.ids = [generator.integers(5, VOCAB, length) for length in self.lengths]
        self.prepare = make_preparation() if is_masked else prepare_clm
        self.make_sampler = functools.partial(
            GroupedBatchSampler, self.lengths, batch_size, 64, group_by_size=grouped, seed=5
        )

    def batch(self, planned):
        lengths_B = torch.from_numpy(self.lengths[planned.sequences])
        ids_BT = torch.full((len(lengths_B), int(lengths_B.max())), PAD)
        for row, sequence in zip(ids_BT, planned.sequences, strict=True):
            row[: self.lengths[sequence]] = torch.from_numpy(self.ids[sequence])
        batch = self.prepare(planned.number, ids_BT, lengths_B)
        if planned.number % 5 == 4 and "masked" in batch.rows:
            rows = {**batch.rows, "masked": batch.rows["masked"][:0]}
            batch = dataclasses.replace(batch, rows=rows)
        return batch

    def updates(self, tokens_per_pass: int, accumulation: int, world_size: int, first: int = 0):
        """Yield (numbers, passes of all ranks in turn) of each update."""
        sampler = self.make_sampler()
        sampler.tokens_per_pass = tokens_per_pass
        plan = len(sampler), accumulation // world_size
        ranks = [
            sampler.updates(*plan, rank, world_size, first=first) for rank in range(world_size)
        ]
        for shares in zip(*ranks, strict=True):
            passes = [one for share in shares for one in share.passes]
            numbers = [batch.number for batch in shares[0].planned]
            yield numbers, [join(map(self.batch, one), PAD) for one in passes]


def results(distiller, numbers, passes) -> list[torch.Tensor]:
    """Return losses_MK and all gradients of an update."""
    distiller.optimizer.zero_grad(set_to_none=True)
    ready = [distiller.ready(one) for one in passes]
    losses_MK = distiller.accumulate(ready, numbers, len(ready))
    grads = [p.grad.clone() for p in distiller.model.parameters() if p.grad is not None]
    return [losses_MK, *grads]


def largest_difference(one: list[torch.Tensor], two: list[torch.Tensor]) -> float:
    """Return the largest difference of losses, of gradients, by the largest of each kind."""
    assert len(one) == len(two) and all(x.isfinite().all() for x in (*one, *two))
    scales = [one[0].abs().max()] + [max(x.abs().max() for x in one[1:])] * (len(one) - 1)
    pairs = zip(one, two, scales, strict=True)
    return max(((a - b).abs().max() / scale).item() for a, b, scale in pairs)


def compare(is_masked, alphas, normalization, accumulation, world_size, limit=400, **options):
    """Return the largest difference of joined and apart over a run's updates."""
    data, worst, num_joined = Data(is_masked), 0.0, 0
    distiller = make_distiller(is_masked, alphas, normalization=normalization, **options)
    apart = data.updates(0, accumulation * world_size, 1)
    joined = data.updates(limit, accumulation * world_size, world_size)
    for one, two in zip(apart, joined, strict=True):
        assert one[0] == two[0] and sorted(b.number for x in two[1] for b in x.parts) == one[0]
        num_joined += len(one[1]) - len(two[1])
        worst = max(worst, largest_difference(results(distiller, *one), results(distiller, *two)))
    assert num_joined > 0 or accumulation == 1
    return worst


# --------------------------------------------------------------------------------------------------
# Joined equals apart
# --------------------------------------------------------------------------------------------------

MASKED = pytest.mark.parametrize("is_masked", [True, False], ids=["masked", "causal"])


@MASKED
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_joined_passes_give_the_losses_and_gradients_of_passes_apart(is_masked, normalization):
    """All objectives at once, over updates of 21 micro-batches on 3 ranks, the last one of 2."""
    assert compare(is_masked, None, normalization, 7, 3) < EXACT


GRADIENT_CASES = [
    (is_masked, name)
    for is_masked in (True, False)
    for name in (*objectives_of(is_masked), "all of them")
]


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 7, 50])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("is_masked", "name"), GRADIENT_CASES)
def test_gradients_are_independent_of_passes(
    is_masked, name, normalization, accumulation, world_size
):
    """The last of the updates is a partial one, but for an update of one micro-batch."""
    alphas = None if name == "all of them" else {name: ALONE.get(name, 1.0)}
    assert compare(is_masked, alphas, normalization, accumulation, world_size) < EXACT


@MASKED
@pytest.mark.parametrize("head", ["plain", "fused"])
def test_every_head_joins_passes_exactly(is_masked, head, monkeypatch):
    """The head for any projection, and the code that would be compiled."""
    monkeypatch.setattr(logit_gradients, "_compiled", lambda: logit_gradients._fused_terms)
    data, found = Data(is_masked, num=40), []
    for limit in (0, 400):
        distiller = make_distiller(is_masked, fast_head=head == "fused")
        distiller.model.compiles_head = head == "fused"
        found.append(results(distiller, *next(data.updates(limit, 20, 1))))
    assert largest_difference(*found) < EXACT


@MASKED
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("head", ["eager", "fused"])
def test_the_host_does_not_wait_during_an_update_of_joined_passes(
    is_masked, normalization, head, monkeypatch
):
    """Without the CPU's kernels, as on a GPU."""
    monkeypatch.setattr(logit_gradients, "_compiled", lambda: logit_gradients._fused_terms)
    distiller = make_distiller(is_masked, normalization=normalization)
    distiller.has_cpu_kernels, distiller.model.compiles_head = False, head == "fused"
    numbers, passes = next(Data(is_masked, num=40).updates(600, 20, 1))
    ready = [distiller.ready(one) for one in passes]
    assert any(one.joined for one in ready)
    results(distiller, numbers, ready)
    with RefuseWaiting():
        distiller._accumulate(ready, numbers, len(ready), lambda: False)


def test_two_objectives_of_one_row_are_told_apart_in_a_fused_pass(monkeypatch):
    """They share their rows, which those of two micro-batches never do."""
    monkeypatch.setattr(logit_gradients, "_compiled", lambda: logit_gradients._fused_terms)
    monkeypatch.setitem(LOSSES, "again", LOSSES["ce"])
    found = []
    for alphas in ({"ce": 5.0, "again": 2.0}, {"ce": 7.0}):
        distiller = make_distiller(True, alphas)
        distiller.model.compiles_head = True
        found.append(results(distiller, *next(Data(True, num=40).updates(400, 20, 1))))
    assert torch.equal(found[0][0][:, 1], found[0][0][:, 2])
    found[0][0] = found[0][0][:, :2]
    assert largest_difference(*found) < EXACT


def test_the_comparison_sees_a_wrong_weight(monkeypatch):
    """A pass weighted as a whole, as by a plain mean over its rows, is what it must find."""
    kept = DistillationModel.forward

    def by_pass(self, batch, *arguments):
        if batch is not None and arguments[-1] is None:
            counts = [sum(batch.num_rows(LOSSES[name].rows)) for name in self.alphas]
            counts_K = torch.tensor(counts, dtype=torch.float64).clamp(min=1) / len(batch.parts)
            arguments = *arguments[:-1], counts_K
        return kept(self, batch, *arguments)

    monkeypatch.setattr(DistillationModel, "forward", by_pass)
    assert compare(True, None, "micro_batches", 7, 1) > 1e-4


def test_micro_batches_that_mask_nothing_weigh_in_a_joined_pass_too():
    data = Data(True)
    numbers, passes = next(data.updates(10**6, 20, 1))
    assert any(0 in one.num_rows("masked") and len(one.parts) > 1 for one in passes)
    apart = next(data.updates(0, 20, 1))
    distiller = make_distiller(True, {"mlm": 1.0})
    one, two = results(distiller, numbers, passes), results(distiller, *apart)
    assert largest_difference(one, two) < EXACT
    assert one[0][4].tolist() == [0, 0]


# --------------------------------------------------------------------------------------------------
# Sequences, dropout, failures
# --------------------------------------------------------------------------------------------------


def widest_pass(data: Data):
    """Return a pass of many micro-batches of unequal lengths."""
    return max(next(data.updates(10**6, 20, 1))[1], key=lambda one: len(one.parts))


@MASKED
def test_a_sequence_of_a_pass_changes_no_other(is_masked):
    student, _ = make_networks(is_masked)
    joined = widest_pass(Data(is_masked))
    num, length = joined.input_ids_BT.shape
    assert num > 10 and joined.is_padded
    hidden_BTD = last_hidden_state(student.eval(), joined)
    for changed in (0, num // 2, num - 1):
        input_ids_BT = joined.input_ids_BT.clone()
        input_ids_BT[changed] = 7
        again = dataclasses.replace(joined, input_ids_BT=input_ids_BT)
        others = torch.arange(num) != changed
        found_BTD = last_hidden_state(student, again)
        assert torch.equal(found_BTD[others], hidden_BTD[others])
        assert not torch.equal(found_BTD[changed], hidden_BTD[changed])


@MASKED
def test_a_pass_gives_every_row_what_its_micro_batch_gives_it(is_masked):
    student, teacher = make_networks(is_masked)
    joined = widest_pass(Data(is_masked))
    for network in (student.eval(), teacher):
        together_ND = last_hidden_state(network, joined).flatten(0, 1)
        apart = [last_hidden_state(network, part).flatten(0, 1) for part in joined.parts]
        for kind, rows_N in joined.rows.items():
            pairs = zip(apart, joined.parts, strict=True)
            alone_ND = torch.cat([hidden_ND[part.rows[kind]] for hidden_ND, part in pairs])
            torch.testing.assert_close(together_ND[rows_N], alone_ND, rtol=1e-11, atol=1e-12)


def test_masks_of_families_that_pad_by_mask_reach_their_unpadded_micro_batches():
    """Alone none of these two is padded."""
    ids = [torch.full((2, length), 7) for length in (12, 20)]
    parts = [
        prepare_clm(number, ids_BT, torch.full((2,), ids_BT.shape[1]), with_mask=True)
        for number, ids_BT in enumerate(ids)
    ]
    assert not any(part.is_padded for part in parts)
    joined = join(parts, PAD)
    assert joined.is_padded and joined.attention_mask_BT.sum(1).tolist() == [12, 12, 20, 20]
    assert joined.input_ids_BT[:2, 12:].eq(PAD).all() and joined.num_tokens == 64


def test_dropout_depends_on_the_first_micro_batch_of_a_pass_alone():
    data, found = Data(True, num=40), {}
    for limit, world_size in ((400, 1), (400, 2), (0, 1)):
        distiller = make_distiller(True, dropout=0.3)
        update = next(data.updates(limit, 20, world_size))
        found[limit, world_size] = results(distiller, *update)
    assert torch.equal(found[400, 1][0], found[400, 2][0])
    assert not torch.equal(found[400, 1][0], found[0, 1][0])


def test_the_non_finite_micro_batch_of_a_joined_pass_is_named():
    data = Data(True, num=40)
    numbers, passes = next(data.updates(10**6, 20, 1))
    joined = max(passes, key=lambda one: len(one.parts))
    culprit, first = joined.parts[3], sum(len(part.input_ids_BT) for part in joined.parts[:3])
    joined.input_ids_BT[first, 2] = VOCAB - 1  # an id of this sequence alone
    others = torch.ones(len(joined.input_ids_BT), dtype=torch.bool)
    others[first] = False
    joined.input_ids_BT[others] = joined.input_ids_BT[others].clamp(max=VOCAB - 2)
    distiller = make_distiller(True, {"cos": 1.0})
    table = distiller.model.student.get_input_embeddings().weight
    table.data[VOCAB - 1] = float("nan")
    message = f"loss_cos became nan in micro-batch {culprit.number};"
    with pytest.raises(NonFiniteError, match=message) as error:
        distiller.step([joined], numbers, 1)
    assert error.value.numbers == [culprit.number]
    found = distiller.non_finite_gradients([joined])
    has_it = {part.number for part in joined.parts if (part.input_ids_BT == VOCAB - 1).any()}
    assert set(found) == has_it and 0 < len(has_it) < len(joined.parts), "each apart"


# --------------------------------------------------------------------------------------------------
# The plan of passes
# --------------------------------------------------------------------------------------------------


def padded(nums, lengths, one) -> int:
    return int(nums[one].sum() * lengths[one].max())


@pytest.mark.parametrize("limit", [0, 1, 200, 1000, 10**6])
def test_passes_hold_every_micro_batch_once_within_the_limit(limit):
    generator = np.random.default_rng(1)
    nums, lengths = generator.integers(1, 6, 60), generator.integers(12, 100, 60)
    passes = plan_passes(nums, lengths, limit)
    assert sorted(itertools.chain(*passes)) == list(range(60))
    assert all(one == sorted(one) for one in passes) and passes == sorted(passes)
    assert all(padded(nums, lengths, one) <= limit or len(one) == 1 for one in passes)
    assert (len(passes) == 60) == (limit in (0, 1))


def cost(nums, lengths, passes) -> int:
    return sum(padded(nums, lengths, one) + PASS_TOKENS for one in passes)


@pytest.mark.parametrize("seed", range(8))
def test_no_division_by_length_pads_less(seed):
    """Against all 512 divisions of ten micro-batches, in which long and short are far apart."""
    generator = np.random.default_rng(seed)
    nums, lengths = generator.integers(1, 9, 10), generator.integers(12, 500, 10)
    order, limit, costs = np.argsort(-lengths, kind="stable"), 6000, []
    for cuts in itertools.product([False, True], repeat=9):
        places = [0, *(k + 1 for k, is_cut in enumerate(cuts) if is_cut), 10]
        passes = [order[a:b].tolist() for a, b in itertools.pairwise(places)]
        if all(padded(nums, lengths, one) <= limit or len(one) == 1 for one in passes):
            costs.append(cost(nums, lengths, passes))
    assert cost(nums, lengths, plan_passes(nums, lengths, limit)) == min(costs)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_passes_are_planned_before_they_are_dealt(world_size):
    def passes_of(world_size: int) -> list[list[tuple[int, ...]]]:
        sampler = Data(True).make_sampler()
        sampler.tokens_per_pass = 300
        ranks = [
            sampler.updates(len(sampler), 12 // world_size, r, world_size)
            for r in range(world_size)
        ]
        updates = zip(*ranks, strict=True)
        shares = [[one for rank in update for one in rank.passes] for update in updates]
        return [sorted(tuple(b.number for b in one) for one in share) for share in shares]

    assert passes_of(world_size) == passes_of(1)


def test_a_resumed_plan_has_the_same_passes():
    data = Data(True)
    whole = list(data.updates(300, 6, 2))
    again = list(data.updates(300, 6, 2, first=whole[2][0][0]))
    for one, two in zip(whole[2:], again, strict=True):
        assert one[0] == two[0]
        assert [one.number for one in one[1]] == [two.number for two in two[1]]


@pytest.mark.parametrize("length", [16, 64])
def test_by_default_a_gpus_pass_is_what_an_update_fills_evenly(length):
    lengths = np.full(8000, length)

    def default(batch_size: int, gpu_bytes: int | None) -> int:
        sampler = GroupedBatchSampler(lengths, batch_size, 64, group_by_size=True, seed=1)
        sampler.join(None, 50, gpu_bytes)
        return sampler.tokens_per_pass

    large, small = 80 * 2**30, 8 * 2**30
    assert default(5, None) == 0, "a CPU"
    assert 250 * length <= default(5, large) < 1.25 * 250 * length + PASS_TOKENS, "one pass"
    assert default(100, large) <= MAX_TOKENS_PER_PASS
    assert default(100, small) <= small // BYTES_PER_TOKEN


def test_a_pass_below_the_longest_sequence_is_refused():
    sampler = Data(True).make_sampler()
    longest = int(sampler.lengths.max())
    with pytest.raises(InputError, match=rf"--tokens_per_pass 20: .* has {longest} ids; raise it"):
        sampler.join(20, 50, None)
    sampler.join(longest, 50, None)
    assert sampler.tokens_per_pass == longest


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_a_run_of_joined_passes_trains_as_one_of_passes_apart(kind, world, tmp_path):
    """Without dropout, which is drawn by pass; the last of the updates is a partial one."""
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop") if kind == "gpt2" else names
    content = json.loads(Path(world.config(kind)).read_text()) | dict.fromkeys(names, 0.0)
    config = tmp_path / "student.json"
    config.write_text(json.dumps(content))
    flags = {"student_config": config, "batch_size": 6, "gradient_accumulation_steps": 7}
    flags |= {"n_epoch": 1, "log_interval": 7, "warmup_prop": 0}
    for name, limit in (("apart", None), ("joined", 500)):
        train.main(world.flags(kind, tmp_path / name, **flags, tokens_per_pass=limit))
    one, two = (read_metrics(tmp_path / name) for name in ("apart", "joined"))
    assert len(one) == len(two) == 6
    for first, second in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", *(k for k in first if k.startswith("loss_"))):
            assert second[key] == pytest.approx(first[key], rel=1e-4)  # float32, other sums
    weights = [torch.load(tmp_path / name / "pytorch_model.bin") for name in ("apart", "joined")]
    for name, tensor in weights[0].items():
        # Adam divides by the gradient's own size, which enlarges rounding errors.
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (30, r"--tokens_per_pass 30: the longest sequence has \d+ ids; raise it, set --max_length"),
        (-1, "--tokens_per_pass -1: expected at least 0"),
        (10**20, "--tokens_per_pass 1\\d+: expected at least 0, at most 1e\\+09"),
        ("many", "argument --tokens_per_pass: invalid int value: 'many'"),
    ],
)
def test_a_pass_of_an_impossible_size_is_one_line(
    value, expected, world, tmp_path, status_and_errors
):
    flags = world.flags("bert", tmp_path / "run", tokens_per_pass=value)
    status, errors = status_and_errors(train.main, flags)
    assert status == 2 and len(errors) == 1 and re.search(expected, errors[0]), errors
    assert not (tmp_path / "run").exists()


def test_out_of_memory_names_the_joined_pass_and_its_flag(
    world, tmp_path, status_and_errors, monkeypatch
):
    def fail(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train.Distiller, "launch", fail)
    flags = world.flags("bert", tmp_path / "run", tokens_per_pass=2000)
    status, errors = status_and_errors(train.main, flags)
    pattern = r"out of memory in a pass of 10 x \d+ = \d+ padded tokens; lower --tokens_per_pass"
    assert status == 2 and len(errors) == 1 and re.match(pattern, errors[0]), errors


def test_a_joined_run_names_the_micro_batch_that_became_nan(world, tmp_path, monkeypatch, capfd):
    """Of one objective's gradient, which is looked for apart."""
    bias = "vocab_projector.bias"
    kept = train.Distiller.launch

    def launch(self, *arguments, **options):
        parameter = self.model.student.get_parameter(bias)
        parameter.register_hook(lambda gradient: gradient * float("nan"))
        return kept(self, *arguments, **options)

    monkeypatch.setattr(train.Distiller, "launch", launch)
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        train.main(world.flags("bert", run, tokens_per_pass=2000, batch_size=6))
    assert end.value.code == EXIT_NON_FINITE
    said = capfd.readouterr().err
    assert "update 0: the gradient norm became nan in micro-batches 0 to 1" in said
    for number in (0, 1):
        assert re.search(rf"micro-batch {number}: loss_ce's gradient for {bias}, on rank 0", said)
    saved = safetensors.torch.load_file(run / "nonfinite-step-0.safetensors")
    assert {name.split("/")[0] for name in saved} == {"0", "1"}


def test_compiled_joined_passes_say_what_is_done(world, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(train.logger, "propagate", True)
    caplog.set_level("INFO", logger="distil")
    config = train.parse_config(
        world.flags("bert", tmp_path / "run", tokens_per_pass=2000, compile=True)
    )
    with contextlib.suppress(InputError):  # no compiler here
        train.devices.check_device(config, torch.device("cpu"))
        assert "passes differ in shape, and are compiled for any shape" in caplog.text
