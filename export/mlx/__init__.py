"""Lowering to MLX."""
