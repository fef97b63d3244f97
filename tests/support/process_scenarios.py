"""What several processes and one place generate alike: exact runs, and everything else that a cache can do."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from families import FAMILIES, prompts
from press_runs import PRESSES, ids_of, padded, read
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.config import CODECS, ROUTINGS, SCHEDULERS

SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "num_shards": 8}
#: Codecs whose pages do not depend on which part they are in; a low-rank basis is fitted in each.
ALIKE = [name for name in CODECS if not name.startswith("lowrank")]
Spread = dict[str, Any]
Scenario = Callable[[Spread], Any]


@functools.cache
def model_of(family: str = "qwen3_moe", **options: Any) -> Any:
    return FAMILIES[family].build(**options)


def cache_for(model: Any, spread: Spread, **options: Any) -> Any:
    """Return a cache of a scenario: PiKV's, in one place or several, or transformers' own for `{"dynamic": True}`."""
    if spread.get("dynamic"):
        return DynamicCache(config=model.config.get_text_config())
    return PiKVCache.for_model(model, **{**SMALL, **options}, **spread)


def generate(model: Any, inputs: dict[str, torch.Tensor], cache: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Generate 12 tokens; returns them, and the logits unless there are beams or drafts."""
    fixed = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    torch.manual_seed(3)
    result = model.generate(**inputs, past_key_values=cache, **{**fixed, **options})
    plain = result.logits is not None and "num_beams" not in options
    return {"tokens": result.sequences, **({"logits": torch.stack(result.logits)} if plain else {})}


# Exact


def greedy(spread: Spread, family: str, **options: Any) -> Any:
    """Three rows with padding on the left."""
    model = model_of(family)
    return generate(model, prompts(), cache_for(model, spread, **options))


def decoded(spread: Spread, family: str = "qwen3_moe", **options: Any) -> Any:
    """The same with another way to decode."""
    model = model_of(family)
    return generate(model, prompts(), cache_for(model, spread), **options)


def turns(spread: Spread) -> Any:
    """A second question after the first answer, in the same cache."""
    model, inputs = model_of(), prompts()
    cache = cache_for(model, spread)
    first = generate(model, inputs, cache)["tokens"]
    asked = torch.cat([first, prompts(seed=5)["input_ids"][:, -30:]], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(asked[:, 75:])], dim=1)
    return generate(model, {"input_ids": asked, "attention_mask": mask}, cache)


def copies(spread: Spread) -> Any:
    """Two questions about one context, each with a copy of its cache; then the context is cropped and asked again."""
    model, ids = model_of(), ids_of(150)
    cache = read(model, cache_for(model, spread), ids)
    answers = []
    for seed in (5, 6):
        asked = torch.cat([ids, ids_of(20, seed=seed)], dim=1)
        twin = cache.fork() if isinstance(cache, PiKVCache) else read(model, cache_for(model, spread), ids)
        answers.append(generate(model, {"input_ids": asked, "attention_mask": torch.ones_like(asked)}, twin))
    cache.crop(90)
    asked = torch.cat([ids[:, :90], ids_of(20, seed=7)], dim=1)
    answers.append(generate(model, {"input_ids": asked, "attention_mask": torch.ones_like(asked)}, cache))
    return {
        "tokens": torch.cat([each["tokens"][:, -12:] for each in answers]),
        "logits": torch.stack([each["logits"] for each in answers]),
    }


def assisted(spread: Spread, family: str) -> Any:
    """Drafts by prompt lookup, which a prompt that repeats itself lets succeed now and then."""
    model = model_of(family)
    ids = torch.randint(2, 190, (1, 20), generator=torch.Generator().manual_seed(3)).repeat(1, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    cache = cache_for(model, spread, sliding_layers="paged")
    # transformers' prompt lookup fails without an end token.
    help_ = {} if spread.get("dynamic") else {"prompt_lookup_num_tokens": 4}
    return {"tokens": generate(model, inputs, cache, eos_token_id=198, max_new_tokens=24, **help_)["tokens"]}


EXACT: dict[str, Scenario] = {
    **{
        f"greedy-{family}": functools.partial(greedy, family=family)
        for family in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "olmoe")
    },
    "greedy-gpt_oss-paged": functools.partial(greedy, family="gpt_oss", sliding_layers="paged"),
    "greedy-hash": functools.partial(greedy, family="qwen3_moe", placement="hash"),
    "sampling": functools.partial(decoded, do_sample=True, temperature=0.7, top_k=20),
    "sampling-rows": functools.partial(decoded, family="mixtral", do_sample=True, num_return_sequences=2),
    "beam": functools.partial(decoded, num_beams=3, num_return_sequences=2, output_logits=False),
    "beam-mla": functools.partial(decoded, family="deepseek_v2", num_beams=3, output_logits=False),
    "chunks": functools.partial(decoded, prefill_chunk_size=13),
    "turns": turns,
    "copies": copies,
}
ASSISTED: dict[str, Scenario] = {
    f"assisted-{family}": functools.partial(assisted, family=family) for family in ("qwen3_moe", "gpt_oss")
}


