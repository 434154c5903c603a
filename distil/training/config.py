"""The configuration of a run: every flag of train.py.

All problems are raised at once, a line each, with flag, value and remedy; nothing is loaded before.
"""

import argparse
import dataclasses
import functools
import os
import typing

from distil.data.token_files import MIN_LENGTH, token_file_problem
from distil.models.architectures import AUTO, PAIRS
from distil.objectives import HIDDEN_DISTANCES, LOSSES, NORMALIZATIONS
from distil.system.files import file_problem
from distil.system.rank_zero import TIMEOUT_S, is_another_rank, is_one_of_several
from distil.training.claim import dump_path_problem, resume_mode
from distil.training.config_file import naming_the_file, read_config_file
from distil.training.contradictions import contradictions
from distil.training.options import add_options, bound_problems, missing_options, option
from distil.training.trackers import NAMES as TRACKERS
from distil.training.trackers import TENSORBOARD, tracker_problems
from utils import VERSION, InputError, OneLineParser, raise_problems

DESCRIPTION = "Distil a language model into a smaller one. See README.md."
USAGE = """train.py --dump_path FOLDER --data_file FILE --teacher_name NAME
                (--student FOLDER | --student_config FILE) [FLAG ..]
       train.py --config RUN/parameters.json --dump_path FOLDER [FLAG ..]
       train.py --plan FLAG .."""
HEADINGS = {
    "obligatory": "obligatory (--student or --student_config; CONFIG may give all but DUMP_PATH)",
    **{name: name for name in ("model", "data", "objectives", "optimization", "precision", "run")},
    "processes": "several processes",
    "planning": "plan",
}
obligatory, model, data, objectives, optimization, precision, run, processes, planning = (
    functools.partial(option, group=group) for group in HEADINGS
)
STUDENT_TYPES = [*sorted({student for _, student in PAIRS}), AUTO]
TEACHER_TYPES = [*sorted({teacher for teacher, _ in PAIRS}), AUTO]


