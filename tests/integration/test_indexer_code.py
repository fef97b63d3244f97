"""What the code of indexers, and of attention with one, may do: judged before it runs."""

import torch

from pikv_hf.integration.attention_code import only_indexes, why_not_in_place


class Indexer(torch.nn.Module):
    """Has the cache for its keys alone."""

    def forward(self, keys, cache=None):
        if cache is not None:
            keys = cache.update_indexer(keys, 0)
        return keys


class Reader(torch.nn.Module):
    """Looks at the cache's layers, too."""

    def forward(self, keys, cache=None):
        keys = cache.update_indexer(keys, 0)
        return keys + cache.layers[0].keys.sum()


class Passer(torch.nn.Module):
    """Hands the cache on."""

    def forward(self, keys, cache=None):
        keys = cache.update_indexer(keys, 0)
        return self.other(keys, cache)


class Masks(torch.nn.Module):
    """Makes a mask of all keys where its attention is another."""

    names = ("eager", "sdpa")

    def forward(self, query, cache, ALL_ATTENTION_FUNCTIONS):
        key, value = cache.update(query, query, 0)
        mask, indices = None, None
        if self.config._attn_implementation in ("eager", "sdpa"):
            mask = query.new_ones(key.shape[2])
        else:
            indices = self.chosen
        attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out = attention_interface(self, query, key, value, mask, indices=indices)
        return self.out(out)


class MasksWithPiKV(torch.nn.Module):
    """Makes it with PiKV's attention, too."""

    def forward(self, query, cache, ALL_ATTENTION_FUNCTIONS):
        key, value = cache.update(query, query, 0)
        mask = None
        if self.config._attn_implementation in ("eager", "sdpa", "pikv"):
            mask = query.new_ones(key.shape[2])
        attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out = attention_interface(self, query, key, value, mask)
        return self.out(out)


class MasksByNames(torch.nn.Module):
    """Makes it for attention whose names are elsewhere."""

    names = ("eager", "sdpa")

    def forward(self, query, cache, ALL_ATTENTION_FUNCTIONS):
        key, value = cache.update(query, query, 0)
        mask = None
        if self.config._attn_implementation in self.names:
            mask = query.new_ones(key.shape[2])
        attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out = attention_interface(self, query, key, value, mask)
        return self.out(out)


class Positions(torch.nn.Module):
    """Counts tokens where it is told of no positions."""

    def forward(self, query, cache, ALL_ATTENTION_FUNCTIONS, position_ids=None):
        key, value = cache.update(query, query, 0)
        if position_ids is None:
            position_ids = torch.arange(key.shape[2])
        attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out = attention_interface(self, query, key, value, self.mask(position_ids))
        return self.out(out)


class BlockPositions(torch.nn.Module):
    """The same of an attention to blocks, which PiKV's refuses without positions."""

    def forward(self, query, cache, ALL_ATTENTION_FUNCTIONS, position_ids=None):
        key, value = cache.update(query, query, 0)
        if position_ids is None:
            position_ids = torch.arange(key.shape[2])
        attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out = attention_interface(self, query, key, value, None, block_indices=self.indexer(position_ids))
        return self.out(out)


def test_what_indexers_and_their_attention_may_do() -> None:
    assert only_indexes(Indexer)
    assert not only_indexes(Reader)
    assert not only_indexes(Passer)
    assert not only_indexes(torch.nn.Linear)
    assert why_not_in_place(Masks()) is None
    assert "takes for those of all tokens" in str(why_not_in_place(MasksWithPiKV()))
    assert why_not_in_place(MasksByNames()) is not None
    assert why_not_in_place(Positions()) is not None
    assert why_not_in_place(BlockPositions()) is None
