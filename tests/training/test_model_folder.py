"""What people take away from a run: model/, complete and nothing else, and equal files once."""

import json
import os
import stat
import sys
from pathlib import Path

import families
import pytest
import torch
import transformers
from conftest import run_process
from stand_ins import ROOT

import extract
import run_task
import train
from distil.models.export import save_folder, tokenizer_for
from distil.models.names import model_folder
from distil.training import checkpointing

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
AUTO = {"bert": transformers.AutoModelForMaskedLM, "gpt2": transformers.AutoModelForCausalLM}


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def finished(request, world, tmp_path_factory) -> tuple[str, Path]:
    """A run of three epochs: (kind, run folder)."""
    run = tmp_path_factory.mktemp("finished") / "run"
    flags = world.flags(request.param, run, n_epoch=3, batch_size=40, checkpoint_interval=4)
    train.main(flags)
    return request.param, run


def size_of(paths) -> int:
    """Count bytes, those of hard links once."""
    return sum({path.stat().st_ino: path.stat().st_size for path in paths}.values())


def test_model_holds_what_is_published_and_nothing_else(finished):
    kind, run = finished
    names = {"config.json", "model.safetensors", *TOKENIZER}
    names |= {"generation_config.json"} if kind == "gpt2" else set()
    assert {path.name for path in (run / "model").iterdir()} == names
    assert not (run / "model.safetensors").exists()
    model = AUTO[kind].from_pretrained(run / "model")
    state = torch.load(run / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert model_folder(str(run)) == str(run / "model")


def test_the_run_folder_keeps_the_names_of_2019_and_each_content_once(finished):
    kind, run = finished
    plain = ["model_epoch_0.pth", "model_epoch_1.pth", "model_epoch_2.pth"]
    plain += ["checkpoint.pth", "pytorch_model.bin"]
    inodes = [(run / name).stat().st_ino for name in plain]
    assert len(set(inodes)) == 3 and inodes[2] == inodes[3] == inodes[4]
    beside = [
        path
        for path in run.rglob("*")
        if path.is_file() and "checkpoints" not in path.parts and "log" not in path.parts
    ]
    assert size_of(beside) < 6 * size_of((run / "model").iterdir())
    for name in ("config.json", *TOKENIZER):
        assert os.path.samefile(run / name, run / "model" / name)


@pytest.mark.parametrize("place", ["run", "checkpoint", "model"])
def test_each_folder_loads_with_its_tokenizer(place, finished, teachers):
    kind, run = finished
    step = checkpointing.checkpoints_in(run / "checkpoints")[0]
    folder = {"run": run, "checkpoint": step, "model": run / "model"}[place]
    model = AUTO[kind].from_pretrained(folder).eval()
    final = AUTO[kind].from_pretrained(run / "model").eval()
    ids_BT = torch.arange(5, 25)[None]
    assert torch.equal(model(ids_BT).logits, final(ids_BT).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    teacher = transformers.AutoTokenizer.from_pretrained(teachers[kind])
    assert tokenizer("bake limo", add_special_tokens=False).input_ids == (
        teacher("bake limo", add_special_tokens=False).input_ids
    )
    checkpointing.read(step)


def test_nothing_of_the_machine_or_the_loader_is_in_a_model(finished):
    _, run = finished
    places = [str(ROOT), os.path.expanduser("~"), str(run), str(run.parent), "/tmp"]
    for path in (run / "model").iterdir():
        content = path.read_bytes()
        assert not [place for place in places if place.encode() in content], path
    declared = json.loads((run / "model" / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "name_or_path"} & set(declared)


def test_whoever_may_read_the_folder_may_read_its_files(finished, teachers, tmp_path):
    _, run = finished
    extract.main(["--teacher", str(teachers["bert"]), "--output", str(tmp_path / "student")])
    umask = os.umask(0)
    os.umask(umask)
    checkpoint = checkpointing.checkpoints_in(run / "checkpoints")[0]
    for folder in (run, run / "model", tmp_path / "student"):
        for path in folder.iterdir():
            if path.is_file() and path.name != "run.lock":
                assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    assert checkpoint.is_dir()


def test_the_newest_epochs_are_kept(world, tmp_path):
    train.main(world.flags("bert", tmp_path / "run", n_epoch=3, batch_size=120, keep_epochs=1))
    assert [path.name for path in tmp_path.glob("run/model_epoch_*")] == ["model_epoch_2.pth"]


def test_programs_take_a_run_for_its_model(finished, teachers, tmp_path, monkeypatch):
    kind, run = finished
    (run / "pytorch_model.bin").rename(run / "hidden")  # only model/ holds the weights now
    try:
        extract.main(["--teacher", str(run), "--num_layers", "1", "--output", str(tmp_path / "s")])
        (tmp_path / "data").mkdir()
        for name in ("train.tsv", "dev.tsv"):
            text = "sentence\tlabel\nbake limo\t1\nlimo\t0\n"
            (tmp_path / "data" / name).write_text(text)
        flags = ["--task", "sst2", "--model_name_or_path", run, "--data_dir", tmp_path / "data"]
        flags += ["--output_dir", tmp_path / "out", "--max_steps", "1", "--seeds", "1", "--no_cuda"]
        run_task.main([*map(str, flags), "--max_seq_length", "32"])
    finally:
        (run / "hidden").rename(run / "pytorch_model.bin")


def test_an_export_states_what_transformers_4_reads(teachers, tmp_path):
    config = families.tiny_config("qwen3", 320, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 12345.0}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokenizer = families.causal_tokenizer(teachers["gpt2"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    save_folder(model, tokenizer_for(model, tokenizer), tmp_path / "s")
    declared = json.loads((tmp_path / "s" / "tokenizer_config.json").read_text())
    assert declared["additional_special_tokens"] == ["<extra>"]
    assert "extra_special_tokens" not in declared
    assert declared["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert set(declared["model_input_names"]) == {"input_ids", "attention_mask"}
    assert json.loads((tmp_path / "s" / "config.json").read_text())["rope_theta"] == 12345.0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "s").eval()
    ids_BT = torch.arange(5, 25)[None]
    assert torch.equal(again(ids_BT).logits, model(ids_BT).logits)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "s")
    assert loaded.convert_tokens_to_ids("<extra>") in loaded.all_special_ids


@pytest.mark.parametrize("model_type", ["modernbert", "llama", "gemma2", "bert", "gpt_neox"])
def test_what_is_stated_for_transformers_4_changes_nothing_in_5(model_type, teachers, tmp_path):
    is_masked = model_type in families.MASKED
    teacher = families.make_teacher(tmp_path / "t", model_type, is_masked, teachers)
    model = families.auto_class(is_masked).from_pretrained(teacher).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    save_folder(model, tokenizer_for(model, tokenizer), tmp_path / "s")
    again = families.auto_class(is_masked).from_pretrained(tmp_path / "s").eval()
    ids_BT = torch.arange(5, 25)[None]
    assert torch.equal(again(ids_BT).logits, model(ids_BT).logits)
    if model_type == "modernbert":
        declared = json.loads((tmp_path / "s" / "config.json").read_text())
        assert declared["global_attn_every_n_layers"] == 3
        assert declared["global_rope_theta"] != declared["local_rope_theta"]


def test_a_resumed_run_that_was_done_writes_its_model_again(world, tmp_path):
    flags = world.flags("bert", tmp_path / "run", batch_size=60)
    train.main(flags)
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    others = [tmp_path / "run" / "model" / name for name in ("notes", "parameters.json", "more/n")]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    os.link(tmp_path / "run" / "model" / "config.json", tmp_path / "backup")
    flags_before = (tmp_path / "run" / "parameters.json").read_text()
    (tmp_path / "run" / ".model.123.tmp").mkdir()  # of a run that was killed
    train.main([*flags, "--resume"])
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before
    assert all(path.read_text() == "mine" for path in others)
    assert not list((tmp_path / "run").glob(".*"))
    assert json.loads((tmp_path / "run" / "parameters.json").read_text()) == {
        **json.loads(flags_before),
        "resume": "required",
    }


def test_publish_needs_no_run_to_say_what_it_would_upload(finished):
    _, run = finished
    done = run_process(sys.executable, str(ROOT / "scripts" / "publish.py"), str(run), "--dry_run")
    assert done.returncode == 0 and "model.safetensors" in done.stdout
    assert "checkpoint.pth" not in done.stdout and "has no card" in done.stderr
