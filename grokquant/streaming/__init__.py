"""Models run layer by layer, each layer read once."""
