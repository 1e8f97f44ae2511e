"""What the host executor computes, against NumPy, Python's integers and exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
from host import build
from host.executor import device_array, device_empty
from host.samples import SCHEDULES, sample

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing())

THREADS = 128

bfloat16 = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes, which is not installed").bfloat16


def launch(kernel, arguments, count, block=128, **options):
    kernel((-(-count // block),), (block,), arguments, **options)


@pytest.mark.parametrize("blocks", [1, 3])
def test_block_sums(blocks):
    x = np.random.default_rng(0).integers(-50, 50, 1000).astype(np.float32)
    sums = device_empty(blocks, np.float32)
    for seed in SCHEDULES:
        sample("values", "block_sums")((blocks,), (256,), (device_array(x), sums, np.int64(x.size)), seed=seed)
        assert sums.sum() == x.sum()


ALL_PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def same_numbers(got, expected):
    """Bit for bit, except that any NaN is as good as another."""
    got, expected = np.asarray(got), np.asarray(expected)
    nan = np.isnan(expected)
    assert np.isnan(got)[nan].all()
    bits = f"u{got.dtype.itemsize}"
    np.testing.assert_array_equal(got.view(bits)[~nan], expected.view(bits)[~nan])


@pytest.mark.parametrize(("name", "dtype"), [("widen_half", np.float16), ("widen_bfloat16", bfloat16)])
def test_every_16_bit_number_widens_exactly(name, dtype):
    x = ALL_PATTERNS.view(dtype)
    y = device_empty(x.size, np.float32)
    launch(sample("values", name), (device_array(x), y, np.int32(x.size)), x.size)
    with np.errstate(invalid="ignore"):
        same_numbers(y, x.astype(np.float32))


def around_every_midpoint(dtype, wide=np.float32):
    """All numbers of a 16-bit format, the midpoints between them, and the closest neighbours of both."""
    numbers = ALL_PATTERNS.view(dtype)
    with np.errstate(invalid="ignore"):
        numbers = np.unique(numbers[np.isfinite(numbers)].astype(np.float64))
    middles = (numbers[:-1] + numbers[1:]) / 2
    beyond = [numbers[-1] * 1.001, numbers[-1] * 1.01, numbers[-1] * 2, np.inf, -np.inf, np.nan, -numbers[-1] * 1.01]
    with np.errstate(over="ignore"):
        x = np.concatenate([numbers, middles, beyond]).astype(wide)
        return np.concatenate([x, np.nextafter(x, wide(np.inf)), np.nextafter(x, wide(-np.inf))])


@pytest.mark.parametrize(
    ("name", "dtype", "wide"),
    [
        ("round_to_half", np.float16, np.float32),
        ("round_to_bfloat16", bfloat16, np.float32),
        ("double_to_half", np.float16, np.float64),
    ],
)
@pytest.mark.parametrize("arch", [75, 90])
def test_rounding_to_16_bits_is_right_at_every_midpoint(name, dtype, wide, arch):
    x = around_every_midpoint(dtype, wide)
    y = device_empty(x.size, dtype)
    launch(sample("values", name, arch), (device_array(x), y, np.int32(x.size)), x.size)
    with np.errstate(over="ignore", invalid="ignore"):
        same_numbers(y, x.astype(dtype))


@pytest.mark.parametrize(("name", "dtype"), [("half_pairs", np.float16), ("bfloat16_pairs", bfloat16)])
def test_pairs_keep_their_order(name, dtype):
    x = np.linspace(-3, 5, 512, dtype=np.float32)
    y = device_empty(x.size, dtype)
    launch(sample("values", name), (device_array(x), y, np.int32(x.size // 2)), x.size // 2)
    same_numbers(y, x.astype(dtype))


def nearest(exact, dtype):
    """The number of a 16-bit format nearest to a fraction, ties to even; for finite results."""
    guess = np.array([float(exact)]).astype(dtype)
    around = (guess.view(np.uint16)[0] + np.arange(-1, 2)).astype(np.uint16).view(dtype)
    candidates = [v for v in around if np.isfinite(v.astype(np.float64))]
    return min(candidates, key=lambda v: (abs(Fraction(float(v)) - exact), v.view(np.uint16) & 1))


@pytest.mark.parametrize(
    ("name", "dtype", "arch"),
    [
        ("half_arithmetic", np.float16, 80),
        ("half_pair_arithmetic", np.float16, 80),
        ("bfloat16_arithmetic", bfloat16, 90),
    ],
)
def test_16_bit_arithmetic_rounds_once(name, dtype, arch):
    """Among the triples: products on a midpoint between two numbers, with an addend too small for double to keep.

    In [1, 4/3), every second bfloat16 times 1.5 is such a midpoint.
    """
    rng = np.random.default_rng(4)
    a, b, c = (rng.uniform(-4, 4, 4000).astype(dtype) for _ in range(3))
    a[:2000] = rng.uniform(1, 4 / 3, 2000).astype(dtype)
    b[:2000] = 1.5
    c[:2000] = (10.0 ** rng.uniform(*((-38, -20) if dtype is bfloat16 else (-7, -3)), 2000)).astype(dtype)
    c[:1000] *= -1
    y = device_empty((a.size, 3), dtype)
    pairs = 2 if "pair" in name else 1
    launch(sample("values", name, arch), (*map(device_array, (a, b, c)), y, np.int32(a.size // pairs)), a.size // pairs)
    got = np.array(y).reshape(-1, 3, pairs).transpose(0, 2, 1).reshape(-1, 3)
    for i in range(a.size):
        p, q, r = (Fraction(float(array[i])) for array in (a, b, c))
        for value, exact in zip(got[i], (p + q, p * q, p * q + r), strict=True):
            assert float(value) == float(nearest(exact, dtype)), (i, a[i], b[i], c[i])


def test_denormal_floats_are_flushed_and_doubles_are_not():
    smallest = np.finfo(np.float32).smallest_normal
    x = np.array([smallest, smallest / 2, -smallest / 2, 1e-45, -1e-45, smallest / 4 * 3, 1], np.float32)
    d = np.array([np.finfo(np.float64).smallest_normal] * x.size)
    y, e = device_empty((x.size, 5), np.float32), device_empty((x.size, 2), np.float64)
    launch(sample("values", "denormals"), (device_array(x), device_array(d), y, e, np.int32(x.size)), x.size)
    flushed = np.where(np.abs(x) < smallest, np.copysign(np.float32(0), x), x)
    same_numbers(y[:, 0], flushed * np.float32(1.5))
    same_numbers(y[:, 1], flushed + np.float32(0))
    same_numbers(y[:, 2], x)
    same_numbers(y[:, 3], (flushed > 0).astype(np.float32))
    same_numbers(y[:, 4] + 0, flushed + 0)
    same_numbers(e[:, 0], d / 2)
    same_numbers(e[:, 1], flushed.astype(np.float64))


@pytest.mark.parametrize("arch", [75, 90])
def test_integers(arch):
    rng = np.random.default_rng(3)
    a, b = rng.integers(-(2**31), 2**31, (2, 300)).astype(np.int32)
    b[:100] %= 50
    a[:3], b[:3] = (-(2**31), 2**31 - 1, 7), (-1, -1, 0)
    y = device_empty(a.size, np.int64)
    launch(sample("values", "integers", arch), (device_array(a), device_array(b), y, np.int32(a.size)), a.size)
    for i in range(a.size):
        assert y[i] == integers_in_python(int(a[i]), int(b[i])), (a[i], b[i])


def integers_in_python(a, b):
    def wrapped(v, bits):
        return (v + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)

    def quotient(p, q):
        return wrapped(abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1), 32)

    u, w, divisor = a % 2**32, b % 2**32, b or 1
    remainder = wrapped(a - quotient(a, divisor) * divisor, 32) if divisor != -1 else 0
    s = a * b + quotient(a, divisor) - remainder * 7
    bits = (u >> (w & 31)) + (a >> 3) + bin(u).count("1") * 11 + (32 - u.bit_length()) + (w & -w).bit_length()
    s += (bits + (u * w >> 32) + u // 7 + quotient(a, 13)) % 2**32
    s = wrapped(s, 64) ^ (wrapped(a, 8) << 20)
    s += w % 2**16 + min(a, b) - max(u, w) + (3 if a < b else 5 if u > w else 9)
    lanes = [(w << 32 | u) >> 8 * k & 255 for k in range(8)]
    permuted = sum(lanes[0x4163 >> 4 * k & 7] << 8 * k for k in range(4))
    funnel = ((w << 32 | u) << 9 >> 32) % 2**32
    s += permuted ^ funnel ^ int(f"{u:032b}"[::-1], 2)
    return wrapped(s + wrapped(abs(a), 32), 64)


def test_roots_and_their_like():
    """Approximate instructions may miss by what CUDA's tables allow: 2 ulp and a little for exp and log."""
    x = np.random.default_rng(5).normal(0, 2, 500).astype(np.float32)
    y, d = device_empty((x.size, 8), np.float32), device_empty((x.size, 4), np.float64)
    launch(sample("values", "roots"), (device_array(x), y, d, np.int32(x.size)), x.size)
    v = np.abs(x) + np.float32(0.1)
    w = v.astype(np.float64)
    approximate = [np.exp(-w), np.log(w), np.sqrt(w), 1 / np.sqrt(w), 1 / w]
    for k, expected in enumerate(approximate):
        np.testing.assert_allclose(y[:, k], expected, rtol=2e-6, atol=2e-6)
    exact = np.floor(x) + np.trunc(x) + np.rint(x * np.float32(10)) + np.ceil(x)
    np.testing.assert_array_equal(y[:, 5], exact)
    clipped = np.clip(x, 0, 1) + np.trunc(x * np.float32(100))
    np.testing.assert_array_equal(y[:, 6], clipped + np.copysign(np.float32(1), x))
    np.testing.assert_array_equal(y[:, 7], np.fmax(x, np.float32(0.25)) - np.fmin(x, np.float32(0.5)))
    np.testing.assert_array_equal(d[:, 0], np.sqrt(w))
    np.testing.assert_array_equal(d[:, 3], (w * 0.1) * (w * 0.1) - 0.5)
    np.testing.assert_allclose(d[:, 1:3], np.stack([1 / np.sqrt(w), 3 * w + 1 / w], 1), rtol=4e-16)


