"""Lesson 5 with class labels."""
