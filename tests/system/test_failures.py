"""What a library raises, as one line: what failed, why, and the remedy."""

import pytest
import transformers

from distil.models.language_model import load_language_model, resolve_by_name
from distil.system.failures import naming_failures
from utils import InputError


def test_a_failure_is_named_with_its_reason_and_remedy():
    with (
        pytest.raises(InputError, match=r"^--a b: fails \(no\); take c$"),
        naming_failures("--a b: fails", "; take c"),
    ):
        raise ValueError("no")
    with pytest.raises(InputError, match=r"^its own line$"), naming_failures("--a b: fails"):
        raise InputError("its own line")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_weights_that_find_no_memory_are_not_called_damaged(error, world, monkeypatch):
    def no_room(*args, **kwargs):
        raise error

    teacher = str(world.teachers["bert"])
    architecture = resolve_by_name(teacher, "--teacher_name")
    monkeypatch.setattr(transformers.BertForMaskedLM, "from_pretrained", no_room)
    with pytest.raises(type(error)) as found:
        load_language_model(architecture, teacher, "--teacher_name")
    assert found.value is error