def test_comparisons_with_nan():
    values = np.array([1, -1, 0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    a, b = (array.ravel() for array in np.meshgrid(values, values))
    y = device_empty(a.size, np.int32)
    launch(sample("values", "comparisons"), (device_array(a), device_array(b), y, np.int32(a.size)), a.size)
    nan = np.isnan(a) | np.isnan(b)
    tests = [a < b, a <= b, a > b, a >= b, a == b, a != b, ~(a < b), ~(a > b), nan, ~(a < 0)]
    np.testing.assert_array_equal(y, sum(test.astype(np.int32) << k for k, test in enumerate(tests)))


@pytest.mark.parametrize("arch", [75, 80])
def test_lanes_exchange_what_they_should(arch):
    x = np.random.default_rng(6).integers(-9, 9, THREADS).astype(np.float32) / 2
    y, votes = device_empty(THREADS, np.float32), device_empty((THREADS, 4), np.uint32)
    sample("values", "lanes", arch)((1,), (THREADS,), (device_array(x), y, votes), seed=3)
    t = np.arange(THREADS)
    lane, warp = t % 32, t // 32 * 32

    def of(source):
        return x[warp + source]

    down, up = np.where(lane + 3 < 32, lane + 3, lane), np.where(lane >= 5, lane - 5, lane)
    narrow = np.where(lane % 8 < 7, lane + 1, lane)
    expected = of(down) + 2 * of(up) + 4 * of(7) + 8 * of(lane ^ 9) + 16 * of(narrow) + 32 * of(lane // 4 * 4 + 2)
    np.testing.assert_array_equal(y, expected)
    warps = x.reshape(-1, 32)
    np.testing.assert_array_equal(votes[:, 0], np.repeat((warps > 0) @ (1 << np.arange(32)), 32))
    np.testing.assert_array_equal(votes[:, 1], np.repeat((warps > 2).any(1) + 2 * (warps > -9).all(1), 32))
    np.testing.assert_array_equal(votes[:, 2], (x > 0.5).sum() * 4 + (x > 9).any() + 2 * (x < 9).all())
    reduced = warp * 32 + 496 + warp + 31 - (warp + 31)
    np.testing.assert_array_equal(votes[:, 3], reduced if arch >= 80 else 0)


@pytest.mark.parametrize("seed", SCHEDULES)
def test_atomics(seed):
    a = np.random.default_rng(7).integers(-(2**20), 2**20, 300).astype(np.int32)
    y, f = device_array(np.zeros(20, np.int32)), device_array(np.zeros(1, np.float32))
    count = device_array(np.zeros(1, np.uint64))
    launch(sample("values", "atomics"), (device_array(a), y, f, count, np.int32(a.size)), a.size, seed=seed)
    np.testing.assert_array_equal(y[:16], np.bincount(a & 15, minlength=16))
    assert y[16:].tolist() == [max(a.max(), 0), min(a.min(), 0), np.bitwise_xor.reduce(a), a.sum()]
    assert f[0] == (a & 3).sum()
    assert count[0] == 3 * a.size


def test_struct_arguments_switches_tables_and_three_dimensions():
    p = np.array((100, 1.5, 7), dtype=[("n", "i4"), ("factor", "f4"), ("shift", "i8")])
    x = np.arange(128, dtype=np.float32)
    y = device_array(np.zeros(128, np.float32))
    sample("values", "struct_argument")((1,), (THREADS,), (p, device_array(x), y))
    np.testing.assert_array_equal(y, np.where(x < 100, x * 1.5 + 7, 0))

    i = np.arange(40, dtype=np.int32)
    start = (i + 1).astype(np.float32)
    y = device_array(start)
    launch(sample("values", "choose"), (device_array(i), y, np.int32(i.size)), i.size)
    one = np.ones_like(start)
    cases = [start * 2, start + 7, one / start, start - 3, -start, start * start, np.sqrt(start), 0 * start]
    np.testing.assert_allclose(y, np.choose(i % 8, cases) + 3.0 ** (i // 8 % 5), rtol=1e-6)

    places = device_empty((2, 3, 2, 2, 3, 4, 3), np.int32)
    sample("values", "block_and_thread")((2, 3, 2), (4, 3, 2), (places,))
    blocks = (
        np.stack(np.meshgrid(range(2), range(3), range(2), indexing="ij"), -1).transpose(2, 1, 0, 3).reshape(-1, 1, 3)
    )
    threads = (
        np.stack(np.meshgrid(range(4), range(3), range(2), indexing="ij"), -1).transpose(2, 1, 0, 3).reshape(1, -1, 3)
    )
    np.testing.assert_array_equal(places.reshape(12, 24, 3), blocks + 10 * threads)
