"""feedfast."""
