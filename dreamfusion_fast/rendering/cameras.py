"""Pinhole cameras: a pose, a lens, and the rays through an image's pixels.

Camera space is x right, y up, looking along -z. Pixel centres are at +0.5, rows run from the top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from dreamfusion_fast.ops._checks import FLOATS
from dreamfusion_fast.rendering.rays import Rays

Convention = Literal["opencv", "opengl"]
Some = TypeVar("Some", bound="Cameras")

# How far the products of a pose's columns may be from those of a rotation: float32 rounding of composed poses, and of
# ones printed with four digits.
_ROTATION_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Cameras:
    """A batch of `B` pinhole cameras for images of any size; all tensors of one device, float32 or float64.

    The lens is kept in heights of the image, so that one camera renders at several sizes: a smaller image of the same
    proportions shows the same, a wider one shows more at both sides.

    Shapes and dtypes are checked, and on a CPU values, too (TypeError, ValueError): a GPU would be waited for.

    Attributes:
        camera_to_world: `[B, 3, 4]`, columns right, up, back, position; scene units.
        fov_y: `[B]`, vertical field of view, that of the image's whole height about the principal axis, radians, above
            0 and below pi.
        pixel_aspect: `[B]`, width of a pixel over its height, fy / fx, above 0; None: square pixels.
        shift: `[B, 2]`, of the principal point from the image's middle, to the right and down, in heights of the image;
            None: it is in the middle.
        image_size: height and width in pixels of the images that the cameras are of, if they are of any.
    """

    camera_to_world: Tensor
    fov_y: Tensor
    pixel_aspect: Tensor | None = None
    shift: Tensor | None = None
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        like = self.camera_to_world
        if like.dim() != 3 or like.shape[1:] != (3, 4):
            raise ValueError(f"cameras.camera_to_world: got shape {list(like.shape)}, want [B, 3, 4]")
        if like.dtype not in FLOATS:
            raise TypeError(f"cameras.camera_to_world: got {like.dtype}, want float32 or float64")
        for name, value in self._tensors().items():
            if name == "camera_to_world":
                continue
            wanted = [like.shape[0], 2] if name == "shift" else [like.shape[0]]
            if list(value.shape) != wanted:
                raise ValueError(f"cameras.{name}: got shape {list(value.shape)}, want {wanted}")
            if value.dtype != like.dtype or value.device != like.device:
                raise ValueError(
                    f"cameras.{name}: got {value.dtype} on {value.device}, want {like.dtype} on {like.device}, as "
                    "camera_to_world is"
                )
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError(f"cameras.image_size: got {self.image_size}, want a height and a width of at least 1")
        if like.device.type == "cpu":
            self._check_values()

    def _check_values(self) -> None:
        self._check_finite("camera_to_world", "shift")
        self._check_between("fov_y", 0.0, math.pi)
        self._check_between("pixel_aspect", 0.0, math.inf)

    def _check_finite(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not bool(value.isfinite().all()):
                raise ValueError(f"cameras.{name}: got a value that is not finite")

    def _check_between(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        if value is None:
            return
        good = (value > least) & (value < most)
        if not bool(good.all()):
            raise ValueError(f"cameras.{name}: got {float(value[~good][0])}, want above {least} and below {most}")

    @staticmethod
    def from_poses(
        camera_to_world: Tensor,
        intrinsics: Tensor | Sequence[Tensor | float],
        width: int,
        height: int,
        convention: Convention = "opencv",
    ) -> Cameras:
        """Cameras of calibrated images, differentiable to poses and intrinsics, as refining them needs.

        There is no lens distortion: undistort the images first. A pose has to be a rotation and a position. One that
        scales, shears or mirrors is refused on a CPU, and not mended, since it is a mistake elsewhere: a transposed
        matrix, a scale that belongs into the position. On a GPU, where a check would wait, a scale does nothing, as
        directions are normalised, and the rest distorts the image.

        Args:
            camera_to_world: `[B, 3, 4]` or `[B, 4, 4]`, scene units, float32 or float64.
            intrinsics: `[3, 3]` for all cameras or `[B, 3, 3]`, without skew, or `(fx, fy, cx, cy)`, each a number, a
                0-dim tensor or `[B]`. In pixels, with (0, 0) the outer corner of the top left pixel, as COLMAP has it:
                the middle of the image is (width / 2, height / 2). Where (0, 0) is that pixel's centre, as in OpenCV's
                calibration, add 0.5 to cx and cy.
            width, height: of the images, pixels.
            convention: axes of camera space. "opencv": x right, y down, looking along +z (COLMAP, OpenCV). "opengl": x
                right, y up, looking along -z (NeRF's transforms.json, Blender), as here.

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape or device, and on a CPU, one of a wrong value.
        """
        if convention not in ("opencv", "opengl"):
            raise ValueError(f"convention: got {convention!r}, want opencv or opengl")
        if width < 1 or height < 1:
            raise ValueError(f"width, height: got {width}, {height}, want both at least 1")
        pose = _checked_poses(camera_to_world)
        fx, fy, cx, cy = _focal_and_principal(intrinsics, pose)
        x, y, z, position = pose.unbind(dim=2)
        if convention == "opencv":
            y, z = -y, -z
        return Cameras(
            torch.stack([x, y, z, position], dim=2),
            2.0 * torch.atan((0.5 * height) / fy),
            fy / fx,
            torch.stack([cx - 0.5 * width, cy - 0.5 * height], dim=1) / height,
            (height, width),
        )

    def __len__(self) -> int:
        return self.fov_y.shape[0]

    def __getitem__(self: Some, index: slice | Tensor) -> Some:
        """The cameras chosen by a slice, a mask or an index tensor."""
        return self._each(lambda value: value[index])

    @property
    def positions(self) -> Tensor:
        """Camera positions `[B, 3]`."""
        return self.camera_to_world[:, :, 3]

    def to(self: Some, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Some:
        """The same cameras on another device or in another dtype."""
        return self._each(lambda value: value.to(device=device, dtype=dtype))

    def rays(self, height: int | None = None, width: int | None = None) -> Rays:
        """One ray through each pixel centre, differentiable to pose and lens.

        Args:
            height, width: of the image, pixels; both None: `image_size`.

        Returns:
            Rays with `n_rays = B * height * width`, views one after another, pixels row by row from the top left;
            `.reshape(B, height, width)` gives them the images' shape.
        """
        if height is None and width is None:
            if self.image_size is None:
                raise ValueError("height, width: got None, want both for cameras without an image_size")
            height, width = self.image_size
        if height is None or width is None or height < 1 or width < 1:
            raise ValueError(f"height, width: got {height}, {width}, want both at least 1")
        x = torch.arange(width, device=self.fov_y.device, dtype=self.fov_y.dtype) + (0.5 - 0.5 * width)
        y = (0.5 * height - 0.5) - torch.arange(height, device=self.fov_y.device, dtype=self.fov_y.dtype)
        x, y = x[:, None], y[:, None, None]
        if self.shift is not None:
            right_by, down_by = (self.shift * height)[:, :, None, None, None].unbind(dim=1)
            x, y = x - right_by, y + down_by
        if self.pixel_aspect is not None:
            x = x * self.pixel_aspect[:, None, None, None]
        focal = (0.5 * height) / torch.tan(0.5 * self.fov_y)
        batch = len(self)
        right, up, back = self.camera_to_world[:, None, None, :, :3].unbind(dim=-1)
        # Sums in place of a product of matrices, which would be rounded to TF32 where that is allowed.
        rows = y * up - focal[:, None, None, None] * back
        directions = torch.nn.functional.normalize((x * right + rows).reshape(-1, 3), dim=1)
        origins = self.positions[:, None, :].expand(batch, height * width, 3).reshape(-1, 3)
        return Rays(origins, directions)

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _each(self: Some, change: Callable[[Tensor], Tensor]) -> Some:
        changed: dict[str, Any] = {name: change(value) for name, value in self._tensors().items()}
        return replace(self, **changed)


def _checked_poses(camera_to_world: Tensor) -> Tensor:
    """The poses as `[B, 3, 4]`, which are rotations and positions as far as a CPU can tell."""
    given = camera_to_world.dtype if isinstance(camera_to_world, Tensor) else type(camera_to_world).__name__
    if given not in FLOATS:
        raise TypeError(f"camera_to_world: got {given}, want a tensor [B, 3, 4] or [B, 4, 4] of float32 or float64")
    if camera_to_world.dim() != 3 or camera_to_world.shape[1:] not in ((3, 4), (4, 4)):
        raise ValueError(f"camera_to_world: got shape {list(camera_to_world.shape)}, want [B, 3, 4] or [B, 4, 4]")
    pose = camera_to_world[:, :3]
    if camera_to_world.device.type != "cpu":
        return pose
    with torch.no_grad():
        rows = camera_to_world[:, 3:].flatten(0, 1)
        other = (rows != rows.new_tensor([0.0, 0.0, 0.0, 1.0])).any(dim=1)
        if bool(other.any()):
            view = int(other.nonzero()[0])
            raise ValueError(f"camera_to_world: got {rows[view].tolist()} as last row of pose {view}, want 0, 0, 0, 1")
        rotation = pose[:, :, :3].double()
        products = (rotation[:, :, :, None] * rotation[:, :, None, :]).sum(dim=1)
        off = (products - torch.eye(3, dtype=torch.float64)).abs().amax(dim=(1, 2))
        bad = ~(off <= _ROTATION_TOLERANCE)
        if bool(bad.any()):
            view = int(bad.nonzero()[0])
            raise ValueError(
                f"camera_to_world: got a pose {view} that is no rotation and position: products of its columns are off "
                f"by {float(off[view]):.3g}, want at most {_ROTATION_TOLERANCE}"
            )
        mirrored = torch.linalg.det(rotation) < 0.0
        if bool(mirrored.any()):
            view = int(mirrored.nonzero()[0])
            raise ValueError(f"camera_to_world: got a pose {view} that mirrors, want a rotation: right-handed axes")
    return pose


def _focal_and_principal(intrinsics: Tensor | Sequence[Tensor | float], pose: Tensor) -> list[Tensor]:
    """fx, fy, cx, cy, `[B]` each and of the poses' dtype."""
    batch = pose.shape[0]
    if isinstance(intrinsics, Tensor):
        if not intrinsics.is_floating_point():
            raise TypeError(f"intrinsics: got {intrinsics.dtype}, want a floating-point tensor")
        if list(intrinsics.shape) not in ([3, 3], [batch, 3, 3]):
            raise ValueError(
                f"intrinsics: got shape {list(intrinsics.shape)}, want [3, 3] or [{batch}, 3, 3], or four values"
            )
        if intrinsics.device.type == "cpu":
            matrix = intrinsics.detach().reshape(-1, 9)
            zeros, one = matrix[:, [1, 3, 6, 7]], matrix[:, 8]
            if bool((zeros != 0.0).any() | (one != 1.0).any()):
                raise ValueError(
                    "intrinsics: got a skew or another last row, want [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]"
                )
        given: list[Tensor | float] = [intrinsics[..., row, column] for row, column in ((0, 0), (1, 1), (0, 2), (1, 2))]
    else:
        if not isinstance(intrinsics, Sequence) or any(not isinstance(v, Tensor | Real) for v in intrinsics):
            raise TypeError(f"intrinsics: got {type(intrinsics).__name__}, want a tensor, or four numbers or tensors")
        given = list(intrinsics)
        if len(given) != 4:
            raise ValueError(f"intrinsics: got {len(given)} values, want four: fx, fy, cx, cy")
    values = []
    for name, value in zip(("fx", "fy", "cx", "cy"), given, strict=True):
        if not isinstance(value, Tensor):
            value = torch.full((), float(value), dtype=pose.dtype, device=pose.device)
        if list(value.shape) not in ([], [batch]):
            raise ValueError(f"intrinsics: got {name} of shape {list(value.shape)}, want [] or [{batch}]")
        if value.device != pose.device:
            raise ValueError(f"intrinsics: got {name} on {value.device}, want {pose.device}, where the poses are")
        if value.device.type == "cpu":
            good = value.detach().isfinite() & ((value.detach() > 0.0) if name[0] == "f" else True)
            if not bool(good.all()):
                wrong = float(value.detach().expand(batch)[~good.expand(batch)][0])
                want = "a finite number" + (" above 0" if name[0] == "f" else "")
                raise ValueError(f"intrinsics: got {name} = {wrong}, want {want}")
        values.append(value.to(pose.dtype).expand(batch))
    return values
