"""Triton kernels: what CUDA tensors get without the compiled CUDA library. Imported at their first launch."""
