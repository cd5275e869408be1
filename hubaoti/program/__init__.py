"""What a model computes, whatever its weights."""
