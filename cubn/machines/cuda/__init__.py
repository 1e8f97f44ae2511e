"""The CUDA machine, so far its source texts only; the kernels and their launch are being built."""
