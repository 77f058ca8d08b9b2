"""Target `xnnpack`: ExecuTorch .pte files for CPUs."""
