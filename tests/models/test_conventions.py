"""Families without a row in ARCHITECTURES: conventions.py resolves them correctly or refuses."""

import collections
import random

import families
import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from distil.data.batches import MicroBatch, prepare_clm
from distil.models import checks, conventions, first_weights, heads, language_model
from distil.models.forward import read_outputs
from distiller import DistillationModel, Distiller
from utils import InputError

FAMILIES = [(name, True) for name in families.MASKED] + [(name, False) for name in families.CAUSAL]
each_family = pytest.mark.parametrize(
    ("model_type", "is_masked"), FAMILIES, ids=[name for name, _ in FAMILIES]
)


def ids_of(model, num_sequences: int, length: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, model.config.vocab_size, (num_sequences, length), generator=generator)


@torch.no_grad()
def logits_of(model, ids_BT: torch.Tensor) -> torch.Tensor:
    return model.eval()(ids_BT, **checks.without_cache(model)).logits


@each_family
def test_all_layers_give_the_teachers_logits(model_type, is_masked):
    teacher = families.tiny_model(model_type, is_masked)
    student = first_weights.student_of_layers(teacher, range(families.NUM_LAYERS), model_type)
    ids_BT = ids_of(teacher, 3, 20)
    assert torch.equal(logits_of(student, ids_BT), logits_of(teacher, ids_BT))
    assert {p.data_ptr() for p in student.parameters()}.isdisjoint(
        p.data_ptr() for p in teacher.parameters()
    )


@each_family
def test_chosen_layers_compute_the_same_as_in_the_teacher(model_type, is_masked):
    """The student equals a teacher in which hooks skip the layers that were left out."""
    teacher = families.tiny_model(model_type, is_masked)
    student = first_weights.student_of_layers(teacher, [0, 2], model_type)
    (path,) = conventions.layer_lists(teacher, model_type)
    ids_BT = ids_of(teacher, 2, 20)
    for layer in (1, 3):
        teacher.get_submodule(path)[layer].register_forward_hook(skip_layer, with_kwargs=True)
    expected = logits_of(teacher, ids_BT)
    torch.testing.assert_close(logits_of(student, ids_BT), expected, rtol=1e-4, atol=1e-5)


