"""Lesson 9: Improved Denoising Diffusion Probabilistic Models [Nichol21]."""
