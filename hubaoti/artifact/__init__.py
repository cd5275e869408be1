"""What an artifact is, on any machine."""
