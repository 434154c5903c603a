"""Output that can't be written, error lines behind a progress bar, Ctrl-C during imports."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run_process
from stand_ins import ROOT

PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
if __name__ == "__main__":
    from distil.system.start import begin_program

    begin_program()
{{imports}}
import tqdm
from utils import InputError, bar_options, logger, run_program, setup_logging

def main():
    setup_logging()
{{body}}

run_program(main{{options}})
"""


def program(path: Path, *body: str, imports: str = "", options: str = "") -> Path:
    """Write a program whose main is `body`."""
    lines = "\n".join(f"    {line}" for line in body)
    path.write_text(PROGRAM.format(imports=imports, body=lines, options=options))
    return path


def started(path: Path, **streams) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(path)], **streams)


def ended(path: Path, stdout: int) -> tuple[int, str]:
    """Run a program with an output: (status, what it wrote to standard error)."""
    process = started(path, stdout=stdout, stderr=subprocess.PIPE, text=True)
    os.close(stdout)
    errors = process.communicate(timeout=60)[1]
    return process.returncode, errors


def closed_pipe() -> int:
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("num_lines", [1, 100_000])
def test_a_reader_that_wants_no_more_ends_a_program_quietly(num_lines, tmp_path):
    done = tmp_path / "done"
    path = program(tmp_path / "a.py", f"print('x\\n' * {num_lines})", f"open({str(done)!r}, 'w')")
    assert ended(path, closed_pipe()) == (0, "") and done.exists()


@pytest.mark.parametrize("num_lines", [1, 100_000])
def test_a_result_that_a_full_disk_did_not_take_is_no_success(num_lines, tmp_path):
    done = tmp_path / "done"
    path = program(tmp_path / "a.py", f"print('x\\n' * {num_lines})", f"open({str(done)!r}, 'w')")
    status, errors = ended(path, full())
    assert status == 2 and done.exists() and errors.count("\n") == 1
    assert "standard output: [Errno 28] No space left on device, it is not complete" in errors


def test_what_training_prints_may_be_lost(tmp_path):
    path = program(tmp_path / "a.py", "print('x')", options=", prints_result=False")
    assert ended(path, full()) == (0, "")


@pytest.mark.parametrize("streams", ["2>&-", ">&- 2>&- <&-", "2>/dev/full"])
def test_a_program_needs_no_streams(streams, tmp_path):
    """Files would take the numbers of closed streams: what C code prints would be their content."""
    kept = tmp_path / "kept"
    body = (
        f"file = open({str(kept)!r}, 'w')",
        "assert file.fileno() > 2",
        "logger.warning('w')",
        "for _ in tqdm.tqdm(range(3), **bar_options(0)): pass",
        "file.write('whole')",
    )
    path = program(tmp_path / "a.py", *body)
    done = run_process("sh", "-c", f"exec '{sys.executable}' '{path}' {streams}")
    assert done.returncode == 0 and kept.read_text() == "whole"


def on_a_terminal(path: Path, after: bytes = b"", keys: bytes = b"") -> tuple[int, str]:
    """Run a program on a terminal, and press keys after some output: (status, output)."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(path)])
    printed = b""
    while True:
        try:
            printed += os.read(terminal, 1000)
        except OSError:  # the program has ended
            break
        if keys and after in printed:
            os.write(terminal, keys)
            keys = b""
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), printed.decode()


OPTIONS = "{'mininterval': 0, 'dynamic_ncols': False, 'ncols': 60, 'nrows': 24}"
BAR = f"bar = tqdm.tqdm(total=9, **(bar_options() | {OPTIONS}))", "bar.update(3)"


def test_error_and_log_lines_begin_at_the_start_of_a_line(tmp_path):
    body = (*BAR, "logger.warning('odd')", "bar.update(3)", "raise InputError('bad')")
    status, printed = on_a_terminal(program(tmp_path / "a.py", *body))
    lines = printed.replace("\r", "\n").split("\n")
    assert status == 2 and "a.py: error: bad" in lines
    assert any(line.endswith("WARNING odd") and line.startswith("20") for line in lines)
    assert any(line.startswith(" 67%|") for line in lines)


def test_ctrl_c_on_a_terminal_is_a_line_of_its_own(tmp_path):
    path = program(tmp_path / "a.py", *BAR, "import time; time.sleep(60)")
    status, printed = on_a_terminal(path, b"33%", b"\x03")
    lines = printed.replace("\r", "\n").split("\n")
    assert status == 130 and "a.py: error: interrupted" in lines and "Traceback" not in printed


SLOW = """
try:
    import {name}
