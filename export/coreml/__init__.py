"""Lowering to Core ML packages and to .pte files with the Core ML delegate."""
