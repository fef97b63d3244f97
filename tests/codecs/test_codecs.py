"""Codecs in the cache: bytes, errors, what is chosen for a page, and that attention reads what was stored."""

import gc
import math
from typing import Any

import pytest
import torch
from families import FAMILIES, prompts

from pikv_hf import PiKVCache, detach
from pikv_hf.codecs.codec import fit_basis
from pikv_hf.codecs.page_encoder import GUARD, PageEncoder
from pikv_hf.common.kv import KV
from pikv_hf.common.tensors import live_bytes
from pikv_hf.config import CODECS, PiKVConfig
from pikv_hf.eval.bench.decode import filled_pikv, geometry_model
from pikv_hf.integration.latent_code import caches_expanded_latents
from pikv_hf.layer.attend import attend
from pikv_hf.layer.layer_reads import storages
from pikv_hf.pages.packed_pool import PackedPool
from pikv_hf.pages.pool_id import PoolId

SMALL = {"page_size": 8, "recent_window": 16, "sink_tokens": 4, "num_shards": 3}
LOSSY = [name for name in CODECS if name != "none"]


def both(codec: str) -> dict[str, str]:
    return {"key_codec": codec, "value_codec": codec}


def filled(tokens: int = 600, dtype: torch.dtype = torch.float32, batch: int = 1, **options: Any) -> PiKVCache:
    """Return one layer of Qwen3-30B-A3B's attention geometry (32 / 4 heads of 128), filled with random tokens."""
    keys, values = torch.randn(2, batch, 4, tokens, 128).to(dtype)
    cache = filled_pikv(geometry_model(), keys, values, **options)
    cache.layers[0].settle()
    return cache


@pytest.mark.parametrize(("codec", "most"), [("int8", 0.55), ("int4", 0.30), ("int2", 0.18)])
def test_bytes_with_everything_counted(codec: str, most: float) -> None:
    cache = filled(8192, torch.bfloat16, **both(codec))
    layer = cache.layers[0]
    pool = layer.table.pools.packed[PoolId.parse(codec)]
    packed = int(pool.count.sum())
    plain = live_bytes(layer.table.plain.tensors()) + layer.table.plain.host_bytes
    assert packed > 0.9 * 8192
    share = (cache.nbytes - plain) / (packed * 2 * 4 * 128 * 2)
    assert 0.9 * most < share <= most
    assert cache.nbytes == sum(live_bytes([t]) for t in storages(layer.store)) + (
        layer.table.pools.host_bytes + layer.table.host_bytes
    )


def test_bytes_of_a_low_rank_codec() -> None:
    cache = filled(4096, torch.bfloat16, **both("lowrank"), rank=16)
    pool = cache.layers[0].table.pools.packed[PoolId.parse("lowrank")]
    assert pool.page_bytes * 8 == 2 * 4 * 128 * 2 * pool.page_size, "coefficients are rank / head dim of the tokens"
    bases = live_bytes([pool.key_codec.basis, pool.value_codec.basis])
    assert bases == 2 * 4 * 128 * 16 * 2
    assert cache.memory_report().keys >= bases // 2


def test_a_prompt_never_passes_through_the_plain_pool() -> None:
    cache = filled(8192, **both("int4"))
    table = cache.layers[0].table
    in_use = int((table.plain.allocator.refcount > 0).sum())
    assert table.plain.capacity <= in_use + 2 * table.num_shards
    assert table.pools.packed[PoolId.parse("int4")].capacity * 32 <= 8192


def test_a_generation_packs_its_pages_and_wastes_few() -> None:
    cache = filled(300, **both("int4"))
    layer = cache.layers[0]
    for _ in range(1500):
        layer.update(*torch.randn(2, 1, 4, 1, 128))
        layer.attend_begins(None)
        layer.record_experts(torch.randint(0, 32, (1,)))
    layer.settle()
    pool = layer.table.pools.packed[PoolId.parse("int4")]
    assert layer.table.tokens() == [1800]
    assert pool.count.sum() > 1800 - 32 - 160 - 8 * 32
    assert pool.allocator.free_pages <= 5
    assert layer.table.plain.capacity < 30


