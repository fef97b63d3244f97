"""Masks of every kind in every call: DynamicCache's logits, or a refusal that says why before anything has changed."""

from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB
from transformers import DynamicCache

from pikv_hf import PiKVCache, attach, detach
from pikv_hf.integration.mask_function import check_mask_of_cache

SMALL: dict[str, Any] = {"page_size": 4, "recent_window": 8, "sink_tokens": 2, "num_shards": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "expert": {},
    "int8 keys": {"key_codec": "int8", "placement": "hash"},
    "parts": {"devices": ["cpu:0", "cpu:1"]},
    "tiers": {"tiers": {"cpu": "8KiB", "disk": "1MiB"}},
}
# One with sinks and sliding layers first, one with multi-head latent attention.
STRUCTURES = ["olmoe", "gpt_oss", "deepseek_v3"]
PROMPT = 40

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad() -> Any:
    with torch.no_grad():
        yield


def ids(tokens: int, rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB - 1, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def holes(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Return a random 2-D mask whose rows differ; the last columns are shown."""
    mask = (torch.rand((rows, columns), generator=torch.Generator().manual_seed(seed)) < 0.7).long()
    mask[:, -2:] = 1
    return mask


def read(model: Any, cache: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits of a call whose tokens are at the positions after those of the cache."""
    seen = cache.get_seq_length()
    position_ids = torch.arange(seen, seen + tokens.shape[1]).expand(len(tokens), -1)
    return model(tokens, attention_mask=mask, position_ids=position_ids, past_key_values=cache).logits


def both(model: Any, **options: Any) -> tuple[PiKVCache, DynamicCache]:
    return PiKVCache.for_model(model, **{**SMALL, **options}), DynamicCache(config=model.config)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("new", [1, 5])
def test_a_mask_hides_stored_tokens_in_any_call(options: str, new: int) -> None:
    model = FAMILIES["olmoe"].build()
    mine, theirs = both(model, **OPTIONS[options])
    # A codec answers for stored tokens: where none is shown, and where all are.
    coded = "key_codec" in OPTIONS[options]
    for cache in (mine, theirs):
        read(model, cache, ids(PROMPT))
    for step in range(3):
        tokens = ids(new, seed=step)
        mask = holes(2, mine.get_seq_length() + new, seed=step)
        mask[:, -new:] = 1
        assert_close(read(model, mine, tokens, mask), read(model, theirs, tokens, mask), atol=0.3 if coded else 1e-4)
    assert_close(read(model, mine, ids(new)), read(model, theirs, ids(new)), atol=0.3 if coded else 1e-4)


@pytest.mark.parametrize("family", STRUCTURES)
def test_what_a_mask_hid_from_one_call_it_may_show_in_the_next_if_it_was_stored(family: str) -> None:
    model = FAMILIES[family].build()
    mine, theirs = both(model, placement="hash")
    for cache in (mine, theirs):
        read(model, cache, ids(PROMPT))
    for step in range(4):
        # A decoded token is stored even where its own mask hides it.
        mask = holes(2, mine.get_seq_length() + 1, seed=step)
        mask[0, -1] = step % 2
        ours, other = (read(model, cache, ids(1, seed=step), mask) for cache in (mine, theirs))
        assert_close(ours[1], other[1])
    assert_close(read(model, mine, ids(3)), read(model, theirs, ids(3)))


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "jetmoe"])
@pytest.mark.parametrize("additive", [False, True])
def test_a_4d_mask_makes_no_token_padding(family: str, additive: bool) -> None:
    model = FAMILIES[family].build()
    mine, theirs = both(model, placement="hash")
    for step, new in enumerate((PROMPT, 1, 6, 1)):
        seen = mine.get_seq_length()
        visible = torch.rand((2, 1, new, seen + new), generator=torch.Generator().manual_seed(step)) < 0.6
        visible &= torch.ones(new, seen + new, dtype=torch.bool).tril(seen)
        # The first token is hidden from the prompt and shown to all later queries.
        visible[..., 0] = bool(step)
        visible |= torch.eye(seen + new, dtype=torch.bool)[seen:]
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min) if additive else visible
        assert_close(read(model, mine, ids(new, seed=step), mask), read(model, theirs, ids(new, seed=step), mask))


@pytest.mark.parametrize("family", STRUCTURES)
@pytest.mark.parametrize("shown", ["no mask", "2-D mask", "4-D mask"])
@pytest.mark.parametrize("new", [1, 4])
def test_padding_is_not_shown_later(family: str, shown: str, new: int) -> None:
    model = FAMILIES[family].build()
    mine, theirs = both(model, placement="hash")
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :6] = 0
    for cache in (mine, theirs):
        read(model, cache, ids(PROMPT), mask)
    total = PROMPT + new
    later: dict[str, torch.Tensor | None] = {
        "no mask": None,
        "2-D mask": torch.ones(2, total, dtype=torch.long),
        "4-D mask": torch.ones(2, 1, new, total, dtype=torch.bool).tril(PROMPT),
    }
    before = [layer.get_seq_length() for layer in mine.layers]
    with pytest.raises(ValueError, match="of row 0 was padding when it came and was never stored"):
        read(model, mine, ids(new), later[shown])
    assert [layer.get_seq_length() for layer in mine.layers] == before
    goes_on = torch.nn.functional.pad(mask, (0, new), value=1)
    assert_close(read(model, mine, ids(new), goes_on), read(model, theirs, ids(new), goes_on))


