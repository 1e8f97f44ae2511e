"""The CUDA machine: hand-written kernels, planned in plain Python, compiled by NVRTC, launched by CuPy.

source   kernel file -> one self-contained text
plan     (problem, device) -> launch plans
machine  the six entry points, over anything that can launch
launch   CuPy; its module is the machine named `cuda`
"""
