"""A run: from a recipe to a proved output."""
