"""Diffusion networks made quick: normalisation, gates, dense layers, the U-Net, the latent encoder, offloading."""
