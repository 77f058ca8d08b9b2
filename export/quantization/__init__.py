"""Quantization methods, one in each file, named by the field's terms."""
