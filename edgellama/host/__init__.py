"""The machine: threads, memory, progress, versions, native libraries, the Hugging Face cache."""
