"""Whether a diffusion model that somebody has does here what such a model should: `dreamfusion-fast validate`."""
