"""Videos and previews."""

from __future__ import annotations

import os
import time

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from dreamfusion_fast.export.turntable import render_preview, render_turntable, save_png, tile, to_uint8


def hue(azimuth, height=48, width=64):
    """A picture whose brightness tells the azimuth, darker in the upper half."""
    image = torch.full((height, width, 3), azimuth / 360)
    image[: height // 2] *= 0.5
    return image


def read_video(path):
    reader = imageio_ffmpeg.read_frames(str(path))
    info = next(reader)
    width, height = info["size"]
    return info, [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]


@pytest.mark.parametrize(("height", "width", "threads"), [(48, 64, 1), (33, 49, 4)])
def test_video_has_the_frames_in_order(tmp_path, height, width, threads):
    path = tmp_path / "turntable.mp4"

    def render(azimuth):
        time.sleep(0.02 * (azimuth == 0))  # with threads, the first frame is ready after others
        return hue(azimuth, height, width)

    render_turntable(render, path, n_frames=9, fps=12, threads=threads)
    info, frames = read_video(path)
    assert info["codec"] == "h264"
    assert info["pix_fmt"].startswith("yuv420p")
    assert info["fps"] == 12
    assert frames[0].shape == (height + height % 2, width + width % 2, 3)
    assert len(frames) == 9
    for index, frame in enumerate(frames):
        # Lossy, so compare means; and the upper half stays the darker one.
        assert frame[-height // 3 :].mean() == pytest.approx(255 * index / 9, abs=8)
        assert frame[: height // 3].mean() == pytest.approx(255 * index / 18, abs=8)
    assert os.listdir(tmp_path) == ["turntable.mp4"]


def test_video_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "turntable.mp4"
    path.write_bytes(b"old")

    def render(azimuth):
        if azimuth > 100:
            raise KeyboardInterrupt
        return hue(azimuth)

    with pytest.raises(KeyboardInterrupt):
        render_turntable(render, path, n_frames=8)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["turntable.mp4"]


def test_frames_have_to_agree(tmp_path):
    with pytest.raises(ValueError, match="frame 1 has shape"):
        render_turntable(lambda azimuth: hue(azimuth, 48 if azimuth == 0 else 50), tmp_path / "a.mp4", n_frames=2)
    with pytest.raises(ValueError, match="n_frames has to be at least 1"):
        render_turntable(hue, tmp_path / "a.mp4", n_frames=0)
    with pytest.raises(ValueError, match="threads has to be at least 1, not 0"):
        render_turntable(hue, tmp_path / "a.mp4", threads=0)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("views", "shape"), [(1, (48, 64)), (4, (48, 256)), (5, (96, 256)), (8, (96, 256))])
def test_preview_shows_equal_azimuths_row_by_row(tmp_path, views, shape):
    path = tmp_path / "preview.png"
    render_preview(hue, path, views)
    picture = np.array(Image.open(path))
    assert picture.shape == (*shape, 3)
    for index in range(views):
        row, column = divmod(index, 4)
        assert (picture[row * 48 + 47, column * 64] == round(255 * index / views)).all()
    if views == 5:
        assert (picture[48:, 64:] == 255).all()
    assert os.listdir(tmp_path) == ["preview.png"]


def test_images_of_any_kind():
    floats = np.array([[[0.0, 0.5, 1.0], [-1.0, 2.0, np.nan]]], np.float64)
    expected = [[[0, 128, 255], [0, 255, 0]]]
    np.testing.assert_array_equal(to_uint8(floats), expected)
    np.testing.assert_array_equal(to_uint8(torch.from_numpy(floats)), expected)
    np.testing.assert_array_equal(to_uint8(torch.from_numpy(floats).transpose(0, 1)), np.swapaxes(expected, 0, 1))
    np.testing.assert_array_equal(to_uint8(np.array(expected, np.uint8)), expected)
    with pytest.raises(ValueError, match=r"\[height, width, 3\], not \[3, 4, 4\]"):
        to_uint8(np.zeros((3, 4, 4)))


def test_save_png_is_lossless(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (13, 7, 3)).astype(np.uint8)
    save_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "a.png")), image)
    np.testing.assert_array_equal(tile([image, image], 1)[13:], image)
    with pytest.raises(ValueError, match="n_views has to be at least 1"):
        render_preview(hue, tmp_path / "b.png", 0)
