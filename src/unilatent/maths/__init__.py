"""Pure maths of noise, denoising and comparison: tensors in, tensors out; no weights, no files."""
