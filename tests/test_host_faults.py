"""What the host executor refuses: planted bugs of every kind, and nothing else.

A planted bug must be a fault under every schedule that is tried, whichever thread comes first; the same kernel
without it must raise nothing under many random ones.
"""

import re

import numpy as np
import pytest
from host import build
from host.executor import Fault, device_array, device_empty
from host.samples import SCHEDULES, sample

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing())

QUIET_SCHEDULES = (0, 1, *range(100, 118))
THREADS = 128

BOUNDS = {  # name: what the fault says; whether an unchecked launch says it, too
    "global_overrun": (r"out-of-bounds read of 4 bytes: 1 bytes past the end of x \(400 bytes\)", True),
    "global_underrun": (r"out-of-bounds read of 4 bytes: 4 bytes before x", True),
    "index_wrong_by_millions": (r"out-of-bounds write of 4 bytes: \d+ bytes past the end of y", True),
    "null_pointer": (r"out-of-bounds write of 4 bytes: address outside any array", True),
    "static_shared": (r"out-of-bounds shared write", False),
    "neighbour_in_shared": (r"out-of-bounds shared write.*called from bounds", False),
    "before_shared": (r"out-of-bounds shared read", False),
    "dynamic_shared": (r"out-of-bounds shared write", False),
    "misaligned_vector": (r"misaligned read of 16 bytes", True),
    "misaligned_shared_vector": (r"misaligned read of 16 bytes", False),
    "uninitialised_shared": (r"read of uninitialised shared memory", False),
    "uninitialised_global": (r"read of uninitialised y", False),
}
BARRIERS = {
    "missing_barrier": (r"race in shared memory|read of uninitialised shared memory", False),
    "write_after_read": (r"race in shared memory", False),
    "missing_syncwarp": (r"race in shared memory|read of uninitialised shared memory", False),
    "partial_syncwarp": (r"race in shared memory|read of uninitialised shared memory", False),
    "shuffle_orders_nothing": (r"race in shared memory", False),
    "warp_reduction": (r"race in shared memory", False),
    "middle_reader": (r"race in shared memory", False),
    "early_exit": (r"divergent barrier: 100 threads are at __syncthreads, 28 have exited", True),
    "two_barriers": (r"divergent barrier: __syncthreads meets the one at \w+\.cu\(\d+\)", True),
    "barrier_against_shuffle": (r"deadlock.*64 wait at __syncthreads", True),
    "half_a_warp": (r"deadlock.*64 wait at a warp operation", True),
    "not_in_its_mask": (r"lane \d+ is not in its own mask 0000ffff", True),
    "absent_source": (r"shuffle: lane \d+ reads lane \d+, which takes no part", True),
    "livelock": (r"livelock: threads only spin", True),
    "spin_without_nap": (r"livelock: threads only spin", True),
    "endless_loop": (r"endless loop", True),
    "trap": (r"trap", True),
}
GRIDS = {  # name, number of the bug
    ("blocks_collide", 1): r"race in y: write after a write by thread \d+ of block \d",
    ("atomic_and_plain", 1): r"race in shared memory: (atomic operation|write) after a (atomic|write)",
    ("last_block", 1): r"race in y: read after a write",
    ("last_block", 2): r"race in y",
    ("last_block", 3): r"race in|uninitialised",
    ("everybody_fences", 1): r"race in y: read after a write",
    ("grid_barrier_rounds", 1): r"race in y",
    ("grid_barrier_rounds", 2): r"race in y|trap",  # the kernel itself traps when it reads too early
    ("grid_barrier_rounds", 3): r"race in y|trap",
    ("grid_barrier_rounds", 4): r"race in y|trap",
    ("flag", 1): r"race in y: read after a write",
    ("asynchronous_copy", 1): r"read of uninitialised shared memory|race in shared memory",
    ("own_asynchronous_copy", 1): r"read of uninitialised shared memory",
    ("asynchronous_copy", 2): r"read of uninitialised shared memory|race in shared memory",
}
CLUSTERS = {
    "read_too_early": r"race in shared memory|uninitialised shared memory|has exited",
    "exit_too_early": r"has exited",
    "no_such_rank": r"rank 2 in a cluster of 2",
    "beyond_the_peers_array": r"out-of-bounds shared read",
    "write_after_arriving": r"race in shared memory|uninitialised shared memory",
    "relaxed_arrival": r"race in shared memory|uninitialised shared memory",
    "second_arrival": r"a second arrive without a wait",
}
PLAIN = {**BOUNDS, **BARRIERS}


