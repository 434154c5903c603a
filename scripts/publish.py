"""Publish a run's model on the Hugging Face hub: model/ of the run folder, with its card.

Nothing else of the run is uploaded. Log in first (`hf auth login`, or HF_TOKEN in the environment).
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()

import argparse
import logging
from pathlib import Path

from utils import InputError, OneLineParser, logger, one_line, run_program, setup_logging


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "run", metavar="RUN", help="run folder of train.py, or a model's folder alone"
    )
    parser.add_argument(
        "--model_id", metavar="OWNER/NAME", help="name on the hub; needed without --dry_run"
    )
    parser.add_argument("--private", action="store_true", help="visible to its owner only")
    parser.add_argument("--revision", help="branch that receives the files (default: main)")
    parser.add_argument(
        "--dry_run", action="store_true", help="list the files and their size; upload nothing"
    )
    return parser.parse_args(argv)


def files_to_publish(run: str) -> tuple[Path, list[Path]]:
    """Find the model's folder and its files. Raises InputError where it is no complete model."""
    from distil.models.names import model_folder

    folder = Path(model_folder(run))
    if not folder.is_dir():
        raise InputError(f"RUN {run}: no such folder; name a run folder of train.py")
    missing = [
        what
        for what, pattern in (
            ("config.json", "config.json"),
            ("model.safetensors", "model*.safetensors"),
            ("tokenizer", "tokenizer_config.json"),
        )
        if not any(folder.glob(pattern))
    ]
    if missing:
        raise InputError(
            f"RUN {folder}: has no {', no '.join(missing)}; expected the model/ that train.py"
            " writes at the end of a run"
        )
    files = sorted(path for path in folder.iterdir() if path.is_file())
    foreign = [path.name for path in files if path.suffix in (".pth", ".bin", ".lock")]
    if foreign:
        raise InputError(
            f"RUN {folder}: holds {foreign[0]}, which is not for the hub; name a folder with"
            " model.safetensors, config.json, tokenizer and card only"
        )
    return folder, files


def upload(folder: Path, args: argparse.Namespace) -> str:
    """Make the repository and upload the folder in one commit; return its address."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        user = api.whoami()["name"]
        owner = args.model_id.split("/")[0]
        api.create_repo(args.model_id, private=args.private or None, exist_ok=True)
        done = api.upload_folder(
            repo_id=args.model_id,
            folder_path=folder,
            revision=args.revision,
            commit_message="Upload a model distilled by Distil",
        )
    except Exception as error:  # no token, no right, no network, a name that the hub refuses
        raise InputError(
            f"--model_id {args.model_id}: the hub refused it ({one_line(error)}); log in with"
            " `hf auth login` as an owner of that name, and run again"
        ) from error
    logger.info("Uploaded as %s to %s.", user, owner)
    return str(done)


def main(argv: list[str] | None = None) -> None:
    """Run the program: check, list, upload."""
    args = parse(argv)
    setup_logging(logging.INFO)
    if not args.dry_run and not (args.model_id and args.model_id.count("/") == 1):
        raise InputError(
            f"--model_id {args.model_id}: expected OWNER/NAME on the hub, or --dry_run"
        )
    folder, files = files_to_publish(args.run)
    sizes = [os.path.getsize(path) for path in files]
    for path, size in zip(files, sizes, strict=True):
        print(f"{size:>13,}  {path.name}")
    print(f"{sum(sizes):>13,}  bytes in {len(files)} files of {folder}", flush=True)
    if not any(path.name == "README.md" for path in files):
        logger.warning("%s has no card (README.md): write it with report.py --write_card.", folder)
    if not args.dry_run:
        print(f"Published: {upload(folder, args)}", flush=True)


if __name__ == "__main__":
    run_program(main)