def add_alphas(group) -> None:
    """Add --alpha_NAME for each row of LOSSES."""
    for name, loss in LOSSES.items():
        group.add_argument(
            f"--alpha_{name}",
            type=float,
            default=argparse.SUPPRESS,
            metavar="X",
            help=f"weight of the {loss.help} (default: {loss.default_alpha})",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every option of a run. Raises InputError that names all problems at once."""

    force: bool = run(
        "move an existing dump_path aside (to DUMP_PATH.old-TIME) instead of refusing it",
        False,
        resumable=True,
    )
    resume: str | None = run(
        "continue from the newest valid checkpoint in DUMP_PATH; with auto, start anew if there is"
        " none",
        None,
        choices=("required", "auto"),
        bare="required",
        resumable=True,
    )
    keep_checkpoints: int = run(
        "number of newest checkpoints to keep",
        3,
        at_least=2,
        why="in case one is damaged",
        resumable=True,
    )
    keep_epochs: int | None = run(
        "number of newest model_epoch_E.pth to keep (default: all)",
        None,
        at_least=1,
        resumable=True,
    )
    dump_path: str = obligatory(
        "folder that receives log, checkpoints and the student", resumable=True
    )
    data_file: str = obligatory(
        "token file made by scripts/binarized_data.py: a pickle, or a store by its prefix",
        resumable=True,
    )

    student: str | None = obligatory(
        "a whole student made by scripts/extract.py --output",
        None,
        resumable=True,
    )
    student_type: str = model("student's model type; auto: detected", AUTO, choices=STUDENT_TYPES)
    student_config: str | None = obligatory(
        "student's configuration, JSON, in place of STUDENT", None, resumable=True
    )
    student_pretrained_weights: str | None = model(
        "student's first weights: of scripts/extract*.py, or .safetensors", None, resumable=True
    )
    teacher_type: str = model("teacher's model type; auto: detected", AUTO, choices=TEACHER_TYPES)
    teacher_name: str = obligatory(
        "teacher, hub name or local folder; its tokenizer is used", resumable=True
    )
    trust_remote_code: bool = model(
        "run Python files that come with teacher or student, where they need them",
        False,
        resumable=True,
    )

    temperature: float = objectives(
        "softmax temperature of KL, reverse KL and Jensen-Shannon divergence",
        2.0,
        above=0,
        at_most=1_000_000,
    )
    alphas: dict[str, float] = dataclasses.field(
        default_factory=lambda: {name: loss.default_alpha for name, loss in LOSSES.items()},
        metadata={"add_to": add_alphas, "group": "objectives"},
    )
    relation_heads: int = objectives(
        "heads that queries, keys and values are cut into for ALPHA_REL; divides all their widths",
        12,
        at_least=1,
    )
    relation_layer: int | None = objectives(
        "the teacher's layer for ALPHA_REL, from 0; default: its last; of the student always the"
        " last",
        None,
        at_least=0,
    )
    layer_map: str | None = objectives(
        "layers for ALPHA_HID and ALPHA_ATT, STUDENT:TEACHER,.. from 0; default: those of the"
        " student's extraction.json, else evenly spaced ones",
        None,
    )
    hid_loss: str = objectives(
        "distance of hidden states and embeddings: squared error, or 1 - cosine",
        "mse",
        choices=HIDDEN_DISTANCES,
    )
    mlm: bool = objectives("masked-language modelling (default: causal)", False)
    mlm_mask_prop: float = objectives(
        "share of the real tokens to be predicted", 0.15, at_least=0, at_most=1
    )
    word_mask: float = objectives(
        "share of predicted tokens that become [MASK]", 0.8, at_least=0, at_most=1
    )
    word_keep: float = objectives("share of predicted tokens that stay", 0.1, at_least=0, at_most=1)
    word_rand: float = objectives(
        "share of predicted tokens that become a random token", 0.1, at_least=0, at_most=1
    )
    mlm_smoothing: float = objectives(
        "tokens are drawn for prediction with weight count ^ -MLM_SMOOTHING; with a small corpus"
        " frequent tokens are then hardly learned, and 0, all tokens alike, is often better",
        0.7,
        at_least=0,
    )
    token_counts: str | None = data(
        "token counts made by scripts/token_counts.py; needed with --mlm and MLM_SMOOTHING above 0",
        None,
        resumable=True,
    )
    restrict_ce_to_mask: bool = objectives(
        "distil at masked positions only; without --mlm no effect", False
    )
    freeze_pos_embs: bool = model("keep the student's position embeddings as they are", False)
    freeze_token_type_embds: bool = model(
        "keep the student's token types as they are (roberta)", False
    )

    student_dropout: float | None = optimization(
        "dropout of the student while it is trained; default: what its configuration says, 0.1 in"
        " those of 2019; what is exported keeps its configuration",
        None,
        at_least=0,
        at_most=0.9,
    )
    n_epoch: int = optimization("passes over the data", 3, at_least=1)
    max_steps: int | None = optimization(
        "number of updates, in place of N_EPOCH; the schedule spans them", None, at_least=1
    )
    max_length: int | None = data(
        "longest sequence, in token ids; default: what the teacher admits",
        None,
        above=MIN_LENGTH,
        why="because shorter sequences are removed",
    )
    batch_size: int = data("sequences per micro-batch, on each process", 5, at_least=1)
    max_tokens: int | None = data(
        "maximum padded tokens per micro-batch, instead of BATCH_SIZE: long and short sequences"
        " cost the same",
        None,
        at_least=1,
    )
    # Differs from the original: 2019's flag switched grouping off.
    group_by_size: bool = data("make batches of sequences of like lengths", True)
    gradient_accumulation_steps: int = optimization(
        "micro-batches per update, on each process", 50, at_least=1, resumable=True
    )
    warmup_prop: float = optimization(
        "share of the updates over which the learning rate rises", 0.05, at_least=0, at_most=1
    )
    weight_decay: float = optimization(
        "weight decay, biases and layer norms excepted", 0.0, at_least=0
    )
    learning_rate: float = optimization("highest learning rate", 5e-4, above=0, at_most=1000)
    adam_epsilon: float = optimization("epsilon of AdamW", 1e-6, above=0)
    max_grad_norm: float = optimization("the gradient's norm is clipped to this", 5.0, above=0)
    initializer_range: float | None = model(
        "standard deviation of random first weights; default: the student configuration's (0.02 in"
        " those shipped)",
        None,
        above=0,
        resumable=True,
    )

    loss_normalization: str = objectives(
        "micro_batches: means over each micro-batch, then over the update's, as in 2019; tokens:"
        " over the update's tokens",
        "micro_batches",
        choices=NORMALIZATIONS,
    )

    bf16: bool = precision("mixed precision in bfloat16", False)
    fp16: bool = precision("mixed precision in float16, with a gradient scaler", False)
    fp16_opt_level: str = precision(
        "accepted for old command lines, without effect: torch's own mixed precision is used",
        "O1",
        resumable=True,
    )
    activation_checkpointing: bool = precision(
        "compute the student's activations twice, to keep fewer of them", False, resumable=True
    )
    tokens_per_pass: int | None = precision(
        "padded tokens of a forward and backward pass, which joins micro-batches of an update up to"
        " there; nothing but dropout depends on it; 0: a pass each micro-batch (default: 0 on a"
        " CPU; on a GPU as large as an update, at most 65536)",
        None,
        at_least=0,
        at_most=1_000_000_000,
    )
    pack_sequences: bool | None = precision(
        "lay a pass's sequences into rows as long as the longest, so that passes have one or two"
        " shapes and little padding; nothing but dropout depends on it (default: on a GPU, with"
        " models of known families, where it saves tokens or passes; not on a CPU)",
        None,
    )
    compile: bool = precision(
        "compile teacher and student (torch.compile): takes minutes to start, then runs faster",
        False,
        resumable=True,
    )
    n_gpu: int = processes(
        "GPUs over all processes, one a process; 0: CPU", 1, at_least=0, resumable=True
    )
    local_rank: int = processes("given by old launchers; leave it alone", -1, resumable=True)
    distributed_timeout_s: int = processes(
        "seconds that processes wait for each other before a missing one ends the run",
        TIMEOUT_S,
        at_least=1,
        resumable=True,
    )
    seed: int = run("seed of order, masks, dropout and first weights", 56)
    log_interval: int = run(
        "micro-batches of one process, not updates, between two logs (as in 2019)",
        500,
        at_least=1,
        resumable=True,
    )
    checkpoint_interval: int = run(
        "micro-batches of one process, not updates, between two checkpoints (as in 2019)",
        4000,
        at_least=1,
        resumable=True,
    )
    report_to: tuple[str, ...] = run(
        "where figures go beside metrics.jsonl: TensorBoard's files, and the packages wandb and"
        " mlflow",
        (TENSORBOARD,),
        choices=TRACKERS,
        resumable=True,
    )
    eval_data_file: str | None = data(
        "token file of held-out text, made as DATA_FILE is: evaluated on fixed masks, first weights"
        " too; with MLM_SMOOTHING above 0 on masks drawn by rarity, too",
        None,
        resumable=True,
    )
    eval_interval: int | None = run(
        "updates between two evaluations of EVAL_DATA_FILE; default: first and last weights only",
        None,
        at_least=1,
        resumable=True,
    )

    plan: str | None = planning(
        "train nothing, write nothing: tell updates, tokens, hours (a few passes are measured),"
        " memory and disk of the run, for N_GPU processes; a run that cannot fit is refused",
        None,
        choices=("text", "json"),
        bare="text",
        resumable=True,
    )
    tokens_per_second: float | None = planning(
        "rate of the run, in real tokens over all processes, in place of a measured one",
        None,
        above=0,
        resumable=True,
    )
    price_per_hour: float | None = planning(
        "price of an hour of all that the run uses, for its cost", None, at_least=0, resumable=True
    )

    @property
    def gpus_here(self) -> int:
        """N_GPU, of which a plan needs one."""
        return self.n_gpu if self.plan is None else min(self.n_gpu, 1)

    def num_processes(self, started: int) -> int:
        """Return the processes of a run: those started, or N_GPU, for which one plans."""
        return started if self.plan is None else max(self.n_gpu, 1)

    @property
    def active(self) -> list[str]:
        """The objectives that have a weight."""
        return [name for name, alpha in self.alphas.items() if alpha > 0]

    def __post_init__(self):
        raise_problems([*bound_problems(self), *contradictions(self), *path_problems(self)])


def path_problems(config: TrainConfig) -> list[str]:
    """Say which files are missing, and whether the run folder is in the way."""
    files = {name: getattr(config, name) for name in INPUT_FILES}
    checks = {"data_file": token_file_problem, "eval_data_file": token_file_problem}
    problems = [
        checks.get(name, file_problem)(path, f"--{name}")
        for name, path in files.items()
        if path is not None
    ]
    if config.plan is not None and is_one_of_several(os.environ):
        num = os.environ.get("WORLD_SIZE") or "N"
        problems.append(
            f"--plan {config.plan}: one process tells the plan of several; start python train.py"
            f" --plan --n_gpu {num}, with the other flags, without the launcher"
        )
    if not is_another_rank(os.environ):  # rank 0 writes, and may have made the folder already
        problems += [folder_problem(config), *tracker_problems(config.report_to)]
    return [problem for problem in problems if problem]


def folder_problem(config: TrainConfig) -> str | None:
    """Say why the run folder can't be made or moved aside: see `dump_path_problem`."""
    inputs = [getattr(config, name) for name in INPUT_FILES]
    inputs += [config.teacher_name, config.student]
    mode = resume_mode(config.resume, config.dump_path)
    return dump_path_problem(config.dump_path, config.force, mode, inputs)


INPUT_FILES = (
    "data_file",
    "student_config",
    "student_pretrained_weights",
    "token_counts",
    "eval_data_file",
)


def make_parser() -> argparse.ArgumentParser:
    """Make the command line from TrainConfig's fields and the LOSSES table."""
    texts = {"prog": "train.py", "usage": USAGE, "description": DESCRIPTION}
    parser = OneLineParser(**texts, allow_abbrev=False, add_help=False)
    add_options(parser, TrainConfig, HEADINGS)
    general = parser.add_argument_group("general")
    general.add_argument(
        "--config",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="values of the flags that are not given here: parameters.json of an earlier run, which"
        " is repeated; --no-X takes its value of X back",
    )
    general.add_argument("-h", "--help", action="help", help="show this text")
    general.add_argument("--version", action="version", version=f"distil {VERSION}")
    return parser


def parse_config(argv: list[str] | None = None) -> TrainConfig:
    """Read the command line, and the file of --config, over which it wins. Raises InputError."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    from_file = {} if path is None else read_config_file(path, given, parser)
    values = from_file | given
    missing = missing_options(TrainConfig, values)
    if missing:
        names = ", ".join(f"--{name}" for name in missing)
        raise InputError(f"the following arguments are required: {names}; see --help")
    alphas = {
        name: values.pop(f"alpha_{name}", loss.default_alpha) for name, loss in LOSSES.items()
    }
    with naming_the_file(path, from_file):
        return TrainConfig(alphas=alphas, **values)


def as_flags(config: TrainConfig) -> dict[str, typing.Any]:
    """List every flag of a run with its value, as parameters.json records it."""
    fields = dataclasses.fields(config)
    values = {f.name: getattr(config, f.name) for f in fields if f.metadata["group"] != "planning"}
    alphas = values.pop("alphas")
    return {**values, **{f"alpha_{name}": alpha for name, alpha in alphas.items()}}
