# SPDX-License-Identifier: Apache-2.0
"""The device primitives, each against NumPy. The kernels are in primitives.cu."""

import ml_dtypes
import numpy as np
import pytest
from primitives_library import Library, compile_library

pytestmark = pytest.mark.gpu

BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
ROWS = 64  # of one wgmma
GUARD = 4096  # elements before and after a tensor, kGuard of primitives.cu
SIGNATURES = 8  # a warpgroup's in one round of take_turns
NAN_BITS = 0x7FFF  # in bf16 and in f16

# Of a sum of products, relative to the sum of their magnitudes. The products are exact; tensor
# cores truncate where they add, at least 22 bits further down.
SUM_ERROR = 1e-5

# Twice what the PTX ISA promises of ex2.approx.
EXP2_ERROR = 2.0**-21

element_types = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    path, _ = compile_library(tmp_path_factory.getbasetemp() / "primitives")
    with Library(path) as library:
        yield library


@pytest.fixture
def rng(request):
    """Other numbers in each test, the same in each run."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


def rounded(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(dtype)


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint16)


def normal(rng, dtype, *shape) -> np.ndarray:
    return rounded(rng.standard_normal(shape), dtype)


def identities(dtype, rows: int, cols: int) -> list[np.ndarray]:
    """Matrices of zeros and at most one one a row; together they have a one in each row and col."""
    return [np.eye(rows, cols, offset).astype(dtype) for offset in range(-64, cols, 64)]


def assert_sums_close(ours, terms_a, terms_b, start=0.0):
    """`ours` is start + terms_a @ terms_b."""
    a, b, start = (np.asarray(x, np.float64) for x in (terms_a, terms_b, start))
    error = np.abs(ours - (start + a @ b))
    assert np.all(error <= SUM_ERROR * (np.abs(start) + np.abs(a) @ np.abs(b))), error.max()


# ----------------------------------------------------------------------------------------- products


def scores(library, a, b, register_a: bool) -> np.ndarray:
    """a b^T."""
    d = np.full((ROWS, len(b)), np.nan, np.float32)
    n, k = b.shape
    return library.call("scores", a.dtype == F16, n, k, register_a, bits(a), bits(b), d)


@pytest.mark.parametrize("register_a", [False, True], ids=["shared_a", "register_a"])
@pytest.mark.parametrize("k", [64, 128, 256])
@pytest.mark.parametrize("n", [64, 80, 128])
@element_types
class TestScores:
    def test_identity(self, library, rng, dtype, n, k, register_a):
        """Each element of a tile is where it should be."""
        b = normal(rng, dtype, n, k)
        for a in identities(dtype, ROWS, k):
            expected = a.astype(np.float32) @ b.astype(np.float32).T
            np.testing.assert_array_equal(scores(library, a, b, register_a), expected)
        a = normal(rng, dtype, ROWS, k)
        for b in identities(dtype, n, k):
            expected = a.astype(np.float32) @ b.astype(np.float32).T
            np.testing.assert_array_equal(scores(library, a, b, register_a), expected)

    def test_random(self, library, rng, dtype, n, k, register_a):
        a, b = normal(rng, dtype, ROWS, k), normal(rng, dtype, n, k)
        assert_sums_close(scores(library, a, b, register_a), a, b.T)


def starts(library, first, second) -> np.ndarray:
    """The columns of three accumulators: first, second, first + second."""
    n = len(first)
    d = np.full((3, ROWS, n), np.nan, np.float32)
    d = library.call("starts", n, first, second, d)
    np.testing.assert_array_equal(d, np.broadcast_to(d[:, :1], d.shape))  # the same in all rows
    return d[:, 0]


@pytest.mark.parametrize("n", [64, 128])
class TestStarts:
    def test_columns_start_from_floats(self, library, rng, n):
        first, second = (
            (rng.standard_normal(n) * 2.0 ** rng.integers(-60, 60, n)).astype(np.float32)
            for _ in range(2)
        )
        ours = starts(library, first, second)
        exact = np.stack([first, second, first.astype(np.float64) + second])
        size = np.stack([abs(first), abs(second), abs(first) + abs(second)])
        assert np.all(abs(ours - exact) <= 2.0**-21 * size)

    def test_the_second_may_be_anything(self, library, rng, n):
        """It is not chosen in S, and may not be noticed there."""
        first = rng.standard_normal(n).astype(np.float32)
        second = np.resize(np.array([np.nan, np.inf, -np.inf, 3.3e38, 1.0], np.float32), n)
        ours = starts(library, first, second)
        np.testing.assert_allclose(ours[0], first, rtol=2.0**-21)
        finite = second == 1
        np.testing.assert_array_equal(ours[1][finite], 1)
        assert not np.isfinite(ours[1][~finite]).any()

    def test_the_first_is_bounded(self, library, n):
        """A row without visible keys has -inf, which would be NaN as a sum of three."""
        first = np.resize(np.array([-np.inf, np.inf, -3.3e38, 3.3e38, -3e38], np.float32), n)
        expected = np.clip(first, -3e38, 3e38)
        np.testing.assert_allclose(
            starts(library, first, np.zeros_like(first))[0], expected, rtol=2.0**-21
        )


def output_product(library, p, v, d) -> np.ndarray:
    """d + p v, with p rounded to the type of v."""
    return library.call("output_product", v.dtype == F16, *v.shape, p, bits(v), d)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("n", [80, 128])
@element_types
class TestOutputProduct:
    def test_identity(self, library, rng, dtype, n, head_dim):
        """Packed accumulators are the operand of the next product, without any shuffle."""
        zeros = np.zeros((ROWS, head_dim), np.float32)
        v = normal(rng, dtype, n, head_dim)
        for p in identities(np.float32, ROWS, n):
            expected = p @ v.astype(np.float32)
            np.testing.assert_array_equal(output_product(library, p, v, zeros), expected)
        p = rng.random((ROWS, n), np.float32)
        for v in identities(dtype, n, head_dim):
            expected = rounded(p, dtype).astype(np.float32) @ v.astype(np.float32)
            np.testing.assert_array_equal(output_product(library, p, v, zeros), expected)

    def test_random(self, library, rng, dtype, n, head_dim):
        p, v = rng.random((ROWS, n), np.float32), normal(rng, dtype, n, head_dim)
        d = rng.standard_normal((ROWS, head_dim), np.float32)
        assert_sums_close(output_product(library, p, v, d), rounded(p, dtype), v, start=d)


# ---------------------------------------------------------------------------------------------- TMA

# The tile's columns and the tensor's. Some leave whole slabs of 64 columns outside the tensor.
COLS_AND_HEAD_DIMS = [
    (64, 64), (64, 40), (64, 8),
    (128, 128), (128, 40), (128, 72),
    (256, 256), (256, 136), (256, 192),
]  # fmt: skip
cols_and_head_dims = pytest.mark.parametrize("cols, head_dim", COLS_AND_HEAD_DIMS)


def guarded(content: np.ndarray, shape) -> tuple[np.ndarray, np.ndarray]:
    """A buffer with `content` and, inside it, a tensor of this shape."""
    return content, content[GUARD:-GUARD].reshape(shape)


def guarded_size(shape) -> int:
    return 2 * GUARD + int(np.prod(shape))


def words(*values: int) -> np.ndarray:
    """As C++ has a TensorShape (batch, seq, heads, head_dim) or TmaCoordinates (the other way)."""
    return np.array(values, np.int32)


@pytest.mark.parametrize("seq, first_row", [(150, 0), (150, 64), (150, 128), (150, 192), (1, 0)])
@cols_and_head_dims
@element_types
def test_output_slab_is_stored(library, rng, dtype, cols, head_dim, seq, first_row):
    """The rows and columns inside the tensor are, and nothing else is touched."""
    shape = (2, seq, 3, head_dim)
    for batch, head in [(0, 0), (0, 2), (1, 1), (1, 2)]:
        acc = rng.standard_normal((ROWS, cols), np.float32)
        factors = rng.standard_normal((ROWS, 1), np.float32)
        poison = rng.integers(1 << 16, size=guarded_size(shape), dtype=np.uint16)
        expected, tensor = guarded(poison.copy(), shape)
        inside = tensor[batch, first_row : first_row + ROWS, head]
        inside[:] = bits(rounded(acc * factors, dtype))[: len(inside), :head_dim]
        at = words(0, first_row, head, batch)
        ours = library.call(
            "store_output", dtype == F16, cols, words(*shape), at, acc, factors, poison
        )
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("rows", [64, 80, 128])
@cols_and_head_dims
@element_types
def test_box_is_loaded(library, rng, dtype, rows, cols, head_dim):
    """Zeros where the tensor ends, whatever stands there in memory."""
    batches, seq, heads = shape = (2, 150, 3)
    for batch, head, first_row in [
        (1, 1, 0),  # inside
        (0, 0, 128), (0, 2, 128), (1, 0, 128), (1, 2, 149),  # over the edge
        (0, 1, 150), (1, 2, 1 << 20), (0, heads, 0), (batches, 0, 0),  # outside
    ]:  # fmt: skip
        buffer, tensor = guarded(
            np.full(guarded_size((*shape, head_dim)), NAN_BITS, np.uint16), (*shape, head_dim)
        )
        expected = np.zeros((rows, cols), np.uint16)
        if batch < batches and head < heads:
            numbers = tensor[batch, :, head]
            numbers[:] = bits(normal(rng, dtype, seq, head_dim))
            inside = numbers[first_row : first_row + rows]
            expected[: len(inside), :head_dim] = inside
        out = np.full_like(expected, 1)
        at = words(0, first_row, head, batch)
        ours = library.call(
            "load_box", dtype == F16, rows, cols, words(*shape, head_dim), at, buffer, out
        )
        np.testing.assert_array_equal(ours, expected)


# ----------------------------------------------------------------------------------------- barriers


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("through_tma", [False, True], ids=["stores", "tma"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_ring_keeps_order(library, stages, through_tma, seed):
    """Each lane of each consumer warp reads each number once, in order, whoever is slow when."""
    steps, lanes = 499, 8 * 32
    unread = np.full((steps, lanes), 0xFFFF, np.uint16)
    seen = library.call("pass_through_ring", stages, through_tma, steps, seed, unread)
    np.testing.assert_array_equal(seen, np.repeat(np.arange(steps)[:, None], lanes, axis=1))


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_cursor_after_steps(library, stages):
    step = np.arange(100)
    cursor = np.stack([step % stages, step // stages % 2], axis=1)
    ours = library.call("move_cursors", stages, len(step), np.full((len(step), 4), -1, np.int32))
    np.testing.assert_array_equal(ours[:, :2], cursor, err_msg="Cursor::after(step)")
    np.testing.assert_array_equal(ours[:, 2:], cursor, err_msg="advanced step times")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("warpgroups", [2, 3])
def test_turns_alternate(library, warpgroups, seed):
    """In a turn all warps of one warpgroup sign, and nobody else."""
    rounds = 200
    unsigned = np.full(rounds * warpgroups * SIGNATURES, -1, np.int32)
    log = library.call("take_turns", warpgroups, rounds, seed, unsigned)
    np.testing.assert_array_equal(
        log, np.tile(np.repeat(np.arange(warpgroups), SIGNATURES), rounds)
    )


# ----------------------------------------------------------------------------------------- numbers


def rounding_cases(dtype, rng) -> np.ndarray:
    """Every number of the type, the ties between them, numbers beside those, and any others."""
    every = rounded(np.arange(1 << 16, dtype=np.uint16).view(dtype), np.dtype(np.float32))
    finite = np.sort(every[np.isfinite(every)].astype(np.float64))
    overflow = 1.5 * finite[-1] - 0.5 * finite[-2]  # the tie of the largest number and infinity
    ties = np.concatenate([(finite[:-1] + finite[1:]) / 2, [overflow, -overflow]])
    ties = ties.astype(np.float32)
    any_bits = rng.integers(1 << 32, size=1 << 16, dtype=np.uint32).view(np.float32)
    specials = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 3.4e38, -3.4e38], np.float32)
    beside = [np.nextafter(ties, np.float32(end)) for end in (-np.inf, np.inf)]
    return np.concatenate([every, ties, *beside, any_bits, specials])


@element_types
def test_pack_rounds_to_nearest_even(library, rng, dtype):
    values = rng.permutation(rounding_cases(dtype, rng))
    pairs = values[: len(values) // 2 * 2].reshape(-1, 2)
    packed = library.call(
        "pack_pairs", dtype == F16, len(pairs), pairs, np.zeros(len(pairs), np.uint32)
    )
    ours = packed.view(np.uint16).reshape(-1, 2)  # the lower half comes first
    expected = rounded(pairs, dtype)
    is_nan = np.isnan(pairs)
    np.testing.assert_array_equal(np.isnan(ours.view(dtype).astype(np.float32)), is_nan)
    np.testing.assert_array_equal(ours[~is_nan], bits(expected)[~is_nan])


def exp2(library, x: np.ndarray) -> np.ndarray:
    return library.call("exp2_of", len(x), x.astype(np.float32))


@pytest.mark.parametrize("low, high", [(-126, 127.9), (-24, 0), (-1e-3, 1e-3), (-1e-30, 1e-30)])
def test_exp2_is_accurate(library, rng, low, high):
    x = rng.uniform(low, high, 1 << 18).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    np.testing.assert_allclose(exp2(library, x).astype(np.float64), exact, rtol=EXP2_ERROR)


def test_exp2_at_the_ends(library):
    x = np.array([-np.inf, -3e38, -1e4, -150, -127, -0.0, 0.0, 128, 1e4, np.inf, np.nan])
    expected = np.array([0, 0, 0, 0, 0, 1, 1, np.inf, np.inf, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(exp2(library, x), expected)
