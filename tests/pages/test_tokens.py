"""Tokens on their way into pages: parts of a sequence and of rows, and which pool they end up in."""

import pytest
import torch

from pikv_hf.config import CODECS
from pikv_hf.pages.pool_id import PLAIN, UNCODED, PoolId
from pikv_hf.pages.tokens import TokenBatch


def batch(*rows: int, tokens: int = 5) -> TokenBatch:
    """Tokens of `rows` rows, of one sequence if there are none; each number says where it is."""
    shape = (*rows, 2, tokens)
    keys, values = (torch.arange(torch.Size(shape).numel() * dim).view(*shape, dim) for dim in (4, 3))
    positions = torch.arange(tokens, dtype=torch.int32)
    return TokenBatch(keys, values, positions, torch.arange(tokens, dtype=torch.int16).expand(*rows, tokens))


@pytest.mark.parametrize("rows", [(), (3,)])
def test_parts_and_picks_are_of_every_tensor(rows: tuple[int, ...]) -> None:
    tokens = batch(*rows)
    part, picked = tokens[1:4], tokens.pick(torch.tensor([3, 0]))
    assert (len(tokens), len(part), len(picked)) == (5, 3, 2)
    for got, places in ((part, [1, 2, 3]), (picked, [3, 0])):
        assert got.positions.tolist() == places
        assert torch.equal(got.experts, tokens.experts[..., places])
        assert torch.equal(got.keys, tokens.keys[..., places, :])
        assert torch.equal(got.values, tokens.values[..., places, :])
    assert part.keys.untyped_storage().data_ptr() == tokens.keys.untyped_storage().data_ptr(), "a part is a view"


def test_a_row_is_a_sequence() -> None:
    tokens = batch(3)
    row = tokens.row(2)
    assert torch.equal(row.keys, tokens.keys[2])
    assert row.experts.shape == row.positions.shape == (5,)
    assert row.to(torch.device("cpu")).keys is row.keys, "nothing travels to where it is"


def test_pools_have_a_name_and_names_a_pool() -> None:
    ids = [PLAIN, UNCODED, *(PoolId(key, value) for key in CODECS for value in CODECS)]
    names = [pool.name for pool in ids]
    assert names[:2] == ["plain", "none"]
    assert PoolId("int4", "int2").name == "int4/int2"
    assert [PoolId.parse(name) for name in names] == ids
    assert len(set(names)) == len(set(ids))


def test_a_pool_is_low_rank_if_keys_or_values_are() -> None:
    assert not PLAIN.is_lowrank
    assert not PoolId("int4", "none").is_lowrank
    assert PoolId("lowrank", "int4").is_lowrank
    assert PoolId("none", "lowrank+int4").is_lowrank
