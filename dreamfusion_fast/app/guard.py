"""Who may reach the server, and what a page may reach: rules for every request, whatever answers it."""

from __future__ import annotations

import asyncio
import getpass
import hmac
import ipaddress
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.settings import shown

PASSWORD = "DREAMFUSION_FAST_APP_AUTH"
"""The environment variable with USER:PASSWORD."""

_SHORTEST = 8  # letters of a password
_AFTER_WRONG = 1.0  # seconds, so that passwords are not tried by the thousand

# The page has all that it needs: the browser asks nobody else, whatever the page's scripts want.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server that listens at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def credentials(given: str | None, host: str, environment: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """User and password of a server; None: nobody is asked for them.

    Args:
        given: USER:PASSWORD, or USER alone, who is asked for the password in the terminal.
        host: that it listens at.
        environment: has `PASSWORD` where nothing is given.

    Raises:
        UserError: they are no such, or there are none and others reach the server. The message has no password.
    """
    text = environment.get(PASSWORD, "") if given is None else given
    if not text and given is None:
        if is_local(host):
            return None
        raise UserError(
            f"--host {host} lets others in, who have to give a password: --auth USER, or {PASSWORD}=USER:PASSWORD"
        )
    user, colon, password = text.partition(":")
    if given is not None and not colon and user.strip():
        if not sys.stdin.isatty():
            raise UserError(f"--auth: there is no terminal to ask for a password; set {PASSWORD}=USER:PASSWORD")
        password = getpass.getpass(f"password of {user}: ")
    source = PASSWORD if given is None else "--auth"
    if not user.strip() or user != user.strip():
        raise UserError(f"{source}: want USER:PASSWORD with a user's name, without spaces around it")
    if len(password) < _SHORTEST:
        raise UserError(f"{source}: want a password of at least {_SHORTEST} letters")
    return user, password


def checker(user: str, password: str) -> Callable[[str, str], Awaitable[bool]]:
    """A function of a name and a password that says whether they are these; it takes its time over wrong ones."""

    async def right(name: str, word: str) -> bool:
        # Both are compared whatever the first one gives, in a time that does not depend on where they differ.
        same = hmac.compare_digest(name.encode(), user.encode()) & hmac.compare_digest(word.encode(), password.encode())
        if not same:
            await asyncio.sleep(_AFTER_WRONG)
        return same

    return right


class Guard:
    """Stands before a web application (ASGI).

    It refuses requests for other host names where the server is for this machine alone, since a foreign page could let
    its own name point to this address. It refuses to fetch addresses for others, and adds `POLICY` to all answers.

    Args:
        app: the application.
        local: whether the server listens for this machine alone.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], local: bool) -> None:
        self._app, self._local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._local and not is_local(_host(scope)):
            await _refuse(send, f"this server is for this machine alone, not for {shown(_host(scope))}")
            return
        if "file=http" in scope["path"].lower() or "/proxy=" in scope["path"]:
            await _refuse(send, "this server fetches nothing for others")
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await self._app(scope, receive, with_headers)


def _host(scope: Scope) -> str:
    """The name, without a port, that a request was made under; empty if it does not say."""
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"host"), "")
    if given.startswith("["):
        return given[1:].partition("]")[0]
    return given.rpartition(":")[0] if given.rpartition(":")[2].isdigit() and ":" in given else given


async def _refuse(send: Send, why: str) -> None:
    await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain"), *_HEADERS]})
    await send({"type": "http.response.body", "body": why.encode()})
