"""Lesson 5: Denoising Diffusion Probabilistic Models [Ho20]."""
