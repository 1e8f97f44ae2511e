"""What ranks do with device memory: on stand-ins that record every step, and on a GPU where there is one.

The stand-in of a device array is a NumPy array that only its stand-in library may read.
"""

import itertools
import sys
import types

import array_api_compat.numpy
import numpy as np
import oracle
import pytest

import cubn
from cubn.errors import SyncError
from cubn.namespace import Library, why_no_cuda
from cubn.sync import over_mpi, over_nccl, rounds
from cubn.sync.over_mpi import _MPISync, takes_device_memory
from cubn.sync.over_nccl import _NCCLSync


class OnDevice(np.ndarray):
    """Memory of a device; `pending` while the current stream has not been waited for."""

    def get(self, stream=None, out=None):
        steps.append("copy to host")
        assert stream is standin.stream
        if out is None:
            return self.view(np.ndarray).copy()
        out[...] = self.view(np.ndarray)
        return out

    @property
    def data(self):
        return types.SimpleNamespace(device_id=DEVICE, ptr=id(self))


steps: list[str] = []
DEVICE = 0


class Stream:
    ptr = 7
    capturing = False
    arrives_after = 0

    def synchronize(self):
        steps.append("synchronise")

    def is_capturing(self):
        return self.capturing

    def record(self, event):
        steps.append("record")
        looks = itertools.count()
        after = self.arrives_after

        class Event:
            @property
            def done(self):
                return next(looks) >= after

        return Event()


class StandIn(types.ModuleType):
    """As much of CuPy as the adapters use."""

    def __init__(self):
        super().__init__("cupy")
        self.stream = Stream()
        self.cuda = types.SimpleNamespace(get_current_stream=lambda: self.stream, Event=lambda **_: None)
        self.made = []

    def empty(self, shape, dtype="float64"):
        made = np.empty(shape, dtype).view(OnDevice)
        self.made.append(made)
        return made

    def ascontiguousarray(self, array, dtype=None):
        return np.ascontiguousarray(array, dtype).view(OnDevice)


@pytest.fixture(autouse=True)
def standin_of_cupy(monkeypatch):
    if why_no_cuda() is None:  # a real CuPy is better
        yield None
        return
    global standin
    standin = StandIn()
    steps.clear()

    on_device = types.SimpleNamespace(
        concat=lambda arrays: np.concatenate(arrays).view(OnDevice),
        zeros=lambda shape, dtype, device: np.zeros(shape, dtype).view(OnDevice),
        asarray=lambda values, dtype, device: np.asarray(values, dtype).view(OnDevice),
    )

    def library_of(array):
        if isinstance(array, OnDevice):
            return Library("cupy", on_device, None, None)
        return Library("numpy", array_api_compat.numpy, None, None)

    for module in (over_mpi, over_nccl, rounds):
        monkeypatch.setattr(module, "library_of", library_of)
    monkeypatch.setitem(sys.modules, "cupy", standin)
    cupyx = types.ModuleType("cupyx")
    cupyx.empty_pinned = lambda shape, dtype: steps.append("pinned") or np.empty(shape, dtype)
    monkeypatch.setitem(sys.modules, "cupyx", cupyx)
    yield standin


needs_standin = pytest.mark.skipif(why_no_cuda() is None, reason="a GPU is at hand: the tests below run on it")


class Request:
    def Test(self):  # noqa: N802  # the names of MPI
        return True


class Comm:
    """A communicator of one rank."""

    rank, size = 0, 1

    def Iallgather(self, send, receive):  # noqa: N802
        steps.append(f"Iallgather from {'device' if isinstance(send, OnDevice) else 'host'}")
        receive[...] = send
        return Request()

    def Allgather(self, send, receive):  # noqa: N802
        steps.append(f"Allgather from {'device' if isinstance(send, OnDevice) else 'host'}")
        np.asarray(receive)[...] = np.asarray(send)

    def Ibarrier(self):  # noqa: N802
        steps.append("Ibarrier")
        return Request()


MPI = types.SimpleNamespace(COMM_NULL=None, Exception=ConnectionError)


@needs_standin
def test_device_memory_is_staged_through_pinned_memory_once_the_stream_is_done():
    sync = _MPISync(Comm(), 1.0, MPI, cuda_aware=False)
    (found,) = sync.all_gather(np.arange(5.0).view(OnDevice))
    assert steps == ["pinned", "copy to host", "synchronise", "Iallgather from host"]
    assert found.tolist() == [0, 1, 2, 3, 4]


