"""Any teacher: what conventions.py finds out about families that have no row, and that what it
takes for true is true.
"""

import collections
import random

import families
import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from distil.data.batches import MicroBatch, prepare_clm
from distil.models import checks, conventions, first_weights, heads, language_model
from distil.models.forward import last_hidden_state
from distiller import DistillationModel
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
def test_half_of_the_layers_compute_what_they_compute_in_the_teacher(model_type, is_masked):
    """Hooks feed each kept layer's output, as the teacher computes it from the same input, to the
    next one kept.
    """
    teacher = families.tiny_model(model_type, is_masked)
    student = first_weights.student_of_layers(teacher, [0, 2], model_type)
    (path,) = conventions.layer_lists(teacher, model_type)
    ids_BT = ids_of(teacher, 2, 20)
    expected = []
    for hop in (teacher.get_submodule(path)[1], teacher.get_submodule(path)[3]):
        hop.register_forward_hook(
            lambda module, given, options, output: pass_on(given, options, output), with_kwargs=True
        )
    expected = logits_of(teacher, ids_BT)
    torch.testing.assert_close(logits_of(student, ids_BT), expected, rtol=1e-4, atol=1e-5)


def pass_on(given, options, output):
    """Replace a layer's hidden states by those that it was given."""
    hidden = given[0] if given else options["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@each_family
def test_the_head_gives_the_models_logits(model_type, is_masked):
    model = families.tiny_model(model_type, is_masked)
    head, ids_BT = heads.prediction_head(model), ids_of(model, 2, 12)
    with torch.no_grad():
        hidden_BTD = model.base_model(
            ids_BT, **checks.without_cache(model.base_model)
        ).last_hidden_state
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
    return MicroBatch(
        0,
        ids_BT,
        real_BT.long(),
        labels_BT,
        {"real": places, "masked": places, "distilled": places},
        len(places),
    )


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
        batch = (
            masked_batch(ids_BT, lengths)
            if is_masked
            else prepare_clm(0, ids_BT, torch.tensor(lengths), with_mask=True)
        )
        counts_K = torch.ones(len(losses))
        with torch.no_grad():
            hidden_BTD = last_hidden_state(teacher, batch)
        return model(batch, hidden_BTD, teacher_head, 1.0, counts_K)[1].detach()

    alone = sum(sums(ids_BT[k : k + 1, :length], [length]) for k, length in enumerate(lengths))
    torch.testing.assert_close(sums(ids_BT, lengths), alone, rtol=1e-4, atol=1e-4)


@each_family
def test_every_parameter_of_the_language_model_gets_the_models_own_gradient(model_type, is_masked):
    """Through base model and head apart, as the step goes, and through the model's own forward."""
    model = families.tiny_model(model_type, is_masked)
    head, ids_BT = heads.prediction_head(model), ids_of(model, 1, 10)
    found = []
    for logits in (
        lambda: head(
            model.base_model(ids_BT, **checks.without_cache(model.base_model)).last_hidden_state[0]
        ),
        lambda: model(ids_BT, **checks.without_cache(model)).logits[0],
    ):
        model.zero_grad()
        logits().square().mean().backward()
        found.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
    assert set(found[0]) == set(found[1]) and len(found[0]) > 4 * families.NUM_LAYERS
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_what_is_listed_by_layer_goes_with_the_layers():
    config = families.tiny_config("qwen2", 99)
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert conventions.config_with_layers(config, [0, 3], "x").layer_types == [
        "full_attention",
        "sliding_attention",
    ]
    neo = conventions.config_with_layers(families.tiny_config("gpt_neo", 99), [1, 2, 3], "x")
    assert neo.attention_layers == ["local", "global", "local"]


def test_deeper_students_of_a_large_teacher():
    config = families.tiny_config("roberta", 99)
    config.num_hidden_layers = 24
    torch.manual_seed(0)
    teacher = transformers.RobertaForMaskedLM(config).eval()
    for num_layers, expected in {
        12: [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23],
        6: [0, 5, 9, 14, 18, 23],
        3: [0, 12, 23],
    }.items():
        layers = first_weights.evenly_spaced_layers(24, num_layers)
        student = first_weights.student_of_layers(teacher, layers, "x")
        assert layers == expected and len(student.roberta.encoder.layer) == num_layers
        for new, old in enumerate(layers):
            pairs = zip(
                student.roberta.encoder.layer[new].parameters(),
                teacher.roberta.encoder.layer[old].parameters(),
                strict=True,
            )
            assert all(torch.equal(a, b) for a, b in pairs)


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------


def found_out(model_type: str, is_masked: bool):
    return language_model.resolve_architecture(
        transformers.AutoConfig.for_model(model_type), is_masked, "--teacher x"
    )


@pytest.mark.parametrize(
    ("model_type", "is_masked", "message"),
    [
        ("bart", True, "bart is an encoder-decoder"),
        ("vit", True, "no masked language model of type vit; take a masked or causal"),
        (
            "llama",
            True,
            "no masked language model of type llama; it has a causal one, leave --mlm out",
        ),
        (
            "modernbert",
            False,
            "no causal language model of type modernbert; it has a masked one, add --mlm",
        ),
    ],
)
def test_models_of_another_kind_are_refused(model_type, is_masked, message):
    with pytest.raises(InputError, match=message):
        found_out(model_type, is_masked)


def test_a_bert_is_no_causal_model():
    model = families.tiny_model("bert", False)
    with pytest.raises(InputError, match="it sees the tokens that come"):
        conventions.check_conventions(model, False, "--teacher_name x")


def test_a_model_that_padding_changes_is_refused():
    model = families.tiny_model("convbert", True)
    with pytest.raises(InputError, match="padding changes"):
        conventions.check_conventions(model, True, "--teacher_name x")


def test_shared_layers_cant_be_taken_apart():
    with pytest.raises(InputError, match="has no list of layers"):
        first_weights.student_of_layers(families.tiny_model("albert", True), [0], "--teacher x")


def test_layers_of_other_kinds_are_refused():
    """OLMo-hybrid and the like have layers with other parameters; here a dense layer stands where
    experts belong.
    """
    model = families.tiny_model("mixtral", False)
    model.model.layers[3].mlp = torch.nn.Linear(32, 32)
    with pytest.raises(InputError, match="can't stand in other places"):
        first_weights.student_of_layers(model, [0, 3], "--teacher x")


def test_layers_of_other_sizes_are_refused_where_something_else_depends_on_their_number():
    """ESM's contact head does, and stays as it is."""
    model = families.tiny_model("esm", True)
    model.esm.encoder.layer[3].intermediate.dense = torch.nn.Linear(32, 40)
    with pytest.raises(InputError, match="can't stand in other places"):
        first_weights.student_of_layers(model, [0, 3], "--teacher x")


def test_a_layer_that_knows_its_number_is_refused():
    """GPT-2's scale_attn_by_inverse_layer_idx divides by the layer's number: it computes something
    else in another place.
    """
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
def test_layers_that_are_not_there(layers):
    with pytest.raises(InputError, match=r"--layers: .* has layers 0 to 3"):
        first_weights.student_of_layers(families.tiny_model("llama", False), layers, "--teacher x")


# --------------------------------------------------------------------------------------------------
# Farthest from home
# --------------------------------------------------------------------------------------------------


LARGEST_TINY = 10**6  # parameters; some families have sizes of their own names


NUM_BUILT = 10


def families_at_random(is_masked: bool) -> list[str]:
    """Shuffle the families that nobody named."""
    names = (
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if is_masked
        else modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ).keys()
    unnamed = sorted(set(names) - set(families.MASKED) - set(families.CAUSAL))
    return random.Random(20261126).sample(unnamed, len(unnamed))


def outcome_of(model_type: str, is_masked: bool) -> str:
    """Say what becomes of a family: not built (by the library), refused, works; wrong where it
    works and differs.
    """
    try:
        auto_class = (
            transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM
        )
        with torch.device("meta"):
            num_parameters = sum(
                p.numel()
                for p in auto_class.from_config(families.tiny_config(model_type, 99)).parameters()
            )
        if num_parameters > LARGEST_TINY:
            return "not built"
        model = families.tiny_model(model_type, is_masked)
    except Exception:  # sizes that go together with no tiny one
        return "not built"
    try:
        row = language_model.resolve_architecture(model.config, is_masked, model_type)
        conventions.check_conventions(model, is_masked, model_type)
        student = first_weights.student_of_layers(model, [0, families.NUM_LAYERS - 1], model_type)
        whole = first_weights.student_of_layers(model, range(families.NUM_LAYERS), model_type)
    except InputError as error:
        return (
            "refused"
            if str(error).startswith((model_type, "--layers")) and "\n" not in str(error)
            else "wrong"
        )
    ids_BT = ids_of(model, 2, 16)
    pairs = [(logits_of(whole, ids_BT), logits_of(model, ids_BT))]
    head = heads.prediction_head(student.eval())
    with torch.no_grad():
        hidden_BTD = student.base_model(
            ids_BT, **checks.without_cache(student.base_model)
        ).last_hidden_state
        pairs.append((head(hidden_BTD.flatten(0, 1)), logits_of(student, ids_BT).flatten(0, 1)))
    is_right = all(checks.is_close(a, b) for a, b in pairs) and row.is_masked == is_masked
    return "works" if is_right else "wrong"


@pytest.mark.slow
@pytest.mark.parametrize("is_masked", [True, False], ids=["masked", "causal"])
@pytest.mark.filterwarnings("ignore")
def test_families_that_nobody_named_work_or_are_refused(is_masked, capsys):
    outcomes, names = {}, iter(families_at_random(is_masked))
    while sum(outcome != "not built" for outcome in outcomes.values()) < NUM_BUILT:
        name = next(names)
        outcomes[name] = outcome_of(name, is_masked)
    counts = collections.Counter(outcomes.values())
    with capsys.disabled():
        print(
            f"\nfarthest from home, {'masked' if is_masked else 'causal'}: {dict(counts)}:"
            f" {outcomes}"
        )
    assert counts["wrong"] == 0, outcomes
    assert counts["works"] >= NUM_BUILT // 2, outcomes
