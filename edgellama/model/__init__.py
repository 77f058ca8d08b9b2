"""The Llama in torch, its quantized form, and its layer-by-layer forward pass."""
