"""Engines: what holds models and answers requests."""

from hubaoti.host.extras import require

require("an engine", "compile", "run")
