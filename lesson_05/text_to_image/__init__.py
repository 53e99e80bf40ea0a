"""Lesson 5 with prompts: a digit in words."""
