"""Real processes that run the command line on a small prior, forked from one that has imported everything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import dreamfusion_fast

_PROGRAM = """
import json, os, sys, threading
sys.path[:0] = sys.argv[1:2]
import torch
torch.set_num_threads(1)
from pathlib import Path
from fakes import look_small, small_config, use_prior
from dreamfusion_fast import cli
from dreamfusion_fast.training import generator, trainer
import tempfile, tyro
use_prior(Path(sys.argv[2]))
look_small()
with tempfile.TemporaryDirectory() as folder:  # one run, which imports all that is imported late
    generator.Generator(small_config(prompt="a cup", steps=1, out=folder)).run()
assert threading.active_count() == 1

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock"}

def child(order):
    torch.set_num_threads(1)  # torch makes its pool anew after a fork: here, before threads race for it
    os.chdir(order["cwd"])
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1), os.dup2(log, 2)
    seen, whole = 0, trainer.Trainer.step
    def hook(event, arguments):
        nonlocal seen
        if event in CHANGES and (isinstance(arguments[0], int) or "run" in Path(os.fsdecode(arguments[0])).parts):
            if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                return
            seen += 1
            if seen == order.get("kill_at"):
                os.kill(os.getpid(), 9)
    def step(self):
        result = whole(self)
        with open("steps", "a") as file:
            file.write(".")
        return result
    trainer.Trainer.step = step
    sys.addaudithook(hook)
    code = cli.main(order["arguments"])
    with open("operations", "w") as file:
        file.write(str(seen))
    sys.stdout.flush()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        try:
            child(order)
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(99)
    if order.get("seconds") is not None:
        killer = threading.Timer(order["seconds"], os.kill, (pid, 9))
        killer.start()
    _, status = os.waitpid(pid, 0)
    if order.get("seconds") is not None:
        killer.cancel()
        killer.join()
    print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
"""


class Server:
    """Starts one run at a time, in milliseconds. Several of these run side by side."""

    def __init__(self, weights: Path) -> None:
        command = [sys.executable, "-c", _PROGRAM, str(Path(__file__).parents[1]), str(weights)]
        # From where the package under test lies: a source tree as working folder would hide an installed one.
        folder = Path(dreamfusion_fast.__file__).parents[1]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def begin(self, cwd: Path, *arguments: str, **order: Any) -> None:
        """Start the command line in the folder `cwd`, to be killed before operation `kill_at` or after `seconds`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"cwd": str(cwd), "arguments": arguments, **order}) + "\n")
        self._process.stdin.flush()

    def end(self) -> int:
        """Wait for it: its exit code, or minus the signal that killed it."""
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def run(self, cwd: Path, *arguments: str, **order: Any) -> int:
        """Both."""
        self.begin(cwd, *arguments, **order)
        return self.end()

    def close(self) -> None:
        """End the process, and any that it has started."""
        self._process.communicate(timeout=60)
