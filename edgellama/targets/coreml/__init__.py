"""Targets `coreml` and `coreml-pte`: Core ML programs."""
