"""The server: what it takes to start, and what can be read through it, by those who may and those who may not."""

from __future__ import annotations

import json
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_helpers import FAKE

from dreamfusion_fast import cli
from dreamfusion_fast.app.guard import PASSWORD, POLICY
from dreamfusion_fast.errors import UserError

pytest.importorskip("gradio")

from dreamfusion_fast.app.serve import serving

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a secret beside the runs, and links to it."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "secret.txt").write_text("xyzzy")
    run = folder / "runs" / "a-cup"
    run.mkdir(parents=True)
    (run / "job.yaml").write_text("prompt: a cup\n")
    (run / "checkpoint.safetensors").write_bytes(b"xyzzy")
    (run / "mesh.glb").symlink_to(folder / "secret.txt")
    (run / "preview.png").symlink_to(folder / "secret.txt")
    (folder / "runs" / "link").symlink_to(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serving(str(folder / "runs"), "127.0.0.1", 0, None, command=FAKE) as address:
        yield address


def fetch(address: str, path: str = "", data: bytes | None = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    request = urllib.request.Request(address + path, data, headers)
    try:
        with OPENER.open(request, timeout=60) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def test_the_page_asks_nobody_else(address: str) -> None:
    status, page, headers = fetch(address)
    assert status == 200
    assert headers["content-security-policy"] == POLICY
    config = json.loads(fetch(address, "config")[1])
    assert config["analytics_enabled"] is False
    assert config["space_id"] is None
    assert b"fonts.googleapis" not in page + fetch(address, "theme.css")[1]
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_no_file_of_the_machine_can_be_read(address: str, folder: Path) -> None:
    run = folder / "runs" / "a-cup"
    paths = [folder / "secret.txt", run / "checkpoint.safetensors", run / "mesh.glb", run / "job.yaml", "/etc/passwd",
             f"{run}/../../secret.txt", folder / "runs" / "link" / "secret.txt", Path(__file__), "/proc/self/environ",
             "../secret.txt", "~/.bashrc"]  # fmt: skip
    for path in map(str, paths):
        for name in (
            path,
            urllib.parse.quote(path, safe=""),
            path.replace("..", "%2e%2e"),
            f"file://{path}",
            f"/{path}",
        ):
            for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/", "gradio_api/stream/"):
                status, body, _ = fetch(address, route + urllib.parse.quote(name, safe="/%"))
                assert status >= 400, (route, name)
                assert b"xyzzy" not in body
    assert fetch(address, "gradio_api/file=http://127.0.0.1:1/")[0] == 403


def test_what_a_page_says_of_itself_is_not_believed() -> None:
    from dreamfusion_fast.app.page import Seen

    seen = Seen("a", "done", (1, 2, 3), ("a", "b"), "x")
    assert Seen.of_text(seen.to_text()) == seen
    wrong = [
        "",
        "3",
        "{",
        "[]",
        None,
        5,
        '{"files": [1], "names": []}',
        '{"files": 3}',
        '{"files": [0,0,0], "names": 1}',
    ]
    for text in [*wrong, seen.to_text().replace("state", "stage")]:
        assert Seen.of_text(text) == Seen()


def test_links_are_not_shown(address: str, folder: Path) -> None:
    """A run whose mesh is a link counts as one without a mesh."""
    from dreamfusion_fast.app.jobs import Jobs
    from dreamfusion_fast.app.page import Page
    from dreamfusion_fast.app.runs import Runs

    jobs = Jobs(Runs(folder / "runs"), FAKE)
    answer = Page(jobs, folder)._answer("a-cup", "")
    jobs.close()
    assert "there is no mesh yet" in str(answer)
    assert "secret.txt" not in str(answer)


def test_names_of_elsewhere_are_refused(address: str) -> None:
    assert fetch(address, Host="example.org")[0] == 403
    assert fetch(address, "config", Host="example.org:80")[0] == 403


def test_nothing_can_be_uploaded(address: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nsome text\r\n--x--\r\n'
    status, _, _ = fetch(address, "gradio_api/upload", body, **{"Content-Type": "multipart/form-data; boundary=x"})
    assert status >= 400


def test_one_server_has_a_folder(address: str, folder: Path) -> None:
    with (
        pytest.raises(UserError, match=r"runs is in use by process"),
        serving(str(folder / "runs"), "127.0.0.1", 0, None, command=FAKE),
    ):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_it_is_reached_whatever_proxy_there_is(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    before = dict(os.environ)
    with serving(str(tmp_path), host, 0, None, command=FAKE) as address:
        assert fetch(address)[0] == 200
        assert fetch(address, f"gradio_api/file={__file__}")[0] == 403
    assert os.environ == before


def test_without_a_password_nothing_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(str(tmp_path), "0.0.0.0", 0, ("ann", "correct horse"), command=FAKE) as address:
        address = address.replace("0.0.0.0", "127.0.0.1")
        for path in ("config", "gradio_api/info", "gradio_api/file=/etc/passwd"):
            status, body, _ = fetch(address, path)
            assert status in (401, 403, 404), path
            assert b"Preset" not in body
        asked = json.dumps({"fn_index": 0, "data": [None], "session_hash": "x"}).encode()
        for path in ("gradio_api/run/predict", "gradio_api/queue/join", "gradio_api/call/predict", "gradio_api/upload"):
            assert fetch(address, path, asked, **{"Content-Type": "application/json"})[0] >= 400, path
        assert b"Preset" not in fetch(address)[1]
        wrong, right = (f"username=ann&password={word}".encode() for word in ("wrong+horse", "correct+horse"))
        assert fetch(address, "login", wrong)[0] == 400
        status, _, headers = fetch(address, "login", right)
        assert status == 200
        # The other cookie of gradio's is for TLS alone.
        cookies = "; ".join(part.partition(";")[0] for key, part in headers.items() if key.lower() == "set-cookie")
        assert b"Preset" in fetch(address, "config", Cookie=cookies)[1]
    said = capfd.readouterr()
    assert "horse" not in said.out + said.err


def test_wrong_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PASSWORD, raising=False)
    runs = ["--runs", str(tmp_path)]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["--host", "0.0.0.0"], "--host 0.0.0.0 lets others in"),
            (["--port", "70000"], "--port: got 70000, want 0 to 65535"),
            (["--port", "x"], "argument --port: invalid int value: 'x'; see dreamfusion-fast app --help"),
            (["--auth", "ann:secret"], "--auth: want a password of at least 8 letters"),
            (["--port", port], f"cannot listen at 127.0.0.1, port {port}: Address already in use; choose others with"),
            (["--host", "no.such.host.invalid", "--auth", "a:12345678"], "cannot listen at no.such.host.invalid"),
            (["--device", "tpu", "--port", "0"], "tpu"),
        ):
            assert cli.main(["app", *runs, *arguments]) == 2
            printed = capsys.readouterr().err
            assert printed.count("\n") == 1, printed
            assert message in printed
            assert "secret" not in printed


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["app", "--help"]) == 0
    described = capsys.readouterr().out
    assert all(option in described for option in ("--runs", "--host", "--port", "--auth", "--guidance", "--device"))
