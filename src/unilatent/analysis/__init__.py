"""Analysis of trained models: latent statistics, rates, probes, and how much the decoder uses its latents."""