# Everything else a cache can do


def stored(spread: Spread, **options: Any) -> Any:
    """Two rows, one of them padded, long enough for many pages; with what each layer still holds."""
    model = model_of()
    _, ids, mask = padded([170, 120])
    cache = cache_for(model, spread, **options)
    return _ended(generate(model, {"input_ids": ids, "attention_mask": mask}, cache, max_new_tokens=10), cache)


def _ended(result: dict[str, Any], cache: PiKVCache) -> dict[str, Any]:
    """Add what each layer still holds, and what moved between tiers."""
    stats = cache.stats()
    moved = None if stats.tiers is None else bool(stats.tiers["demoted"])
    return {**result, "held": [layer.stored_mask() for layer in cache.layers], "moved": moved}


def beams(spread: Spread, **options: Any) -> Any:
    """Beam search, where rows share pages and are reordered."""
    model = model_of()
    ids = ids_of(120)
    cache = cache_for(model, spread, **options)
    return generate(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache, num_beams=3, max_new_tokens=10
    )


def pressed(spread: Spread, press: str) -> Any:
    """A press of this project on a prompt of two rows, then a question."""
    model = model_of()
    _, ids, mask = padded([130, 90])
    half = PRESSES[press](compression_ratio=0.5)
    cache = read(model, cache_for(model, spread, num_shards=4, placement="hash"), ids, half, mask)
    return _asked(model, cache, ids, mask)


def pressed_by_kvpress(spread: Spread, name: str, codec: str = "none") -> Any:
    """A press of kvpress, which assigns keys and values, or marks tokens of each head."""
    import kvpress

    presses = {
        "knorm": lambda: kvpress.KnormPress(0.5),
        "snap": lambda: kvpress.SnapKVPress(0.5, window_size=16),
        "adakv": lambda: kvpress.AdaKVPress(kvpress.KnormPress(0.5)),
        "streaming": lambda: kvpress.StreamingLLMPress(0.5),
        "decoding": lambda: kvpress.DecodingPress(
            base_press=kvpress.KnormPress(), compression_interval=4, target_size=90
        ),
    }
    model, ids = model_of(), ids_of(200)
    cache = cache_for(model, spread, placement="hash", key_codec=codec, value_codec=codec)
    with torch.no_grad(), presses[name]()(model):
        model.model(ids, past_key_values=cache)
        if name == "decoding":
            for step in range(12):
                model.model(torch.tensor([[7 + step]]), past_key_values=cache)
    return _asked(model, cache, ids, torch.ones_like(ids))


def kept(spread: Spread) -> Any:
    """Half of the tokens of each head at random, some of them packed, and once more after some steps."""
    model, ids = model_of(), ids_of(150)
    cache = cache_for(model, spread)
    for round_ in range(2):
        read(model, cache, ids if not round_ else ids_of(3, seed=4))
        for index, layer in enumerate(cache.layers):
            generator = torch.Generator().manual_seed(10 * round_ + index)
            widths = torch.tensor([0, 4, 8, 16])[torch.randint(0, 4, (1, 2, layer.seen), generator=generator)]
            layer.keep(widths)
    return _asked(model, cache, torch.zeros((1, 153), dtype=torch.long), torch.ones((1, 153), dtype=torch.long))


