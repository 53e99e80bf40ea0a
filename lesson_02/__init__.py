"""Lesson 2: Deep Unsupervised Learning using Nonequilibrium Thermodynamics [SD15]."""
