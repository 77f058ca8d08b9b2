"""Readers of file formats: .pte, .mlpackage, .onnx, .gguf."""
