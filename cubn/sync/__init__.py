"""Statistics over the samples of several ranks.

A *rank* is one of several workers that hold a part of the batch each.  Everything that they must tell each
other is one all-gather per forward pass (count, mean and m2 of every channel, in float64) and one per backward
pass (two sums).  Each rank merges what it receives in rank order with the one union that there is, so that all
ranks hold the same bits, whatever their shares of the batch, none included.

    threads    ranks that are threads of this process
    mpi        ranks of an MPI communicator (mpi4py)
    nccl       ranks of an NCCL communicator, one GPU each (CuPy)
    torch      ranks of a `torch.distributed` process group (gloo, nccl)
    grid       rows and columns of any of these: fewer bytes where ranks are many

Every rank calls, also one whose share is empty, and one that needs no gradient.  What goes wrong on one rank is
raised on all: an input that is refused on rank 2 travels in the all-gather that the others wait in.
"""

from cubn.sync.grid import Grid, grid
from cubn.sync.local import threads
from cubn.sync.over_mpi import mpi
from cubn.sync.over_nccl import nccl
from cubn.sync.over_torch import torch
from cubn.sync.protocol import Sync

__all__ = ["Grid", "Sync", "grid", "mpi", "nccl", "threads", "torch"]
