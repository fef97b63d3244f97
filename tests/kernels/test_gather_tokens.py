"""Single tokens out of pages: what the pages decode to, at their slots."""

import pytest
import torch

from pikv_hf.codecs.codec import Codec
from pikv_hf.common.kv import KV
from pikv_hf.kernels.decode_pages import decode_pages
from pikv_hf.kernels.gather_tokens import gather_tokens
from pikv_hf.kernels.page_codes import KINDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", KV)
@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("in_place", [False, True])
def test_as_decoded_pages_have_them(kind: str, which: KV, size: int, in_place: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = Codec(kind, which).encode(torch.randn(2, 7, size, 12, generator=generator))
    if in_place:
        codes = codes.narrow(1, 7)
    numbers = torch.randint(codes.pages, (30,), generator=generator)
    slots = torch.randint(size, (30,), generator=generator)
    expected = decode_pages(codes, torch.float32)[:, numbers, slots]
    torch.testing.assert_close(gather_tokens(codes, numbers, slots, torch.float32), expected, atol=0, rtol=0)


def test_none_of_them() -> None:
    codes = Codec("int4", KV.KEYS).encode(torch.randn(2, 3, 8, 12))
    none = torch.zeros(0, dtype=torch.int64)
    assert gather_tokens(codes, none, none, torch.float32).shape == (2, 0, 12)
