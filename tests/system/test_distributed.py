"""Several processes equal one, by both launchers; the documented commands; launchers' variables."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_process
from readme import readme_commands
from stand_ins import ROOT, open_port, student_config_of, vocab_size_of

from distil.system import files
from distil.system.launch import choose_device, read_launcher
from utils import InputError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
LAUNCH = [sys.executable, "-W", "ignore", "-m", "torch.distributed.launch", "--nproc_per_node"]
WORKER = ROOT / "tests" / "system" / "rank_worker.py"
TRAIN = ROOT / "train.py"


def check(done) -> None:
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def world_sizes(world, tmp_path_factory):
    """Return the worker's results on 1 rank at accumulation 8 and on 2 ranks at 4.

    21 micro-batches: the last update has 5.
    """
    folder, found = tmp_path_factory.mktemp("ranks"), {}
    for world_size, accumulation in ((1, 8), (2, 4)):
        flags = world.flags(
            "bert",
            folder / "unused",
            gradient_accumulation_steps=accumulation,
            batch_size=12,
            student_pretrained_weights=world.first_weights("bert"),
        )
        output = folder / f"found-{world_size}"
        check(run_process(*TORCHRUN, world_size, WORKER, output, *flags))
        found[world_size] = [torch.load(f"{output}.{rank}") for rank in range(world_size)]
    return found


def test_two_ranks_have_the_gradient_of_one(world_sizes):
    (alone,), ranks = world_sizes[1], world_sizes[2]
    assert alone["updates"] == 3
    for number, grads in enumerate(alone["grads"]):
        for rank in ranks:
            assert set(rank["grads"][number]) == set(grads)
            for name, grad in grads.items():
                found = rank["grads"][number][name]
                torch.testing.assert_close(found, grad, rtol=1e-9, atol=1e-12)  # float64 sums
            assert all(grad.abs().sum() > 0 for grad in grads.values())


def test_every_rank_knows_the_losses_of_all(world_sizes):
    (alone,), ranks = world_sizes[1], world_sizes[2]
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], alone["losses"], rtol=1e-12, atol=0)


def test_no_rank_sees_anothers_data(world_sizes):
    one, two = (rank["mine"] for rank in world_sizes[2])
    (alone,) = (rank["mine"] for rank in world_sizes[1])
    assert [sorted(a + b) for a, b in zip(one, two, strict=True)] == alone


def test_gradients_are_reduced_once_an_update(world_sizes):
    assert [rank["reductions"] for rank in world_sizes[2]] == [3, 3]


def assert_joined_alike(alone: dict, ranks: list[dict]) -> None:
    """Check that ranks divide one rank's passes, with equal gradients and losses."""
    passes = [sum(update) for update in zip(*(rank["passes"] for rank in ranks), strict=True)]
    assert passes == alone["passes"]
    assert sum(passes) < sum(map(len, alone["mine"])), "none was joined"
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], alone["losses"], rtol=1e-12, atol=0)
        for grads, expected in zip(rank["grads"], alone["grads"], strict=True):
            for name, grad in expected.items():  # float64 sums in another order
                torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-12)


