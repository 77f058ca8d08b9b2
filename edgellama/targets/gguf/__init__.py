"""Target `gguf`: one file for llama.cpp and the programs around it."""
