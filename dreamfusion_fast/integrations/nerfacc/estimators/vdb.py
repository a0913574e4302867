"""nerfacc's estimator over fVDB grids is not served."""

raise ImportError(
    "nerfacc.estimators.vdb is not served by dreamfusion_fast: VDB grids are left out, use OccGridEstimator or nerfacc"
)
