"""Make pools of pages to check kernels on: real quantisations, with poison wherever a kernel must not look."""

import dataclasses

import torch

from pikv_hf.eval.gpu.references import PageTable
from pikv_hf.kernels.encode_pages import encode_pages
from pikv_hf.kernels.page_codes import Kind, PageCodes

#: Channels of keys with a constant offset, as biased projections make them, and its size beside a deviation of 1.
OFFSET_CHANNELS, OFFSET = 2, 8.0

#: What table entries beyond a row's length hold.
STRAY_PAGES = (10**8, -7)


def random_tokens(
    heads: int, pages: int, page_size: int, dim: int, generator: torch.Generator, *, keys: bool
) -> torch.Tensor:
    """Return `(H, N, P, D)` float32 tokens on the CPU; keys have a few huge channels."""
    tokens = torch.randn(heads, pages, page_size, dim, generator=generator)
    if keys:
        tokens[..., :OFFSET_CHANNELS] = tokens[..., :OFFSET_CHANNELS] * 2 + OFFSET
    return tokens


def ragged_table(
    batch: int, columns: int, page_size: int, generator: torch.Generator, *, full: bool = False
) -> PageTable:
    """Return rows of different lengths over scattered pages, on the CPU.

    The rows take turns at all columns, none, one page, and all but one; rows that read at least two pages share their
    first one. Every row's last page and some pages inside are partly filled, and one page is empty. At least one page
    of the pool is read by no row.

    Parameters
    ----------
    batch, columns, page_size : int
        B, n and P.
    generator : torch.Generator
        Of the page numbers and counts.
    full : bool
        Whether every row has all columns instead.
    """
    pages = batch * columns + 1
    table = torch.randperm(pages, generator=generator)[: batch * columns].view(batch, columns).int()
    pattern = [columns] if full else [columns, 0, 1, max(columns - 1, 1)]
    lengths = torch.tensor([pattern[row % len(pattern)] for row in range(batch)], dtype=torch.int32)
    counts = torch.full((pages,), page_size, dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        if length > 1:
            table[row, 0] = table[0, 0]
        if length > 3:
            counts[table[row, 1]], counts[table[row, 2]] = 0, (page_size + 1) // 2
        if length:
            counts[table[row, length - 1]] = int(torch.randint(1, page_size + 1, (1,), generator=generator))
        stray = [STRAY_PAGES[i % len(STRAY_PAGES)] for i in range(columns - length)]
        table[row, length:] = torch.tensor(stray, dtype=torch.int32)
    return PageTable(table, lengths, counts)


def encoded_pool(
    kind: Kind,
    heads: int,
    dim: int,
    page_size: int,
    page_table: PageTable,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    keys: bool,
    rank: int = 0,
) -> PageCodes:
    """Return the N pages of a table on the CPU, encoded by torch, poisoned, with L = `rank` latent channels.

    `dtype` is that of what is stored as it is: the codes of kind `"none"`, and latent channels.
    """
    pages = page_table.counts.shape[0]
    tokens = random_tokens(heads, pages, page_size, dim, generator, keys=keys)
    codes = encode_pages(tokens.to(dtype) if kind == "none" else tokens, kind, keys=keys, backend="torch")
    if rank:
        latent = torch.randn(heads, pages, page_size, rank, generator=generator).to(dtype)
        codes = dataclasses.replace(codes, latent=latent)
    return poisoned(codes, page_table)


def poisoned(codes: PageCodes, page_table: PageTable) -> PageCodes:
    """Spoil what no row may use: slots that hold no token, and every tensor of pages that no row reads.

    Codes of the integer kinds and of fp8 in unused slots stay what real tokens became; using them shows as well.
    """
    codes = codes.map(torch.clone)
    slots = torch.arange(codes.page_size)
    unused = (slots >= page_table.counts.unsqueeze(1)).unsqueeze(0).unsqueeze(-1)
    for stored in (codes.codes, codes.latent):
        if stored is not None and stored.is_floating_point():
            stored.masked_fill_(unused, torch.nan)
    read = torch.cat([page_table.pages(row) for row in range(len(page_table.lengths))])
    unread = torch.ones(page_table.counts.shape[0], dtype=torch.bool)
    unread[read] = False
    for tensor in codes.tensors():
        tensor[:, unread] = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    return codes
