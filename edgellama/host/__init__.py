"""The machine: threads, memory, progress, versions, native libraries."""
