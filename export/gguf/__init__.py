"""Lowering to GGUF files."""
