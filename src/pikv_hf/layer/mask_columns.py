"""What the mask of a call says of whole columns: which of them count, and which were padding and never stored.

Tokens that a 2-D mask hides when they come are padding, and are not stored. A later mask may hide stored tokens too,
and then attention applies it to them; it cannot show padding.
"""

import dataclasses
import functools

import numpy as np
import torch

from ..common.foreign_attributes import COLUMNS_ATTRIBUTE


@dataclasses.dataclass(frozen=True)
class MaskColumns:
    """The columns of an attention mask, on the host. Found once per mask, which all layers share.

    Attributes
    ----------
    shown : numpy.ndarray
        `(B or 1, T)` bool, False where the mask hides a column from every query of the call.
    new : int
        Q, the tokens of the call: the last columns.
    is_causal : bool
        Whether the mask hides nothing else but the future.
    tells_padding : bool
        Whether hidden tokens are padding, as a 2-D mask says of them. Of a 4-D mask nobody knows: it may show a token
        later that no query of this call sees.
    version : int or None
        Of the mask's tensor, which its owner may write into between calls; None where torch does not count.
    """

    shown: np.ndarray
    new: int
    is_causal: bool = False
    tells_padding: bool = False
    version: int | None = None

    @classmethod
    def of(cls, mask: torch.Tensor) -> "MaskColumns":
        """Return those of a mask.

        It is `(B or 1, 1 or Hq, Q, T)`, boolean or additive, or `(B, T)` as flash attention has it.
        """
        known: MaskColumns | None = getattr(mask, COLUMNS_ATTRIBUTE, None)
        version = None if mask.is_inference() else mask._version
        # Nobody but transformers has what the mask function made; it is not written into.
        if known is not None and (known.tells_padding or (version is not None and known.version == version)):
            return known
        shown = mask.bool() if mask.ndim == 2 else _visible(mask).any(dim=1).any(dim=1)
        known = cls(shown.cpu().numpy(), 0 if mask.ndim == 2 else mask.shape[2], version=version)
        setattr(mask, COLUMNS_ATTRIBUTE, known)
        return known

    def carried_to(self, narrower: torch.Tensor) -> None:
        """Have a mask that hides more of some queries say the same of padding: what none of them reads is none."""
        version = None if narrower.is_inference() else narrower._version
        setattr(narrower, COLUMNS_ATTRIBUTE, dataclasses.replace(self, is_causal=False, version=version))

    @functools.cached_property
    def hidden_until(self) -> int:
        """The columns before the call's own, up to the last one that is hidden in any row."""
        before = self.shown.shape[1] - self.new
        hidden = np.flatnonzero(~self.shown[:, :before].all(axis=0))
        return int(hidden[-1]) + 1 if len(hidden) else 0

    @functools.cached_property
    def new_valid(self) -> np.ndarray | None:
        """`(B, Q)` bool, which tokens of the call are no padding; None if all are stored."""
        valid = self.shown[:, self.shown.shape[1] - self.new :]
        return None if not self.tells_padding or valid.all() else valid

    def hides_stored(self, padding: np.ndarray | None) -> bool:
        """Return whether a token is hidden that came before the call and is no padding; see :func:`joined`."""
        known = 0 if padding is None else padding.shape[1]
        if self.hidden_until > known:
            return True
        return padding is not None and not np.array_equal(self.shown[:, :known], ~padding)

    def last(self, columns: int) -> "MaskColumns":
        """Return the last columns alone."""
        return dataclasses.replace(self, shown=self.shown[:, self.shown.shape[1] - columns :])


def _visible(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def new_tokens_valid(mask: torch.Tensor | None, new: int) -> torch.Tensor | None:
    """Tell real tokens from padding: where the mask does not say, a real token is one that sees itself.

    Parameters
    ----------
    mask : torch.Tensor, optional
        `(B, 1 or Hq, Q, T)`, boolean or additive; the last Q columns are the new tokens.
    new : int
        Q.

    Returns
    -------
    torch.Tensor or None
        `(B, Q)` bool, or None if all tokens are real.
    """
    if mask is None:
        return None
    columns = MaskColumns.of(mask)
    if columns.tells_padding:
        return None if columns.new_valid is None else torch.from_numpy(columns.new_valid).to(mask.device)
    valid = _visible(mask[..., -new:].diagonal(dim1=-2, dim2=-1)).any(dim=1)
    return None if bool(valid.all()) else valid


def trailing_columns(mask: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the last columns of a mask, for a layer whose older positions were replaced by fewer tokens."""
    cut = mask[..., -columns:]
    setattr(cut, COLUMNS_ATTRIBUTE, MaskColumns.of(mask).last(columns))
    return cut


# The padding of a layer: `(B, n)` bool, True for columns that were never stored; all from column n on hold tokens


def joined(padding: np.ndarray | None, columns: int, valid: np.ndarray) -> np.ndarray | None:
    """Return the padding of a layer of so many columns with new ones, of which `valid` `(B, Q)` bool are stored."""
    known = np.zeros((len(valid), columns), dtype=np.bool_)
    if padding is not None:
        known[:, : padding.shape[1]] = padding
    return trimmed(np.concatenate([known, ~valid], axis=1))


def trimmed(padding: np.ndarray) -> np.ndarray | None:
    """Return the padding without the columns after the last one, None if there is none."""
    last = np.flatnonzero(padding.any(axis=0))
    return padding[:, : last[-1] + 1] if len(last) else None


def check_shows_no_padding(where: str, padding: np.ndarray | None, columns: MaskColumns | None) -> None:
    """Raise `ValueError` if a mask shows what was padding when it came; without a mask everything is shown.

    Parameters
    ----------
    where : str
        For the message.
    padding : numpy.ndarray, optional
        `(B, n)` bool, see above.
    columns : MaskColumns, optional
        Those of the mask, by the layer's own.
    """
    if padding is None:
        return
    shown = padding if columns is None else padding & columns.shown[:, : padding.shape[1]]
    if not shown.any():
        return
    row, column = (int(index[0]) for index in np.nonzero(shown))
    says = "without an attention mask all tokens are shown" if columns is None else "the attention mask shows it"
    raise ValueError(
        f"{where}: token {column} of row {row} was padding when it came and was never stored, but {says} now; pass a "
        "mask that goes on to hide it, or show it from the start"
    )