@pytest.mark.parametrize("codec", LOSSY)
def test_window_and_sinks_are_exact(codec: str) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 4, 900, 128)
    cache = filled_pikv(geometry_model(), keys, values, **both(codec))
    held_keys, held_values = cache.layers[0].dense()
    for held, given in ((held_keys, keys), (held_values, values)):
        assert torch.equal(held[:, :, :32], given[:, :, :32])
        assert torch.equal(held[:, :, -128:], given[:, :, -128:])
        assert not torch.equal(held[:, :, 32:-160], given[:, :, 32:-160])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("codec", [name for name in LOSSY if name != "auto"])
def test_attention_in_compressed_space_equals_decoding(family: str, codec: str) -> None:
    """An attached model attends to codes, a detached one to what they decode to: all but the same logits.

    Not quite the same, since a key that lies between two codes may be rounded either way.
    """
    model = FAMILIES[family].build()
    if any(caches_expanded_latents(type(module)) for module in model.modules()):
        pytest.skip(
            "codes of an attached model are those of latents: tests/integration/test_stored_latents.py has them"
        )
    options = {**SMALL, **both(codec), "placement": "hash", "rank": 4}
    ids = torch.randint(3, 190, (2, 150))
    steps = torch.randint(3, 190, (6, 2, 1))

    def logits(cache: PiKVCache) -> torch.Tensor:
        with torch.no_grad():
            out = [model(ids, past_key_values=cache).logits[:, -1]]
            out += [model(step, past_key_values=cache).logits[:, -1] for step in steps]
            # A later turn of many tokens: more queries than tokens in a page.
            out.append(model(ids[:, :70], past_key_values=cache).logits[:, -1])
        return torch.stack(out)

    dense = logits(PiKVCache(model.config, PiKVConfig(**options)))
    packed = PiKVCache.for_model(model, **options)
    difference = (logits(packed) - dense).abs()
    assert any(pool.count.sum() for layer in packed.layers if hasattr(layer, "table") for pool in _packed_pools(layer))
    detach(model)
    exact = logits(PiKVCache(model.config, PiKVConfig(**{**options, **both("none")})))
    loss = (dense - exact).abs()
    assert loss.max() > 1e-3, "nothing was lost, so nothing was tested"
    assert difference.max() < 0.1 * loss.max()
    assert difference.median() < 1e-5


def _packed_pools(layer: Any) -> list[PackedPool]:
    return list(layer.table.pools.packed.values())


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["int8", "auto", "lowrank+int4"])
def test_padding_beams_and_sampling_run(codec: str) -> None:
    model = FAMILIES["mixtral"].build()
    ids = torch.randint(3, 190, (2, 90))
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    cache = PiKVCache.for_model(model, **SMALL, **both(codec), rank=4)
    out = model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=40, past_key_values=cache)
    assert out.shape == (2, 130)
    assert any(pool.count.sum() for layer in cache.layers for pool in _packed_pools(layer))
    assert min(cache.layers[0].table.tokens()) < max(cache.layers[0].table.tokens()), "padding was stored"


def test_rows_that_share_a_prompt_pack_it_once() -> None:
    keys, values = torch.randn(2, 1, 4, 900, 128).expand(2, 3, 4, 900, 128)
    cache = filled_pikv(geometry_model(), keys.contiguous(), values.contiguous(), **both("int4"), placement="hash")
    cache.layers[0].settle()
    pool = cache.layers[0].table.pools.packed[PoolId.parse("int4")]
    assert 700 <= int(pool.count.sum()) <= 900
    fork = cache.fork()
    assert set(pool.allocator.refcount[pool.allocator.refcount > 0].tolist()) == {2}
    del fork
    gc.collect()
    cache.memory_report()
    assert set(pool.allocator.refcount[pool.allocator.refcount > 0].tolist()) == {1}


# What is chosen for a page


def encoder(codec: str, **options: Any) -> PageEncoder:
    return PageEncoder(codec, KV.KEYS, PiKVConfig(key_codec=codec, **options))


def test_a_page_with_a_huge_token_is_kept_wider() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(4, 20, 32, 64)
    tokens[:, 7, 5] *= 100
    taken = {each.codec.name: each.which.tolist() for each in encoder("int4").encode(tokens, None, 1.0)}
    assert taken.pop("int4") == [page for page in range(20) if page != 7]
    assert list(taken.values()) == [[7]]