@needs_standin
def test_device_memory_goes_to_a_cuda_aware_mpi_once_the_stream_is_done_and_all_ranks_are_there():
    sync = _MPISync(Comm(), 1.0, MPI, cuda_aware=True)
    (found,) = sync.all_gather(np.arange(5.0).view(OnDevice))
    assert steps[:3] == ["synchronise", "Ibarrier", "Allgather from device"]
    assert isinstance(found, OnDevice)
    assert found.tolist() == [0, 1, 2, 3, 4]


@needs_standin
def test_host_memory_needs_no_stream():
    (found,) = _MPISync(Comm(), 1.0, MPI, cuda_aware=True).all_gather(np.arange(3.0))
    assert steps == ["Iallgather from host"]
    assert found.tolist() == [0, 1, 2]


def test_an_error_of_mpi_names_the_rank_and_ends_the_communicator():
    class Dead(Comm):
        def Iallgather(self, send, receive):  # noqa: N802
            raise ConnectionError("process 1 has failed")

    sync = _MPISync(Dead(), 1.0, MPI, cuda_aware=False)
    with pytest.raises(SyncError, match=r"rank 0 met an error of MPI .*process 1 has failed.*look for a rank"):
        sync.all_gather(np.zeros(3))
    with pytest.raises(SyncError, match="has lost another rank of this communicator before"):
        sync.all_gather(np.zeros(3))


class Info(dict):
    def Get(self, key):  # noqa: N802
        return self.get(key)

    def Free(self):  # noqa: N802
        pass


@pytest.mark.parametrize(
    ("kinds", "aware"),
    [(None, False), ("mpi,system", False), ("mpi,system,cuda:device", True), ("system, cuda", True)],
)
def test_the_mpi_library_says_whether_it_takes_device_memory(kinds, aware):
    comm = types.SimpleNamespace(Get_info=lambda: Info(mpi_memory_alloc_kinds=kinds))
    assert takes_device_memory(comm, types.SimpleNamespace(__file__="/nowhere.so")) is aware


class NcclError(RuntimeError):
    pass


class Communicator:
    """NCCL with one rank, whose copies arrive when the stream says so."""

    aborted = False
    broken = False

    def rank_id(self):
        return 0

    def size(self):
        return 1

    def device_id(self):
        return 0

    def allGather(self, source, target, count, dtype, stream):  # noqa: N802
        assert (dtype, stream) == ("double", standin.stream.ptr)
        steps.append("allGather")
        rows = next(one for one in standin.made if id(one) == target)
        rows[...] = self.sent[-1]

    def check_async_error(self):
        if self.broken:
            raise NcclError("remote process exited")

    def abort(self):
        self.aborted = True


@pytest.fixture
def nccl_rank(standin_of_cupy, monkeypatch):
    if standin_of_cupy is None:
        pytest.skip("a GPU is at hand: the tests below run on it")
    comm = Communicator()
    comm.sent = []
    contiguous = standin_of_cupy.ascontiguousarray

    def kept(array, dtype=None):
        comm.sent.append(contiguous(array, dtype))
        return comm.sent[-1]

    monkeypatch.setattr(standin_of_cupy, "ascontiguousarray", kept)
    library = types.SimpleNamespace(NCCL_FLOAT64="double", NcclError=NcclError)
    return _NCCLSync(comm, 0.2, standin_of_cupy, library), comm


def test_nccl_sends_on_the_current_stream_and_waits_for_the_messages_alone(nccl_rank):
    sync, _ = nccl_rank
    standin.stream.arrives_after = 3
    (found,) = sync.all_gather(np.arange(4.0).view(OnDevice))
    assert steps[:2] == ["allGather", "record"]
    assert "synchronise" not in steps
    assert found.tolist() == [0, 1, 2, 3]


def test_nothing_is_waited_for_and_nothing_read_while_a_graph_is_recorded(nccl_rank):
    sync, _ = nccl_rank
    standin.stream.capturing = True
    (found,) = sync._gather_blindly(np.arange(4.0).view(OnDevice))
    assert steps == ["allGather"]
    assert found.view(np.ndarray).tolist() == [0, 1, 2, 3]


