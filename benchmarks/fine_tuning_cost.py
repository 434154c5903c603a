"""What a fine-tuning step costs on a CPU: CPU seconds of run_task.py's Trainer, by updates.

    python -m benchmarks.fine_tuning_cost --updates 4

BERT of base size with a classifier, random weights and ids, 8 x 128 by default, float32 or with
--bf16, one thread. Run it in two checkouts, taking turns, to compare states of the code.
"""

import argparse
import json
import time
from tempfile import TemporaryDirectory

import torch
import transformers

from distil.tasks.fine_tuning import Trainer, training_arguments


class Clock(transformers.TrainerCallback):
    """Note the CPU seconds at each update's start and end."""

    def __init__(self):
        self.started, self.update_s = 0.0, []

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Start the clock."""
        self.started = time.process_time()

    def on_step_end(self, *_: object, **__: object) -> None:
        """Stop it."""
        self.update_s.append(time.process_time() - self.started)


def main() -> None:
    """Run the program: train a few updates, predict, print CPU seconds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, default in (("batch_size", 8), ("length", 128), ("updates", 4), ("layers", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=args.layers, num_labels=2)
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(1000, 30000, (args.batch_size * args.updates, args.length))
    examples = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": torch.tensor(k % 2)}
        for k, row in enumerate(ids)
    ]
    with TemporaryDirectory() as folder:
        sizes = {"batch_size": args.batch_size, "eval_batch_size": args.batch_size}
        more = {"use_cpu": True, "num_train_epochs": 1, "bf16": args.bf16, "fp16": False}
        arguments = training_arguments(folder, seed=1, **sizes, **more)
        clock = Clock()
        parts = {"model": model, "args": arguments, "train_dataset": examples}
        trainer = Trainer(distance="classes", callbacks=[clock], **parts)
        trainer.train()
        started = time.process_time()
        trainer.predict(examples[: args.batch_size])
        found = {"update_s": clock.update_s, "prediction_s": time.process_time() - started}
    print(json.dumps({**found, "best_update_s": min(clock.update_s)}))


if __name__ == "__main__":
    main()
