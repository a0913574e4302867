"""Behaves as `dreamfusion-fast generate` does towards other processes, without torch, and as its prompt says.

It writes its arguments to arguments.json in its folder, and goes on until a file called "go" is there:
then it is done, or, if the prompt holds "fails", ends with an error, or, if it holds "crashes", without one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parents[2]))

from dreamfusion_fast.io import RunFolder, claimed

signals: list[int] = []


def noted(number: int, frame: FrameType | None) -> None:
    signals.append(number)


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, noted)
    where = "--resume" if "--resume" in arguments else "--out"
    path = Path(arguments[arguments.index(where) + 1])
    prompt = (path / "job.yaml").read_text() if (path / "job.yaml").is_file() else ""
    with claimed(path):
        folder = RunFolder(path)
        (path / "arguments.json").write_text(json.dumps(arguments))
        if "fails early" in prompt:
            print("error: nothing can be loaded", file=sys.stderr)
            return 2
        folder.checkpoint.write_bytes(b"a checkpoint")
        step = 0
        while not (path / "go").exists():
            step += 1
            values = {"stage": "steps", "done": step, "total": 1000, "rate": 20.0, "began": 0.0, "written": time.time()}
            whole = path / "progress.tmp"
            whole.write_text(json.dumps(values | {"losses": {}}))
            whole.rename(folder.progress)
            if signals:
                time.sleep(0.2)  # a second one would come by then
                (path / "signals.json").write_text(json.dumps(signals))
                print("interrupted", file=sys.stderr)
                return 128 + signals[0]
            time.sleep(0.02)
        if "fails" in prompt:
            print("error: no surface", file=sys.stderr)
            return 2
        if "crashes" in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        folder.mesh.write_bytes(b"glTF")
        folder.progress.write_text(json.dumps({"stage": "done"}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