def _asked(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    """Ask four tokens at once and some one by one."""
    steps, at = [], mask.sum(dim=-1, keepdim=True)
    new = [ids_of(4, seed=9), *ids_of(10, seed=8).split(1, dim=1)]
    with torch.no_grad():
        for tokens in new:
            count = tokens.shape[1]
            mask = torch.nn.functional.pad(mask, (0, count), value=1)
            given = {"attention_mask": mask} if len(ids) > 1 else {}
            where = at + torch.arange(count)
            at = at + count
            tokens = tokens.expand(len(ids), -1)
            steps.append(model(tokens, past_key_values=cache, position_ids=where, **given).logits)
    held = [layer.stored_mask() for layer in cache.layers]
    dense = [layer.dense() for layer in cache.layers]
    return {"logits": torch.cat(steps, dim=1), "held": held, "dense": dense}


def budgeted(spread: Spread, **options: Any) -> Any:
    """One row, several times as long as a budget in bytes needs at least in each of four parts."""
    model, ids = model_of(), ids_of(420)
    cache = cache_for(model, spread, **{"page_size": 4, "recent_window": 8, "num_shards": 2, **options})
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return _ended(generate(model, inputs, cache, max_new_tokens=10), cache)


#: How much of some 180 tokens, or of 430, may stay.
BUDGETS: dict[str, tuple[Scenario, Any]] = {
    "tokens": (stored, 100),
    "share": (stored, 0.5),
    "bytes": (budgeted, "280KB"),
}
STORED: dict[str, Scenario] = {
    **{f"codec-{name}": functools.partial(stored, key_codec=name, value_codec=name, rank=8) for name in CODECS},
    "codec-beams-auto": functools.partial(beams, key_codec="auto", value_codec="int4"),
    **{
        f"routing-{name}": functools.partial(stored, routing=name, max_pages=3, key_codec="int8")
        for name in ROUTINGS
        if name != "all"
    },
    "routing-beams": functools.partial(beams, routing="page_bound", max_pages=2),
    **{
        f"budget-{kind}-{scheduler}": functools.partial(BUDGETS[kind][0], budget=BUDGETS[kind][1], scheduler=scheduler)
        for index, scheduler in enumerate(SCHEDULERS)
        for kind in [[*BUDGETS][index % 3 if index < 5 else index % 2], *(["bytes"] if scheduler == "pikv" else [])]
    },
    # Packed pages are so small that the budget is used up only now and then.
    "bytes-codec": functools.partial(budgeted, budget="190KB", key_codec="int4", value_codec="int4"),
    "budget-codec": functools.partial(stored, budget=0.4, key_codec="int4", value_codec="int4"),
    "budget-shard": functools.partial(stored, budget=24, budget_scope="shard", scheduler="lru"),
    "tiers": functools.partial(stored, tiers={"device": "64KB", "cpu": "16KB", "disk": None}),
    "tiers-routing": functools.partial(
        stored, tiers={"device": "64KB", "disk": None}, routing="cache_aware", max_pages=4, key_codec="int4"
    ),
    **{f"press-{name}": functools.partial(pressed, press=name) for name in PRESSES},
    **{
        f"kvpress-{name}": functools.partial(pressed_by_kvpress, name=name)
        for name in ("knorm", "snap", "adakv", "streaming", "decoding")
    },
    "kvpress-snap-int8": functools.partial(pressed_by_kvpress, name="snap", codec="int8"),
    "keep": kept,
}
#: To save time: others like them run in four processes too.
#: Of these, what four processes run too: one of a kind, the others with two.
ON_FOUR = [
    *("codec-int4", "codec-auto", "codec-lowrank+int4", "codec-beams-auto"),
    *("routing-page_bound", "routing-hierarchical", "routing-beams"),
    *(f"budget-share-{name}" for name in ("quest", "two_queue")),
    *("budget-codec", "budget-shard", "keep", "tiers", "press-pikv", "press-lora", "kvpress-adakv"),
]
NOT_EIGHT = (
    *("greedy-qwen3_moe", "greedy-olmoe", "greedy-gpt_oss-paged", "greedy-hash"),
    *("sampling-rows", "beam-mla", "chunks", "copies"),
)
#: What does not depend on which pages tokens share is as in one place.
AS_IN_ONE = [
    "codec-none",
    "codec-int8",
    "tiers",
    *(n for n in STORED if "press-" in n and n not in ("press-lora", "press-pikv")),
]
