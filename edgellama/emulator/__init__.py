"""Emulation of Arm processors on x86-64 Linux, by qemu's user mode.

The unmodified aarch64 libraries of ExecuTorch and ONNX Runtime run here, with the kernels that a phone's
processor would choose. Results are those of the architecture. Speed and memory say nothing about a phone.
"""
