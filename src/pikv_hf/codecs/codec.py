"""Encoding and decoding full pages of keys or values: quantised, as low-rank coefficients, or as they came."""

import dataclasses

import torch

from ..common.kv import KV
from ..kernels.decode_pages import decode_pages
from ..kernels.encode_pages import encode_pages
from ..kernels.page_codes import Kind, PageCodes, empty_codes

#: A low-rank basis is fitted once this many tokens per head dim are there.
FIT_TOKENS_PER_DIM = 4


@dataclasses.dataclass(slots=True)
class Codec:
    """Encodes and decodes the keys, or the values, of the pages of one pool.

    Stored pages live in a *code space* of `D` coded and `L` latent channels; attention takes queries into it and
    brings outputs back, so that pages are never decoded. For all but the low-rank codecs it is the model's own space.

    Parameters
    ----------
    name : str
        Any of :data:`pikv_hf.config.CODECS` but `"auto"`, which is a choice among others.
    which : KV
        Keys or values.
    rank : int
        Of the low-rank codecs, at most the head dim.

    Attributes
    ----------
    basis : torch.Tensor or None
        `(H, D, rank)` in the model's dtype, orthonormal columns per KV head; None until fitted, and for other codecs.
    """

    name: str
    which: KV
    rank: int = 0
    basis: torch.Tensor | None = None

    @property
    def is_lowrank(self) -> bool:
        """Whether pages are kept as coefficients of a basis."""
        return is_lowrank(self.name)

    @property
    def kind(self) -> Kind:
        """The format of what is coded."""
        return {"lowrank": "none", "lowrank+int4": "int4"}.get(self.name, self.name)  # type: ignore[return-value]

    def empty(self, heads: int, page_size: int, dim: int, dtype: torch.dtype, device: torch.device) -> PageCodes:
        """Return the codes of no pages."""
        coded = min(self.rank, dim) if self.name == "lowrank" else dim
        latent = min(self.rank, dim) if self.name == "lowrank+int4" else 0
        return empty_codes(self.kind, heads, page_size, coded, dtype, device, keys=self.which is KV.KEYS, rank=latent)

    def is_ready(self, tokens: int, dim: int) -> bool:
        """Return whether pages of so many tokens can be encoded; a basis wants some to be fitted to."""
        return not self.is_lowrank or self.basis is not None or tokens >= FIT_TOKENS_PER_DIM * dim

    def encode(self, tokens: torch.Tensor) -> PageCodes:
        """Encode full pages `(H, N, P, D)`. The first call of a low-rank codec fits its basis to them."""
        if not self.is_lowrank:
            return encode_pages(tokens, self.kind, keys=self.which is KV.KEYS)
        if self.basis is None:
            self.basis = fit_basis(tokens, self.rank)
        coefficients = torch.matmul(tokens, self.basis.unsqueeze(1))
        if self.name == "lowrank":
            return PageCodes("none", tokens.shape[2], coefficients)
        rest = tokens.float() - torch.matmul(coefficients.float(), self.basis.float().unsqueeze(1).transpose(2, 3))
        return dataclasses.replace(encode_pages(rest, self.kind, keys=self.which is KV.KEYS), latent=coefficients)

    def decode(self, codes: PageCodes, dtype: torch.dtype) -> torch.Tensor:
        """Decode pages into `(H, N, P, D)`."""
        if self.basis is None:
            return decode_pages(codes, dtype)
        heads = codes.heads
        decoded = decode_pages(codes, torch.float32)
        return self.from_code_space(decoded.reshape(heads, -1, codes.width)).view(*decoded.shape[:3], -1).to(dtype)

    def to_code_space(self, queries: torch.Tensor) -> torch.Tensor:
        """Return `(H, ..., D)` as `(H, ..., D')` that meet stored keys as the queries meet decoded ones."""
        if self.basis is None:
            return queries
        latent = torch.matmul(queries.flatten(1, -2), self.basis.to(queries.dtype)).view(*queries.shape[:-1], -1)
        return latent if self.name == "lowrank" else torch.cat([queries, latent], dim=-1)

    def from_code_space(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return sums of stored values, `(H, ..., D')`, as sums of decoded ones, `(H, ..., D)`."""
        if self.basis is None:
            return outputs
        rank = self.basis.shape[-1]
        latent = outputs[..., -rank:]
        full = torch.matmul(latent.flatten(1, -2), self.basis.to(outputs.dtype).transpose(1, 2))
        full = full.view(*outputs.shape[:-1], -1)
        return full if self.name == "lowrank" else outputs[..., :-rank] + full


def is_lowrank(name: str) -> bool:
    """Return whether the codec of that name keeps pages as coefficients of a basis."""
    return name.startswith("lowrank")


def fit_basis(tokens: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the basis `(H, D, rank)` that keeps most of the energy of `(H, N, P, D)` tokens, one per head.

    The leading eigenvectors of the second moment, the right singular vectors of the tokens: the best basis of that
    rank in the least-squares sense (Eckart and Young, 1936). Not centred, so that a query needs no extra term.
    """
    flat = tokens.flatten(1, 2).double()
    _, vectors = torch.linalg.eigh(torch.matmul(flat.transpose(1, 2), flat))
    return vectors[..., -min(rank, tokens.shape[-1]) :].to(tokens.dtype).contiguous()
