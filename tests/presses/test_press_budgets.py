"""What budgets leave: tokens counted by hand, bytes as measured, and errors for what cannot be."""

import gc
import re
from typing import Any

import pytest
import torch
import transformers
from families import COMMON, FAMILIES
from press_runs import EVICTING, PRESSES, attached, held_by, ids_of, kept_columns, padded, read, shared_model
from transformers import DynamicCache, StaticCache

from pikv_hf import PiKVCache
from pikv_hf.presses import DuoPress, ExpertPress, LoRAPress, PiKVPress, PyramidPress, QueryAwarePress, pikv_press
from pikv_hf.presses.press_budget import PressBudget
from pikv_hf.presses.pyramid_press import falling_shares

pytestmark = pytest.mark.slow


def counts_of(cache: PiKVCache) -> torch.Tensor:
    """Return the tokens of each layer, row and head, `(L, B, H)`."""
    return torch.stack([held.sum(dim=-1) for held in held_by(cache)])


def dense_bytes(model: Any, tokens: int, batch: int = 1) -> int:
    """Return the bytes that `DynamicCache` holds in layers that do not slide."""
    cache = read(model, DynamicCache(config=model.config), ids_of(tokens, batch))
    return sum(part.nbytes for layer in cache.layers if not layer.is_sliding for part in (layer.keys, layer.values))


def paged_bytes(cache: PiKVCache) -> int:
    gc.collect()
    sizes = zip(cache.layers, cache.memory_report().layers, strict=True)
    return sum(layer_bytes.total for layer, layer_bytes in sizes if not layer.is_sliding)


@pytest.mark.parametrize(
    ("given", "kind", "amount"),
    [
        (0.25, "share", 0.25),
        ("25%", "share", 0.25),
        (" 12.5 % ", "share", 0.125),
        (512, "tokens", 512),
        ("1 token", "tokens", 1),
        ("64 KiB", "bytes", 65536),
        ("1.5MB", "bytes", 1_500_000),
        ("7 b", "bytes", 7),
    ],
)
def test_budgets_are_read_as_users_write_them(given: Any, kind: str, amount: float) -> None:
    assert PressBudget.parse(given) == PressBudget(kind, amount)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [0, -3, 0.0, 1.5, float("nan"), "0%", "150%", "64 pounds", "", "half", "-1 MiB"])
def test_budgets_that_mean_nothing_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(given))):
        QueryAwarePress(budget=given)


@pytest.mark.parametrize("given", [True, [1], 1j])
def test_budgets_of_another_type_are_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=type(given).__name__):
        QueryAwarePress(budget=given)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"compression_ratio": 0.5}, 50),
        ({"compression_ratio": 0.9}, 10),
        ({"budget": "25%"}, 25),
        ({"budget": 0.07}, 7),
        ({"budget": 49}, 49),
        ({"budget": "33 tokens"}, 33),
        ({"budget": 1000}, 100),
        # Three layers of two heads, 128 bytes a token: 768 bytes keep a token of every head.
        ({"budget": "7680 B"}, 10),
        ({"budget": "7.5 KiB"}, 10),
    ],
)
def test_every_head_keeps_as_many_tokens_as_asked_for(options: dict[str, Any], kept: int) -> None:
    model = shared_model()
    for press in (QueryAwarePress(window=4, **options), ExpertPress(window=4, **options)):
        cache = read(model, attached(model), ids_of(100), press)
        assert (counts_of(cache) == kept).all()
        dynamic = read(model, DynamicCache(), ids_of(100), press)
        assert [layer.keys.shape[2] for layer in dynamic.layers] == [kept] * 3


def test_a_padded_row_keeps_its_own_share_and_the_tokens_asked_for() -> None:
    model = shared_model()
    _, ids, mask = padded([30, 50, 100])
    shares = counts_of(read(model, attached(model), ids, QueryAwarePress(0.5, window=4), mask))
    assert shares[0].tolist() == [[15, 15], [25, 25], [50, 50]]
    tokens = counts_of(read(model, attached(model), ids, QueryAwarePress(budget=40, window=4), mask))
    assert tokens[0].tolist() == [[30, 30], [40, 40], [40, 40]]
    whole = counts_of(read(model, attached(model), ids, QueryAwarePress(budget=f"{90 * 768} B", window=4), mask))
    assert int(whole.sum()) == 90 * 6