except BaseException as error:
    raise ImportError("no {name}") from error
"""


@pytest.mark.parametrize("is_late", [False, True])
def test_ctrl_c_during_imports_is_a_line_though_the_import_converts_it(is_late, tmp_path):
    """As the initialization of C extensions does."""
    ready = tmp_path / "ready"
    (tmp_path / "slow.py").write_text(f"open({str(ready)!r}, 'w')\nimport time\ntime.sleep(60)\n")
    (tmp_path / "outer.py").write_text(SLOW.format(name="slow"))
    imports = f"sys.path.insert(1, {str(tmp_path)!r})\n{'' if is_late else 'import outer'}"
    path = program(tmp_path / "a.py", "import outer", imports=imports)
    process = started(path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and errors == "a.py: error: interrupted\n"


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_a_late_import_cleans_up_behind_it(number, status, tmp_path):
    """An import within main: a library loads a part of itself when it is first used."""
    ready, folder = tmp_path / "ready", tmp_path / "work"
    folder.mkdir()
    (tmp_path / "slow.py").write_text(f"open({str(ready)!r}, 'w')\nimport time\ntime.sleep(1)\n")
    imports = f"sys.path.insert(1, {str(tmp_path)!r})\nimport tempfile, time"
    imports += "\nfrom distil.system.signals import exit_on_sigterm\nexit_on_sigterm()"
    body = f"tempfile.TemporaryDirectory(dir={str(folder)!r})"
    body = f"folder = {body}", "with folder:", "    import slow", "    time.sleep(60)"
    process = started(program(tmp_path / "a.py", *body, imports=imports), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == status and b"Traceback" not in errors
    assert not list(folder.iterdir())


def test_ctrl_c_during_a_last_import_does_not_end_the_interpreters_own_end(tmp_path):
    """The alarm that repeats it must not go off behind the handlers: status -14."""
    (tmp_path / "late.py").write_text(
        "import os, signal, time\n"
        "class Slow:\n"
        "    def __del__(self, sleep=time.sleep):\n"
        "        sleep(1.5)\n"
        "slow = Slow()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    imports = f"sys.path.insert(1, {str(tmp_path)!r})\nfrom distil.system import start"
    body = "start.RETRY_S = 1.0", "import late"
    done = run_process(sys.executable, program(tmp_path / "a.py", *body, imports=imports))
    assert (done.returncode, done.stderr) == (130, "a.py: error: interrupted\n")


def test_ctrl_c_at_the_end_of_an_import_is_heeded_before_main_goes_on(tmp_path):
    (tmp_path / "late.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    imports = f"sys.path.insert(1, {str(tmp_path)!r})"
    path = program(tmp_path / "a.py", "import late", "raise InputError('x')", imports=imports)
    done = run_process(sys.executable, path)
    assert (done.returncode, done.stderr) == (130, "a.py: error: interrupted\n")


KILLING = """
import os, signal

class Killing:
    is_first = True

    def write(self, text):
        if "error: x" in text and self.is_first:
            self.is_first = False
            os.kill(os.getpid(), signal.SIGINT)
        return os.write(2, text.encode())

    def __getattr__(self, name):
        return getattr(sys.__stderr__, name)

