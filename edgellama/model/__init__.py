"""The Llama, its quantized form, and its walk layer by layer."""
