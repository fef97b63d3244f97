"""The original's variants by its protocol, on a small random model: what is timed, counted and hit."""

import contextlib
import dataclasses
import json
import statistics

import pytest
import torch
from families import FAMILIES
from transformers import DynamicCache

from pikv_hf import PiKVCache, detach
from pikv_hf.eval.studies.variants import protocol_study as study
from pikv_hf.eval.studies.variants.attention_hits import _watch, exact_attention, hit_rate, read_of
from pikv_hf.eval.studies.variants.request_runs import Run, Variant, Work, read_context, serve, shard_spread, step

BY_NAME = {variant.name: variant for variant in study.VARIANTS}
EXACT = [name for name, each in BY_NAME.items() if not each.press and "routing" not in name]
STEPS = 3


@pytest.fixture(scope="module")
def model():
    return FAMILIES["mixtral"].build(max_position_embeddings=1024)


@pytest.fixture(scope="module")
def work() -> Work:
    tokens = torch.randint(3, 190, (500,), generator=torch.Generator().manual_seed(0))
    return Work.of(tokens, 10, context=256, prompt=24, new=8, requests=2)


@pytest.fixture(scope="module")
def exact(model, work):
    return exact_attention(model, work, STEPS)


def test_requests_follow_the_context_and_a_text_that_is_too_short_is_refused(work: Work) -> None:
    tokens = torch.arange(100)
    cut = Work.of(tokens, 5, context=20, prompt=6, new=4, requests=2)
    assert cut.context.tolist() == [list(range(5, 25))]
    assert [request.tolist() for request in cut.requests] == [[list(range(25, 35))], [list(range(35, 45))]]
    with pytest.raises(ValueError, match="100 tokens, of which 105"):
        Work.of(tokens, 65, context=20, prompt=6, new=4, requests=2)


@pytest.mark.parametrize(
    "name", [each.name for each in study.VARIANTS if not each.press and "routing" not in each.name]
)
def test_exact_variants_write_what_one_forward_over_the_whole_text_says(name: str, model, work: Work) -> None:
    run = serve(model, BY_NAME[name], work)
    losses = []
    for request in work.requests:
        ids = torch.cat([work.context, request], dim=1)
        with torch.no_grad():
            logits = model(ids).logits[0, work.context.shape[1] + work.prompt - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, request[0, work.prompt :]))
    assert run.nats == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)
    assert run.open_bytes > run.context_bytes > 0 < run.latency
    assert (run.imbalance is None) == (name == study.VARIANTS[0].name)


def test_copies_of_dynamic_caches_count_each_and_forks_count_what_they_share_once(model, work: Work) -> None:
    dynamic, paged = (serve(model, BY_NAME[name], work) for name in (study.VARIANTS[0].name, study.BASE))
    config, tokens = model.config, work.context.shape[1] + work.requests[0].shape[1]
    dim = config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * dim
    assert dynamic.context_bytes == 4 * numbers * work.context.shape[1]
    assert dynamic.open_bytes == 4 * numbers * tokens * len(work.requests)
    # The context once, and for each request what it adds, in pages that are not full of each shard.
    assert paged.open_bytes < dynamic.open_bytes + paged.context_bytes - dynamic.context_bytes


def test_exact_attention_sums_to_one_and_all_of_it_hits(model, work: Work, exact) -> None:
    assert all(layer.sum(-1).allclose(torch.ones(())) for layers in exact for layer in layers)
    for name in (study.VARIANTS[0].name, "balanced placement"):
        assert hit_rate(model, BY_NAME[name], work, exact) == pytest.approx(1, abs=1e-5)


class Window(Variant):
    """Keeps the first four tokens of the context and those after the 132nd; the cache is the latest that was made."""

    def cache(self, model):
        Window.made = super().cache(model)
        return Window.made

    @contextlib.contextmanager
    def reading(self, model):
        yield
        for layer in Window.made.layers:
            kept = torch.ones(1, model.config.num_key_value_heads, layer.get_seq_length(), dtype=torch.bool)
            kept[..., 4:132] = False
            layer.keep(kept)


def test_hits_of_a_press_are_the_attention_to_what_it_leaves(model, work: Work, exact) -> None:
    kept = torch.ones(exact[-1][0].shape[-1], dtype=torch.bool)
    kept[4:132] = False
    expected = torch.stack([layer[:, kept[: layer.shape[-1]]].sum(-1).mean() for layers in exact for layer in layers])
    hits = hit_rate(model, Window("window", options={"placement": "hash"}), work, exact)
    assert hits == pytest.approx(float(expected.mean()), abs=1e-5)


def test_hits_of_a_press_that_renumbers_are_not_known(model, work: Work, exact) -> None:
    variant = Variant("window", options={"placement": "hash"}, press="StreamingLLMPress(n_sink=4)", ratio=0.5)
    assert hit_rate(model, variant, work, exact) is None


def test_routed_steps_hit_less_than_all_and_more_with_more_pages(model, work: Work, exact) -> None:
    def hits(pages: float) -> float:
        options = {"placement": "hash", "num_shards": 1, "page_size": 8, "recent_window": 16, "routing": "page_bound"}
        return hit_rate(model, Variant("routed", options=options | {"max_pages": pages}), work, exact)

    few, many = hits(0.1), hits(0.6)
    assert 0 < few < many < 1
    assert hits(1.0) == pytest.approx(1, abs=1e-5)


