"""The container of the rendered views: per model one WebP sheet of albedo (RGBA) and one of normals (RGB).

``albedo.bin`` and ``normal.bin`` are the sheets' bytes one after the other, ``views.npz`` says where each begins and
how every view was taken. Decoding needs Pillow and NumPy only.
"""

import io
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
COLUMNS = 9


def to_sheet(views: np.ndarray) -> np.ndarray:
    """Tile views [N, 64, 64, C] row-major into one picture, COLUMNS wide; unused tiles are zero."""
    count, height, width, channels = views.shape
    rows = -(-count // COLUMNS)
    sheet = np.zeros((rows * COLUMNS, height, width, channels), views.dtype)
    sheet[:count] = views
    sheet = sheet.reshape(rows, COLUMNS, height, width, channels).swapaxes(1, 2)
    return sheet.reshape(rows * height, COLUMNS * width, channels)


def from_sheet(sheet: np.ndarray, count: int) -> np.ndarray:
    """Undo :func:`to_sheet`."""
    rows, channels = sheet.shape[0] // SIZE, sheet.shape[2]
    tiles = sheet.reshape(rows, SIZE, COLUMNS, SIZE, channels).swapaxes(1, 2)
    return tiles.reshape(-1, SIZE, SIZE, channels)[:count]


def encode(sheet: np.ndarray, quality: int, alpha_quality: int = 90) -> bytes:
    """WebP bytes of a sheet, uint8."""
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(
        buffer, "WEBP", quality=quality, alpha_quality=alpha_quality, method=4, use_sharp_yuv=True
    )
    return buffer.getvalue()


def _decode(job: tuple[bytes, bytes, int]) -> tuple[np.ndarray, np.ndarray]:
    albedo, normal, count = job
    with Image.open(io.BytesIO(albedo)) as first, Image.open(io.BytesIO(normal)) as second:
        colours, normals = np.asarray(first.convert("RGBA")), np.asarray(second.convert("RGB"))
    return from_sheet(colours, count), from_sheet(normals, count)


def load_views(folder: Path | str, workers: int = 8) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Every view of a data folder.

    :return: albedo uint8 [N, 64, 64, 4] (straight alpha), normal uint8 [N, 64, 64, 3] (world-space n = v / 127.5 - 1,
        meaningless where alpha is 0) and meta, arrays [N]: ``model`` int32 (index into models.json), ``azimuth``,
        ``elevation`` (radians) and ``distance`` float32.
    """
    folder = Path(folder)
    with np.load(folder / "views.npz") as archive:
        table = {name: archive[name] for name in archive.files}
    counts, albedo_ends, normal_ends = table.pop("counts"), table.pop("albedo_ends"), table.pop("normal_ends")
    albedo_bytes, normal_bytes = (folder / "albedo.bin").read_bytes(), (folder / "normal.bin").read_bytes()
    jobs = [
        (albedo_bytes[albedo_begin:albedo_end], normal_bytes[normal_begin:normal_end], int(count))
        for albedo_begin, albedo_end, normal_begin, normal_end, count in zip(
            [0, *albedo_ends[:-1]], albedo_ends, [0, *normal_ends[:-1]], normal_ends, counts, strict=True
        )
    ]
    total = int(counts.sum())
    albedo, normal = np.empty((total, SIZE, SIZE, 4), np.uint8), np.empty((total, SIZE, SIZE, 3), np.uint8)
    begin = 0
    with ProcessPoolExecutor(workers) as pool:
        for colours, normals in pool.map(_decode, jobs, chunksize=8):
            end = begin + len(colours)
            albedo[begin:end], normal[begin:end] = colours, normals
            begin = end
    return albedo, normal, table
