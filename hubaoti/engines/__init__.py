"""Engines: what holds models and answers requests."""
