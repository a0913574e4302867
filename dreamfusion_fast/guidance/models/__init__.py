"""Diffusion models: the embedded prior and diffusers pipelines, with their noise schedules."""
