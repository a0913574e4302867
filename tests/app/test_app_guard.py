"""Who comes in: hosts, passwords, and requests that are refused."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from dreamfusion_fast.app.guard import PASSWORD, POLICY, Guard, checker, credentials, is_local
from dreamfusion_fast.errors import UserError


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.7", False),
        ("example.org", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_which_hosts_are_this_machine_alone(host: str, local: bool) -> None:
    assert is_local(host) == local


def test_nobody_is_asked_at_home_and_everybody_elsewhere() -> None:
    assert credentials(None, "127.0.0.1", {}) is None
    with pytest.raises(UserError, match=r"--host 0.0.0.0 lets others in.*--auth USER, or DREAMFUSION_FAST_APP_AUTH="):
        credentials(None, "0.0.0.0", {})
    assert credentials("ann:a:long:word", "0.0.0.0", {}) == ("ann", "a:long:word")
    assert credentials(None, "::", {PASSWORD: "ann:long enough"}) == ("ann", "long enough")
    assert credentials(None, "127.0.0.1", {PASSWORD: "ann:long enough"}) == ("ann", "long enough")


@pytest.mark.parametrize("given", [":long enough", "ann:short", " ann:long enough", "ann:", ""])
def test_bad_ones_are_refused_and_not_printed(given: str) -> None:
    for arguments in ((given, "0.0.0.0", {}), (None, "0.0.0.0", {PASSWORD: given or "x"})):
        with pytest.raises(UserError) as error:
            credentials(*arguments)
        assert "long enough" not in str(error.value)
        assert "short" not in str(error.value)


def test_a_user_alone_is_asked_for_the_password(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("getpass.getpass", lambda prompt: "typed in the dark" if "ann" in prompt else "")
    assert credentials("ann", "0.0.0.0", {}) == ("ann", "typed in the dark")
    monkeypatch.setattr(sys, "stdin", type("Pipe", (), {"isatty": lambda self: False})())
    with pytest.raises(UserError, match=f"no terminal to ask for a password; set {PASSWORD}=USER:PASSWORD"):
        credentials("ann", "0.0.0.0", {})


def test_only_the_right_pair_is_right(monkeypatch: Any) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    right = checker("ann", "pässword")
    tried = [("ann", "pässword"), ("ann", "password"), ("bob", "pässword"), ("", ""), ("ann", "pässword2")]
    assert [asyncio.run(right(*pair)) for pair in tried] == [True, False, False, False, False]
    assert waited == [1.0] * 4


def answer(guard: Guard, path: str, host: str | None) -> tuple[int, dict[bytes, bytes]]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if host is None else [(b"Host", host.encode())]
    asyncio.run(guard({"type": "http", "path": path, "headers": headers}, None, send))  # type: ignore[arg-type]
    return sent[0]["status"], dict(sent[0]["headers"])


async def application(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": b"here"})


def test_other_names_of_this_machine_are_refused() -> None:
    guard = Guard(application, local=True)
    for host, status in (
        ("127.0.0.1:7860", 200),
        ("localhost", 200),
        ("[::1]:7860", 200),
        ("example.org", 403),
        ("example.org:7860", 403),
        ("127.0.0.1.example.org:7860", 403),
        ("", 403),
        (None, 403),
    ):
        assert answer(guard, "/", host)[0] == status, host
    assert answer(Guard(application, local=False), "/", "example.org")[0] == 200


def test_nothing_is_fetched_for_others_and_every_answer_has_the_policy() -> None:
    guard = Guard(application, local=False)
    for path, status in (("/gradio_api/file=https://x.org/", 403), ("/gradio_api/file=HTTP:/x", 403),
                         ("/gradio_api/proxy=x", 403), ("/gradio_api/file=/a/http", 200)):  # fmt: skip
        found, headers = answer(guard, path, "example.org")
        assert found == status, path
        assert headers[b"content-security-policy"] == POLICY.encode()
    assert "http" not in POLICY