def test_two_ranks_of_joined_passes_have_the_gradient_of_one(world_sizes):
    """Dropout included: passes are planned before they are dealt."""
    (alone,), ranks = world_sizes[1], world_sizes[2]
    assert_joined_alike(alone["joined"], [rank["joined"] for rank in ranks])
    assert not torch.equal(alone["joined"]["losses"], alone["losses"]), "other dropout"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_three_ranks_of_joined_passes_have_the_gradient_of_one(kind, world, tmp_path):
    found = {}
    for world_size, accumulation in ((1, 9), (3, 3)):
        changes = {"gradient_accumulation_steps": accumulation, "batch_size": 10}
        flags = world.flags(kind, tmp_path / "unused", **changes)
        output = tmp_path / f"found-{world_size}"
        check(run_process(*TORCHRUN, world_size, WORKER, output, *flags))
        found[world_size] = [torch.load(f"{output}.{rank}") for rank in range(world_size)]
    assert_joined_alike(found[1][0]["joined"], [rank["joined"] for rank in found[3]])


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Train three updates: one rank at 8, and two ranks at 4 by each launcher."""
    folder = tmp_path_factory.mktemp("trained")

    def flags(name, accumulation):
        return world.flags(
            "bert",
            folder / name,
            gradient_accumulation_steps=accumulation,
            batch_size=4,
            max_steps=3,
            log_interval=4,
        )

    check(run_process(sys.executable, TRAIN, *flags("alone", 8), WORLD_SIZE="7"))
    check(run_process(*TORCHRUN, 2, TRAIN, *flags("torchrun", 4)))
    check(run_process(*LAUNCH, 2, "--master_port", open_port(), TRAIN, *flags("launch", 4)))
    return folder


@pytest.mark.parametrize("launcher", ["torchrun", "launch"])
def test_two_ranks_train_as_one_does(launcher, trained):
    one, two = (
        torch.load(trained / name / "pytorch_model.bin", weights_only=True)
        for name in ("alone", launcher)
    )
    assert set(one) == set(two)
    for name in one:
        # float32 sums in another order, then Adam, which divides by the gradient's own size
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5)
    moved = [name for name in one if not torch.equal(one[name], two[name])]
    assert len(moved) < len(one), "frozen positions are equal to the bit"


def test_by_tokens_two_ranks_train_as_one_does(world, tmp_path):
    """One rank at 4, two ranks at 2; the last of three updates has 2 micro-batches, one a rank."""

    def flags(name, accumulation):
        changes = {
            "loss_normalization": "tokens",
            "batch_size": 24,
            "n_epoch": 1,
            "warmup_prop": 0.0,
        }
        return world.flags(
            "bert", tmp_path / name, gradient_accumulation_steps=accumulation, **changes
        )

    check(run_process(sys.executable, TRAIN, *flags("alone", 4)))
    check(run_process(*TORCHRUN, 2, TRAIN, *flags("two", 2)))
    one, two = (
        torch.load(tmp_path / name / "pytorch_model.bin", weights_only=True)
        for name in ("alone", "two")
    )
    for name in one:
        # float32 sums in another order, then Adam, which divides by the gradient's own size
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5)


def test_a_rank_without_a_micro_batch_takes_part(world, tmp_path):
    # 240 sequences in batches of 100: three micro-batches, on two ranks at accumulation 1 a last
    # update with one.
    flags = world.flags("gpt2", tmp_path / "run", batch_size=100, gradient_accumulation_steps=1)
    check(run_process(*TORCHRUN, 2, TRAIN, *flags))
    assert (tmp_path / "run" / "model_epoch_0.pth").exists()


def test_a_nan_ends_every_rank_and_the_launcher_says_so(world, tmp_path):
    flags = world.flags(
        "bert", tmp_path / "run", learning_rate=1e3, warmup_prop=0, max_grad_norm=1e30, fp16=True
    )
    done = run_process(*TORCHRUN, 2, TRAIN, *flags, timeout_s=120)
    assert done.returncode != 0 and done.stderr.count("the update was not applied") == 1, (
        done.stderr[-2000:]
    )
    assert not (tmp_path / "run" / "pytorch_model.bin").exists()


def test_an_address_where_nobody_meets_is_said_in_one_line(world, tmp_path):
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "no-such-host.invalid",
        "MASTER_PORT": "29511",
    }
    done = run_process(
        sys.executable, TRAIN, *world.flags("bert", tmp_path / "run"), timeout_s=120, **alone
    )
    assert (
        done.returncode == 2 and "train.py: error: MASTER_ADDR=no-such-host.invalid" in done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_ranks_is_said_once_and_ends_them_all(world, tmp_path):
    flags = world.flags("bert", tmp_path / "run", data_file=world.data("gpt2"))
    done = run_process(*TORCHRUN, 2, TRAIN, *flags, timeout_s=120)
    assert (
        done.returncode != 0
        and done.stderr.count("train.py: error:") == 1
        and not (tmp_path / "run").exists()
    )
    assert "Traceback" not in done.stderr.split("ChildFailedError")[0].split("train.py: error:")[0]


# --------------------------------------------------------------------------------------------------
# The documentation's commands
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, text_file, teachers) -> Path:
    """Make a folder like the checkout, with small stand-ins for its inputs."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("scripts", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    (folder / "training_configs").mkdir()
    shutil.copy(text_file, folder / "data" / "dump.txt")
    (folder / "data" / "documents").mkdir()
    documents = text_file.read_text(encoding="utf-8").replace("\n", "\n\n")
    (folder / "data" / "documents" / "a.txt").write_text(documents, encoding="utf-8")
    names = {"bert-base-uncased": "bert", "roberta-base": "roberta", "gpt2": "gpt2"}
    configs = {
        "bert": "distilbert-base-uncased",
        "roberta": "distilroberta-base",
        "gpt2": "distilgpt2",
    }
    for name, kind in names.items():
        shutil.copytree(teachers[kind], folder / name)
        content = student_config_of(kind, vocab_size_of(teachers[kind]))
        files.write_json(folder / "training_configs" / f"{configs[kind]}.json", content)
    return folder