def run_in_one_block(name, bug, seed, checked=True):
    """A kernel of bounds.cu or barriers.cu."""
    kernel = sample("bounds" if name in BOUNDS or name in ONLY_RIGHT else "barriers", name, checked=checked, BUG=bug)
    x = device_array(np.zeros(100, np.float32), "x")
    empty = name == "uninitialised_global"
    y = device_empty(256, np.float32, "y") if empty else device_array(np.zeros(256, np.float32), "y")
    kernel.most_steps = 1 << 26  # so that the endless loop is one soon
    kernel((1,), (THREADS,), (x, y, np.int32(100)), shared_mem=4 * THREADS, seed=seed)
    return y


ONLY_RIGHT = ("local_array", "unwritten_output")


def run_in_several_blocks(name, bug, seed, checked=True):
    """A kernel of grids.cu."""
    blocks, rounds = 3, 3
    counters = device_array(np.zeros(8, np.uint32), "counters", offset=0)
    size = (blocks * rounds if name == "grid_barrier_rounds" else blocks + 1) * THREADS
    y = device_array(np.zeros(size, np.float32), "y")
    kernel = sample("grids", name, checked=checked, BUG=bug)
    cooperative = name in ("grid_barrier_rounds", "flag")
    kernel((blocks,), (THREADS,), (counters, y, np.int32(rounds)), cooperative=cooperative, seed=seed)
    return y


def run_in_a_cluster(name, bug, seed, checked=True):
    """A kernel of clusters.cu."""
    y = device_array(np.zeros(256, np.float32), "y")
    sample("clusters", name, 90, checked, BUG=bug)((2,), (THREADS,), (y,), seed=seed)
    return y


@pytest.mark.parametrize("name", PLAIN)
def test_a_bug_in_one_block_is_a_fault_under_every_schedule(name):
    for seed in SCHEDULES:
        with pytest.raises(Fault, match=PLAIN[name][0]) as caught:
            run_in_one_block(name, 1, seed)
        assert name in str(caught.value), "the kernel is not named"
        if "deadlock" not in str(caught.value):
            assert re.search(
                r"(bounds|barriers)\.cu\(\d+\).*by thread \(\d+,0,0\) of block \(0,0,0\)", str(caught.value)
            )


@pytest.mark.parametrize("name", [name for name in PLAIN if PLAIN[name][1]])
def test_bounds_of_global_memory_and_barriers_need_no_checked_launch(name):
    for seed in SCHEDULES[:2]:
        with pytest.raises(Fault, match=PLAIN[name][0]):
            run_in_one_block(name, 1, seed, checked=False)


@pytest.mark.parametrize(("name", "bug"), GRIDS, ids=lambda value: str(value))
def test_a_bug_between_blocks_is_a_fault_under_every_schedule(name, bug):
    for seed in SCHEDULES:
        with pytest.raises(Fault, match=GRIDS[name, bug]):
            run_in_several_blocks(name, bug, seed)


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_bug_in_a_cluster_is_a_fault_under_every_schedule(name):
    for seed in SCHEDULES:
        with pytest.raises(Fault, match=CLUSTERS[name]):
            run_in_a_cluster(name, 1, seed)


RIGHT = [
    *((run_in_one_block, name) for name in (*PLAIN, *ONLY_RIGHT)),
    *((run_in_several_blocks, name) for name in dict.fromkeys(name for name, _ in GRIDS)),
    *((run_in_a_cluster, name) for name in CLUSTERS),
]


@pytest.mark.parametrize(("run", "name"), RIGHT, ids=[name for _, name in RIGHT])
def test_a_right_kernel_raises_nothing_under_many_schedules(run, name):
    results = [run(name, 0, seed) for seed in QUIET_SCHEDULES]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    run(name, 0, 0, checked=False)


def test_after_a_fault_the_next_launch_is_as_good_as_the_first():
    for _ in range(3):
        with pytest.raises(Fault):
            run_in_one_block("early_exit", 1, 0)
        assert (run_in_one_block("warp_reduction", 0, 5)[:THREADS] == sum(range(32))).all()
