"""Hold one allocation that every case takes its tensors from, so that each may use nearly all of the memory."""

import math

import torch

from pikv_hf.kernels.page_codes import FLOOR_UNITS, SPREAD_ONE, SPREAD_STEPS, Kind, PageCodes, empty_codes

#: Tensors begin at multiples of this, in bytes.
ALIGNMENT = 256

#: Bits that keep a byte from being one of float8 e4m3's NaN, 0x7F and 0xFF.
FINITE_FP8 = 0xF7


class Arena:
    """Memory to take tensors from; :meth:`reset` takes them all back.

    Parameters
    ----------
    size : int
        Bytes.
    device : torch.device
        Where.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self._used = 0

    @property
    def size(self) -> int:
        """Return the bytes there are."""
        return self._bytes.numel()

    def reset(self) -> None:
        """Take all tensors back; they must not be used any more."""
        self._used = 0

    def take(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a contiguous tensor that holds anything.

        Raises
        ------
        ValueError
            If not as many bytes are left.
        """
        size = math.prod(shape) * dtype.itemsize
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if start + size > self.size:
            raise ValueError(f"{size} bytes do not fit into an arena of {self.size}, {start} of them taken")
        self._used = start + size
        return self._bytes[start : self._used].view(dtype).view(*shape)


def random_pages(
    arena: Arena, kind: Kind, heads: int, pages: int, page_size: int, dim: int, *, keys: bool
) -> PageCodes:
    """Return pages of random codes, standard normal bf16 where they are stored as they are, else between -2 and 2.5.

    They are no quantisation of anything: for speed it only matters where they lie and how many bytes they are.
    """
    form = _form(kind, heads, page_size, dim, keys=keys)
    codes = form.map(lambda tensor: arena.take(heads, pages, *tensor.shape[2:], dtype=tensor.dtype))
    for part in (codes.codes, codes.fine):
        if part is not None:
            fill_random(part)
    if kind == "fp8":
        codes.codes.bitwise_and_(FINITE_FP8)
    if codes.spread is not None:
        codes.spread.random_(SPREAD_ONE - SPREAD_STEPS, SPREAD_ONE + SPREAD_STEPS)
    if codes.floor is not None:
        _fill_floors(codes.floor)
    if codes.outliers is not None:
        _fill_distinct(codes.outliers, dim)
    return codes


def _form(kind: Kind, heads: int, page_size: int, dim: int, *, keys: bool) -> PageCodes:
    return empty_codes(kind, heads, page_size, dim, torch.bfloat16, torch.device("cpu"), keys=keys)


def _fill_floors(floors: torch.Tensor) -> None:
    """Fill floors of keys, or of values in units of a share of the spread, unevenly about what centres the channel."""
    if floors.dtype == torch.int8:
        floors.random_(-2 * FLOOR_UNITS, FLOOR_UNITS // 2)
    else:
        floors.uniform_(-2.0, 0.5)


def _fill_distinct(outliers: torch.Tensor, dim: int) -> None:
    # One channel of each quarter.
    few = outliers.shape[-1]
    outliers.random_(0, dim // few)
    outliers += torch.arange(few, dtype=outliers.dtype, device=outliers.device) * (dim // few)


def fill_random(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a contiguous tensor with standard normal numbers, or with random bytes if it is uint8."""
    if tensor.dtype != torch.uint8:
        return tensor.normal_()
    flat = tensor.view(-1)
    whole = flat[: flat.numel() // 8 * 8].view(torch.int64)
    # By default the sign bit is always 0.
    whole.random_(-(2**63), 2**63 - 1)
    flat[whole.numel() * 8 :].random_(0, 256)
    return tensor


def pages_bytes(kind: Kind, heads: int, pages: int, page_size: int, dim: int, *, keys: bool) -> int:
    """Return the bytes of what :func:`random_pages` returns."""
    parts = _form(kind, heads, page_size, dim, keys=keys).tensors()
    return pages * sum(heads * math.prod(part.shape[2:]) * part.element_size() for part in parts)