@pytest.mark.parametrize("slope", [1, 3, 20])
@pytest.mark.parametrize("headwise", [False, True])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_the_layers_of_a_pyramid_fall_and_keep_the_budget_together(slope: float, headwise: bool, ratio: float) -> None:
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=5)
    press = PyramidPress(ratio, window=4, slope=slope, headwise=headwise)
    layers = counts_of(read(model, attached(model), ids_of(200), press)).sum(dim=(1, 2)) / 2
    assert layers.tolist() == sorted(layers.tolist(), reverse=True)
    assert (1 - ratio) * 1000 - 5 <= layers.sum() <= (1 - ratio) * 1000 + 1e-3
    if slope > 1:
        assert layers[0] > layers[-1]
        if float(layers[0]) < 200:
            assert float(layers[0] / layers[-1]) == pytest.approx(slope, rel=0.15)
    else:
        assert layers.unique().numel() == 1


@pytest.mark.parametrize("share", [0.05, 0.4, 0.9, 1.0])
def test_shares_fall_to_the_given_mean(share: float) -> None:
    shares = falling_shares(share, 8, 5.0)
    assert sum(shares) / 8 == pytest.approx(share)
    assert max(shares) <= 1
    assert shares == sorted(shares, reverse=True)


def test_heads_compete_but_none_loses_everything() -> None:
    model = shared_model()
    counts = counts_of(read(model, attached(model), ids_of(200), PyramidPress(0.8, window=4, headwise=True)))
    assert (counts[:, 0, 0] != counts[:, 0, 1]).any()
    for layer in counts[:, 0]:
        assert layer.min() >= layer.sum() // 2 // 5


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 60])
@pytest.mark.parametrize("sinks", [0, 4])
def test_sinks_and_at_least_one_token_survive(name: str, tokens: int, sinks: int) -> None:
    model = shared_model()
    press = PRESSES[name](compression_ratio=0.99, sink_tokens=sinks)
    cache = read(model, attached(model), ids_of(tokens), press)
    for held in held_by(cache):
        assert held[..., :sinks].all()
        assert (held.sum(dim=-1) >= 1).all()
    with torch.no_grad():
        assert model(torch.tensor([[5]]), past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("name", EVICTING)
def test_sinks_and_at_least_one_token_survive_on_dynamic_cache(name: str) -> None:
    model = FAMILIES["qwen3_moe"].build()
    for tokens in (2, 5, 60):
        press = EVICTING[name](compression_ratio=0.99)
        for kept in kept_columns(model, ids_of(tokens), press, DynamicCache()):
            assert kept[..., :4].all()


#: Tokens, rows, page size, recent window, share of the bytes.
CASES = [
    (40, 1, 8, 16, 0.5),
    (333, 2, 32, 64, 0.125),
    (700, 1, 13, 0, 0.0625),
    (90, 1, 1, 5, 0.5),
    (100, 3, 7, 9, 0.25),
]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("qwen3_moe", torch.float32),
        ("deepseek_v2", torch.bfloat16),
        ("deepseek_v3", torch.float32),
        ("llama", torch.bfloat16),
        ("gpt_oss", torch.bfloat16),
    ],
)
def test_measured_bytes_stay_within_the_budget(family: str, dtype: torch.dtype) -> None:
    model = FAMILIES[family].build().to(dtype)
    for tokens, batch, page_size, window, share in CASES:
        cache = attached(model, page_size=page_size, recent_window=window)
        read(model, cache, ids_of(tokens, batch), PiKVPress(budget=share))
        assert paged_bytes(cache) <= share * dense_bytes(model, tokens, batch)
        assert (counts_of(cache) >= 4).all()


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25])
def test_bytes_are_used_not_only_kept(share: float) -> None:
    model, ids = FAMILIES["qwen3_moe"].build(head_dim=64), ids_of(600)
    budget = int(share * dense_bytes(model, 600))
    for given in (share, f"{budget} B"):
        cache = read(model, attached(model, page_size=32), ids, PiKVPress(budget=given))
        assert 0.9 * budget < paged_bytes(cache) <= budget


