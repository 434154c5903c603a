"""--student_dropout: off or on in every family while a student is trained, not in what is saved."""

import json

import families
import pytest
import torch
import transformers

import train
from distil.models.export import save_config
from distil.models.forward import set_dropout

IDS_BT = torch.randint(5, 99, (3, 12), generator=torch.Generator().manual_seed(3))
FAMILIES = [*((name, True) for name in families.MASKED), *((n, False) for n in families.CAUSAL)]


def logits(model, is_training: bool) -> torch.Tensor:
    """Compute a batch's logits in one of the two modes."""
    with torch.no_grad():
        return model.train(is_training)(IDS_BT).logits


@pytest.mark.parametrize("model_type, is_masked", FAMILIES)
def test_a_rate_holds_in_every_dropout_of_a_family(model_type, is_masked, tmp_path):
    model = families.tiny_model(model_type, is_masked)
    save_config(model, tmp_path / "before")
    expected = logits(model, is_training=False)
    set_dropout(model, 0.0)
    torch.testing.assert_close(logits(model, is_training=True), expected, rtol=1e-5, atol=1e-5)
    set_dropout(model, 0.5)
    assert (logits(model, is_training=True) - expected).abs().max() > 1e-2
    save_config(model, tmp_path / "after")
    files = [tmp_path / folder / "config.json" for folder in ("before", "after")]
    before, after = (json.loads(file.read_text()) for file in files)
    assert after == before


def test_every_dropout_has_the_rate_and_no_other_entry():
    """One that kept its own rate would be hidden by the others."""
    config = families.tiny_config("distilbert", 99)
    model = transformers.DistilBertForMaskedLM(config)
    set_dropout(model, 0.25)
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(rates) > 8 and set(rates) == {0.25}
    assert config.dropout == config.attention_dropout == config.seq_classif_dropout == 0.25
    assert config.initializer_range == 0.02


def test_a_run_without_dropout_exports_the_configuration_with_its_own(world, tmp_path):
    config = train.parse_config(
        world.flags("bert", tmp_path / "run", max_steps=1, student_dropout=0.0)
    )
    parts = train.set_up(config, train.Runtime())
    student = parts.student.network
    assert torch.equal(*(student.train()(IDS_BT).logits for _ in range(2)))
    train.main(world.flags("bert", tmp_path / "run", max_steps=1, student_dropout=0.0))
    saved = json.loads((tmp_path / "run/model/config.json").read_text())
    assert saved["dropout"] == saved["attention_dropout"] == 0.1  # DistilBERT's own
