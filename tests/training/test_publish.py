"""publish.py against a stand-in of the hub's API: what is uploaded, and what is refused."""

import base64
import contextlib
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_process
from stand_ins import ROOT, make_model

PROGRAM = ROOT / "scripts" / "publish.py"


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests of one upload: who am I, make a repository, which way, commit."""

    uploaded: dict[str, bytes] = {}
    token = "hf_right"

    def do_GET(self):
        self._read()
        self._answer({"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def do_POST(self):
        body = self._read()
        if "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            rows = [
                {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files
            ]
            return self._answer({"files": rows})
        if "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.uploaded[value["path"]] = base64.b64decode(value["content"])
            address = f"http://{self.headers['Host']}/me/student/commit/abc"
            return self._answer({"commitUrl": address, "commitOid": "abc"})
        return self._answer({"url": f"http://{self.headers['Host']}/me/student", "warnings": []})

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content: dict) -> None:
        is_right = self.headers.get("Authorization") == f"Bearer {self.token}"
        text = json.dumps(content if is_right else {"error": "Invalid token"}).encode()
        self.send_response(200 if is_right else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@contextlib.contextmanager
def hub() -> Iterator[dict[str, str]]:
    """Serve a hub; yield the environment in which huggingface_hub talks to it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Hub.uploaded.clear()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        yield {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def run(teachers, tmp_path) -> Path:
    """A run folder with its model/ and what is not for the hub."""
    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    make_model("bert", 200).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((teachers["bert"] / name).read_bytes())
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# student\n")
    (tmp_path / "run" / "checkpoint.pth").write_bytes(b"x")
    (tmp_path / "run" / "config.json").write_bytes((folder / "config.json").read_bytes())
    return tmp_path / "run"


def publish(run: Path, *flags: str, **environment: str):
    return run_process(sys.executable, PROGRAM, run, *flags, **environment)


def test_the_model_and_nothing_else_is_uploaded(run, tmp_path):
    with hub() as environment:
        done = publish(run, "--model_id", "me/student", **environment, HF_TOKEN=Hub.token)
    assert done.returncode == 0, done.stderr
    assert "Published: " in done.stdout and "Traceback" not in done.stderr
    model = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    assert Hub.uploaded == model


def test_a_refused_token_is_one_line_and_nothing_is_uploaded(run, tmp_path):
    with hub() as environment:
        done = publish(run, "--model_id", "me/student", **environment, HF_TOKEN="hf_wrong")
    assert done.returncode == 2 and not Hub.uploaded
    (line,) = [line for line in done.stderr.splitlines() if "ERROR" in line or "error" in line]
    assert "the hub refused it" in line and "hf auth login" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: (model / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda model: (model / "tokenizer_config.json").unlink(), "has no tokenizer"),
        (lambda model: (model / "old.pth").write_bytes(b"x"), "holds old.pth"),
    ],
)
def test_an_incomplete_or_private_folder_is_refused(change, message, run):
    change(run / "model")
    done = publish(run, "--dry_run")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_name_that_is_no_name_is_refused(run):
    done = publish(run, "--model_id", "student")
    assert done.returncode == 2 and "expected OWNER/NAME" in done.stderr
