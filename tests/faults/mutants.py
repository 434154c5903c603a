"""Trials of the tests: realistic mistakes, planted one at a time into a copy of the program.

Called by scripts/fault_injection.py (T18). The mistakes are silent ones: training continues as if
nothing were wrong.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from stand_ins import ROOT

COPIED = (
    *("*.py", "distil", "scripts", "tests", "training_configs"),
    *("pyproject.toml", "README.md", "docs"),
)
LIMIT_S = 600
PASSED, CAUGHT = 0, 1  # pytest's status where all tests passed; where some failed


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One mistake: description, file, its text and the replacement, the guarding test's id."""

    what: str
    file: str
    text: str
    replacement: str
    guard: str


STEP, RESUME = "tests/test_distiller.py", "tests/training/test_resume.py"
RESUMES = f"{RESUME}::test_a_stopped_run_resumes_bit_for_bit[gpt2]"

MISTAKES = [
    Mistake(
        "every epoch has the order of the first",
        "grouped_batch_sampler.py",
        'keyed_numpy_generator(self.seed, epoch, "order")',
        'keyed_numpy_generator(self.seed, 0, "order")',
        "tests/test_grouped_batch_sampler.py::test_order_depends_on_seed_and_epoch_alone",
    ),
    Mistake(
        "the teacher is set to training, dropout on, with the student",
        "distiller.py",
        "        self.model.train()\n",
        "        for model in filter(None, (self.model, self.teacher)):\n           "
        " model.train()\n",
        f"{STEP}::test_the_step_computes_the_objectives_by_definition[True]",
    ),
    Mistake(
        "the gradient's norm is measured, not clipped",
        "distiller.py",
        "clip_grad_norm_(parameters, self.max_grad_norm)",
        "clip_grad_norm_(parameters, math.inf)",
        f"{STEP}::test_gradients_are_clipped_to_the_norm",
    ),
    Mistake(
        "token counts are shifted by one id",
        "scripts/token_counts.py",
        "np.bincount(chunk, minlength=vocab_size)",
        "np.bincount(chunk + 1, minlength=vocab_size)[:vocab_size]",
        "tests/test_scripts.py::test_counts_are_a_list_of_the_vocabularys_length",
    ),
    Mistake(
        "the first update after a resume has a new optimizer's learning rate",
        "distil/training/state.py",
        'group["lr"] = rate',
        'group.setdefault("lr", rate)',
        RESUMES,
    ),
    Mistake(
        "gradients are summed over an update's micro-batches, not averaged",
        "distiller.py",
        "share, counts_K = self.world_size / len(numbers), None",
        "share, counts_K = self.world_size, None",
        f"{STEP}::test_the_step_computes_the_objectives_by_definition[True]",
    ),
    Mistake(
        "every micro-batch draws the same masks",
        "distil/data/batches.py",
        'keyed_seed(self.seed, number, "mask")',
        'keyed_seed(self.seed, "mask")',
        f"{STEP}::test_masks_depend_on_seed_and_number_alone",
    ),
    Mistake(
        "special tokens are masked like others",
        "distil/data/batches.py",
        "    weights_V[list(special_ids)] = 0.0\n",
        "",
        f"{STEP}::test_positions_are_drawn_over_the_whole_batch"
        "_and_never_from_special_tokens_or_padding",
    ),
    Mistake(
        "a causal student predicts the token that it reads",
        "distil/data/batches.py",
        "labels_BT.flatten()[rows_N + 1]",
        "labels_BT.flatten()[rows_N]",
        f"{STEP}::test_the_causal_loss_predicts_the_next_token",
    ),
    Mistake(
        "the temperature's square is missing from the gradient, not from the loss",
        "distil/losses.py",
        "gradient_NV.mul_(temperature)",
        "gradient_NV.div_(temperature)",
        "tests/test_losses.py::test_losses_and_gradients_equal_the_2019_code",
    ),
    Mistake(
        "the KL divergence is taken from student to teacher",
        "distil/losses.py",
        "        student_log_probs_NE, teacher_log_probs_NE, reduction",
        "        teacher_log_probs_NE, student_log_probs_NE, reduction",
        "tests/test_losses.py::test_each_objective_equals_a_slow_loop[ce]",
    ),
    Mistake(
        "a resume forgets the optimizer's moments: they go into a copy",
        "distil/training/state.py",
        "optimizer.state[parameter][kind] =",
        "dict(optimizer.state[parameter])[kind] =",
        RESUMES,
    ),
    Mistake(
        "a checkpoint counts the micro-batches before its last update: a resume does that one"
        " again",
        "distil/training/progress.py",
        "self.micro_batches = planned[-1].number + 1",
        "self.micro_batches = planned[0].number",
        RESUMES,
    ),
    Mistake(
        "a resume leaves in the log what came after the checkpoint: points are there twice",
        "distil/training/log.py",
        "            _cut(file, size)\n",
        "            continue\n",
        f"{RESUME}::test_a_killed_run_resumes_from_its_last_checkpoint",
    ),
    Mistake(
        "--freeze_pos_embs is ignored, as in 2019",
        "distil/models/language_model.py",
        'if positions or getattr(student.config, "sinusoidal_pos_embds", False):',
        'if getattr(student.config, "sinusoidal_pos_embds", False):',
        f"{STEP}::test_frozen_positions_get_no_gradient",
    ),
    Mistake(
        "layer norms are told by a name that not all have, as in 2019, and decayed",
        "distil/training/optimizer.py",
        "is_exempt = id(parameter) in norms or",
        'is_exempt = "LayerNorm.weight" in name or',
        f"{STEP}::test_biases_and_layer_norms_are_not_decayed",
    ),
    Mistake(
        "DDP's mean over the ranks is not undone",
        "distiller.py",
        "share, counts_K = self.world_size / len(numbers), None",
        "share, counts_K = 1 / len(numbers), None",
        "tests/system/test_distributed.py::test_two_ranks_have_the_gradient_of_one",
    ),
    Mistake(
        "the first padding position of a sequence enters the loss",
        "distil/data/batches.py",
        "torch.arange(padded_length) < lengths_B[:, None]",
        "torch.arange(padded_length) <= lengths_B[:, None]",
        f"{STEP}::test_causal_padding_changes_nothing",
    ),
    Mistake(
        "dropout goes on from whatever state the generator is in",
        "distiller.py",
        '        torch.manual_seed(keyed_seed(self.seed, batch.number, "dropout"))\n',
        "",
        f"{STEP}::test_dropout_depends_on_seed_and_number_alone",
    ),
    Mistake(
        "a teacher's layers are counted from 1 on extraction",
        "distil/models/first_weights.py",
        "teacher_name.format(layer=teacher_layer)",
        "teacher_name.format(layer=max(teacher_layer - 1, 0))",
        "tests/models/test_architectures.py::test_chosen_layers_become_the_students_first[gpt2]",
    ),
]


