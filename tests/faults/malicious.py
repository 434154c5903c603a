"""Trials of malicious files (T19): 60 files, each read in every place that reads its kind.

A payload is detected by the file that it writes (the canary) and by Python's audit events in the
process that reads it.
"""

import copyreg
import ctypes
import dataclasses
import functools
import importlib
import io
import json
import marshal
import operator
import os
import pathlib
import pickle
import pydoc
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors.torch
import torch
from faults.files import in_child, settle_manifest
from stand_ins import World, make_lines

import binarized_data
import extract
import extract_distilbert
import inspect_data
import prepare_text
import token_counts
import train
from distil.training import checkpointing

LIMIT_S = 30
ENDS_TORCH = "tuples as a key"  # which torch.load and transformers read by weights_only, too


class Call:
    """An object whose pickle calls `function` when it is loaded."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments

    def __call__(self):  # pickle asks whether it could be called
        raise AssertionError


class With(Call):
    """An object whose pickle makes a call, then sets a state."""

    def __reduce__(self):
        return self.function, *self.arguments


@dataclasses.dataclass
class Site:
    """A folder for a malicious file. kind: of the imitated teacher; canary: the payload's file."""

    world: World
    folder: Path
    canary: Path
    kind: str = "bert"

    @property
    def command(self) -> str:
        """A shell command that writes the canary."""
        return f"touch {self.canary}"

    @property
    def code(self) -> str:
        """Python code that writes the canary."""
        return f"open({str(self.canary)!r}, 'w').close()"

    def write(self, name: str, content: bytes | str) -> Path:
        """Write a file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def module(self, name: str = "evil_module.py", more: str = "") -> Path:
        """Write a module that writes the canary when it is imported."""
        return self.write(name, f"{self.code}\n{more}\n")

    def teacher(self) -> Path:
        """Copy a teacher's folder."""
        path = self.folder / "evil-teacher"
        shutil.copytree(self.world.teachers[self.kind], path)
        return path

    def edited(self, name: str, **changes: Any) -> Path:
        """Copy a teacher's folder with a JSON file changed."""
        folder = self.teacher()
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | changes))
        return folder


# --------------------------------------------------------------------------------------------------
# Pickles
# --------------------------------------------------------------------------------------------------


def listed(site: Site, payload: Any, protocol: int = 4) -> Path:
    """Pickle a list of sequences together with a payload."""
    return site.write(
        "evil.pickle", pickle.dumps([np.arange(20, dtype=np.uint16), payload], protocol)
    )


def raw(site: Site, *parts: bytes | str) -> Path:
    """Write opcodes."""
    return site.write(
        "evil.pickle", b"".join(part.encode() if isinstance(part, str) else part for part in parts)
    )


def text_of(text: str) -> bytes:
    """Encode a string as opcodes."""
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def extended(site: Site) -> Path:
    """Call through a number of the extension registry."""
    if ("posix", "system") not in copyreg._extension_registry:
        copyreg.add_extension("posix", "system", 0x71)
    return raw(site, b"\x80\x02\x82\x71", text_of(site.command), b"\x85R.")


def marshalled(site: Site) -> Call:
    """Make a function from code in bytes."""
    code = marshal.dumps(compile(site.code, "evil_code", "exec"))
    return Call(Call(Call(type, os.path.join), Call(marshal.loads, code), {}))


def loaded_array(site: Site) -> Call:
    """Make numpy.load unpickle another file."""
    path = site.folder / "evil.npy"
    np.save(path, np.array([Call(os.system, site.command)], dtype=object), allow_pickle=True)
    return Call(np.load, str(path), None, True)


def forged_state(site: Site) -> Call:
    """Set a structured dtype's state without the flag for objects."""
    state = list(np.dtype([("a", "O")]).__reduce__()[2])
    state[-1] = 0
    return Call(np.ndarray, (1,), With(np.dtype, ("V8", False, True), tuple(state)), b"A" * 8)


def partial_by_state(site: Site) -> Call:
    """Make a harmless partial harmful through its state."""
    return Call(With(functools.partial, (print,), (os.system, (site.command,), {}, {})))


