"""hubaoti: the package manager for compiled PyTorch graphs.

Importing this imports nothing heavy; the names below are loaded on first use.
"""

__version__ = "0.1.0"
