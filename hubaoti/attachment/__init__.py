"""Artifact → module: its regions are answered by graphs, or by itself where none can."""
