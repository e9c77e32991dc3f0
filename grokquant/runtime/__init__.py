"""Models in memory: loading and generating."""
