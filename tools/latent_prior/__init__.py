"""A small latent diffusion model in diffusers' format, trained on the embedded prior's data.

It exists so that the guidance of latent models (`dreamfusion_fast.guidance.models.pipelines.LatentModel`) can be proven
on meaning where no such model can be downloaded. `tools/train_latent_prior.py` is its command line.
"""
