"""Lowering to ExecuTorch .pte files with XNNPACK delegates."""
