"""What a model's latents hold, what they cost, and what its decoder makes of them."""
