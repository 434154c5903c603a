"""Resuming: the checkpoint that a run continues from, and the proof that it is this run's.

Flags that decide what is computed must be the same; files may have moved, so their content is
compared by digest.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from distil.data.cards import file_digest
from distil.data.watched import WatchedFiles
from distil.models.language_model import LanguageModel
from distil.system.json_files import LARGEST, type_problem
from distil.system.launch import Runtime
from distil.training import checkpointing
from distil.training.checkpointing import Checkpoint
from distil.training.claim import checkpoints_of, resume_mode
from distil.training.config import TrainConfig, as_flags
from distil.training.models import objective_options
from distil.training.options import resumable_options
from utils import InputError, logger, one_line, raise_problems

# The types of a state's parts; older versions had fewer.
TEXT, NUMBER = (str, None), (int, float, None)
BEST = {"step": int, "lowest": str, "figures": {...: float}, "data": TEXT}
STATE_PARTS = {
    **{"micro_batches": int, "log_sums": [float], "log_count": int, "epoch_sums": [[float]]},
    **{"evaluated_step": (int, None), "best": (BEST, None), "per_update": int, "torch": TEXT},
    **{
        "flags": dict,
        "log_bytes": {...: int},
        "trackers": ({...: TEXT}, None),
        "scaler": {...: float},
    },
    "held_out": ({...: {...: float}}, None),
    "curve": ([float], None),
    "schedule": {"_last_lr": ([float], None), ...: (int, float, bool, [float], None)},
    **{"tokens_per_pass": (int, None), "pack_sequences": (bool, None)},
    "identity": {"student_config": dict, ...: (str, dict, None)},
}
START_ANEW = "or start anew with another --dump_path"


def find_resume_point(config: TrainConfig, world_size: int) -> Checkpoint | None:
    """Find the checkpoint to resume from, before any model is loaded; None: the run starts anew.

    Raises InputError where a checkpoint is required and there is none, all are damaged, or it is of
    a run of other flags.
    """
    mode = resume_mode(config.resume, config.dump_path)
    folder = checkpoints_of(config.dump_path)
    if mode is None:
        return None
    found = checkpointing.newest(folder)
    if found is None:
        if mode == "required":
            raise InputError(
                f"--resume: there is no checkpoint in {folder}; name the run's --dump_path, or use"
                " --resume auto"
            )
        return None
    with naming_misfit(found):
        if problem := type_problem(found.state, STATE_PARTS) or count_problem(found):
            raise ValueError(problem)
        problems = flag_contradictions(config, world_size, found)
        raise_problems(problems)
        done = found.step, found.state["micro_batches"]
        logger.info("Resuming from %s: %d updates, %d micro-batches done.", found.path, *done)
    return found


@contextlib.contextmanager
def naming_misfit(found: Checkpoint | None) -> Iterator[None]:
    """Raise InputError in place of the errors that a whole but foreign state causes."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        name = "--resume: the checkpoint" if found is None else found.path
        reason = f"{type(error).__name__}: {one_line(error)}"
        remedy = START_ANEW.removeprefix("or ")
        raise InputError(
            f"{name}: does not fit this program and run ({reason}); {remedy}"
        ) from error


def count_problem(found: Checkpoint) -> str | None:
    """Say which counter can't be of as many updates as a checkpoint is of, or None."""
    most = found.step * found.state["per_update"]
    ranges = {"micro_batches": (found.step, most), "log_count": (0, most)}
    if found.state.get("tokens_per_pass") is not None:
        ranges["tokens_per_pass"] = 0, LARGEST
    for name, (least, most) in ranges.items():
        if not least <= (value := found.state[name]) <= most:
            return f"{name} is {value}, expected {least} to {most} after update {found.step}"
    if found.state.get("pack_sequences") and not found.state.get("tokens_per_pass"):
        return "pack_sequences is True, without tokens_per_pass"
    return None


def flag_contradictions(config: TrainConfig, world_size: int, found: Checkpoint) -> list[str]:
    """List the flags, and the number of processes, that contradict a checkpoint: a line each."""
    then, now, free = found.state["flags"], as_flags(config), resumable_options(TrainConfig)
    problems = [
        f"--{name} {now[name]}: {found.path} was made with {then[name]!s:.200}; pass that,"
        f" {START_ANEW}"
        for name in now
        if name not in free and name in then and then[name] != now[name]
    ]
    accumulation = config.gradient_accumulation_steps
    per_update = accumulation * world_size
    if per_update != found.state["per_update"]:
        problems.append(
            f"--gradient_accumulation_steps {accumulation} on {world_size}"
            f" process(es): {per_update} micro-batches an update, {found.path} was made with"
            f" {found.state['per_update']}; keep their product, {START_ANEW}"
        )
    return problems


