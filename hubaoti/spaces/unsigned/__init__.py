"""Packages without a manifest, which others published."""
