"""Lesson 6: DDIM."""