def watch_data(config: TrainConfig) -> WatchedFiles:
    """Note size and time of the files of data, before they are read."""
    tokens = {f"--{name}": getattr(config, name) for name in ("data_file", "eval_data_file")}
    return WatchedFiles(tokens, {"--token_counts": config.token_counts})


def identify(
    config: TrainConfig, student_config, teacher: LanguageModel, data: str, held_out: str | None
) -> dict[str, Any]:
    """Describe the inputs that a resumed run must find again, whatever their paths.

    data, held_out: digests of the sequences trained on and evaluated.
    """
    unrelated = ("transformers_version", "_name_or_path")
    entries = {k: v for k, v in student_config.to_dict().items() if k not in unrelated}
    if data == held_out:
        logger.warning(
            "--eval_data_file is what is trained on: its figures say nothing about other text."
        )
    pairs = objective_options(config, student_config, teacher.network.config).get("layer_map")
    return {
        "student_config": json.loads(json.dumps(entries, default=str)),
        "teacher_name": checkpointing.content_digest(teacher.network.state_dict()),
        "data_file": data,
        "token_counts": file_digest(config.token_counts) if config.token_counts else None,
        "vocabulary": teacher.tokenizer_facts["vocabulary_sha256"],
        "tokenizer_rules": teacher.tokenizer_facts["rules_sha256"],
        "eval_data_file": held_out,
        "layer_map": json.dumps(pairs) if pairs else None,
    }


def check_identity(
    config: TrainConfig, now: Mapping[str, Any], student_source: str, found: Checkpoint
) -> None:
    """Raise InputError, a line each, where inputs differ from those of the checkpoint."""
    then, problems = found.state["identity"], []
    for key, value in now["student_config"].items():
        was = then["student_config"].get(key, value)
        if was != value:
            made = f"{found.path} was made with {was!s:.200}"
            problems.append(f"{student_source}: {key} is {value!s:.200}, {made}")
    of_tokenizer = "vocabulary", "tokenizer_rules"  # older checkpoints have no rules
    names = ["teacher_name", "data_file", *of_tokenizer]
    if config.mlm and config.mlm_smoothing > 0:  # otherwise the counts change nothing
        names.append("token_counts")
    for name in names:
        if now[name] != then.get(name, now[name]):
            is_tokenizer = name in of_tokenizer
            source = "the tokenizer of --teacher_name" if is_tokenizer else f"--{name}"
            path = getattr(config, "teacher_name" if is_tokenizer else name)
            digests = [str(digest)[:12] for digest in (now[name], then[name])]
            problems.append(
                f"{source} {path}: its digest is {digests[0]}, {found.path} was made with"
                f" {digests[1]}"
            )
    if now["layer_map"] != then.get("layer_map", now["layer_map"]):
        was = then["layer_map"]
        problems.append(
            f"--layer_map: layers {now['layer_map']} are compared, {found.path} was made with {was}"
        )
    best = found.state.get("best")
    if best and now["eval_data_file"] not in (None, best["data"]):
        digests = [str(digest)[:12] for digest in (now["eval_data_file"], best["data"])]
        problems.append(
            f"--eval_data_file {config.eval_data_file}: its digest is {digests[0]}, the best"
            f" student so far was found on {digests[1]}"
        )
    if problems:
        lines = [f"{problem}; name the same, {START_ANEW}" for problem in problems]
        raise InputError("\n".join(lines))


def passes(config: TrainConfig, state: Mapping[str, Any]) -> tuple[int, bool]:
    """Return the passes that a run keeps, on whichever device: (tokens, whether they are packed).

    Older states have neither.
    """
    size = state.get("tokens_per_pass")
    size = (config.tokens_per_pass or 0) if size is None else size
    return size, bool(state.get("pack_sequences"))


def share_checkpoint(
    runtime: Runtime, point: Checkpoint | None, files: Iterable[str], check: Callable[[], None]
) -> tuple[dict[str, dict[str, torch.Tensor]], int, dict[str, Any]]:
    """Read on rank 0 the checkpoint that it found; return (tensors, step, state) on every rank.

    check: raises InputError where the checkpoint is another run's.
    """
    with runtime.raise_on_all_ranks():
        if point is not None:
            with naming_misfit(point):
                check()
        tensors = {name: point.tensors(name) if point is not None else {} for name in files}
    tensors = {name: runtime.tensors_from_main(content) for name, content in tensors.items()}
    found = (point.step, dict(point.state)) if point is not None else None
    step, state = runtime.from_main(found)
    versions = state.get("torch"), torch.__version__
    if versions[0] != versions[1]:
        logger.warning("The checkpoint is of torch %s, this is %s: results may differ.", *versions)
    return tensors, step, state