def run_block(block: str, checkout: Path, teachers, **environment: str) -> None:
    """Run a printed block in bash, with sizes, addresses and processes substituted."""
    substitutes = {
        "30522": str(vocab_size_of(teachers["bert"])),
        "50265": str(vocab_size_of(teachers["roberta"])),
        "N_GPU_NODE=4": "N_GPU_NODE=2",
        "WORLD_SIZE=4": "WORLD_SIZE=2",
        "<AN_OPEN_PORT>": str(open_port()),
        "<I.P.>": "127.0.0.1",
        "--nproc_per_node=4": "--nproc_per_node=2",
    }
    for printed, substitute in substitutes.items():
        block = block.replace(printed, substitute)
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    check(run_process("bash", "-euc", block, cwd=checkout, PATH=path, **environment))


@pytest.mark.parametrize(
    "kind", ["DistilBERT", "resume", "initialization", "DistilRoBERTa", "DistilGPT2", "corpus"]
)
def test_the_workflow_runs_as_printed(kind, checkout, teachers):
    block = readme_commands()[kind]
    needs_data = kind in ("initialization", "resume") and not (checkout / BERT_DATA).exists()
    if needs_data:
        run_block(readme_commands()["DistilBERT"], checkout, teachers)
    run_block(block, checkout, teachers)
    folder = checkout / re.findall(r"--dump_path (\S+)", block)[-1]
    assert (folder / "pytorch_model.bin").exists()


def test_the_distributed_commands_run_as_printed(checkout, teachers):
    commands = readme_commands()
    if not (checkout / BERT_DATA).exists():
        run_block(commands["DistilBERT"], checkout, teachers)
    for name in ("distributed", "torchrun"):
        shutil.rmtree(checkout / "serialization_dir", ignore_errors=True)
        run_block(commands[name], checkout, teachers)
        assert (checkout / "serialization_dir" / "my_first_training" / "pytorch_model.bin").exists()


def test_the_commands_are_those_of_2019():
    """Every word of the 2019 README's commands is printed in README or docs, except `pkill`."""
    printed = " ".join(" ".join(readme_commands().values()).replace("\\\n", " ").split())
    for words in COMMANDS_OF_2019:
        assert " ".join(words.split()) in printed


BERT_DATA = "data/binarized_text.bert-base-uncased.pickle"
COMMANDS_OF_2019 = [
    """python scripts/binarized_data.py --file_path data/dump.txt --tokenizer_type bert
       --tokenizer_name bert-base-uncased --dump_file data/binarized_text""",
    """python scripts/token_counts.py --data_file data/binarized_text.bert-base-uncased.pickle
       --token_counts_dump data/token_counts.bert-base-uncased.pickle --vocab_size 30522""",
    """python train.py --student_type distilbert --student_config
       training_configs/distilbert-base-uncased.json --teacher_type bert --teacher_name
       bert-base-uncased --alpha_ce 5.0 --alpha_mlm 2.0 --alpha_cos 1.0 --alpha_clm 0.0 --mlm
       --freeze_pos_embs --dump_path serialization_dir/my_first_training --data_file
       data/binarized_text.bert-base-uncased.pickle --token_counts
       data/token_counts.bert-base-uncased.pickle --force""",
    """export NODE_RANK=0 export N_NODES=1 export N_GPU_NODE=4 export WORLD_SIZE=4 export
       MASTER_PORT=<AN_OPEN_PORT> export MASTER_ADDR=<I.P.> python -m torch.distributed.launch
       --nproc_per_node=$N_GPU_NODE --nnodes=$N_NODES --node_rank $NODE_RANK --master_addr
       $MASTER_ADDR --master_port $MASTER_PORT train.py --force --n_gpu $WORLD_SIZE --student_type
       distilbert --student_config training_configs/distilbert-base-uncased.json --teacher_type
       bert --teacher_name bert-base-uncased --alpha_ce 0.33 --alpha_mlm 0.33 --alpha_cos 0.33
       --alpha_clm 0.0 --mlm --freeze_pos_embs --dump_path serialization_dir/my_first_training
       --data_file data/binarized_text.bert-base-uncased.pickle --token_counts
       data/token_counts.bert-base-uncased.pickle""",
]


