"""The command `app`: its options, and the server from its start to its end."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dreamfusion_fast.app.guard import PASSWORD, Guard, checker, credentials, is_local
from dreamfusion_fast.errors import UserError, missing_package
from dreamfusion_fast.io import claimed

_log = logging.getLogger(__name__)

DESCRIPTION = "Serve a web page on which objects are asked for, watched, stopped, resumed, turned and downloaded."


def command(arguments: Sequence[str], parser: argparse.ArgumentParser) -> int:
    """Serve until a signal asks for the end.

    Args:
        arguments: behind the word app.
        parser: without arguments yet.

    Raises:
        UserError: an option is wrong, the port or the folder is taken, or gradio is not installed.
        Interrupted: by the signal, once what ran has saved itself.
    """
    parser.description = DESCRIPTION
    parser.add_argument("--runs", metavar="FOLDER", default="out", help="folder of all runs (default: out)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at; 0: any that is free (default: 7860)")
    parser.add_argument(
        "--auth",
        metavar="USER[:PASSWORD]",
        help=f"who may come in. Without :PASSWORD it is asked for; {PASSWORD}=USER:PASSWORD does the same, and other "
        "people on the machine do not see it. Needed with a --host that others reach",
    )
    parser.add_argument(
        "--guidance",
        metavar="NAME",
        action="append",
        default=[],
        help="a diffusion model to choose from besides those with a name: a folder, file or hub id; may be repeated",
    )
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda or cuda:1")
    given = parser.parse_args(list(arguments))
    if not 0 <= given.port <= 65535:
        raise UserError(f"--port: got {given.port}, want 0 to 65535")
    auth = credentials(given.auth, given.host)
    _check_address(given.host, given.port)
    with serving(given.runs, given.host, given.port, auth, given.guidance, given.device) as address:
        # On stdout and flushed: it is for people and for programs that wait for it.
        print(f"{address}  (Ctrl-C ends the server; what runs saves itself)", flush=True)
        threading.Event().wait()
    return 0


@contextlib.contextmanager
def serving(
    runs: str,
    host: str,
    port: int,
    auth: tuple[str, str] | None,
    guidance: Sequence[str] = (),
    device: str = "auto",
    command: Sequence[str] | None = None,
) -> Iterator[str]:
    """Serve the page during the block, in threads; yields its address.

    Args:
        runs: folder of all runs, which is made where there is none. One server at a time has it.
        host: address to listen at.
        port: to listen at; 0: any.
        auth: user and password; None: nobody is asked.
        guidance: models to choose from besides those that have a name.
        device: of the runs.
        command: that the command line's arguments come behind; None: this package's.

    Raises:
        UserError: as the function `command`.
    """
    with contextlib.ExitStack() as stack:
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dreamfusion-fast-app-")))
        stack.enter_context(_environment(cache, host))
        try:
            import gradio
        except ModuleNotFoundError as error:
            raise UserError(missing_package(error, "app")) from error
        from dreamfusion_fast.app.jobs import COMMAND, Jobs
        from dreamfusion_fast.app.page import Page
        from dreamfusion_fast.app.runs import Runs
        from dreamfusion_fast.app.words import STYLE
        from dreamfusion_fast.training.device import resolve_device

        resolve_device(device)
        folder = stack.enter_context(claimed(runs)).path
        command = COMMAND if command is None else command
        jobs = Jobs(Runs(folder), command)
        stack.callback(jobs.close)
        blocks = Page(jobs, cache, guidance, device, command).blocks()
        options: dict[str, Any] = {} if auth is None else {"auth": checker(*auth), "auth_message": "dreamfusion_fast"}
        try:
            blocks.launch(
                server_name=f"[{host}]" if ":" in host else host,
                server_port=port or _free_port(host),
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                inbrowser=False,
                ssr_mode=False,
                enable_monitoring=False,
                mcp_server=False,
                run_history=False,
                pwa=False,
                max_file_size=1,  # nothing is to be uploaded
                show_error=False,
                footer_links=[],
                css=STYLE,
                theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                app_kwargs={"middleware": [_middleware(is_local(host))], "docs_url": None, "openapi_url": None},
                **options,
            )
        except OSError as error:
            raise UserError(f"cannot listen at {host}, port {port}: {error}") from error
        stack.callback(blocks.close, verbose=False)
        yield str(blocks.local_url)


def _middleware(local: bool) -> Any:
    from starlette.middleware import Middleware

    return Middleware(Guard, local=local)


@contextlib.contextmanager
def _environment(cache: Path, host: str) -> Iterator[None]:
    """Tell gradio to ask nobody elsewhere, to keep its files in a folder of this server, and not to be told otherwise.

    It has to be said before gradio is imported.
    """
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(cache),
        "GRADIO_EXAMPLES_CACHE": str(cache / "examples"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for name in ("no_proxy", "NO_PROXY"):  # it looks whether it reaches itself
        os.environ[name] = ",".join(filter(None, [before.get(name), "localhost,127.0.0.1,::1", host]))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _check_address(host: str, port: int) -> None:
    """Raise UserError where nothing can listen there; said before anything is imported."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen at {host}, port {port}: {why}; choose others with --host and --port") from error


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        return int(server.getsockname()[1])
