"""Model FLOPs against torch's count of a forward pass, and the peak; no speed is asserted."""

import dataclasses

import families
import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from distil import flops
from distil.flops import ModelSize

FAMILIES = [
    *((name, True) for name in families.MASKED),
    *((name, False) for name in families.CAUSAL),
]


def ids(length: int) -> torch.Tensor:
    return torch.arange(5, 5 + length)[None]


def counted(model, token_ids_BT: torch.Tensor) -> int:
    """Let torch count a forward pass, with the attention's products one by one."""
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(token_ids_BT)
    return counter.get_total_flops()


@pytest.mark.parametrize(("model_type", "is_masked"), FAMILIES)
@pytest.mark.parametrize("length", [12, 60])
def test_a_forward_pass_is_what_torch_counts(model_type, is_masked, length):
    model = families.tiny_model(model_type, is_masked)
    size = flops.shown_size(model, ids(length))
    assert size is not None and size == flops.size_of(model)
    assert size.forward_flops(np.array([length])) == pytest.approx(
        counted(model, ids(length)), rel=0.01
    )


def test_heads_wider_than_the_hidden_states_are_counted_so():
    config = families.tiny_config("qwen3", 99)
    config.head_dim = 24  # 4 heads of 24 over hidden states of 32, keys and values of 2 heads
    model = transformers.AutoModelForCausalLM.from_config(config)
    size = flops.shown_size(model, ids(60))
    assert size.attention_width == 96
    assert size.forward_flops(np.array([60])) == pytest.approx(counted(model, ids(60)), rel=0.01)


def test_a_pooler_is_left_out_for_it_reads_one_token():
    model = families.tiny_model("bert", True)
    expected = flops.size_of(model)
    model.bert = transformers.BertModel(model.config, add_pooling_layer=True)
    assert model.bert.pooler is not None and flops.shown_size(model, ids(60)) == expected
    assert expected.forward_flops(np.array([60])) == pytest.approx(
        counted(model, ids(60)), rel=0.01
    )


# Layers used twice; tokens that go to some of the experts; positions that have products of their
# own; no attention at all.
UNKNOWN = {
    "albert": (True, {}),
    "mixtral": (False, {}),
    "deberta-v2": (True, {"relative_attention": True, "pos_att_type": ["c2p"]}),
    "mamba": (False, {}),
    "fnet": (True, {}),
}


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_what_can_not_be_counted_has_no_figure(model_type):
    is_masked, entries = UNKNOWN[model_type]
    config = families.tiny_config(model_type, 99)
    for name, value in entries.items():
        setattr(config, name, value)
    auto_class = (
        transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM
    )
    model = auto_class.from_config(config).train()
    assert flops.shown_size(model, ids(20)) is None and model.training


class Lacking:
    """A configuration without one entry."""

    def __init__(self, config, entry: str | None):
        self.config, self.entry = config, entry

    def __getattr__(self, name: str):
        if name == self.entry:
            raise AttributeError(name)
        return getattr(self.config, name)


@pytest.mark.parametrize("entry", ["hidden_size", "num_attention_heads", "num_hidden_layers", None])
def test_a_configuration_without_sizes_has_no_figure(entry):
    config = families.tiny_config("phi", 99)  # which names no width of a head
    model = transformers.AutoModelForCausalLM.from_config(config)
    config = Lacking(config, entry)
    model.config.get_text_config = lambda *_arguments, **_options: config
    assert (flops.shown_size(model, ids(20)) is None) == (entry is not None)


def test_an_update_is_counted_by_hand():
    teacher, student = ModelSize(1000, 70, 4, 16), ModelSize(500, 50, 2, 8)
    lengths_B = np.array([10, 20], dtype=np.int32)
    of_teacher = 2 * 30 * 1070 + 4 * 16 * 4 * 500
    of_student = 2 * 30 * 550 + 4 * 8 * 2 * 500
    assert flops.update_flops(teacher, student, lengths_B) == of_teacher + 3 * of_student
    assert flops.update_flops(None, student, lengths_B) == 3 * of_student
    some = (2 * 30 * 1000 + 2 * 5 * 70 + 4 * 16 * 4 * 500) + 3 * (
        2 * 30 * 500 + 2 * 5 * 50 + 4 * 8 * 2 * 500
    )
    assert flops.update_flops(teacher, student, lengths_B, num_head_rows=5) == some
    assert (
        flops.update_flops(dataclasses.replace(teacher, in_head=0), student, lengths_B)
        == of_teacher - 60 * 70 + 3 * of_student
    )


def test_lengths_of_few_bits_do_not_overflow():
    lengths_B = np.array([512] * 9, dtype=np.uint16)
    assert ModelSize(0, 0, 1, 1).forward_flops(lengths_B) == 4 * 9 * 512**2


# --------------------------------------------------------------------------------------------------
# The peak
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", flops.DTYPES)
def test_only_devices_with_a_data_sheet_have_a_peak(precision, monkeypatch):
    dtype = flops.DTYPES[precision]
    assert flops.peak_flops(torch.device("cpu"), dtype) is None
    for name, half, single in (("NVIDIA H200", 989e12, 67e12), ("NVIDIA of tomorrow", None, None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found = flops.peak_flops(torch.device("cuda"), dtype)
        assert found == (single if precision == "fp32" else half)


@pytest.mark.parametrize(
    ("dtype", "own_s", "expected_s"),
    [
        (torch.float32, 0.5, 0.5),
        (torch.float32, 3.0, 2.0),
        (torch.bfloat16, 0.5, 2.0),
        (torch.float64, 0.5, 2.0),
    ],
)
def test_a_product_is_as_fast_as_the_faster_way_of_the_step(dtype, own_s, expected_s, monkeypatch):
    """On a clock that only products move: torch's takes 2 s, the step's float32 product own_s."""
    now = [0.0]

    def taking(function, seconds):
        def slow(*arguments, **options):
            now[0] += seconds
            return function(*arguments, **options)

        return slow

    monkeypatch.setattr(torch, "matmul", taking(torch.matmul, 2.0))
    monkeypatch.setattr(flops.cpu, "linear", taking(flops.cpu.linear, own_s))
    monkeypatch.setattr(flops, "clock_s", lambda device: now[0])
    left = torch.ones(8, 8, dtype=dtype)
    assert flops.product_rate(left, left) == 2 * 8**3 / expected_s
