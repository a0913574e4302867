"""The embedded prior: a small text-to-image diffusion model that ships with the package and knows a few hundred things.

Nothing here imports diffusers, which takes seconds, except to draw pictures (`sample`).
"""
