"""Prompts as they come to a store of contexts: chats, questions about documents, and agents, drawn with a seed."""

import random
from collections.abc import Iterator

#: A prompt as numbers of blocks of 16 tokens; equal numbers are equal blocks.
Blocks = tuple[int, ...]
Trace = list[tuple[Blocks, Blocks]]

SYSTEM = 8


def chats(seed: int, requests: int = 600) -> Trace:
    """Return turns of chats that go on by turns: some at once, some after a long time, most never again."""
    draw, fresh = random.Random(seed), _fresh()
    system = _blocks(fresh, SYSTEM)
    histories: list[Blocks] = []
    trace: Trace = []
    for _ in range(requests):
        if not histories or draw.random() < 0.15:
            histories.append(system)
        # Those of late are the likeliest to go on.
        at = max(0, len(histories) - 1 - int(draw.expovariate(0.15)))
        prompt = histories[at] + _blocks(fresh, draw.randint(2, 12))
        histories[at] = prompt + _blocks(fresh, draw.randint(4, 24))
        trace.append((prompt, histories[at]))
    return trace


def documents(seed: int, requests: int = 600) -> Trace:
    """Return questions about documents, some of which are asked about far more often than others."""
    draw, fresh = random.Random(seed), _fresh()
    system = _blocks(fresh, SYSTEM)
    texts = [system + _blocks(fresh, draw.randint(60, 600)) for _ in range(60)]
    weights = [1 / (rank + 1) for rank in range(len(texts))]
    trace: Trace = []
    for _ in range(requests):
        prompt = draw.choices(texts, weights)[0] + _blocks(fresh, draw.randint(1, 4))
        trace.append((prompt, prompt + _blocks(fresh, draw.randint(2, 10))))
    return trace


def agents(seed: int, requests: int = 600) -> Trace:
    """Return steps of agents that work side by side: each step reads all before it, until a task is done."""
    draw, fresh = random.Random(seed), _fresh()
    tools = _blocks(fresh, 100)
    running = [tools + _blocks(fresh, draw.randint(4, 30)) for _ in range(8)]
    trace: Trace = []
    for _ in range(requests):
        at = draw.randrange(len(running))
        prompt = running[at]
        history = prompt + _blocks(fresh, draw.randint(2, 10))
        trace.append((prompt, history))
        done = draw.random() < 0.06
        running[at] = (
            tools + _blocks(fresh, draw.randint(4, 30)) if done else history + _blocks(fresh, draw.randint(2, 40))
        )
    return trace


TRACES = {"chats": chats, "documents": documents, "agents": agents}


def _fresh() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def _blocks(fresh: Iterator[int], count: int) -> Blocks:
    return tuple(next(fresh) for _ in range(count))
