"""Rounding a matrix onto a grid: pure functions of matrices and statistics."""
