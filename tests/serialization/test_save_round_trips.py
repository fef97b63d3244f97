"""What is loaded is what was saved: codecs, families, shared, evicted and compressed pages."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, prompts
from save_round_trip import assert_equal, round_trip
from saved_runs import both, go_on, new_cache, read, shared_model

from pikv_hf import PiKVCache
from pikv_hf.config import CODECS
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.layer.layer_codecs import recode

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("codec", CODECS)
def test_codecs(codec: str, tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model, **both(codec)))
    assert any(layer.table.pools.packed for layer in cache.layers) == (codec != "none")
    loaded = round_trip(model, cache, tmp_path)
    for layer in loaded.layers:
        for encoder, keys in zip(layer.table.pools.encoders.in_use, (True, False), strict=False):
            pools = [pool for name, pool in layer.table.pools.packed.items() if name.is_lowrank]
            assert all((pool.key_codec if keys else pool.value_codec) in encoder.codecs.values() for pool in pools)


@pytest.mark.parametrize("codecs", [("int4", "none"), ("auto", "lowrank")])
def test_codecs_that_differ(codecs: tuple[str, str], tmp_path: Path) -> None:
    model = shared_model()
    round_trip(model, read(model, new_cache(model, key_codec=codecs[0], value_codec=codecs[1])), tmp_path)


@pytest.mark.parametrize("sliding", ["bounded", "paged"])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "jetmoe", "llama"])
def test_families(family: str, sliding: str, tmp_path: Path) -> None:
    """Sliding layers, keys and values of different width, a model whose attention loses the cache, a dense model."""
    model = shared_model(family)
    cache = read(model, new_cache(model, sliding_layers=sliding, **both("int8")))
    assert any(not isinstance(layer, PiKVLayer) for layer in cache.layers) == (
        family == "gpt_oss" and sliding == "bounded"
    )
    round_trip(model, cache, tmp_path)


def test_a_sliding_layer_before_its_window_is_full(tmp_path: Path) -> None:
    model = shared_model("gpt_oss")
    round_trip(model, read(model, new_cache(model), tokens=9), tmp_path)


@pytest.mark.parametrize(
    ("dtype", "codec"),
    [(torch.float16, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "int4"), (torch.bfloat16, "lowrank")],
)
def test_narrow_floats(dtype: torch.dtype, codec: str, tmp_path: Path) -> None:
    model = shared_model("mixtral", dtype)
    cache = read(model, new_cache(model, **both(codec)))
    path = tmp_path / "cache"
    cache.save(path)
    loaded = PiKVCache.load(path, model)
    assert_equal(cache, loaded)
    assert torch.equal(go_on(model, cache, steps=4).argmax(-1), go_on(model, loaded, steps=4).argmax(-1))


@pytest.mark.parametrize("codec", ["none", "int4", "lowrank"])
def test_a_padded_batch(codec: str, tmp_path: Path) -> None:
    model = shared_model("mixtral")
    inputs = prompts(batch=3, length=120)
    mask = inputs["attention_mask"]
    cache = new_cache(model, **both(codec))
    with torch.no_grad():
        model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), past_key_values=cache)
    assert cache.layers[0].store.padding() != [0, 0, 0]
    round_trip(model, cache, tmp_path, mask)


@pytest.mark.parametrize("codec", ["none", "auto"])
def test_beams_share_their_pages(codec: str, tmp_path: Path) -> None:
    model = shared_model("mixtral")
    cache = new_cache(model, **both(codec))
    ids = torch.randint(3, 190, (1, 100))
    model.generate(ids, num_beams=4, max_new_tokens=20, past_key_values=cache)
    loaded = round_trip(model, cache, tmp_path)
    assert loaded.layers[0].batch == 4


def test_shared_pages_are_written_once(tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model), batch=1)
    cache.save(tmp_path / "one")
    cache.batch_repeat_interleave(8)
    cache.save(tmp_path / "eight")
    one, eight = ((tmp_path / name).stat().st_size for name in ("one", "eight"))
    assert one <= eight < 1.02 * one
    rows = PiKVCache.load(tmp_path / "eight", model).layers[0].table.rows
    assert len(rows) == 8
    assert all(row is rows[0] for row in rows)


def test_forks_are_saved_apart(tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model, **both("int4")))
    forks = [cache.fork() for _ in range(2)]
    go_on(model, forks[0])
    forks[1].crop(60)
    for fork in (cache, *forks):
        round_trip(model, fork, tmp_path, shares=True)


def test_only_pages_in_use_are_written(tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model), batch=4)
    cache.save(tmp_path / "all")
    cache.batch_select_indices(torch.tensor([2]))
    cache.crop(40)
    assert cache.layers[0].table.plain.allocator.free_pages > 0
    cache.save(tmp_path / "little")
    assert (tmp_path / "little").stat().st_size < 0.2 * (tmp_path / "all").stat().st_size
    (tmp_path / "all").unlink()
    (tmp_path / "little").unlink()
    # Which compares their bytes too.
    round_trip(model, cache, tmp_path)


@pytest.mark.parametrize("codec", ["none", "int4", "lowrank+int4"])
@pytest.mark.parametrize("kind", ["uniform", "lanes", "widths"])
def test_partly_evicted(kind: str, codec: str, tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, new_cache(model, **both(codec)))
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        layer.settle()
        shape = 2, layer.store.heads, layer.seen
        kept = torch.rand(shape, generator=generator) < 0.5
        if kind == "uniform":
            kept = kept[:, :1].expand(shape)
        if kind == "widths":
            kept = torch.tensor([0, 2, 4, 8, 16])[torch.randint(0, 5, shape, generator=generator)]
        layer.keep(kept)
    assert cache.layers[0].store.lanes == (1 if kind == "uniform" else 2)
    round_trip(model, cache, tmp_path)


@pytest.mark.parametrize("press_name", ["KnormPress", "AdaKVPress"])
def test_compressed_by_kvpress(press_name: str, tmp_path: Path) -> None:
    """Assigned keys and values, of layers that count fewer columns than the model has seen, and marked heads."""
    import kvpress

    model = FAMILIES["qwen3_moe"].build()
    press = getattr(kvpress, press_name)
    press = press(press=kvpress.KnormPress(0.5)) if press_name == "AdaKVPress" else press(0.5)
    cache = new_cache(model, **both("int4"))
    with torch.no_grad(), press(model):
        model.model(torch.randint(3, 190, (1, 150)), past_key_values=cache)
    for layer in cache.layers:
        layer.settle()
    if press_name == "AdaKVPress":
        assert cache.layers[0].state.evicted
    else:
        assert cache.layers[0].state.dropped > 0
    loaded = round_trip(model, cache, tmp_path)
    assert loaded.get_seq_length() == 150 + 9 + 8


def test_layers_with_codecs_of_their_own(tmp_path: Path) -> None:
    model = shared_model()
    cache = new_cache(model)
    recode(cache.layers[1].store, key_codec="lowrank", value_codec="int2", rank=3)
    read(model, cache)
    loaded = round_trip(model, cache, tmp_path)
    codecs = [(layer.config.key_codec, layer.config.value_codec) for layer in loaded.layers]
    assert codecs == [("none", "none"), ("lowrank", "int2")]


@pytest.mark.parametrize("how", ["new", "reset", "cropped", "sliding"])
def test_an_empty_cache(how: str, tmp_path: Path) -> None:
    model = shared_model("gpt_oss" if how == "sliding" else "qwen3_moe")
    cache = new_cache(model, **both("int4"))
    if how in ("reset", "cropped"):
        read(model, cache, batch=1)
        cache.reset() if how == "reset" else cache.crop(-cache.get_seq_length())
    round_trip(model, cache, tmp_path)


def test_a_page_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pikv_hf.serialization.pool_records.CHUNK_PAGES", 3)
    model = shared_model()
    round_trip(model, read(model, new_cache(model, **both("int2"))), tmp_path)