def skip_layer(module, given, options, output):
    """Replace a layer's output hidden states by its input."""
    hidden = given[0] if given else options["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@each_family
def test_the_head_gives_the_models_logits(model_type, is_masked):
    model = families.tiny_model(model_type, is_masked)
    head, ids_BT = heads.prediction_head(model), ids_of(model, 2, 12)
    with torch.no_grad():
        options = checks.without_cache(model.base_model)
        hidden_BTD = model.base_model(ids_BT, **options).last_hidden_state
        logits_NV = logits_of(model, ids_BT).flatten(0, 1)
        torch.testing.assert_close(head(hidden_BTD.flatten(0, 1)), logits_NV, rtol=1e-5, atol=1e-5)
        if hasattr(head, "projection"):
            split_NV = head.projection(head.transform(hidden_BTD.flatten(0, 1)))
            torch.testing.assert_close(split_NV, logits_NV, rtol=1e-5, atol=1e-5)
    assert hasattr(head, "projection") == (model_type != "gemma2")  # whose logits are capped


def masked_batch(ids_BT: torch.Tensor, lengths: list[int]) -> MicroBatch:
    real_BT = torch.arange(ids_BT.shape[1]) < torch.tensor(lengths)[:, None]
    places = real_BT.flatten().nonzero()[:, 0]
    labels_BT = torch.where(real_BT, ids_BT, -100)
    rows = {"real": places, "masked": places, "distilled": places}
    return MicroBatch(0, ids_BT, real_BT.long(), labels_BT, rows, len(places))


@each_family
def test_a_padded_batch_gives_the_losses_of_its_sequences_one_by_one(model_type, is_masked):
    teacher, student = (families.tiny_model(model_type, is_masked, seed=seed) for seed in (0, 1))
    lengths, pad = [14, 6, 9], teacher.config.pad_token_id
    ids_BT = ids_of(teacher, 3, 14)
    ids_BT[torch.arange(14) >= torch.tensor(lengths)[:, None]] = pad
    losses = {"ce": 1.0, "cos": 1.0, **({"mlm": 1.0} if is_masked else {"clm": 1.0})}
    model = DistillationModel(student, losses, 2.0)
    teacher_head = heads.prediction_head(teacher)

    def sums(ids_BT, lengths) -> torch.Tensor:
        if is_masked:
            batch = masked_batch(ids_BT, lengths)
        else:
            batch = prepare_clm(0, ids_BT, torch.tensor(lengths), with_mask=True)
        counts_K = torch.ones(len(losses))
        with torch.no_grad():
            teacher_read = read_outputs(teacher, batch, model.readings)
        return model(batch, teacher_read, teacher_head, 1.0, counts_K)[1].detach()

    alone = sum(sums(ids_BT[k : k + 1, :length], [length]) for k, length in enumerate(lengths))
    torch.testing.assert_close(sums(ids_BT, lengths), alone, rtol=1e-4, atol=1e-4)


def test_a_teacher_whose_logits_are_capped_teaches_a_student_with_a_plain_head():
    """Gemma-2's head is more than layers and one linear map: both use the slower head."""
    teacher, student = (families.tiny_model(name, False) for name in ("gemma2", "qwen2"))
    model = DistillationModel(student, {"ce": 1.0}, 2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    distiller = Distiller(model, teacher, optimizer, None, max_grad_norm=1.0, seed=1)
    ids_BT = ids_of(teacher, 2, 20)
    batch = prepare_clm(0, ids_BT, torch.tensor([20, 20]))
    (losses_K,) = distiller.accumulate([batch], [0], 1)
    rows_NV = [(logits_of(m, ids_BT).flatten(0, 1).double() / 2) for m in (teacher, student)]
    p_NV, log_q_NV = rows_NV[0].softmax(-1), rows_NV[1].log_softmax(-1)
    expected = 4 * (p_NV * (p_NV.log() - log_q_NV)).sum(-1).mean()
    torch.testing.assert_close(losses_K[1], expected, rtol=1e-4, atol=1e-5)


@each_family
def test_base_model_and_head_give_the_gradients_of_the_whole_model(model_type, is_masked):
    """The update runs base model and head separately; compare with the model's own forward."""
    model = families.tiny_model(model_type, is_masked)
    head, ids_BT = heads.prediction_head(model), ids_of(model, 1, 10)

    def separate_logits() -> torch.Tensor:
        options = checks.without_cache(model.base_model)
        return head(model.base_model(ids_BT, **options).last_hidden_state[0])

    def own_logits() -> torch.Tensor:
        return model(ids_BT, **checks.without_cache(model)).logits[0]

    found = []
    for logits in (separate_logits, own_logits):
        model.zero_grad()
        logits().square().mean().backward()
        named = model.named_parameters()
        found.append({name: p.grad.clone() for name, p in named if p.grad is not None})
    assert set(found[0]) == set(found[1]) and len(found[0]) > 4 * families.NUM_LAYERS
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_configuration_entries_by_layer_follow_the_layers():
    config = families.tiny_config("qwen2", 99)
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    shallow = conventions.config_with_layers(config, [0, 3], "x")
    assert shallow.layer_types == ["full_attention", "sliding_attention"]
    neo = conventions.config_with_layers(families.tiny_config("gpt_neo", 99), [1, 2, 3], "x")
    assert neo.attention_layers == ["local", "global", "local"]


def test_students_of_a_large_teacher_hold_evenly_spaced_layers():
    config = families.tiny_config("roberta", 99)
    config.num_hidden_layers = 24
    torch.manual_seed(0)
    teacher = transformers.RobertaForMaskedLM(config).eval()
    for num_layers, expected in {
        12: [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23],
        6: [0, 4, 8, 13, 17, 23],
        3: [0, 12, 23],
    }.items():
        layers = first_weights.evenly_spaced_layers(24, num_layers)
        student = first_weights.student_of_layers(teacher, layers, "x")
        assert layers == expected and len(student.roberta.encoder.layer) == num_layers
        for new, old in enumerate(layers):
            copied = student.roberta.encoder.layer[new].parameters()
            pairs = zip(copied, teacher.roberta.encoder.layer[old].parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


# --------------------------------------------------------------------------------------------------
# Refused models
# --------------------------------------------------------------------------------------------------


def resolve(model_type: str, is_masked: bool):
    config = transformers.AutoConfig.for_model(model_type)
    return language_model.resolve_architecture(config, is_masked, "--teacher x")


NO_LLAMA = "no masked language model of type llama; it has a causal one, leave --mlm out"
NO_MODERNBERT = "no causal language model of type modernbert; it has a masked one, add --mlm"


@pytest.mark.parametrize(
    ("model_type", "is_masked", "message"),
    [
        ("bart", True, "bart is an encoder-decoder"),
        ("vit", True, "no masked language model of type vit; take a masked or causal"),
        ("llama", True, NO_LLAMA),
        ("modernbert", False, NO_MODERNBERT),
    ],
)
def test_models_of_another_kind_are_refused(model_type, is_masked, message):
    with pytest.raises(InputError, match=message):
        resolve(model_type, is_masked)


def test_a_bert_is_refused_as_a_causal_model():
    model = families.tiny_model("bert", False)
    with pytest.raises(InputError, match="it attends to later tokens"):
        conventions.check_conventions(model, False, "--teacher_name x")


def test_a_model_whose_logits_depend_on_padding_is_refused():
    model = families.tiny_model("convbert", True)
    with pytest.raises(InputError, match="padding changes"):
        conventions.check_conventions(model, True, "--teacher_name x")


def test_shared_layers_are_refused():
    with pytest.raises(InputError, match="has no list of layers"):
        first_weights.student_of_layers(families.tiny_model("albert", True), [0], "--teacher x")


def test_layers_with_other_parameters_are_refused():
    """Hybrid models such as OLMo-hybrid mix kinds of layers; here one has no experts."""
    model = families.tiny_model("mixtral", False)
    model.model.layers[3].mlp = torch.nn.Linear(32, 32)
    with pytest.raises(InputError, match="do not fit their places in the student"):
        first_weights.student_of_layers(model, [0, 3], "--teacher x")


def test_layers_of_other_sizes_are_refused_with_a_head_that_depends_on_their_number():
    """ESM's contact head depends on the number of layers, which alone is admitted."""
    model = families.tiny_model("esm", True)
    model.esm.encoder.layer[3].intermediate.dense = torch.nn.Linear(32, 40)
    with pytest.raises(InputError, match="do not fit their places in the student"):
        first_weights.student_of_layers(model, [0, 3], "--teacher x")


def test_layers_that_compute_with_their_number_are_refused():
    """GPT-2's scale_attn_by_inverse_layer_idx divides attention by the layer's number."""
    config = families.tiny_config("gpt2", 99)
    config.scale_attn_by_inverse_layer_idx = True
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    with pytest.raises(InputError, match="compute something else in the student"):
        first_weights.student_of_layers(model, [0, 3], "--teacher x")


@pytest.mark.parametrize("layers", [[4], [-1], []])
def test_absent_layers_are_refused(layers):
    with pytest.raises(InputError, match=r"--layers: .* has layers 0 to 3"):
        first_weights.student_of_layers(families.tiny_model("llama", False), layers, "--teacher x")


# --------------------------------------------------------------------------------------------------
# Families drawn at random
# --------------------------------------------------------------------------------------------------


LARGEST_TINY = 10**6  # parameters; some families name their sizes differently and stay large
NUM_BUILT = 10


def families_at_random(is_masked: bool) -> list[str]:
    """Shuffle the families that families.py does not name."""
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    names = set(masked if is_masked else causal) - set(families.MASKED) - set(families.CAUSAL)
    return random.Random(20261126).sample(sorted(names), len(names))


def is_small(model_type: str, is_masked: bool) -> bool:
    """Test whether a family can be built with our sizes. Raises anything where it cannot."""
    with torch.device("meta"):
        config = families.tiny_config(model_type, 99)
        skeleton = families.auto_class(is_masked).from_config(config)
    return sum(parameter.numel() for parameter in skeleton.parameters()) <= LARGEST_TINY


def outcome_of(model_type: str, is_masked: bool) -> str:
    """Return "not built" (by transformers), "refused", "works", or "wrong" (works and differs)."""
    try:
        if not is_small(model_type, is_masked):
            return "not built"
        model = families.tiny_model(model_type, is_masked)
    except Exception:  # the family does not support our sizes
        return "not built"
    try:
        row = language_model.resolve_architecture(model.config, is_masked, model_type)
        conventions.check_conventions(model, is_masked, model_type)
        student = first_weights.student_of_layers(model, [0, families.NUM_LAYERS - 1], model_type)
        whole = first_weights.student_of_layers(model, range(families.NUM_LAYERS), model_type)
    except InputError as error:
        text = str(error)
        is_one_line = text.startswith((model_type, "--layers")) and "\n" not in text
        return "refused" if is_one_line else "wrong"
    ids_BT = ids_of(model, 2, 16)
    pairs = [(logits_of(whole, ids_BT), logits_of(model, ids_BT))]
    head = heads.prediction_head(student.eval())
    with torch.no_grad():
        options = checks.without_cache(student.base_model)
        hidden_BTD = student.base_model(ids_BT, **options).last_hidden_state
        pairs.append((head(hidden_BTD.flatten(0, 1)), logits_of(student, ids_BT).flatten(0, 1)))
    is_right = all(checks.is_close(a, b) for a, b in pairs) and row.is_masked == is_masked
    return "works" if is_right else "wrong"


@pytest.mark.slow
@pytest.mark.parametrize("is_masked", [True, False], ids=["masked", "causal"])
@pytest.mark.filterwarnings("ignore")
def test_families_drawn_at_random_work_or_are_refused(is_masked, capsys):
    outcomes, names = {}, iter(families_at_random(is_masked))
    while sum(outcome != "not built" for outcome in outcomes.values()) < NUM_BUILT:
        name = next(names)
        outcomes[name] = outcome_of(name, is_masked)
    counts = collections.Counter(outcomes.values())
    with capsys.disabled():
        kind = "masked" if is_masked else "causal"
        print(f"\n{kind} families drawn at random: {dict(counts)}: {outcomes}")
    assert counts["wrong"] == 0, outcomes
    assert counts["works"] >= NUM_BUILT // 2, outcomes
