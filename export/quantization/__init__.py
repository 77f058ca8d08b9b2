"""Quantization: one file a method, each named by the field's term."""
