"""This machine: its facts, its memory and processes, and which artifacts fit it."""