NEST = 200_000
PICKLES: dict[str, Callable[[Site], Path]] = {
    **{
        f"os.system, protocol {protocol}": lambda site, p=protocol: listed(
            site, Call(os.system, site.command), p
        )
        for protocol in (0, 2, 5)
    },
    "INST": lambda site: raw(site, f"(S'{site.command}'\niposix\nsystem\n."),
    "OBJ": lambda site: raw(site, f"(cposix\nsystem\nS'{site.command}'\no."),
    "STACK_GLOBAL": lambda site: raw(
        site, b"\x80\x04\x8c\x05posix\x8c\x06system\x93", text_of(site.command), b"\x85R."
    ),
    "memo": lambda site: raw(site, f"cposix\nsystem\np0\n0(lp1\ng0\n(S'{site.command}'\ntRa."),
    "extension registry": extended,
    "persistent id": lambda site: raw(site, b"\x80\x02", text_of(site.command), b"Q."),
    "subprocess": lambda site: listed(site, Call(subprocess.Popen, ["touch", str(site.canary)])),
    "exec": lambda site: listed(site, Call(exec, site.code)),
    "eval": lambda site: listed(site, Call(eval, site.code)),
    "getattr of __import__": lambda site: listed(
        site, Call(Call(getattr, Call(__import__, "os"), "system"), site.command)
    ),
    "attrgetter": lambda site: listed(
        site,
        Call(
            Call(Call(operator.attrgetter, "system"), Call(importlib.import_module, "os")),
            site.command,
        ),
    ),
    "partial": lambda site: listed(site, Call(functools.partial(os.system, site.command))),
    "state of a partial": lambda site: listed(site, partial_by_state(site)),
    "numpy.testing.runstring": lambda site: raw(
        site, b"cnumpy.testing\nrunstring\n(", text_of(site.code), b"}tR."
    ),
    "numpy.load": lambda site: listed(site, loaded_array(site)),
    "numpy.memmap": lambda site: listed(
        site, Call(np.memmap, str(site.canary), "uint8", "w+", 0, (10,))
    ),
    "numpy.save": lambda site: listed(site, Call(np.save, str(site.canary), [1])),
    "array of objects": lambda site: listed(
        site, np.array([Call(os.system, site.command)], dtype=object)
    ),
    "forged pointers": lambda site: raw(
        site, pickle.dumps([Call(np.ndarray, (1,), np.dtype("O"), b"A" * 8)])
    ),
    "forged dtype": lambda site: raw(site, pickle.dumps([forged_state(site)])),
    "pathlib": lambda site: listed(site, Call(pathlib.Path.write_text, site.canary, "x")),
    "open": lambda site: listed(site, Call(open, str(site.canary), "w")),
    "runpy": lambda site: listed(site, Call(runpy.run_path, str(site.module()))),
    "marshal": lambda site: listed(site, marshalled(site)),
    "pydoc.pipepager": lambda site: listed(site, Call(pydoc.pipepager, "x", site.command)),
    "ctypes": lambda site: listed(
        site, Call(Call(getattr, Call(ctypes.CDLL, None), "system"), site.command.encode())
    ),
    "tuples as a key": lambda site: raw(site, b"\x80\x02}K\x01", b"\x85" * NEST, b"K\x01s."),
}


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------


def saved(site: Site, content: Any, **options: Any) -> Path:
    """Save a file with torch."""
    path = site.folder / "evil.pth"
    torch.save(content, path, **options)
    return path


def old_tar(site: Site) -> Path:
    """Write the tar format of torch's first versions."""
    path = site.folder / "evil.pth"
    payload = pickle.dumps(Call(os.system, site.command), 2)
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            archive.addfile(entry, io.BytesIO(payload))
    return path


class Script(torch.nn.Module):
    """A module to be scripted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input plus 1."""
        return x + 1


def torchscript(site: Site) -> Path:
    """Write TorchScript, with a pickle that executes."""
    path = site.folder / "evil.pth"
    torch.jit.save(torch.jit.script(Script()), site.folder / "whole.pt")
    with zipfile.ZipFile(site.folder / "whole.pt") as whole, zipfile.ZipFile(path, "w") as archive:
        for name in whole.namelist():
            is_pickle = name.endswith((".pkl", "constants.pkl"))
            archive.writestr(
                name,
                pickle.dumps(Call(os.system, site.command), 2) if is_pickle else whole.read(name),
            )
    return path


