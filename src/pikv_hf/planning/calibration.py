"""Measuring the CPU at hand, so that a plan can be made for it: memory, softmax, unpacking, and the cost of a call.

Each figure comes from a small measurement of its own, on tensors made for it: the times of caches of some length, which
a plan predicts from them, are not looked at.
"""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pikv_hf.config import PiKVConfig
from pikv_hf.kernels.coded_attention import coded_attention
from pikv_hf.kernels.dispatch import choose
from pikv_hf.kernels.encode_pages import encode_pages
from pikv_hf.kernels.page_codes import KINDS, Kind, PageCodes
from pikv_hf.kernels.page_lists import ListedPool, PageLists

from .hardware import DEVICES, Device, KernelRates

#: Bytes that are read for the bandwidth, keys and values each: several times what a processor caches.
BUFFER_BYTES = 256 << 20

# What is passed through between steps of a tiny cache.
_PASSED_BYTES = 64 << 20

# Heads and dims of what is measured: four KV heads of 128 channels, eight queries each.
_HEADS, _DIM, _GROUP, _PAGE = 4, 128, 8, 32

# Pages that a step chooses for each KV head, as routing does.
_CHOSEN = 64


def calibrated_cpu(*, buffer_bytes: int = BUFFER_BYTES, repeats: int = 7) -> Device:
    """Return the device `"cpu"` with what this machine does, in some seconds, on as many threads as torch now has.

    Parameters
    ----------
    buffer_bytes : int
        Read for the bandwidth, keys and values each.
    repeats : int
        Of each measurement; medians count.

    Raises
    ------
    ValueError
        If there is nothing to repeat or to read.
    """
    if repeats < 1 or buffer_bytes < 4 * _HEADS * _DIM:
        raise ValueError(f"repeats must be at least 1 and buffer_bytes at least 2048, got {repeats} and {buffer_bytes}")
    overhead, routed, coded = step_overheads(repeats)
    compiled, bandwidth = is_compiled(), read_bandwidth(buffer_bytes, repeats)
    codes: dict[str, float] = {kind: code_rate(kind, repeats) for kind in KINDS if kind != "none"}
    rates = KernelRates(
        # The compiled kernel's reading has its softmax in it.
        logits=math.inf if compiled else softmax_rate(repeats),
        # The residual of a low-rank part is int4; its coefficients are few beside it.
        codes={**codes, "lowrank+int4": codes["int4"]},
        copies=scattered_copies(bandwidth, buffer_bytes, repeats) if compiled else DEVICES["cpu"].rates.copies,
        routed_overhead=routed,
        coded_overhead=coded,
    )
    return dataclasses.replace(
        DEVICES["cpu"],
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        bandwidth=bandwidth,
        flops=product_rate(repeats),
        overhead=overhead,
        rates=rates,
    )


def is_compiled() -> bool:
    """Return whether decoding steps on the CPU run in the kernel that numba compiles."""
    return choose(torch.device("cpu"), compiled=True) == "numba"


