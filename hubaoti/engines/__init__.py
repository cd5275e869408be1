"""Engines: what holds models and answers requests."""

from hubaoti.extras import require

require("an engine", "compile", "run")