@pytest.mark.parametrize("operation", ["crop", "select", "fork", "save"])
def test_padding_is_known_after(operation: str, tmp_path: Any) -> None:
    model = FAMILIES["olmoe"].build()
    cache = PiKVCache.for_model(model, **SMALL)
    mask = torch.ones(3, PROMPT, dtype=torch.long)
    mask[0, :6], mask[1, 20:26] = 0, 0
    read(model, cache, ids(PROMPT, rows=3), mask)
    if operation == "crop":
        cache.crop(22)
        mask = mask[:, :22]
    elif operation == "select":
        cache.batch_select_indices(torch.tensor([2, 1]))
        mask = mask[[2, 1]]
    elif operation == "fork":
        cache = cache.fork()
    else:
        cache.save(tmp_path / "cache")
        cache = PiKVCache.load(tmp_path / "cache", model)
    assert cache.layers[0].store.padding() == (1 - mask).sum(dim=1).tolist()
    again = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert read(model, cache, ids(1, rows=len(mask)), again).isfinite().all()
    again = torch.nn.functional.pad(again, (0, 1), value=1)
    again[:, :25] = 1
    with pytest.raises(ValueError, match="was padding"):
        read(model, cache, ids(1, rows=len(mask)), again)


def test_rows_without_padding_need_no_mask_once_the_others_are_gone() -> None:
    model = FAMILIES["olmoe"].build()
    mine, theirs = both(model)
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :6] = 0
    for cache in (mine, theirs):
        read(model, cache, ids(PROMPT), mask)
        cache.batch_select_indices(torch.tensor([1]))
    assert_close(read(model, mine, ids(2, rows=1)), read(model, theirs, ids(2, rows=1)))


@pytest.mark.parametrize("name", ["indices", "position_bias", "sinks"])
def test_arguments_that_attention_does_not_know_are_refused(name: str) -> None:
    model = FAMILIES["olmoe"].build()
    cache = PiKVCache.for_model(model, **SMALL)
    read(model, cache, ids(PROMPT))
    with pytest.raises(NotImplementedError, match=f"calls its attention with {name}"):
        model(ids(1), past_key_values=cache, **{name: torch.zeros(1)})
    assert [layer.get_seq_length() for layer in cache.layers] == [PROMPT] * len(cache.layers)
    assert read(model, cache, ids(1)).isfinite().all()


def test_padding_cannot_be_shown_to_a_detached_model() -> None:
    model = FAMILIES["olmoe"].build()
    cache = PiKVCache.for_model(model, **SMALL)
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :6] = 0
    read(model, cache, ids(PROMPT), mask)
    detach(model)
    goes_on = torch.nn.functional.pad(mask, (0, 1), value=1)
    with pytest.raises(ValueError, match="rows of this cache are padded, and padding is not stored"):
        read(model, cache, ids(1), goes_on)
    attach(model)
    assert read(model, cache, ids(1), goes_on).isfinite().all()


def test_a_mask_that_is_written_into_is_read_again() -> None:
    model = FAMILIES["olmoe"].build()
    mine, theirs = both(model, placement="hash")
    for cache in (mine, theirs):
        read(model, cache, ids(PROMPT))
    mask = torch.ones(2, 1, 1, PROMPT + 1, dtype=torch.bool)
    for hidden in (3, 9):
        mask[..., hidden] = False
        ours, other = (read(model, cache, ids(1), mask) for cache in (mine, theirs))
        assert_close(ours, other)
        for cache in (mine, theirs):
            cache.crop(PROMPT - cache.get_seq_length())


def test_a_2d_mask_of_flash_attention_is_compared_with_the_padding() -> None:
    model = FAMILIES["olmoe"].build()
    cache = PiKVCache.for_model(model, **SMALL)
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :6] = 0
    read(model, cache, ids(PROMPT), mask)
    later = torch.ones(2, PROMPT + 2, dtype=torch.long)
    with pytest.raises(ValueError, match="was padding"):
        check_mask_of_cache(cache, later)
    later[0, :6] = 0
    check_mask_of_cache(cache, later)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_dropout_and_caches_of_other_models_are_refused_before_any_layer_has_changed(family: str) -> None:
    model, other = FAMILIES[family].build(attention_dropout=0.1), FAMILIES[family].build(seed=1)
    cache = PiKVCache.for_model(model, **SMALL, placement="hash")
    PiKVCache.for_model(other, placement="hash")
    read(model, cache, ids(PROMPT))
    for wrong, message in ((model.train(), "attention dropout is 0.1"), (other, "made for another model")):
        with pytest.raises(ValueError, match=message):
            read(wrong, cache, ids(2))
        assert [layer.get_seq_length() for layer in cache.layers] == [PROMPT] * len(cache.layers)
