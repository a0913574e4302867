"""nerfacc's lens undistortion is not served."""

raise ImportError(
    "nerfacc.cameras is not served by dreamfusion_fast: lens undistortion is left out, use nerfacc or OpenCV"
)
