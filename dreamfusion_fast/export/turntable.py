"""Pictures of the result: a video of one turn, and a few views side by side."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from dreamfusion_fast.errors import UserError, joined
from dreamfusion_fast.io import atomic_path

RenderImageFn = Callable[[float], ArrayLike | torch.Tensor]

_CRF = 10  # constant rate factor of the video: 0 is lossless, 51 the worst


def render_turntable(
    render_image: RenderImageFn,
    path: str | os.PathLike[str],
    *,
    n_frames: int = 60,
    fps: int = 24,
    threads: int = 1,
) -> None:
    """Write an MP4 video (H.264, yuv420p, plays everywhere) of the camera going once around the object.

    Args:
        render_image: azimuth in degrees (0 is the front, positive towards +x) to an image [height, width, 3]: floats in
            [0, 1] or uint8, a tensor or an array. All of one size; an odd one is made even by repeating the last row or
            column, since the format needs it.
        path: file to write, whole or not at all.
        n_frames: frames of the turn, at least 1.
        fps: frames a second.
        threads: in which render_image is called.

    Raises:
        UserError: there is no ffmpeg, or it failed. An older video is kept then.
    """
    for name, value in (("n_frames", n_frames), ("fps", fps), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name} has to be at least 1, not {value}")
    with ExitStack() as closing:
        pool = ThreadPoolExecutor(threads)
        closing.callback(pool.shutdown, cancel_futures=True)
        images = pool.map(render_image, (360.0 * index / n_frames for index in range(n_frames)))
        frames = (_even(to_uint8(image)) for image in images)
        try:
            with atomic_path(path) as temporary:
                _encode(frames, temporary, fps)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error


def _encode(frames: Iterator[NDArray[np.uint8]], path: Path, fps: int) -> None:
    """Have ffmpeg write frames [height, width, 3] of one size to the file `path`, which exists; UserError if it fails.

    It gets the file open and not by name: where this process is killed, ffmpeg would make the file anew, or write to
    one that another process has put there.
    """
    import imageio_ffmpeg  # 70 MB of ffmpeg that everything but a video does without

    first = next(frames)
    height, width, _ = first.shape
    with open(path, "rb+") as file:
        read = f"-v error -y -f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i - -an"
        write = f"-vcodec h264 -pix_fmt yuv420p -crf {_CRF} -f mp4 -movflags +faststart /proc/self/fd/{file.fileno()}"
        try:
            process = subprocess.Popen(
                [imageio_ffmpeg.get_ffmpeg_exe(), *read.split(), *write.split()],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[file.fileno()],
                start_new_session=True,  # Ctrl-C is for this process, which ends ffmpeg when it has to end
            )
        except (RuntimeError, OSError) as error:  # not found; found and no program
            raise UserError(f"no ffmpeg ({joined(error)}); install it, or go without: --turntable-frames 0") from error
    assert process.stdin is not None
    assert process.stderr is not None
    with process, ThreadPoolExecutor(1) as reader:
        said = reader.submit(process.stderr.read)  # all along, since ffmpeg waits for whoever reads it
        try:
            for index, frame in enumerate(chain([first], frames)):
                if frame.shape != first.shape:
                    raise ValueError(f"frame {index} has shape {frame.shape}, the first one {first.shape}")
                process.stdin.write(frame.tobytes())
            process.stdin.flush()
        except BrokenPipeError:
            pass  # ffmpeg has ended; its status says why
        except BaseException:
            process.kill()
            raise
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()
        status = process.wait()
        if status or not path.stat().st_size:
            last = said.result().decode(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"ffmpeg failed with status {status}" + "".join(f" ({line.strip()})" for line in last))


def tile(images: list[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """Put images [height, width, 3] of one size side by side, row by row; places left over are white."""
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    height, width, _ = images[0].shape
    grid = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    return grid


def save_png(path: str | os.PathLike[str], image: ArrayLike | torch.Tensor) -> None:
    """Write an image [height, width, 3] (floats in [0, 1] or uint8) as PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        Image.fromarray(to_uint8(image)).save(temporary, format="PNG")


def render_preview(render_image: RenderImageFn, path: str | os.PathLike[str], n_views: int) -> None:
    """Write a PNG of `n_views` views at equal azimuths, four in a row. `render_image` is as for render_turntable."""
    if n_views < 1:
        raise ValueError(f"n_views has to be at least 1, not {n_views}")
    save_png(path, tile([to_uint8(render_image(360.0 * index / n_views)) for index in range(n_views)], columns=4))


def to_uint8(image: ArrayLike | torch.Tensor) -> NDArray[np.uint8]:
    """An image [height, width, 3] of floats in [0, 1] (clamped) or uint8 as a uint8 array."""
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image has to have shape [height, width, 3], not {list(array.shape)}")
    if array.dtype == np.uint8:
        return array
    return (np.clip(np.nan_to_num(array.astype(np.float32)), 0, 1) * 255).round().astype(np.uint8)


def _even(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
