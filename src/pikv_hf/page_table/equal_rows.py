"""Which rows of a batch are equal, so that they may share what is stored of them."""

from collections.abc import Sequence

import torch


def equal_rows(telling: Sequence[torch.Tensor], rest: Sequence[torch.Tensor | None]) -> list[int]:
    """Return for each row the first row that equals it in all of `(B, ...)` tensors.

    `generate(num_beams=n)` repeats its inputs before the prompt is run, so n rows of one prompt arrive as n equal
    blocks of K/V. Comparing small tensors of all rows first makes the usual answer, no, almost free.

    Parameters
    ----------
    telling : sequence of torch.Tensor
        Small ones, compared of all rows at once: at least one.
    rest : sequence of torch.Tensor or None
        Compared of the rows whose `telling` tensors are equal.

    Returns
    -------
    list of int
        Of B rows.
    """
    batch = len(telling[0])
    maybe = torch.ones((batch, batch), dtype=torch.bool)
    for part in telling:
        flat = part.flatten(1)
        maybe &= (flat[:, None] == flat).all(dim=-1).cpu()
    leaders = list(range(batch))
    for row in range(1, batch):
        for other in dict.fromkeys(leaders[:row]):
            if maybe[row, other] and all(part is None or torch.equal(part[row], part[other]) for part in rest):
                leaders[row] = other
                break
    return leaders
