"""Lowering to ONNX models."""