# --------------------------------------------------------------------------------------------------
# The launcher's variables
# --------------------------------------------------------------------------------------------------

GOOD = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_a_process_is_one_of_several_only_with_rank_and_local_rank():
    assert (
        read_launcher(
            {"WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1", "N_NODES": "1"}, -1
        )
        is None
    )
    assert read_launcher(GOOD, -1) == (1, 4, 1, 4)
    readme = {"N_GPU_NODE": "4", "N_NODES": "1", "NODE_RANK": "0"}
    assert read_launcher(GOOD | readme, 1) == (1, 4, 1, 4)
    assert read_launcher(GOOD | {"RANK": ""}, -1) is None
    by_hand = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "4",
        "N_NODES": "1",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }
    assert read_launcher(by_hand, -1) == (0, 4, 0, 4)
    uneven = {
        "RANK": "4",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "6",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "1",
        "NODE_RANK": "1",
    }
    assert read_launcher(GOOD | uneven, -1) == (4, 6, 0, 2)
    second = {"RANK": "5", "WORLD_SIZE": "8", "N_GPU_NODE": "4", "N_NODES": "2", "NODE_RANK": "1"}
    assert read_launcher(GOOD | second, 1) == (5, 8, 1, 4)


@pytest.mark.parametrize(
    "changes, flag, expected",
    [
        ({"WORLD_SIZE": None}, -1, "WORLD_SIZE is not set"),
        ({"MASTER_PORT": None}, -1, "MASTER_PORT is not set"),
        ({"MASTER_ADDR": None, "WORLD_SIZE": None}, -1, "MASTER_ADDR is not set"),
        ({"RANK": None}, 0, "--local_rank 0: RANK not set"),
        ({"RANK": "one"}, -1, "RANK=one: not a whole number"),
        ({"RANK": "4"}, -1, "RANK=4: expected 0 to WORLD_SIZE - 1 = 3"),
        ({"LOCAL_RANK": "4"}, -1, "LOCAL_RANK=4: expected 0 to 3"),
        ({}, 0, "--local_rank 0 contradicts LOCAL_RANK=1"),
        ({"N_GPU_NODE": "2"}, -1, "N_GPU_NODE=2 contradicts LOCAL_WORLD_SIZE=4"),
        ({"N_NODES": "3"}, -1, "N_NODES=3 x 4 processes a machine contradicts WORLD_SIZE=4"),
        ({"NODE_RANK": "1"}, -1, "NODE_RANK=1 contradicts RANK=1"),
        ({"WORLD_SIZE": "0"}, -1, "WORLD_SIZE=0: expected at least 1"),
        ({"MASTER_PORT": "99999"}, -1, "MASTER_PORT=99999: expected 1 to 65535"),
        (
            {"GROUP_RANK": "1", "NODE_RANK": "0"},
            -1,
            "NODE_RANK=0 contradicts RANK=1, which runs on machine 1",
        ),
    ],
)
def test_variables_missing_or_contradicting_each_other_are_named(changes, flag, expected):
    environment = {name: value for name, value in (GOOD | changes).items() if value is not None}
    with pytest.raises(InputError, match=re.escape(expected)):
        read_launcher(environment, flag)


@pytest.mark.parametrize(
    "n_gpu, world_size, gpus_here, expected",
    [
        (1, 1, 0, "cpu"),
        (4, 4, 0, "cpu"),
        (0, 1, 8, "cpu"),
        (0, 2, 8, "cpu"),
        (1, 1, 8, "cuda:0"),
        (4, 4, 4, "cuda:0"),
        (1, 4, 4, "cuda:0"),
    ],
)
def test_the_device_follows_from_what_is_there(n_gpu, world_size, gpus_here, expected):
    assert (
        str(choose_device(n_gpu, world_size, 0, world_size, gpus_here, is_launched=world_size > 1))
        == expected
    )


@pytest.mark.parametrize("n_gpu, world_size, gpus_here", [(4, 4, 2), (4, 2, 8), (2, 1, 8)])
def test_gpus_but_too_few_are_an_error(n_gpu, world_size, gpus_here):
    with pytest.raises(InputError, match="GPU|--n_gpu"):
        choose_device(n_gpu, world_size, 0, world_size, gpus_here, is_launched=world_size > 1)