@pytest.mark.parametrize("codec", ["int8", "int4", "int2"])
def test_the_guard_lets_ordinary_pages_pass(codec: str) -> None:
    torch.manual_seed(0)
    shapes = {
        "normal": torch.randn(4, 50, 32, 64),
        "uniform": torch.rand(4, 50, 32, 64),
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((4, 50, 32, 64)),
        "scaled channels": torch.randn(4, 50, 32, 64) * torch.logspace(-1, 2, 64),
        "offset": torch.randn(4, 50, 32, 64) + 50 * torch.randn(64),
    }
    for name, tokens in shapes.items():
        taken = {each.codec.name: len(each.which) for each in encoder(codec).encode(tokens, None, 1.0)}
        assert taken == {codec: 50}, name


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_as_it_is(codec: str, value: float) -> None:
    tokens = torch.randn(2, 40, 8, 16)
    tokens[0, 3, 2, 1] = value
    encoded = encoder(codec, rank=4).encode(tokens, None, 1.0)
    assert sorted(page for each in encoded for page in each.which.tolist()) == list(range(40))
    assert next(each.codec.name for each in encoded if 3 in each.which) == "none"
    for each in encoded:
        decoded = each.codec.decode(each.codes, torch.float32)
        assert decoded[:, [p != 3 for p in each.which]].isfinite().all()


@pytest.mark.parametrize("budget", [0.003, 0.02, 0.2, 1.0])
def test_auto_takes_the_narrowest_codec_within_the_budget(budget: float) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(3, 30, 32, 64) * torch.logspace(-1, 1, 30)[None, :, None, None]
    queries = torch.randn(3, 10, 64)
    chosen = encoder("auto", error_budget=budget)
    widths = {"int2": 2, "int4": 4, "int8": 8, "none": 32}
    for each in chosen.encode(tokens, queries, 0.125):
        for page, logit in zip(each.which.tolist(), each.errors.logits, strict=True):
            assert logit <= budget**2
            for name in widths:
                if widths[name] < widths[each.codec.name]:
                    narrower = chosen.codec(name, 64)
                    error = narrower.decode(narrower.encode(tokens[:, [page]]), torch.float32) - tokens[:, [page]]
                    logits = (error[:, 0] @ queries.transpose(1, 2) * 0.125).square().mean(dim=(1, 2)).sqrt()
                    deviation = (tokens[:, page] - tokens[:, page].mean(dim=1, keepdim=True)).abs().mean(dim=(1, 2))
                    ratio = error[:, 0].square().mean(dim=(1, 2)).sqrt() / deviation
                    assert logits.max() > budget or ratio.max() > GUARD[name]


def test_auto_with_a_budget_of_zero_is_exact() -> None:
    keys, values = torch.randn(2, 1, 4, 500, 128)
    cache = filled_pikv(geometry_model(), keys, values, **both("auto"), error_budget=0)
    assert torch.equal(cache.layers[0].dense()[0], keys)
    assert not any(pool.count.sum() for pool in _packed_pools(cache.layers[0]))


def test_a_basis_is_the_best_of_its_rank_and_waits_for_tokens() -> None:
    torch.manual_seed(0)
    low = torch.randn(2, 3, 16) @ torch.diag(torch.tensor([4.0] * 5 + [0.01] * 11))
    tokens = torch.randn(2, 40, 8, 3) @ low.unsqueeze(1)
    basis = fit_basis(tokens, 5)
    assert torch.allclose(basis.transpose(1, 2) @ basis, torch.eye(5).expand(2, 5, 5), atol=1e-5)
    kept = torch.matmul(torch.matmul(tokens, basis.unsqueeze(1)), basis.unsqueeze(1).transpose(2, 3))
    assert (kept - tokens).norm() < 1e-3 * tokens.norm()
    cache = filled(400, **both("lowrank"))
    assert not _packed_pools(cache.layers[0])[0].count.sum(), "512 tokens are wanted for a basis of head dim 128"
    cache = filled(1200, **both("lowrank"))
    assert _packed_pools(cache.layers[0])[0].count.sum() > 700


# Reports and errors