def test_what_a_routed_step_does_not_read_is_whole_pages(model, work: Work) -> None:
    options = {"placement": "hash", "num_shards": 1, "page_size": 8, "recent_window": 16, "sink_tokens": 0}
    cache = PiKVCache.for_model(model, **options, routing="page_bound", max_pages=3)
    with torch.inference_mode():
        step(model, cache, work.context)
        watched = [_watch(layer) for layer in cache.layers]
        step(model, cache, work.requests[0][:, :1])
    for layer, watcher in zip(cache.layers, watched, strict=True):
        read = read_of(layer, watcher)
        # 257 tokens, 16 of them in the window, the others in 30 full pages and one that is not full.
        assert (read.sum(-1) == 257 - (30 - 3) * 8).all()
    detach(model)


def test_heads_that_keep_tokens_of_their_own_read_what_was_chosen_for_each(model, work: Work) -> None:
    options = {"placement": "hash", "num_shards": 1, "page_size": 8, "recent_window": 16, "sink_tokens": 0}
    cache = PiKVCache.for_model(model, **options, routing="page_mass", max_pages=3)
    with torch.inference_mode():
        read_context(model, Variant("pressed", (), options, "PiKVPress", 0.5), cache, work.context)
        watched = [_watch(layer) for layer in cache.layers]
        step(model, cache, work.requests[0][:, :1])
    for layer, watcher in zip(cache.layers, watched, strict=True):
        stored, read = layer.stored_mask()[0], read_of(layer, watcher)
        assert layer.store.lanes == len(watcher.unread) == len(stored) == 2
        for of_stored, of_read, unread in zip(stored, read, watcher.unread, strict=True):
            assert len(unread) > 0
            # Whole pages of what is stored, and nothing twice.
            assert of_stored[unread].all()
            assert len(unread.unique()) == len(unread)
            assert of_stored.sum() - of_read.sum() == len(unread)
            assert len(unread) % 8 == 0
    detach(model)


def test_shards_of_heads_count_tokens_once(model, work: Work) -> None:
    whole = PiKVCache.for_model(model, placement="hash", num_shards=4, page_size=16, recent_window=0, sink_tokens=0)
    with torch.inference_mode():
        read_context(model, Variant("pressed", (), {}, "PiKVPress", 0.1), whole, work.context)
    assert all(layer.store.lanes == 2 for layer in whole.layers)
    counts = [memory.shard_tokens for memory in whole.memory_report().layers]
    spread = [statistics.pvariance(own) / 2 / statistics.fmean(own) for own in counts]
    assert shard_spread(whole)[0] == pytest.approx(statistics.fmean(spread))
    detach(model)


def test_imbalance_is_none_without_shards_and_nought_where_they_are_even(model, work: Work) -> None:
    assert shard_spread(DynamicCache(config=model.config)) == (None, None)
    cache = PiKVCache.for_model(model, placement="hash", num_shards=4, page_size=16, recent_window=0, sink_tokens=0)
    with torch.inference_mode():
        step(model, cache, work.context)
    assert shard_spread(cache) == (0, 1)
    detach(model)


def test_synergy_is_what_the_parts_alone_do_not_explain() -> None:
    run = dataclasses.asdict(Run(1.0, 2.0, 3, 100, 5.0, 4.0, 1.5))
    runs = {variant.name: [run] for variant in study.VARIANTS}
    runs["balanced placement"] = [run | {"latency": 0.9}]
    runs["(F) DuoPress"] = [run | {"latency": 0.8}, run | {"latency": 0.6}]
    runs["(A) balanced placement, DuoPress"] = [run | {"latency": 0.5, "open_bytes": 50}]
    rows = {row["variant"]: row for row in study.rows_of(runs, {"(F) DuoPress": 0.5})}
    both = rows["(A) balanced placement, DuoPress"]
    assert both["synergy"]["latency"] == pytest.approx((0.5 - 1) - (0.9 - 1) - (0.7 - 1))
    assert both["synergy"]["kv_bytes"] == pytest.approx(-50)
    assert both["compression"] == pytest.approx(2)
    assert rows["(F) DuoPress"]["latency_range"] == [0.6, 0.8]
    assert rows["(F) DuoPress"]["hit_rate"] == 0.5
    assert both["hit_rate"] is None


def test_the_study_goes_on_where_it_was(tmp_path, monkeypatch, model, capsys) -> None:
    class Words:
        source = "drawn"

        def ids(self, tokenizer) -> torch.Tensor:
            return torch.randint(3, 190, (2000,), generator=torch.Generator().manual_seed(1))

    for name, value in {"CONTEXT": 600, "PROMPT": 40, "NEW": 4, "REQUESTS": 2}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "texts", lambda: [Words()])
    monkeypatch.setattr(study, "load_model", lambda *_: (model, None))
    names = [study.VARIANTS[0].name, study.BASE]
    arguments = ["--parts", str(tmp_path / "parts.jsonl"), "--runs", "2", "--threads", "1", "--output"]
    study.main([*arguments, str(tmp_path / "one.json"), "--variants", *names])
    served = study.serve
    monkeypatch.setattr(study, "serve", None)
    monkeypatch.setattr(study, "hit_rate", None)
    study.main([*arguments, str(tmp_path / "two.json"), "--variants", *names])
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["variants"] == two["variants"]
    assert [row["runs"] for row in one["variants"]] == [2, 2]
    assert all(row["hit_rate"] == pytest.approx(1) for row in one["variants"])
    assert "original's variants" in capsys.readouterr().out
    # Figures of another setting are not taken for those of this one.
    calls = []
    monkeypatch.setattr(study, "serve", lambda *given: calls.append(given) or served(*given))
    monkeypatch.setattr(study, "hit_rate", lambda *_: 0.5)
    study.main([*arguments, str(tmp_path / "three.json"), "--variants", *names, "--dtype", "float32"])
    assert len(calls) == 2 * 2 * len(names)
    three = json.loads((tmp_path / "three.json").read_text())
    assert [row["hit_rate"] for row in three["variants"]] == [0.5, 0.5]