sys.stderr = Killing()
"""


def test_ctrl_c_while_an_error_is_printed_is_a_line(tmp_path):
    done = run_process(
        sys.executable, program(tmp_path / "a.py", "raise InputError('x')", imports=KILLING)
    )
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert done.stderr.endswith("a.py: error: interrupted\n")


LOST = """
class Slow:
    def __del__(self):
        open({ready!r}, "w").close()
        time.sleep(1)
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_whose_error_is_lost_raises_it_again(number, status, tmp_path):
    """Python ignores what is raised in a __del__; blocks that clean up are not disturbed."""
    ready, cleaned = tmp_path / "ready", tmp_path / "cleaned"
    imports = "import time\nfrom distil.system.signals import exit_on_sigterm\nexit_on_sigterm()"
    imports += LOST.format(ready=str(ready))
    clean = f"    time.sleep(1); open({str(cleaned)!r}, 'w').close()"
    body = "thing = Slow()", "try:", "    del thing", "    time.sleep(60)", "finally:", clean
    process = started(program(tmp_path / "a.py", *body, imports=imports), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == status and cleaned.exists()
    assert errors.count(b"a.py: error: interrupted") == (number == signal.SIGINT)


@pytest.mark.parametrize(
    "module, words",
    [("distil.workflow", "'b.py', {}"), ("distil.reporting.task_runs", "['b.py'], 'b'")],
)
def test_ctrl_c_before_the_first_statement_of_a_started_program_is_its_line(
    module, words, tmp_path
):
    """A terminal sends it to all programs; there the interpreter itself may still be starting."""
    path = program(tmp_path / "b.py", "time.sleep(60)", imports="import time")
    early = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    path.write_text(early + path.read_text())
    imports = f"import pathlib\nimport {module} as module\n"
    imports += f"module.ROOT = module.SCRIPTS = pathlib.Path({str(tmp_path)!r})"
    starter = program(tmp_path / "a.py", f"module.call({words})", imports=imports)
    done = run_process(sys.executable, starter)
    assert "Traceback" not in done.stderr and "interrupted" in done.stderr, done.stderr


@pytest.mark.parametrize("path", [ROOT / "train.py", *sorted((ROOT / "scripts").glob("*.py"))])
def test_every_program_begins_before_its_slow_imports(path):
    code = path.read_text(encoding="utf-8").split('"""', 2)[2]
    begins = code.index("    begin_program()")
    before = [line for line in code[:begins].splitlines() if " import " in f" {line}"]
    assert len(before) <= 3 and not any("numpy" in line or "torch" in line for line in before)


# Runs a program where importing torch or transformers raises an error.
WITHOUT_TORCH = """
import runpy, sys
sys.modules |= dict.fromkeys(["torch", "transformers", "matplotlib"])
sys.argv = sys.argv[1:]
sys.path[0] = {folder!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("path", [ROOT / "train.py", *sorted((ROOT / "scripts").glob("*.py"))])
def test_flags_are_read_before_the_slow_imports(path):
    code = WITHOUT_TORCH.format(folder=str(path.parent))
    for flag, status in [("--help", 0), ("--mistyped", 2)]:
        done = run_process(sys.executable, "-c", code, str(path), flag)
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
        assert status == 2 or "usage: " in done.stdout


CONTINUED = """
import datetime, os, sys, time
sys.path.insert(0, {root!r})
from torch import distributed
from distil.system.watch import Watch
store = distributed.TCPStore("127.0.0.1", 0, is_master=True)
store.set("beat/0", "1")
watch = Watch(store, rank=1, world_size=2, timeout_s=1)
print("ready", flush=True)
time.sleep(0.5)
print(watch.describe(), flush=True)
"""


def test_a_rank_that_was_stopped_does_not_report_rank_0(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(CONTINUED.format(root=str(ROOT)))
    process = started(path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    printed, errors = process.communicate(timeout=60)
    assert printed.startswith("rank 1 itself did not run for ") and errors == ""