def test_report_names_bytes_and_errors_by_codec() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 4, 2000, 128)
    cache = filled_pikv(geometry_model(), keys, values, key_codec="int4", value_codec="int2")
    attend(cache.layers[0], torch.randn(1, 32, 1, 128))
    report = cache.memory_report()
    held_keys, held_values = cache.layers[0].dense()
    packed = report.per_codec["int4/int2"]
    lost = [(held - given).norm() for held, given in ((held_keys, keys), (held_values, values))]
    inside = packed.tokens / 2000
    assert packed.key_error == pytest.approx(float(lost[0] / keys.norm()) / inside**0.5, rel=0.02)
    assert packed.value_error == pytest.approx(float(lost[1] / values.norm()) / inside**0.5, rel=0.02)
    assert 0.05 < packed.key_error < 0.12 < 0.3 < packed.value_error < 0.6
    total = sum(codec.keys + codec.values for codec in report.per_codec.values()) + report.layers[0].free
    assert total == report.keys + report.values
    assert sum(codec.tokens for codec in report.per_codec.values()) == report.tokens_stored == 2000
    assert report.total == cache.nbytes
    assert "int4/int2" in str(report)
    assert report.to_dict()["per_codec"][1]["key_error"] == packed.key_error


def test_errors_of_logits_are_those_of_recent_queries() -> None:
    model = FAMILIES["qwen3_moe"].build()
    cache = PiKVCache.for_model(model, **SMALL, **both("int2"))
    with torch.no_grad():
        model(torch.randint(3, 190, (1, 200)), past_key_values=cache)
    cache.layers[0].settle()
    error = cache.memory_report().per_codec["int2"].logit_error
    assert error is not None
    assert error > 0
    assert cache.layers[0].table.pools.encoders.queries.shape == (2, 16, 16)


def test_out_of_memory_while_packing_a_prompt_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(1500, **both("int4"))
    layer = cache.layers[0]
    before = [t.clone() for t in layer.dense()]
    counts = {name: pool.allocator.refcount.copy() for name, pool in layer.table.pools.by_id().items()}

    def no_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory for codes")

    new = torch.randn(2, 1, 4, 3000, 128)
    with monkeypatch.context() as patch:
        patch.setattr(PackedPool, "put", no_memory)
        layer.update_from_attention(*new)
        layer.attend_begins(None)
        with pytest.raises(torch.OutOfMemoryError):
            layer.record_experts(torch.randint(0, 32, (3000,)))
    for name, pool in layer.table.pools.by_id().items():
        assert (pool.allocator.refcount[: len(counts[name])] == counts[name]).all()
        assert not pool.allocator.refcount[len(counts[name]) :].any()
    layer.crop(1500)
    for then, now in zip(before, layer.dense(), strict=True):
        assert torch.allclose(then, now, atol=1e-5)
    layer.update_from_attention(*new)
    layer.attend_begins(None)
    layer.record_experts(torch.randint(0, 32, (3000,)))
    assert layer.table.tokens() == [4500]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_codec": "int5"}, "key_codec must be one of .*, got 'int5'"),
        ({"value_codec": "lowrnk"}, "did you mean 'lowrank'"),
        ({"error_budget": -0.1}, "error_budget must be at least 0 and finite, got -0.1"),
        ({"error_budget": math.nan}, "error_budget must be at least 0 and finite, got nan"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PiKVConfig(**options)


@pytest.mark.parametrize("codec", ["lowrank", "lowrank+int4"])
def test_pages_packed_after_an_eviction_have_the_basis_of_those_before(codec: str) -> None:
    model = FAMILIES["qwen3_moe"].build()
    cache = PiKVCache.for_model(model, page_size=8, recent_window=16, key_codec=codec, value_codec=codec)
    exact = PiKVCache.for_model(model, page_size=8, recent_window=16)
    layer = cache.layers[0]
    with torch.no_grad():
        for each in (cache, exact):
            model(**prompts(1, 300), past_key_values=each)
        layer.settle()
        kept = torch.ones((1, layer.store.heads, 300), dtype=torch.bool)
        kept[:, :, 50:100] = False
        layer.keep(kept)
        held = layer.keys.clone()
        for each in (cache, exact):
            model(prompts(1, 200, seed=2)["input_ids"], past_key_values=each)
    assert torch.equal(layer.keys[:, :, :300], held)
    # The first layer's keys do not depend on what was evicted: what was packed later is as far off as what was before.
    error = (layer.keys - exact.layers[0].keys).square()[:, :, 100:].sum(dim=(1, 3))
    size = exact.layers[0].keys.square()[:, :, 100:].sum(dim=(1, 3))
    before, after = (
        float((error[:, part].sum() / size[:, part].sum()).sqrt()) for part in (slice(0, 150), slice(200, 350))
    )
    assert after < 1.2 * before
