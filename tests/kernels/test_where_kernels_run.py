"""The CPU kernels serve fine-tuning, scoring and evaluation, and change no result but dropout."""

import contextlib
import copy
import types

import pytest
import torch
import transformers

from distil import evaluation
from distil.evaluation import measure, next_tokens, reader_of
from distil.kernels import cpu
from distil.kernels.cpu import faster_for
from distil.tasks import fine_tuning, label_order, squad_training
from distil.tasks.features import collator

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "vocab_size": 50, "max_position_embeddings": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """Count the products that run in oneDNN by this project's kernels."""
    counted, kept = [], cpu._product

    def product(*arguments):
        counted.append(1)
        return kept(*arguments)

    monkeypatch.setattr(cpu, "_product", product)
    monkeypatch.setattr(cpu, "MKL_IS_FASTER", False)
    return counted


def classifier(**changes) -> transformers.BertForSequenceClassification:
    torch.manual_seed(3)
    config = transformers.BertConfig(**SIZES, num_labels=3, **changes)
    return transformers.BertForSequenceClassification(config)


def examples(num: int = 6) -> list[dict]:
    ids_BT = torch.randint(5, 50, (num, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row.tolist(), "labels": k % 3} for k, row in enumerate(ids_BT)]


def trainer_of(model, tmp_path, **options) -> fine_tuning.Trainer:
    sizes = {"batch_size": 3, "eval_batch_size": 3, "use_cpu": True, "num_train_epochs": 1}
    arguments = fine_tuning.training_arguments(tmp_path, seed=1, **sizes)
    parts = {"args": arguments, "train_dataset": examples(), "data_collator": collator(0)}
    return fine_tuning.Trainer(distance="classes", model=model, **parts, **options)


def test_every_product_of_a_fine_tuning_step_runs_in_the_kernels(products, tmp_path):
    """12 linear maps and a pooler and classifier: forward, and twice in backward."""
    trainer = trainer_of(classifier(), tmp_path)
    trainer.train()
    num_linear, num_updates = 6 * SIZES["num_hidden_layers"] + 2, 2
    # The first map's input is an embedding's output, which gets a gradient, too.
    assert len(products) == 3 * num_linear * num_updates
    products.clear()
    trainer.predict(examples())
    assert len(products) == num_linear * 2


def test_fine_tuning_without_dropout_gives_torchs_weights(tmp_path, monkeypatch):
    """Two updates of student and teacher: only the order of float32 sums differs."""
    teacher = classifier(initializer_range=0.2, **NO_DROPOUT).eval()
    students = {}
    for name in ("kernels", "torch"):
        if name == "torch":
            empty = lambda *_: contextlib.nullcontext()  # noqa: E731
            monkeypatch.setattr(fine_tuning, "faster_for", empty)
        options = {"teacher": copy.deepcopy(teacher), "alpha_task": 0.5, "alpha_ce": 0.5}
        trainer = trainer_of(classifier(**NO_DROPOUT), tmp_path / name, **options)
        trainer.train()
        students[name] = trainer.model.state_dict()
    for name, tensor in students["kernels"].items():
        # Adam divides by the gradient's own size; the rate is 5e-5.
        torch.testing.assert_close(tensor, students["torch"][name], rtol=0, atol=5e-6)


def test_teachers_are_measured_in_the_kernels(products):
    model = classifier().eval()
    args = types.SimpleNamespace(per_gpu_eval_batch_size=3, no_cuda=True)
    tokenizer = types.SimpleNamespace(pad_token_id=0)
    task = types.SimpleNamespace(head="classes")
    plan = types.SimpleNamespace(args=args, tokenizer=tokenizer, teacher=model, task=task)
    assert len(label_order.outputs_of_teacher(plan, examples())) == 6 and products
    products.clear()
    torch.manual_seed(0)
    spans = transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES)).eval()
    arguments = types.SimpleNamespace(per_device_eval_batch_size=2, device="cpu")
    items = [{**one, "start_positions": 1, "end_positions": 2} for one in examples()]
    items = [{k: torch.tensor(v) for k, v in one.items() if k != "labels"} for one in items]
    collate = transformers.default_data_collator
    trainer = types.SimpleNamespace(args=arguments, data_collator=collate, teacher=spans)
    found_N2, truth_N2 = squad_training.spans_of_teacher(trainer, items)
    assert found_N2.shape == (6, 2) and truth_N2.tolist() == [[1, 2]] * 6 and products


def gpt2() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 60, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def test_held_out_figures_are_computed_in_the_kernels(products, monkeypatch):
    model, ids_BT = gpt2(), torch.arange(48).view(4, 12)
    batches = next_tokens(0, ids_BT, torch.full((4,), 12))
    found = measure(reader_of(model), None, batches)
    assert products
    monkeypatch.setattr(evaluation, "faster_for", lambda *_: contextlib.nullcontext())
    products.clear()
    torch.testing.assert_close(measure(reader_of(model), None, batches), found)
    assert not products


def test_mixed_precision_casts_a_weight_once_a_measurement():
    """Within one context autocast keeps the cast weights; each of them is 132 MB for BERT-base."""
    model, casts = gpt2(), []
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
            if function is torch.ops.aten._to_copy.default:
                casts.append(arguments[0].data_ptr())
            return function(*arguments, **(options or {}))

    batches = next_tokens(0, torch.arange(48).view(4, 12), torch.full((4,), 12)) * 3
    with Casts():
        measure(reader_of(model, amp_dtype=torch.bfloat16), None, batches)
    of_weights = [place for place in casts if place in weights]
    assert model.lm_head.weight.data_ptr() in of_weights and len(of_weights) > 8
    assert len(of_weights) == len(set(of_weights))


def test_compiled_models_and_other_devices_are_left_alone():
    on_cpu, elsewhere, compiled = gpt2(), gpt2().to("meta"), gpt2()
    compiled.base_model.compile(backend="eager")
    empty = contextlib.nullcontext
    assert not isinstance(faster_for(on_cpu, None), empty)
    assert isinstance(faster_for(on_cpu, elsewhere), empty)
    assert isinstance(faster_for(compiled), empty)