def hooks(site: Site) -> dict[str, Any]:
    """Hide a call in the arguments that rebuild a tensor."""
    tensor = torch.zeros(3)
    parts = (tensor.untyped_storage(), 0, (3,), (1,), False, Call(os.system, site.command))
    return {"a": With(torch._utils._rebuild_tensor_v2, parts)}


def header(site: Site, text: str, size: int | None = None) -> Path:
    """Write a safetensors file with a false header."""
    content = struct.pack("<Q", len(text) if size is None else size) + text.encode() + bytes(64)
    return site.write("evil.safetensors", content)


def tensors(**rows: list[int]) -> str:
    """Describe float tensors by their byte ranges."""
    return json.dumps(
        {name: {"dtype": "F32", "shape": [2], "data_offsets": span} for name, span in rows.items()}
    )


WEIGHTS: dict[str, Callable[[Site], Path]] = {
    "zip": lambda site: saved(site, {"a": Call(os.system, site.command)}),
    "zip, in a tensor": lambda site: saved(site, hooks(site)),
    "legacy": lambda site: saved(
        site, {"a": Call(exec, site.code)}, _use_new_zipfile_serialization=False
    ),
    "TorchScript": torchscript,
    "tar": old_tar,
    "overlapping": lambda site: header(site, tensors(a=[0, 8], b=[4, 12])),
    "a huge header": lambda site: header(site, "{}", 2**62),
    "nested header": lambda site: header(site, "{" + '"a":{' * 10**5),
    "metadata": lambda site: header(
        site, json.dumps({"__metadata__": {"format": site.code, "a": ["b"]}})
    ),
}


# --------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------

EVIL_CLASSES = "\n".join(
    f"class {name}:\n    pass" for name in ("EvilConfig", "EvilModel", "EvilTokenizer")
)
AUTO_MAP = {
    "AutoConfig": "evil_module.EvilConfig",
    "AutoModel": "evil_module.EvilModel",
    "AutoModelForMaskedLM": "evil_module.EvilModel",
    "AutoModelForCausalLM": "evil_module.EvilModel",
}


def with_code(folder: Path, site: Site, name: str = "evil_module.py") -> Path:
    """Add a module to a folder."""
    made = site.module(more=EVIL_CLASSES)
    if made != folder / name:
        shutil.copy(made, folder / name)
    return folder


def with_pickle(site: Site, folder: Path, name: str = "pytorch_model.bin") -> Path:
    """Replace the weights with a pickle."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save({"a": Call(os.system, site.command)}, folder / name)
    return folder


def sharded(site: Site, index: str, target: str) -> Path:
    """Refer to weights in a file elsewhere."""
    folder = site.teacher()
    state = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"a": Call(os.system, site.command)}, (folder / target).resolve())
    (folder / index).write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, target)})
    )
    return folder


def linked(site: Site) -> Path:
    """Link the weights to a pickle outside."""
    folder = site.teacher()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(saved(site, {"a": Call(os.system, site.command)}))
    return folder


def elsewhere(site: Site, name: str, key: str) -> Path:
    """Refer to another folder whose weights are a pickle."""
    other = with_code(with_pickle(site, site.teacher()), site).rename(site.folder / "evil-other")
    return site.edited(name, **{key: str(other), "peft_type": "LORA", "auto_map": AUTO_MAP})


def templated(site: Site) -> Path:
    """Put code into a chat template."""
    jinja = "{{ cycler.__init__.__globals__.os.system(%r) }}" % site.command  # noqa: UP031 (braces)
    folder = site.edited("tokenizer_config.json", chat_template=jinja)
    (folder / "chat_template.jinja").write_text(jinja)
    return folder


def custom_generate(site: Site) -> Path:
    """Add a custom generate()."""
    folder = site.edited("generation_config.json", custom_generate=".")
    (folder / "custom_generate").mkdir()
    with_code(folder / "custom_generate", site, "generate.py")
    return folder


FOLDERS: dict[str, Callable[[Site], Path]] = {
    "pytorch_model.bin": lambda site: with_pickle(site, site.teacher()),
    "auto_map": lambda site: with_code(site.edited("config.json", auto_map=AUTO_MAP), site),
    "auto_map of an unknown type": lambda site: with_code(
        site.edited("config.json", auto_map=AUTO_MAP, model_type="evil"), site
    ),
    "tokenizer's auto_map": lambda site: with_code(
        site.edited(
            "tokenizer_config.json",
            tokenizer_class="EvilTokenizer",
            auto_map={"AutoTokenizer": ["evil_module.EvilTokenizer", "evil_module.EvilTokenizer"]},
        ),
        site,
    ),
    "custom generate": custom_generate,
    "chat template": templated,
    "index outside": lambda site: sharded(
        site, "model.safetensors.index.json", "../evil-outside.safetensors"
    ),
    "shards": lambda site: sharded(
        site, "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"
    ),
    "_name_or_path": lambda site: elsewhere(site, "config.json", "_name_or_path"),
    "adapter": lambda site: elsewhere(site, "adapter_config.json", "base_model_name_or_path"),
    "kernel": lambda site: site.edited(
        "config.json", attn_implementation="evil/kernel", use_kernels=True
    ),
    "link": linked,
}


# --------------------------------------------------------------------------------------------------
# Configurations, texts, checkpoints
# --------------------------------------------------------------------------------------------------


def configured(site: Site, **changes: Any) -> Path:
    """Write a student's configuration."""
    return site.write(
        "evil.json", json.dumps(json.loads(Path(site.world.config("bert")).read_text()) | changes)
    )