def copy_checkout(target: Path) -> Path:
    """Copy the files that the tests need, without compiled ones."""
    target.mkdir()
    for path in (path for pattern in COPIED for path in sorted(ROOT.glob(pattern))):
        if path.is_dir():
            shutil.copytree(
                path, target / path.name, ignore=shutil.ignore_patterns("__pycache__", ".*")
            )
        else:
            shutil.copy(path, target)
    return target


def plant(mistake: Mistake, checkout: Path) -> bool:
    """Make the mistake in a copy; False unless its text occurs exactly once."""
    path = checkout / mistake.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mistake.text, mistake.replacement), encoding="utf-8")
    return text.count(mistake.text) == 1


def run_guard(guard: str, checkout: Path) -> subprocess.CompletedProcess:
    """Run one test of a copy, with all its cases, up to the first failure."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", str(checkout.parent / "tests")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1"
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, guard],
        cwd=checkout,
        env=environment,
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def planted_mistake(bench) -> None:
    """T18: a planted mistake must make a test fail that passes without it.

    An error before the test doesn't count.
    """
    bench.count(1)
    mistake = MISTAKES[bench.number % len(MISTAKES)]
    checkout = copy_checkout(bench.folder / "checkout")
    if run_guard(mistake.guard, checkout).returncode != PASSED:
        return bench.fail(f"{mistake.what}: {mistake.guard} fails without the mistake, too")
    if not plant(mistake, checkout):
        return bench.fail(f"{mistake.what}: the planted text is not there")
    done = run_guard(mistake.guard, checkout)
    failed = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    if done.returncode == CAUGHT and failed:
        return bench.note(f"{mistake.what}: caught by {failed[1]}")
    said = (done.stdout + done.stderr).strip().splitlines()[-1:]
    bench.fail(
        f"{mistake.what}: not caught by {mistake.guard}: pytest's status is {done.returncode}"
        f" {said}"
    )
