"""Two ranks train what one does, whatever parameters get no gradient, for any family."""

import collections
import json

import families
import pytest
import torch
from conftest import run_process
from stand_ins import ROOT
from test_distributed import TORCHRUN, check
from whole_runs import masked_flags

import train

TRAIN, WORKER = ROOT / "train.py", ROOT / "tests" / "system" / "family_worker.py"


def test_two_ranks_train_a_model_with_unused_parameters_as_one_does(teachers, text_file, tmp_path):
    teacher = families.make_teacher(tmp_path / "esm", "esm", True, teachers)
    flags = masked_flags(tmp_path, teacher, text_file, max_steps=3, weight_decay=0.1)
    alone = ["--dump_path", str(tmp_path / "one"), "--gradient_accumulation_steps", "4"]
    train.main([*flags, *alone])
    two = run_process(*TORCHRUN, 2, TRAIN, *flags, "--dump_path", tmp_path / "two")
    check(two)
    names = "esm.contact_head.regression.weight, esm.contact_head.regression.bias."
    text = "2 parameters get no gradient from this run's losses and are frozen: "
    assert two.stderr.count(text + names) == 1  # the main rank alone says it
    states = [
        torch.load(tmp_path / run / "pytorch_model.bin", weights_only=True)
        for run in ("one", "two")
    ]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        # float32 sums in another order, then Adam, which divides by the gradient's own size
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=2e-5)
    kept = families.auto_class(True).from_pretrained(teacher).esm.contact_head.regression.weight
    assert torch.equal(states[1]["esm.contact_head.regression.weight"], kept)


# --------------------------------------------------------------------------------------------------
# Families
# --------------------------------------------------------------------------------------------------

# Drawn by the test of families that nobody named in tests/models/test_conventions.py, and all
# others that are known to leave parameters out, always or by chance.
BY_CHANCE = [f"{name}:causal+layerdrop" for name in ("opt", "xglm", "biogpt")]
KNOWN = ["squeezebert", "esm", "layoutlm", "big_bird", "luke", "longformer", "ibert"]
OBJECTIVES = {
    "logits and hidden states": {"ce": 1.0, "cos": 1.0},
    "hidden states alone": {"cos": 1.0},
}


def drawn_families() -> list[str]:
    """List the families that the test of conventions draws, without those that are not built."""
    from test_conventions import NUM_BUILT, families_at_random, outcome_of

    found = []
    for is_masked, kind in ((True, "masked"), (False, "causal")):
        names = (
            n for n in families_at_random(is_masked) if outcome_of(n, is_masked) != "not built"
        )
        found += [f"{name}:{kind}" for name, _ in zip(names, range(NUM_BUILT), strict=False)]
    return found


@pytest.mark.long
@pytest.mark.parametrize("objectives", OBJECTIVES)
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_train_any_family_as_one_does_or_refuse_it(
    objectives, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(ROOT / "tests" / "models")
    names = [*drawn_families(), *BY_CHANCE, *(f"{name}:masked" for name in KNOWN)]
    alphas, names = json.dumps(OBJECTIVES[objectives]), list(dict.fromkeys(names))
    output = tmp_path / "found"
    check(run_process(*TORCHRUN, 2, WORKER, output, alphas, *names, timeout_s=900))
    ranks = [json.loads((tmp_path / f"found.{rank}").read_text()) for rank in range(2)]
    with capsys.disabled():
        for found in ranks[:1]:
            counts = collections.Counter(outcome for outcome, _ in found.values())
            print(f"\n{objectives}: {dict(counts)}")
            print("\n".join(f"  {name}: {' '.join(what)[:120]}" for name, what in found.items()))
    for found in ranks:
        outcomes = {name: outcome for name, (outcome, _) in found.items()}
        assert list(found) == names and "wrong" not in outcomes.values(), found
        assert all(outcomes[name] == "works" for name in BY_CHANCE)
        assert outcomes["ibert:masked"] == "refused", "its buffers change in training"