def test_a_token_that_spoils_its_page_costs_no_more_than_the_budget() -> None:
    model = FAMILIES["qwen3_moe"].build(head_dim=64)
    for layer in model.model.layers:
        # About one value in six is very long.
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: out * (1 + 30 * (args[0][..., :1] > 1)))
    cache = read(model, attached(model, page_size=16), ids_of(400), PiKVPress(budget=0.2))
    assert paged_bytes(cache) <= 0.2 * dense_bytes(model, 400)


def test_a_budget_that_does_not_hold_the_sinks_is_refused() -> None:
    model = shared_model()
    with pytest.raises(ValueError, match=r"budget of .* bytes does not hold the sinks"):
        read(model, attached(model), ids_of(50), PiKVPress(budget="600 B"))


@pytest.mark.parametrize(
    ("press", "options", "message"),
    [
        (QueryAwarePress, {"compression_ratio": 1.0}, "1.0"),
        (QueryAwarePress, {"compression_ratio": -0.1}, "-0.1"),
        (QueryAwarePress, {"compression_ratio": 0.5, "budget": "10%"}, "0.5 and '10%'"),
        (QueryAwarePress, {"sink_tokens": -1}, "at least 0, got -1"),
        (QueryAwarePress, {"window": 65}, "between 1 and 64 queries, got 65"),
        (QueryAwarePress, {"window": 0}, "between 1 and 64 queries, got 0"),
        (QueryAwarePress, {"pooling": 4}, "odd and at least 1, got 4"),
        (QueryAwarePress, {"page_size": 0}, "at least 1, got 0"),
        (PyramidPress, {"slope": 0.5}, "at least 1, got 0.5"),
        (PyramidPress, {"shard_weight": 2}, "between 0 and 1, got 2"),
        (ExpertPress, {"router_weight": -1}, "between 0 and 1, got -1"),
        (ExpertPress, {"router": "best"}, "'model' or 'random', got 'best'"),
        (DuoPress, {"recent_tokens": 0}, "at least 1, got 0"),
        (LoRAPress, {"rank": 0}, "at least 1, got 0"),
        (LoRAPress, {"error": 1.0}, "between 0 and 1, got 1.0"),
        (LoRAPress, {"rank": 4, "error": 0.1}, "'rank': 4, 'error': 0.1"),
        (LoRAPress, {"rank": 4, "budget": "10%"}, "'budget': '10%', 'rank': 4"),
        (PiKVPress, {"smoothing": 1.1}, "between 0 and 1, got 1.1"),
        (PiKVPress, {"widths": (3,)}, r"\[2, 4, 8, 16\], got \(3,\)"),
    ],
)
def test_bad_arguments_name_what_was_given(press: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        press(**options)


def test_models_that_cannot_be_pressed_are_refused_and_left_alone() -> None:
    llama = FAMILIES["llama"].build()
    before = dict(vars(llama.model.layers[0].self_attn))
    with pytest.raises(ValueError, match="no router found in LlamaForCausalLM"), ExpertPress(0.5)(llama):
        pass
    assert llama.config._attn_implementation == "sdpa"
    assert vars(llama.model.layers[0].self_attn).keys() == before.keys()
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with (
        pytest.raises(ValueError, match="T5Config is an encoder-decoder"),
        QueryAwarePress(0.5)(transformers.T5ForConditionalGeneration(config)),
    ):
        pass
    sliding = transformers.MistralForCausalLM(transformers.MistralConfig(**COMMON, sliding_window=8))
    with pytest.raises(ValueError, match="all layers of MistralForCausalLM slide"), PyramidPress(0.5)(sliding):
        pass


def test_caches_that_cannot_be_pressed_are_refused() -> None:
    model = shared_model()
    with pytest.raises(ValueError, match="QueryAwarePress cannot take tokens from a StaticCache"):
        read(model, StaticCache(config=model.config, max_cache_len=64), ids_of(20), QueryAwarePress(0.5))


@pytest.mark.parametrize("name", PRESSES)
def test_one_token_and_none_are_left_alone(name: str) -> None:
    model = shared_model()
    press = PRESSES[name](compression_ratio=0.5)
    for kind in ("pikv", "dynamic"):
        cache = attached(model) if kind == "pikv" else DynamicCache()
        with torch.no_grad(), press(model):
            model.model(ids_of(1))
            model.model(ids_of(1), past_key_values=cache)
            assert cache.get_seq_length() == 1
            model.model(ids_of(1), past_key_values=cache)
            assert [layer.keys.shape[2] for layer in cache.layers] == [2, 2, 2]
            assert not layer_is_zero(cache)


def layer_is_zero(cache: Any) -> bool:
    return any(bool((layer.keys == 0).all(dim=-1).any()) for layer in cache.layers)


def test_a_press_that_removes_nothing_changes_nothing() -> None:
    model = shared_model()
    coded = {"key_codec": "int4", "value_codec": "int4"}
    for name, make in PRESSES.items():
        plain = read(model, attached(model, **coded), ids_of(100))
        pressed = read(model, attached(model, **coded), ids_of(100), make(compression_ratio=0.0))
        assert pressed.nbytes == plain.nbytes, name
        assert torch.equal(pressed.layers[0].keys, plain.layers[0].keys)


@pytest.mark.parametrize("error", [0.3, 0.03])
def test_an_error_budget_says_how_many_bytes(error: float) -> None:
    model, ids = shared_model(), ids_of(200)

    def nbytes(press: Any) -> int:
        cache = read(model, attached(model, num_shards=1, recent_window=0, sink_tokens=0), ids, press)
        gc.collect()
        return paged_bytes(cache)

    loose, strict = nbytes(PiKVPress(error_budget=error)), nbytes(PiKVPress(error_budget=error / 10))
    assert loose < strict
    assert nbytes(PiKVPress(error_budget=1e-9)) > 0.9 * dense_bytes(model, 200)


@pytest.mark.parametrize("given", [{"budget": 0.5}, {"compression_ratio": 0.5}, {"compression_interval": 8}])
def test_an_error_budget_stands_alone(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"error_budget=0\.1 says by itself how many bytes"):
        PiKVPress(error_budget=0.1, **given)
    with pytest.raises(ValueError, match="error_budget must be between 0 and 1, got 1"):
        PiKVPress(error_budget=1)


@pytest.mark.parametrize("error", [0.3, 0.1])
@pytest.mark.parametrize("chunk", [16, 80, 320])
def test_an_error_budget_is_of_all_chunks_together(error: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by the losses with which each token was evicted, against all that there was to lose."""
    lost, total = [], []
    decide = pikv_press.token_widths

    def noted(layers: Any, *given: Any, **more: Any) -> torch.Tensor:
        widths = decide(layers, *given, **more)
        for layer, of_layer in zip(layers, widths, strict=True):
            lost.append(float((layer.loss * (layer.stored & (of_layer == 0))).sum()))
        total.append(sum(float((layer.loss * layer.stored).sum()) for layer in layers))
        return widths

    monkeypatch.setattr(pikv_press, "token_widths", noted)
    model = shared_model()
    cache = attached(model, num_shards=1, recent_window=0, sink_tokens=0)
    with PiKVPress(error_budget=error)(model), torch.no_grad():
        for part in ids_of(320).split(chunk, dim=1):
            model(part, past_key_values=cache)
    assert len(total) == 320 // chunk
    # What went before the last decision, and what there was then.
    before = sum(lost[: -len(cache.layers)])
    assert sum(lost) <= error * (before + total[-1]) * (1 + 1e-5) or sum(lost) == before


@pytest.mark.parametrize(
    "given", [{"compression_interval": 2.5}, {"compression_interval": True}, {"error_budget": "10%"}]
)
def test_what_is_no_number_is_named(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=re.escape(repr(next(iter(given.values()))))):
        PiKVPress(**given)
