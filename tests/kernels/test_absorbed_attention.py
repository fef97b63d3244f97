"""Attention to latents with the projections in the queries: as over keys and values that are put together first."""

import pytest
import torch

from pikv_hf.codecs.codec import Codec
from pikv_hf.common.kv import KV
from pikv_hf.kernels import partial_attention
from pikv_hf.kernels.coded_attention import coded_attention
from pikv_hf.kernels.decode_pages import decode_pages

LANES, PAGES, SIZE, RANK, ROPE = 2, 5, 8, 32, 16


def tokens(dim: int, seed: int) -> torch.Tensor:
    """Return `(LANES, PAGES, SIZE, dim)` with a few large channels, as latents have them."""
    made = torch.randn(LANES, PAGES, SIZE, dim, generator=torch.Generator().manual_seed(seed))
    return made * torch.logspace(-0.5, 1, dim)


def reference(
    query: torch.Tensor, latents: torch.Tensor, rotary: torch.Tensor, bias: torch.Tensor | None, holes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.cat([latents, rotary], dim=-1).double()
    logits = query.double() @ keys.transpose(1, 2) * 0.1
    if bias is not None:
        logits = logits + bias
    logits[..., holes] = -torch.inf
    return logits.softmax(-1) @ latents.double(), logits.logsumexp(-1)


@pytest.mark.parametrize("queries", [1, 4, 40])
@pytest.mark.parametrize("kind", ["plain", "none", "int8", "int4", "int2", "fp8"])
@pytest.mark.parametrize("hidden", [False, True])
def test_as_over_whole_keys(queries: int, kind: str, hidden: bool) -> None:
    latents, rotary = tokens(RANK, 0), tokens(ROPE, 1)
    query = torch.randn(LANES, queries, RANK + ROPE, generator=torch.Generator().manual_seed(2))
    bias = torch.randn(1, queries, PAGES * SIZE, generator=torch.Generator().manual_seed(3)) if hidden else None
    holes = torch.tensor([3, 17, 39])
    page_lse = torch.empty(LANES, queries, PAGES)
    if kind == "plain":
        whole = latents.flatten(1, 2), rotary.flatten(1, 2)
        out, lse = partial_attention(query, *whole, 0.1, bias, holes, page_lse=page_lse, absorbed=True)
    else:
        codes = [Codec(kind, which).encode(part) for which, part in ((KV.KEYS, latents), (KV.VALUES, rotary))]
        whole = tuple(decode_pages(each, torch.float32).flatten(1, 2) for each in codes)
        out, lse = coded_attention(query, *codes, 0.1, bias, holes, page_lse=page_lse, absorbed=True)
    expected, total = reference(query, *whole, bias, holes)
    torch.testing.assert_close(out.double(), expected, atol=2e-4 * float(expected.abs().max()), rtol=0)
    torch.testing.assert_close(lse.double(), total, atol=1e-3, rtol=0)
    torch.testing.assert_close(page_lse.double().logsumexp(-1), total, atol=1e-3, rtol=0)