@torch.no_grad()
def read_bandwidth(buffer_bytes: int = BUFFER_BYTES, repeats: int = 7) -> float:
    """Return the bytes per second at which few queries read long keys and values from memory."""
    pages = max(1, buffer_bytes // (4 * _HEADS * _DIM * _PAGE))
    # Written, or the system would give out the same page of zeros again and again.
    keys, values = (torch.ones(_HEADS, pages, _PAGE, _DIM) for _ in range(2))
    size = 2 * keys.numel() * keys.element_size()
    if is_compiled():
        return size / _median_seconds(
            _attention(PageCodes("none", _PAGE, keys), PageCodes("none", _PAGE, values)), repeats
        )
    keys, values = keys.flatten(1, 2), values.flatten(1, 2)
    query, weights = torch.ones(_HEADS, _GROUP, _DIM), torch.ones(_HEADS, _GROUP, pages * _PAGE)
    out = torch.empty_like(weights)

    def multiply() -> None:
        torch.bmm(query, keys.transpose(1, 2), out=out)
        torch.bmm(weights, values)

    return size / _median_seconds(multiply, repeats)


@torch.no_grad()
def scattered_copies(bandwidth: float, buffer_bytes: int = BUFFER_BYTES, repeats: int = 7) -> float:
    """Return how many times as long the compiled kernel takes for pages that a step chooses as at this bandwidth."""
    pages = max(_CHOSEN, buffer_bytes // (4 * _HEADS * _DIM * _PAGE))
    pool, query = _pool(*(PageCodes("none", _PAGE, torch.ones(_HEADS, pages, _PAGE, _DIM)) for _ in range(2))), _query()
    starts, chance = np.arange(_HEADS + 1, dtype=np.int64) * _CHOSEN, np.random.default_rng(0)
    choices = [
        np.concatenate([chance.choice(pages, _CHOSEN, replace=False) for _ in range(_HEADS)])
        for _ in range(4 * repeats + 1)
    ]
    # What it takes to list pages is known as an overhead of routing.
    lists = iter([PageLists([pool], chosen, starts, 1, "numba") for chosen in choices])
    size = 2 * 4 * _HEADS * _CHOSEN * _PAGE * _DIM
    return max(1.0, _median_seconds(lambda: next(lists).attend(query, 1.0), 4 * repeats) * bandwidth / size)


def _attention(keys: PageCodes, values: PageCodes) -> Callable[[], Any]:
    """Return a step's attention over all pages of a pool, by the compiled kernel."""
    pool, query, pages = _pool(keys, values), _query(), keys.codes.shape[1]
    lists = PageLists([pool], np.arange(pages, dtype=np.int64), np.array([0, pages], dtype=np.int64), 1, "numba")
    return lambda: lists.attend(query, 1.0)


def _pool(keys: PageCodes, values: PageCodes) -> ListedPool:
    return ListedPool(keys, values, np.full(keys.codes.shape[1], _PAGE, dtype=np.int16))


def _query() -> torch.Tensor:
    return torch.randn(1, _HEADS * _GROUP, _DIM)


@torch.no_grad()
def softmax_rate(repeats: int = 7) -> float:
    """Return the logits per second that attention turns into weights: in four passes."""
    logits = torch.randn(_HEADS, _GROUP, 1 << 16)

    def softmax() -> None:
        logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
        logits.sum(dim=-1)

    return logits.numel() / _median_seconds(softmax, repeats)


@torch.no_grad()
def product_rate(repeats: int = 7) -> float:
    """Return the operations per second of large products in float32."""
    matrix = torch.randn(1024, 1024)
    return 2 * 1024**3 / _median_seconds(lambda: matrix @ matrix, repeats)


@torch.no_grad()
def code_rate(kind: Kind, repeats: int = 7, pages: int = 192) -> float:
    """Return the packed numbers per second that attention reads, of a pool of few pages and no cache around it."""
    tokens = torch.randn(_HEADS, pages, _PAGE, _DIM)
    keys, values = encode_pages(tokens, kind, keys=True), encode_pages(tokens, kind, keys=False)
    few = pages // 4
    some = keys.narrow(0, few), values.narrow(0, few)
    # What a call takes in any case is no matter of how much it reads.
    if is_compiled():
        whole, part = (_median_seconds(_attention(*each), repeats) for each in ((keys, values), some))
    else:
        query = torch.randn(_HEADS, _GROUP, _DIM)
        whole = _median_seconds(lambda: coded_attention(query, keys, values, 1.0), repeats)
        part = _median_seconds(lambda: coded_attention(query, *some, 1.0), repeats)
    numbers = 2 * tokens.numel()
    return numbers * (1 - few / pages) / max(whole - part, whole / 4)


@torch.no_grad()
def step_overheads(repeats: int = 7) -> tuple[float, float, float]:
    """Return the seconds of a layer's step on a cache of next to nothing, and what routing and packed pages add to it.

    Between steps memory is passed through that takes the place of all in the processor's caches, as the weights of a
    model's other layers do.
    """
    kinds = (
        PiKVConfig(),
        PiKVConfig(routing="page_bound", max_pages=2),
        PiKVConfig(key_codec="int4", value_codec="int4"),
    )
    steps = [_tiny_step(options) for options in kinds]
    seconds: list[list[float]] = [[] for _ in steps]
    passed = torch.zeros(_PASSED_BYTES // 4)
    for _ in range(4 * repeats):
        # In turn, so that a busy moment meets all of them.
        for taken, step in zip(seconds, steps, strict=True):
            passed.add_(1)
            started = time.perf_counter()
            step()
            taken.append(time.perf_counter() - started)
    plain, routed, coded = (statistics.median(each) for each in seconds)
    return plain, max(0.0, routed - plain), max(0.0, coded - plain)


def _tiny_step(options: PiKVConfig) -> Callable[[], None]:
    """Return a decoding step of one layer with tiny heads and some 400 tokens."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from pikv_hf.cache import PiKVCache
    from pikv_hf.integration.attention_function import pikv_attention_forward

    heads, queries, dim, experts = 2, 4, 16, 8
    model: Any = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=queries,
            num_key_value_heads=heads,
            head_dim=dim,
            num_experts=experts,
            num_experts_per_tok=2,
        )
    ).eval()
    cache: Any = PiKVCache.for_model(model, options)
    layer, attention = cache.layers[0], model.model.layers[0].self_attn

    def store(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        key = torch.randn(1, heads, tokens, dim)
        updated: tuple[torch.Tensor, torch.Tensor] = layer.update_from_attention(key, torch.randn_like(key))
        return updated

    def step() -> None:
        keys, values = store(1)
        pikv_attention_forward(attention, torch.randn(1, queries, 1, dim), keys, values, None, scaling=dim**-0.5)
        layer.record_experts(torch.randint(0, experts, (1,)))

    store(400)
    layer.attend_begins(None)
    layer.record_experts(torch.randint(0, experts, (400,)))
    # The model lives as long as its layers are asked for their experts.
    step.__dict__["model"] = model
    return step


def _median_seconds(work: Callable[[], Any], repeats: int) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return max(statistics.median(seconds), 1e-9)
