"""Read the Sweet Home 3D furniture libraries out of Debian's ``sweethome3d-furniture`` package.

Each library is a zip (``*.sh3f``) of a properties file and of OBJ models with their materials and textures.
"""

import re
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LIBRARIES = ("BlendSwap-CC-0", "BlendSwap-CC-BY", "KatorLegaz", "Reallusion", "Scopia")
LICENCES = {
    "BlendSwap-CC-0": "CC0-1.0",
    "BlendSwap-CC-BY": "CC-BY-3.0",
    "KatorLegaz": "CC-BY-3.0-US",
    "Reallusion": "CC-BY-3.0-US",
    "Scopia": "CC-BY-3.0",
}
_ENTRY = re.compile(r"([A-Za-z]+)#(\d+)=(.*)")
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")


@dataclass(frozen=True)
class Entry:
    """One piece of the catalogue, as its library describes it.

    ``size`` is (width, height, depth) in centimetres along x, y, z after ``rotation`` (row-major 3x3).
    """

    key: str
    library: str
    name: str
    tags: tuple[str, ...]
    category: str
    creator: str
    licence: str
    obj: Path
    size: tuple[float, float, float]
    rotation: np.ndarray


def unpack(package: Path, folder: Path) -> Path:
    """Unpack the Debian package and its libraries below ``folder`` (once); returns the folder of the libraries."""
    target = folder / "libraries"
    if target.is_dir():
        return target
    if not package.is_file():
        raise FileNotFoundError(f"package {package} not found; get it with: apt-get download sweethome3d-furniture")
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["dpkg", "-x", str(package), str(folder / "debian")], check=True)
    partial = folder / "libraries.partial"
    for library in LIBRARIES:
        source = folder / "debian/usr/share/sweethome3d/furniture" / f"{library}.sh3f"
        with zipfile.ZipFile(source) as archive:
            archive.extractall(partial / library)
    partial.rename(target)
    return target


def _properties(path: Path) -> dict[int, dict[str, str]]:
    entries: dict[int, dict[str, str]] = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        match = _ENTRY.match(line.strip())
        if match:
            value = _ESCAPE.sub(lambda code: chr(int(code[1], 16)), match[3])
            entries.setdefault(int(match[2]), {})[match[1]] = value
    return entries


def _existing(root: Path, relative: str) -> Path:
    path = root / relative.lstrip("/")
    if path.exists():
        return path
    matches = [other for other in path.parent.glob("*") if other.name.lower() == path.name.lower()]
    if not matches:
        raise FileNotFoundError(f"model {relative} is not in {root}")
    return matches[0]


def read_catalogue(libraries: Path) -> list[Entry]:
    """All entries of the unpacked libraries, in a fixed order."""
    entries = []
    for library in LIBRARIES:
        root = libraries / library
        for number, item in sorted(_properties(root / "PluginFurnitureCatalog.properties").items()):
            rotation = np.array([float(x) for x in item.get("modelRotation", "1 0 0 0 1 0 0 0 1").split()]).reshape(
                3, 3
            )
            entries.append(
                Entry(
                    key=f"{library}#{number}",
                    library=library,
                    name=item["name"].strip(),
                    tags=tuple(tag.strip() for tag in item.get("tags", "").split(",") if tag.strip()),
                    category=item["category"].strip(),
                    creator=item.get("creator", "").strip() or "unknown",
                    licence=LICENCES[library],
                    obj=_existing(root, item["model"]),
                    size=(float(item["width"]), float(item["height"]), float(item["depth"])),
                    rotation=rotation,
                )
            )
    return entries