CONFIGS: dict[str, Callable[[Site], Path]] = {
    "auto_map": lambda site: (
        with_code(configured(site, auto_map=AUTO_MAP, architectures=["os.system"]).parent, site)
        / "evil.json"
    ),
    "dtype": lambda site: configured(
        site, dtype="__import__('os')", torch_dtype=f"__import__('os').system({site.command!r})"
    ),
    "nested": lambda site: site.write("evil.json", '{"a":' * NEST),
}


def with_script(site: Site) -> Path:
    """Add a loading script, and a card that names it, to a folder of data."""
    folder = site.folder / "dump"
    folder.mkdir()
    for name in ("dump.py", "evil_module.py"):
        site.module(f"dump/{name}")
    data_files = f"!!python/object/apply:os.system ['{site.command}']"
    site.write(
        "dump/README.md",
        "---\nconfigs:\n- config_name: default\n  script: dump.py\n  data_files:"
        f" {data_files}\n---\n",
    )
    rows = [{"text": line} for line in make_lines(30)]
    site.write("dump/dump.json", "\n".join(map(json.dumps, rows)))
    site.write(
        "dump/dataset_infos.json",
        json.dumps({"default": {"builder_name": "dump", "script": "dump.py"}}),
    )
    return folder


def arrow_table(site: Site) -> pyarrow.Table:
    """Make a table with a column type that reading once unpickled."""
    payload = pickle.dumps(Call(os.system, site.command), 2)
    of_type = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": payload,
    }
    field = pyarrow.field("text", pyarrow.string(), metadata=of_type)
    metadata = {
        "huggingface": json.dumps(
            {"info": {"features": {"text": {"_type": "evil_module.EvilConfig"}}}}
        ),
        "pandas": payload,
    }
    return pyarrow.table([make_lines(30)], pyarrow.schema([field], metadata=metadata))


def parquet(site: Site) -> Path:
    """Write the table as Parquet."""
    pyarrow.parquet.write_table(arrow_table(site), site.folder / "evil.parquet")
    return site.folder / "evil.parquet"


