"""Pages as rows of bytes, for the memory of the host and for files."""

import dataclasses
import json
import math

import torch
import xxhash


@dataclasses.dataclass(frozen=True, slots=True)
class RecordLayout:
    """How the parts of a page's codes follow one another in its record.

    Attributes
    ----------
    label : str
        What else the bytes mean: codecs and page size.
    shapes : tuple of tuple of int
        Of each part of one page, the heads first.
    dtypes : tuple of torch.dtype
        Of each part.
    """

    label: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, label: str, tensors: list[torch.Tensor]) -> "RecordLayout":
        """Return the layout of pages of a pool whose parts are these `(H, N, ...)` tensors."""
        shapes = tuple((tensor.shape[0], *tensor.shape[2:]) for tensor in tensors)
        return cls(label, shapes, tuple(tensor.dtype for tensor in tensors))

    @property
    def sizes(self) -> list[int]:
        """Bytes of each part."""
        return [math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of a page."""
        return sum(self.sizes)

    @property
    def fingerprint(self) -> int:
        """64 bits that tell this layout from others."""
        text = json.dumps([self.label, self.shapes, [str(dtype) for dtype in self.dtypes]])
        return xxhash.xxh3_64_intdigest(text.encode())

    def pack(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return n pages, given by their parts `(H, n, ...)`, as `(n, nbytes)` uint8."""
        rows = [part.transpose(0, 1).contiguous().view(part.shape[1], -1).view(torch.uint8) for part in parts]
        return torch.cat(rows, dim=1)

    def unpack(self, records: torch.Tensor) -> list[torch.Tensor]:
        """Undo :meth:`pack`: `(n, nbytes)` uint8 into parts `(H, n, ...)`, all copies."""
        columns = records.split(self.sizes, dim=1)
        return [
            rows.clone(memory_format=torch.contiguous_format).view(dtype).view(len(records), *shape).transpose(0, 1)
            for rows, shape, dtype in zip(columns, self.shapes, self.dtypes, strict=True)
        ]
