"""Target `onnx`: models for ONNX Runtime and onnxruntime-genai."""