def arrow(site: Site) -> Path:
    """Write the table as an Arrow stream."""
    table = arrow_table(site)
    with (
        pyarrow.OSFile(str(site.folder / "evil.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)
    return site.folder / "evil.arrow"


TEXTS: dict[str, Callable[[Site], Path]] = {
    "loading script": with_script,
    "parquet": parquet,
    "arrow": arrow,
}


def checkpoint(site: Site, change: Callable[[Path], None]) -> Path:
    """Make a run's folder with a changed checkpoint and a matching manifest."""
    run = site.folder / "run"
    ended = in_child(
        lambda: train.main(site.world.flags("bert", run, **SHORT)), site.folder / "first-log"
    )
    assert ended.status == 0, ended
    newest, *older = checkpointing.checkpoints_in(run / "checkpoints")
    for path in older:
        shutil.rmtree(path)
    change(newest)
    settle_manifest(newest)
    return run


SHORT = {"max_steps": 1, "gradient_accumulation_steps": 1}


def pickled_file(site: Site) -> Callable[[Path], None]:
    """Replace the optimizer with a pickle; add others under the names of torch's checkpoints."""

    def change(path: Path) -> None:
        for name in ("optimizer.safetensors", "optimizer.pt", ".metadata", "__0_0.distcp"):
            (path / name).write_bytes(pickle.dumps({"a": Call(os.system, site.command)}))

    return change


def endless(path: Path) -> None:
    """Name an endless device in the manifest."""
    manifest = json.loads((path / checkpointing.MANIFEST).read_bytes())
    manifest["files"]["/dev/zero"] = {"bytes": 0, "sha256": "0" * 64}
    (path / checkpointing.MANIFEST).write_text(json.dumps(manifest))


def odd_state(path: Path) -> None:
    """Leave out everything that a run needs."""
    (path / checkpointing.STATE).write_text(json.dumps({"step": 1, "flags": [], "identity": 7}))


CHECKPOINTS: dict[str, Callable[[Site], Path]] = {
    "pickle": lambda site: checkpoint(site, pickled_file(site)),
    "endless file": lambda site: checkpoint(site, endless),
    "odd state": lambda site: checkpoint(site, odd_state),
}


# --------------------------------------------------------------------------------------------------
# Every place that reads a kind of file
# --------------------------------------------------------------------------------------------------

Entry = tuple[str, Callable[[list[str]], None], list[object]]  # name, program, flags


def training(site: Site, name: str, **changes: Any) -> Entry:
    """Train with a malicious file."""
    flags = site.world.flags(site.kind, site.folder / f"run-{name}", **SHORT, **changes)
    return f"train {name}", train.main, flags


def binarizing(site: Site, text: Path, tokenizer: Path) -> Entry:
    """Binarize a malicious text, or with a malicious tokenizer."""
    return (
        "binarize",
        binarized_data.main,
        [
            "--file_path",
            text,
            "--tokenizer_type",
            site.kind,
            "--tokenizer_name",
            tokenizer,
            "--dump_file",
            site.folder / "out" / "dump",
        ],
    )


def of_text(site: Site, path: Path) -> Iterator[Entry]:
    """Read as text."""
    yield binarizing(site, path, site.world.teachers[site.kind])
    yield (
        "prepare",
        prepare_text.main,
        ["--file_path", path, "--output", site.folder / "out" / "text"],
    )


def of_folder(site: Site, folder: Path) -> Iterator[Entry]:
    """Read as a teacher, with its tokenizer."""
    program = extract_distilbert if site.kind == "bert" else extract
    yield training(site, "teacher_name", teacher_name=folder)
    yield (
        "extract",
        program.main,
        [
            "--model_type",
            site.kind,
            "--model_name",
            folder,
            "--dump_checkpoint",
            site.folder / "out" / "first.pth",
        ],
    )
    yield binarizing(site, site.world.text, folder)
    yield (
        "inspect",
        inspect_data.main,
        [site.world.data(site.kind), "--tokenizer_type", site.kind, "--tokenizer_name", folder],
    )


def of_weights(site: Site, path: Path) -> Iterator[Entry]:
    """Read as first weights, and as a teacher's."""
    yield training(site, "student_pretrained_weights", student_pretrained_weights=path)
    folder = site.teacher()
    (folder / "model.safetensors").unlink()
    shutil.copy(
        path,
        folder / ("model.safetensors" if path.suffix == ".safetensors" else "pytorch_model.bin"),
    )
    yield from list(of_folder(site, folder))[:2]


def of_config(site: Site, path: Path) -> Iterator[Entry]:
    """Read as a student's configuration, and in its teacher's place."""
    yield training(site, "student_config", student_config=path)
    folder = site.teacher()
    merged = (
        path.read_text()
        if len(path.read_text()) > 10**5
        else json.dumps(
            json.loads((folder / "config.json").read_text()) | json.loads(path.read_text())
        )
    )
    (folder / "config.json").write_text(merged)
    yield from of_folder(site, folder)


def of_pickle(site: Site, path: Path) -> Iterator[Entry]:
    """Read as everything that may be a pickle."""
    yield training(site, "data_file", data_file=path)
    yield training(site, "token_counts", token_counts=path)
    yield (
        "count",
        token_counts.main,
        ["--data_file", path, "--token_counts_dump", site.folder / "out" / "counts"],
    )
    yield "inspect", inspect_data.main, [path, "--verify"]
    yield "inspect", inspect_data.main, [path]
    yield from of_weights(site, path)
    yield from of_text(site, path)
    yield training(site, "student_config", student_config=path)


def of_run(site: Site, run: Path) -> Iterator[Entry]:
    """Resume from a checkpoint."""
    for mode in (True, "auto"):
        name, program, flags = training(site, "resume", resume=mode)
        flags[flags.index("--dump_path") + 1] = str(run)
        yield f"{name} {mode}", program, flags


KINDS: list[
    tuple[str, dict[str, Callable[[Site], Path]], Callable[[Site, Path], Iterator[Entry]]]
] = [
    ("pickle", PICKLES, of_pickle),
    ("weights", WEIGHTS, of_weights),
    ("folder", FOLDERS, of_folder),
    ("configuration", CONFIGS, of_config),
    ("text", TEXTS, of_text),
    ("checkpoint", CHECKPOINTS, of_run),
]
CASES = [
    (f"{kind} {name}", make, entries)
    for kind, makers, entries in KINDS
    for name, make in makers.items()
]


# --------------------------------------------------------------------------------------------------
# The trial
# --------------------------------------------------------------------------------------------------

STARTS = {
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "pty.spawn",
    "compile",
    "exec",
    "import",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def watch(site: Site, places: list[Path]) -> None:
    """Report what this process later executes of a malicious file or writes outside `places`."""
    allowed = tuple(map(str, [*places, "/dev/"]))
    sys.dont_write_bytecode = True

    def on_event(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if (
                flags
                and flags & WRITING
                and isinstance(path, str)
                and not os.path.abspath(path).startswith(allowed)
            ):
                say("WROTE", event, path)
        elif event in STARTS and "evil" in told(arguments):
            say("EXECUTED", event, told(arguments)[:200])
        elif event == "socket.connect":
            say("CONNECTED", event, arguments[1:])

    def say(what: str, event: str, detail: Any) -> None:
        os.write(2, f"{what} {event} {detail!r}\n".encode(errors="replace"))

    sys.addaudithook(on_event)


def told(arguments: tuple) -> str:
    """Describe an event's arguments; code by its file and constants."""
    return " ".join(
        (
            f"{part.co_filename} {part.co_consts} {part.co_names}"
            if isinstance(part, types.CodeType)
            else str(part)[:4000]
        )
        for part in arguments
    )


def malicious(bench) -> None:
    """T19: read one malicious file in every place: executes nothing, prints no traceback."""
    name, make, entries = CASES[bench.number % len(CASES)]
    kinds = ["bert", "gpt2"] if entries is of_folder else ["bert"]
    for kind in kinds:
        site = Site(bench.world, bench.folder / kind, bench.folder / "evil-canary", kind)
        (site.folder / "out").mkdir(parents=True)
        for place, program, flags in entries(site, make(site)):
            attempt(bench, site, f"{name} at {place}", program, list(map(str, flags)))
            bench.count()


def attempt(
    bench, site: Site, where: str, program: Callable[[list[str]], None], flags: list[str]
) -> None:
    """Run a program that reads a malicious file in a child."""
    temporary = bench.folder / "tmp"
    temporary.mkdir(exist_ok=True)

    def run() -> None:
        tempfile.tempdir = str(temporary)
        watch(site, [bench.folder, Path(datasets.config.HF_DATASETS_CACHE)])
        program(flags)

    ended = in_child(run, bench.folder / "log", LIMIT_S)
    for line in ended.text.splitlines():
        if line.startswith(("EXECUTED", "WROTE", "CONNECTED")):
            bench.fail(f"{where}: {line[:300]}")
    for canary in bench.folder.glob(f"{site.canary.name}*"):  # numpy appends an ending
        canary.unlink()
        bench.fail(f"{where}: executed, the canary is there ({ended})")
    if ended.status == -signal.SIGSEGV and ENDS_TORCH in where:
        bench.note(
            f"{where}: torch's own reader runs out of stack and ends the process; nothing is"
            " executed"
        )
    elif not ended.is_clean:
        bench.fail(f"{where}: {ended}")