def test_a_lost_rank_of_nccl_is_missed_in_time_and_its_communicator_aborted(nccl_rank):
    sync, comm = nccl_rank
    standin.stream.arrives_after = 10**9
    with pytest.raises(SyncError, match=r"rank 0 waited for 1 ranks.*within 0.2 s"):
        sync.all_gather(np.arange(4.0).view(OnDevice))
    assert comm.aborted
    with pytest.raises(SyncError, match="has lost another rank"):
        sync.all_gather(np.arange(4.0).view(OnDevice))


def test_an_error_of_nccl_is_one_of_the_ranks(nccl_rank):
    sync, comm = nccl_rank
    standin.stream.arrives_after, comm.broken = 10**9, True
    with pytest.raises(SyncError, match=r"an error of NCCL .*remote process exited"):
        sync.all_gather(np.arange(4.0).view(OnDevice))


def test_an_array_on_another_device_than_the_communicator_is_refused(nccl_rank, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", 1)
    sync, _ = nccl_rank
    with pytest.raises(SyncError, match=r"x lives on device 1, but the communicator of rank 0 was made on device 0"):
        sync.all_gather(np.arange(4.0).view(OnDevice))


@needs_standin
def test_something_that_is_no_communicator_of_nccl_is_refused(monkeypatch):
    monkeypatch.setattr(over_nccl, "_library", lambda: None)
    with pytest.raises(TypeError, match=r"comm is a str, .*pass a cupy\.cuda\.nccl\.NcclCommunicator"):
        cubn.sync.nccl("world")


# On a GPU, with one rank


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(why_no_cuda() is not None, reason=str(why_no_cuda()))]


@pytest.fixture
def one_gpu_rank():
    nccl = pytest.importorskip("cupy.cuda.nccl")
    if not nccl.available:
        pytest.skip("this CuPy finds no NCCL")
    return cubn.sync.nccl(nccl.NcclCommunicator(1, nccl.get_unique_id(), 0))


def gpu_batch(cp):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(3.0, 2.0, (2, 16, 24, 5, 5))
    return x, dy, cp.asarray(x), cp.asarray(dy)


def roundoff_of_one_merge():
    return 6 * oracle.ARITHMETIC["float64"]


@pytest.mark.parametrize("marks", [pytest.param(None, marks=on_gpu)])
@pytest.mark.parametrize("engine", ["nccl", "mpi", "threads"])
def test_one_rank_with_a_gpu_computes_what_it_does_alone(engine, marks, request):
    cp = pytest.importorskip("cupy")
    if engine == "mpi":
        pytest.importorskip("mpi4py")
        sync = cubn.sync.mpi()
    else:
        sync = request.getfixturevalue("one_gpu_rank") if engine == "nccl" else cubn.sync.threads(1)[0]
    x, dy, on_x, on_dy = gpu_batch(cp)
    y, saved = cubn.batch_norm(on_x, sync=sync)
    dx = cubn.batch_norm_backward(on_dy, saved, sync=sync).dx
    exact = oracle.batch_norm(x, dy=dy, roundoff=roundoff_of_one_merge())
    oracle.assert_within(y.get(), exact.y)
    oracle.assert_within(dx.get(), exact.dx)
    with pytest.raises(cubn.ShapeError):
        cubn.batch_norm(on_x[:1, :, :1, :1], sync=sync)


@pytest.mark.parametrize("marks", [pytest.param(None, marks=on_gpu)])
def test_a_step_over_nccl_is_recorded_into_a_graph_and_follows_its_input(one_gpu_rank, marks):
    import cupy as cp

    x, dy, on_x, on_dy = gpu_batch(cp)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        y, dx = cp.empty_like(on_x), cp.empty_like(on_x)

        def step():
            _, saved = cubn.batch_norm(on_x, sync=one_gpu_rank, out=y)
            cubn.batch_norm_backward(on_dy, saved, sync=one_gpu_rank, out=dx)

        step()
        stream.synchronize()
        stream.begin_capture()
        step()
        graph = stream.end_capture()
        on_x *= 2
        graph.launch()
        stream.synchronize()
    exact = oracle.batch_norm(2 * x, dy=dy, roundoff=roundoff_of_one_merge())
    oracle.assert_within(y.get(), exact.y)
    oracle.assert_within(dx.get(), exact.dx)
