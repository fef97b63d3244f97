"""Compute plainly what the kernels compute: in float64 as the truth, and in the kernel's dtype as a yardstick.

`operands` chooses: `torch.float64` computes everything in float64; any other dtype rounds what a kernel of that dtype
multiplies to it, and computes in float32. The error of the second against the first is what the dtype itself costs.
Packed pages are decoded by :func:`~pikv_hf.kernels.decode_pages.decode_pages`, in float32 before they are rounded.
"""

import dataclasses

import torch

from pikv_hf.kernels.decode_pages import decode_pages
from pikv_hf.kernels.page_codes import PageCodes, spread_values


@dataclasses.dataclass(frozen=True, slots=True)
class PageTable:
    """Which pages each row reads, and how many tokens they hold.

    Attributes
    ----------
    entries : torch.Tensor
        `(B, n)` int32 page numbers; entries beyond a row's length may be any numbers.
    lengths : torch.Tensor
        `(B,)` int32, table entries in use.
    counts : torch.Tensor
        `(N,)` int32, tokens in each page.
    """

    entries: torch.Tensor
    lengths: torch.Tensor
    counts: torch.Tensor

    def to(self, device: torch.device) -> "PageTable":
        """Return the table on a device."""
        return PageTable(self.entries.to(device), self.lengths.to(device), self.counts.to(device))

    def pages(self, row: int) -> torch.Tensor:
        """Return the page numbers that a row reads, int64."""
        return self.entries[row, : int(self.lengths[row])].long()

    def seen(self, row: int, page_size: int) -> torch.Tensor:
        """Return `(pages, P)` bool: the slots of a row's pages that hold a token."""
        slots = torch.arange(page_size, device=self.counts.device)
        return slots < self.counts[self.pages(row)].unsqueeze(1)


def _computed_in(operands: torch.dtype) -> torch.dtype:
    return torch.float64 if operands == torch.float64 else torch.float32


def _decoded(pages: PageCodes, index: torch.Tensor, operands: torch.dtype) -> torch.Tensor:
    """Return the pages at `index`, decoded and rounded to `operands`, `(H, n, P, D + L)`."""
    decoded = decode_pages(pages.pick(index), torch.float32)
    return decoded.to(operands).to(_computed_in(operands))


