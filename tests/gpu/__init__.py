"""Checks that take a device: on a CPU with tiny shapes, on an NVIDIA GPU with real ones.

A test that records with the fixture `found` is a check: a line of `scripts/gpu_check`, named by its
case or module and its step, as `block-cache answer` or `attach-model streams`. What it needs is a
fixture; where that fails, the first check that asked for it fails and the others are skipped.
"""
