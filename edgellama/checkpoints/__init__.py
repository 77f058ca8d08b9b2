"""Full-precision sources: Hugging Face directories, GGUF files, Meta directories."""