def attended(
    query: torch.Tensor,
    keys: PageCodes,
    values: PageCodes,
    page_table: PageTable,
    scale: float,
    softcap: float | None,
    operands: torch.dtype,
    *,
    absorbed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of one query per row and query head over the row's pages.

    Parameters
    ----------
    query : torch.Tensor
        `(B, Hq, D + L)` floating point.
    keys, values : PageCodes
        N pages of H KV heads, H a divisor of Hq.
    page_table : PageTable
        The pages of each row.
    scale : float
        Factor on the logits.
    softcap : float or None
        Logits become `softcap * tanh(logits / softcap)`.
    operands : torch.dtype
        See the module.
    absorbed : bool
        Whether `keys` are latents, values too, and `values` the rotary parts of keys; queries are as wide as both.

    Returns
    -------
    tuple of torch.Tensor
        `out` `(B, Hq, Dv + Lv)`, `lse` `(B, Hq)` and `page_lse` `(B, Hq, n)`, float64 or float32.
    """
    compute = _computed_in(operands)
    batch, heads, _ = query.shape
    columns = page_table.entries.shape[1]
    out = torch.zeros(batch, heads, (keys if absorbed else values).width, dtype=compute, device=query.device)
    lse = torch.full((batch, heads), -torch.inf, dtype=compute, device=query.device)
    page_lse = torch.full((batch, heads, columns), -torch.inf, dtype=compute, device=query.device)
    for row in range(batch):
        index, seen = page_table.pages(row), page_table.seen(row, keys.page_size)
        if not seen.any():
            continue
        # The scaled query is rounded, as flash-attention's own reference does: kernels round it with other factors.
        scaled = (query[row].to(compute) * scale).to(operands).to(compute).unflatten(0, (keys.heads, -1))
        parts = tuple(_decoded(pages, index, operands) for pages in (keys, values))
        scored, read = (torch.cat(parts, dim=-1), parts[0]) if absorbed else parts
        logits = torch.einsum("hgd,hptd->hgpt", scaled, scored)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~seen, -torch.inf)
        weights = (logits - logits.amax(dim=(2, 3), keepdim=True)).exp()
        # Unused slots may hold NaN, which a weight of 0 would not hide.
        shown = read.masked_fill(~seen.unsqueeze(-1), 0.0)
        total = weights.sum(dim=(2, 3)).unsqueeze(-1)
        mean = torch.einsum("hgpt,hptd->hgd", weights.to(operands).to(compute), shown) / total
        out[row] = mean.flatten(0, 1)
        page_lse[row, :, : len(index)] = logits.logsumexp(dim=3).flatten(0, 1)
        lse[row] = logits.flatten(2).logsumexp(dim=2).flatten()
    return out, lse, page_lse


def gathered(pages: PageCodes, page_table: PageTable, operands: torch.dtype) -> torch.Tensor:
    """Return each row's pages side by side, decoded, `(B, H, n * P, D + L)`, zeros where there is no token."""
    batch, columns = page_table.entries.shape
    shape = (batch, pages.heads, columns, pages.page_size, pages.width)
    out = torch.zeros(shape, dtype=_computed_in(operands), device=pages.codes.device)
    for row in range(batch):
        index, seen = page_table.pages(row), page_table.seen(row, pages.page_size)
        out[row, :, : len(index)] = _decoded(pages, index, operands).masked_fill(~seen.unsqueeze(-1), 0.0)
    return out.flatten(2, 3)


def scored(
    query: torch.Tensor, low: torch.Tensor, high: torch.Tensor | None, page_table: PageTable, operands: torch.dtype
) -> torch.Tensor:
    """Return the score of each row's pages for each KV head, `(B, H, n)`, `-inf` beyond a row's length.

    Parameters
    ----------
    query : torch.Tensor
        `(B, Hq, D)` floating point.
    low : torch.Tensor
        `(H, N, D)` floating point: least values, or centroids where `high` is None.
    high : torch.Tensor or None
        `(H, N, D)`: greatest values, or uint8 spread codes, by which they exceed `low`.
    page_table : PageTable
        The pages of each row.
    operands : torch.dtype
        See the module.
    """
    compute = _computed_in(operands)
    batch, columns = page_table.entries.shape
    out = torch.full((batch, low.shape[0], columns), -torch.inf, dtype=compute, device=low.device)
    for row in range(batch):
        index = page_table.pages(row)
        folded = query[row].to(operands).to(compute).unflatten(0, (low.shape[0], -1)).unsqueeze(2)
        least = low[:, index].to(compute)
        greatest = least
        if high is not None:
            chosen = high[:, index]
            greatest = least + spread_values(chosen).to(compute) if chosen.dtype == torch.uint8 else chosen.to(compute)
        bounds = (bound.to(operands).to(compute).unsqueeze(1) for bound in (least, greatest))
        products = [folded * bound for bound in bounds]
        out[row, :, : len(index)] = torch.maximum(*products).sum(dim=-1).amax(dim=1)
    return out


def merged(
    outs: torch.Tensor, lses: torch.Tensor, sinks: torch.Tensor | None, operands: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention over the union of S parts: `out` `(B, Hq, Dv)` and the keys' own `lse` `(B, Hq)`.

    Parameters
    ----------
    outs, lses : torch.Tensor
        `(S, B, Hq, Dv)` and `(S, B, Hq)`.
    sinks : torch.Tensor or None
        `(Hq,)`, logits without values that take their share of the softmax.
    operands : torch.dtype
        See the module.
    """
    compute = _computed_in(operands)
    lse = lses.to(compute).logsumexp(dim=0)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.to(compute))
    # Parts and rows without a key weigh nothing; -inf - -inf would be NaN.
    weights = (lses.to(compute) - total.masked_fill(total == -torch.inf, 0.0)).exp()
    return (weights.unsqueeze(-1) * outs.to(compute)).sum(dim=0), lse
