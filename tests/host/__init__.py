"""Executes the CUDA kernels on the CPU, thread for thread, and watches what they do.

No GPU is needed, and no second implementation of the kernels: what runs is what NVIDIA's own compiler made of the
text that a GPU would be given.

    kernel text ── nvrtc.py ──> PTX ── ptx.py ──> instructions ── translate.py ──> C++ ── build.py ──> library
                   (libnvrtc)                                                          (g++, cached)
                                        executor.py launches it on the machine in machine/

Every CUDA thread is a fiber of one OS thread, and `seed` chooses the order in which they run.  Each access to memory
goes through a checker, which knows the bounds of every array, what was never written, and which accesses no
barrier, fence or atomic orders: out-of-bounds and misaligned accesses, races, uninitialised reads, divergent
barriers, deadlocks and endless loops are a `Fault` that names line, thread and block.  It also counts the bytes that
each array moves, so that "x is read once" is a test.

What cannot be seen here: speed, coalescing, bank conflicts, what ptxas makes of the PTX, and the last bits of
approximate instructions (exp2, reciprocal, reciprocal root), which are computed better than on a device.

    nvrtc.py      compile with the real compiler: PTX, or machine code and what it costs
    executor.py   Kernel, device arrays, Fault, Traffic
    build.py      the cache of compiled kernels; `missing()` says why there can be none on this machine
    mutants.py    deletes barriers and shifts bounds, to see whether tests notice
    samples/      kernels with planted bugs, and right ones, for the executor's own tests
"""
