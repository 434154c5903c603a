"""What is read inside models of any family, compared with what transformers itself returns."""

import families
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distil.data.batches import prepare_clm
from distil.models.forward import attend_without_masks, recompute_activations
from distil.models.layer_readings import (
    EMBEDDINGS,
    blocks_of,
    probe,
    recording_attention,
    recording_blocks,
)
from distiller import DistillationModel
from utils import InputError

FAMILIES = [(name, True) for name in families.MASKED] + [(name, False) for name in families.CAUSAL]
BYPASSING = {"deberta-v2", "gpt_neo"}  # their attention is no function of transformers' interface
EVERY_FAMILY = pytest.mark.parametrize(
    ("model_type", "is_masked"), FAMILIES, ids=[name for name, _ in FAMILIES]
)
IDS = torch.arange(5, 9)[None]  # 4 tokens: within every family's windows


def scores_seen(attention, is_masked: bool, cap: float | None) -> torch.Tensor:
    """Return softmax(Q K' scale) by heads, of queries and keys that were read."""
    query, key = (
        getattr(attention, part).unflatten(-1, (heads, -1)).transpose(1, 2)
        for part, heads in (("query", attention.num_heads), ("key", attention.num_key_heads))
    )
    key = key.repeat_interleave(attention.num_heads // attention.num_key_heads, dim=1)
    scores = query @ key.transpose(-1, -2) * attention.scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    later = torch.ones(scores.shape[-2:]).triu(1).bool()
    return (scores if is_masked else scores.masked_fill(later, -torch.inf)).softmax(-1)


@EVERY_FAMILY
def test_attention_is_read_as_it_is_computed_or_refused(model_type, is_masked):
    model = families.tiny_model(model_type, is_masked)
    if model_type in BYPASSING:
        with pytest.raises(
            InputError, match="--alpha_rel: the attention of layer 3 of a .* cannot"
        ):
            probe(model, recording_attention, [3], "--alpha_rel")
        return
    with torch.no_grad():
        plain = model(IDS).logits
        with recording_attention(model, [0, 3]) as found:
            logits = model(IDS).logits
        assert torch.equal(plain, logits) and set(found) == {0, 3}
        model.set_attn_implementation("eager")
        expected = model(IDS, output_attentions=True).attentions
    cap = getattr(model.config, "attn_logit_softcapping", None)
    for layer, attention in found.items():
        probs = scores_seen(attention, is_masked, cap)
        torch.testing.assert_close(probs, expected[layer], rtol=1e-4, atol=1e-5)  # other kernels


@EVERY_FAMILY
def test_blocks_are_read_as_transformers_returns_them(model_type, is_masked):
    model = families.tiny_model(model_type, is_masked)
    with torch.no_grad():
        states = model.base_model(IDS, output_hidden_states=True).hidden_states
        with recording_blocks(model, [EMBEDDINGS, 0, 2]) as found:
            model(IDS)
    assert set(found) == {EMBEDDINGS, 0, 2}
    for layer, hidden in found.items():
        assert torch.equal(hidden, states[layer + 1])
    assert probe(model, recording_blocks, [EMBEDDINGS, 0, 3], "x").keys() == {EMBEDDINGS, 0, 3}


def test_nothing_is_left_behind():
    model = families.tiny_model("bert", True)
    before = dict(ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(RuntimeError), recording_attention(model, [1]), recording_blocks(model, [1]):
        raise RuntimeError
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_function_set_in_the_table_itself_is_called_and_comes_back(monkeypatch):
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    calls = []

    def counting(*arguments, **options):
        calls.append(1)
        return plain(*arguments, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = counting
    try:
        model = families.tiny_model("bert", True)
        calls.clear()
        with recording_attention(model, [1]) as found:
            model(IDS)
        assert len(calls) == families.NUM_LAYERS and set(found) == {1}
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is counting
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_layers_that_cannot_be_told_apart_are_refused():
    model = families.tiny_model("albert", True)
    assert blocks_of(model) is None
    with pytest.raises(InputError, match="--alpha_hid: the layers of a Albert.* cannot be told"):
        probe(model, recording_blocks, [0], "--alpha_hid")


def test_layers_that_are_skipped_at_random_are_refused():
    model = families.tiny_model("opt", False)
    model.config.layerdrop = 0.1
    with pytest.raises(InputError, match="with layerdrop 0.1 skips layers"):
        probe(model, recording_blocks, [0], "--alpha_hid")


# --------------------------------------------------------------------------------------------------
# The objectives on every family
# --------------------------------------------------------------------------------------------------

OPTIONS = {"relation_heads": 4, "layer_map": [(0, 1), (3, 2)], "hid_loss": "mse"}


def make_pair(model_type: str, is_masked: bool, names):
    """Make a DistillationModel of objectives, in float64 and its teacher."""
    dtype = torch.float32 if model_type == "gemma2" else torch.float64  # its own masks are float32
    pair = (families.tiny_model(model_type, is_masked, seed=seed) for seed in (1, 0))
    student, teacher = (model.to(dtype) for model in pair)
    teacher.requires_grad_(False)
    for model in (student, teacher):
        attend_without_masks(model)
    alphas = dict.fromkeys(names, 1.0)
    return DistillationModel(student, alphas, 2.0, teacher=teacher, options=OPTIONS), teacher


def losses_and_gradients(model, teacher, ids_BT, lengths_B):
    """Return the mean losses over real tokens and their gradients by the student's weights."""
    batch = prepare_clm(0, ids_BT, lengths_B, with_mask=True)
    if model.student.config.model_type in families.MASKED:
        rows = {kind: batch.rows["real"] for kind in ("real", "masked", "distilled")}
        batch = type(batch)(0, ids_BT, batch.attention_mask_BT, ids_BT, rows, batch.num_tokens)
    total, losses_K = model(batch, model.read_teacher(teacher, batch), None, 1.0)
    parameters = list(model.student.parameters())
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    return losses_K, [torch.zeros(()) if grad is None else grad for grad in grads]


@EVERY_FAMILY
def test_a_padded_batch_is_the_mean_of_its_sequences(model_type, is_masked):
    """Relations, scores, hidden states and embeddings; a longer neighbour changes nothing."""
    names = ["hid", "emb"] if model_type in BYPASSING else ["rel", "hid", "att", "emb"]
    model, teacher = make_pair(model_type, is_masked, names)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(5, 99, (2, 11), generator=generator)
    lengths = [7, 11]
    whole = losses_and_gradients(model, teacher, ids_BT, torch.tensor(lengths))
    assert (whole[0] > 0).all() and any(grad.abs().sum() > 0 for grad in whole[1])
    parts = [
        losses_and_gradients(model, teacher, ids_BT[k : k + 1, :length], torch.tensor([length]))
        for k, length in enumerate(lengths)
    ]
    shares = [length / sum(lengths) for length in lengths]
    expected = [
        sum(share * part for share, part in zip(shares, both, strict=True))
        for both in zip(*([losses, *grads] for losses, grads in parts), strict=True)
    ]
    torch.testing.assert_close(whole[0], expected[0], rtol=1e-5, atol=0)
    # Rotary embeddings and norms are float32 in any model: relative to the largest gradient.
    bound = 1e-5 * max(grad.abs().max().item() for grad in expected[1:])
    for mine, other in zip(whole[1], expected[1:], strict=True):
        torch.testing.assert_close(mine, other.expand_as(mine), rtol=0, atol=bound)


@pytest.mark.slow
@EVERY_FAMILY
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(model_type, is_masked):
    names = ["hid", "emb"] if model_type in BYPASSING else ["rel", "hid", "att", "emb"]
    student = families.tiny_model(model_type, is_masked)
    options = OPTIONS | {"layer_map": [(k, k) for k in range(4)]}
    alphas = dict.fromkeys(names, 1.0)
    model = DistillationModel(student, alphas, 2.0, teacher=student, options=options)
    ids_BT = torch.arange(5, 29).reshape(2, 12)
    losses_K, grads = losses_and_gradients(model, student, ids_BT, torch.tensor([12, 6]))
    assert (losses_K == 0).all() and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "qwen3"])
def test_recomputed_activations_give_the_same_gradients(model_type):
    is_masked = model_type in families.MASKED
    model, teacher = make_pair(model_type, is_masked, ["rel", "hid", "att", "emb"])
    given = torch.arange(5, 29).reshape(2, 12), torch.tensor([12, 6])
    expected = losses_and_gradients(model, teacher, *given)
    recompute_activations(model.student)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = losses_and_gradients(model, teacher, *given)
    for mine, other in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # raised by torch's compiler
def test_compiled_models_are_read_like_others_also_after_an_evaluation():
    """An evaluation, in which nothing is read, compiles the teacher first."""
    given = torch.arange(5, 29).reshape(2, 12), torch.tensor([12, 6])
    found = []
    for is_compiled in (False, True):
        model, teacher = make_pair("bert", True, ["rel", "hid", "att", "emb"])
        if is_compiled:
            for network in (model.student, teacher):
                network.base_model.compile(dynamic=True)
            with torch.no_grad():
                teacher.base_model(given[0])
        losses_K, grads = losses_and_gradients(model, teacher, *given)
        found.append([losses_K, *grads])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)
