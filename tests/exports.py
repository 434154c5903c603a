"""Exported folders on another version of transformers: made by this one, checked by that one.

scripts/check_exports.sh calls both: `make FOLDER` with the tested version, `check FOLDER` with
transformers 4.57, which loads nothing of this project.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

TEXTS = ["bake limo Dake.", "Café naïve 東京 1999!", "so ti vu ze <extra> go"]
CASES = {  # name -> (type of teacher, type of student)
    "distilbert of bert": ("bert", "distilbert"),
    "roberta": ("roberta", "roberta"),
    "gpt2": ("gpt2", "gpt2"),
    "bert": ("bert", "bert"),
    "modernbert": ("modernbert", "modernbert"),
    "qwen3, theta, extra token": ("qwen3", "qwen3"),
    "bert, own tokenizer": ("own", "distilbert"),
    "llama, scaled angles": ("llama", "llama"),
}


def make(folder: Path) -> None:
    """Export a student of each case, with the ids and logits of this version."""
    from stand_ins import make_lines, make_teachers

    folder.mkdir(parents=True)
    text = folder / "text"
    text.write_text("\n".join(make_lines(200)) + "\n", encoding="utf-8")
    teachers = make_teachers(folder, text)
    for number, (name, (kind, student)) in enumerate(CASES.items()):
        place = folder / f"case-{number}"
        make_teacher(kind, folder / f"teacher-{number}", teachers)
        sys.argv = ["extract.py"]
        import extract

        flags = ["--teacher", str(folder / f"teacher-{number}"), "--num_layers", "2"]
        flags += ["--output", str(place)]
        flags += ["--student_type", "distilbert", "--fold_token_types"] * (student == "distilbert")
        extract.main(flags)
        (place / "expected.json").write_text(json.dumps({"name": name, **outputs_of(place)}))


def make_teacher(kind: str, folder: Path, teachers: dict[str, Path]) -> None:
    """Save a tiny teacher of a case."""
    import shutil

    import families

    if kind == "own":
        from test_tokenizers import save_teacher, word_pieces
        from tokenizers import normalizers

        save_teacher(folder, word_pieces(normalizers.NFC()))
    elif kind in teachers:
        shutil.copytree(teachers[kind], folder)
    elif kind == "modernbert":
        families.make_teacher(folder, kind, True, teachers)
    else:
        tokenizer = families.causal_tokenizer(teachers["gpt2"])
        tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        config = families.tiny_config(kind, len(tokenizer), **ids)
        config.rope_parameters = {"rope_type": "default", "rope_theta": 12345.0}
        if kind == "llama":
            config.rope_parameters |= {"rope_type": "linear", "factor": 2.0}
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def outputs_of(folder: Path) -> dict:
    """Return a folder's ids and logits for each text, by the installed transformers."""
    config = transformers.AutoConfig.from_pretrained(folder)
    is_masked = config.architectures[0].endswith("MaskedLM")
    auto = transformers.AutoModelForMaskedLM if is_masked else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder).float().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = {"ids": [], "logits": []}
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        found["ids"].append(inputs["input_ids"][0].tolist())
        found["logits"].append(logits.tolist())
    return found


def check(folder: Path) -> int:
    """Compare every case with what the other version found; return the number of differences."""
    num_wrong = 0
    print(f"transformers {transformers.__version__}")
    for place in sorted(folder.glob("case-*")):
        expected = json.loads((place / "expected.json").read_text())
        try:
            found = outputs_of(place)
            same_ids = found["ids"] == expected["ids"]
            gaps = [
                np.abs(np.array(one) - np.array(other)).max()
                for one, other in zip(found["logits"], expected["logits"], strict=True)
                if np.shape(one) == np.shape(other)
            ]
            gap = max(gaps, default=np.nan)
            result = f"ids {'equal' if same_ids else 'DIFFER'}, logits differ by {gap:.1e}"
            is_wrong = not (same_ids and gap < 1e-4)
        except Exception as error:  # whatever the other version raises
            result, is_wrong = f"FAILS: {type(error).__name__}: {error}"[:200], True
        num_wrong += is_wrong
        print(f"{expected['name']:28} {result}")
    return num_wrong


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        sys.exit(min(check(Path(sys.argv[2])), 1))
