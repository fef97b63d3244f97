"""One cache in several processes: the tokens of a single one, a share of its memory, and an end when one fails."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from child_processes import SUPPORT, environment
from process_failures import FAILURES, TIMEOUT
from process_runs import scenarios_of
from process_scenarios import ALIKE, AS_IN_ONE, ASSISTED, EXACT, SMALL, STORED
from process_traffic import MEMORY, TRAFFIC, small_model

from pikv_hf import PiKVCache
from pikv_hf.distributed.lockstep import AGREEMENT, HEADER

pytestmark = pytest.mark.slow

WORLDS = (2, 4, 8)

#: Seconds for all processes together; each group of them has a limit of its own, so that this is never reached.
DEADLINE = 900


def run_all(folder: Path) -> None:
    """Run all processes, and end them whatever happens."""
    command = [sys.executable, "-P", str(SUPPORT / "process_runs.py"), str(folder)]
    with (folder / "output.txt").open("w") as output:
        child = subprocess.Popen(command, env=environment(), stdout=output, stderr=output, start_new_session=True)
        try:
            child.wait(DEADLINE)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


class Results:
    """What the processes left, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            file = self.folder / f"{name}.pt"
            assert file.exists(), f"{name} left nothing:\n{(self.folder / 'output.txt').read_text()[-3000:]}"
            self._known[name] = torch.load(file, weights_only=False)
        return self._known[name]

    def of(self, world: int, scenario: str) -> list[dict[str, Any]]:
        """Return what each rank got."""
        results = [self[f"world-{world}-{rank}"][scenario] for rank in range(world)]
        for rank, result in enumerate(results):
            assert "error" not in result, f"rank {rank} of {world}:\n{result['error']}"
        return results

    def reference(self, name: str, scenario: str) -> dict[str, Any]:
        """Return what came of it in one process."""
        result: dict[str, Any] = self[name][scenario]
        assert "error" not in result, result["error"]
        return result


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Results:
    """Return the results of all processes, which run once however many workers pytest has."""
    base = tmp_path_factory.getbasetemp()
    root = base if worker_id == "master" else base.parent
    folder = root / "processes"
    with (root / "processes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            run_all(folder)
    return Results(folder)


def runs_of(*groups: dict[str, Any]) -> list[Any]:
    """Return the scenarios of some groups, with each number of processes that runs them."""
    names = [name for group in groups for name in group]
    return [pytest.param(n, name, id=f"{n}-{name}") for n in WORLDS for name in names if name in scenarios_of(n)]


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-4) -> None:
    """The same tokens, the same columns kept, logits and stored numbers to a tolerance."""
    assert {*ours} == {*theirs}
    for name in {*ours} - {"seconds"}:
        mine, other = ours[name], theirs[name]
        if name == "tokens":
            assert torch.equal(mine, other)
        elif name == "held":
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
        elif name == "moved":
            assert mine == other
        else:
            torch.testing.assert_close(mine, other, atol=tolerance, rtol=0, equal_nan=True)


# The same tokens


@pytest.mark.parametrize(("world", "scenario"), runs_of(EXACT, ASSISTED))
def test_tokens_are_those_of_one_process(results: Results, world: int, scenario: str) -> None:
    """Of PiKV's cache and of transformers' own."""
    expected = results.reference("dynamic", scenario)
    assert len(expected["tokens"][:, -12:].unique()) > 8, "the model's output is trivial"
    assert_same(results.reference("one", scenario), expected)
    for result in results.of(world, scenario):
        assert_same(result, expected)


@pytest.mark.parametrize(("world", "scenario"), runs_of(EXACT, STORED))
def test_all_ranks_have_the_same_numbers(results: Results, world: int, scenario: str) -> None:
    """Bit by bit: one that rounded differently would sample another token sooner or later."""
    first, *others = results.of(world, scenario)
    for result in others:
        assert_same(result, first, tolerance=0)


@pytest.mark.parametrize(("world", "scenario"), runs_of(STORED))
def test_processes_are_like_devices_of_one_process(results: Results, world: int, scenario: str) -> None:
    """Codecs, routing, budgets, presses and tiers act on each part alike, wherever the parts are."""
    assert_same(results.of(world, scenario)[0], results.reference(f"devices-{world}", scenario))


@pytest.mark.parametrize(("world", "scenario"), runs_of({name: STORED[name] for name in AS_IN_ONE}))
def test_what_does_not_depend_on_parts_is_as_in_one_place(results: Results, world: int, scenario: str) -> None:
    ours, theirs = results.of(world, scenario)[0], results.reference("one", scenario)
    if scenario.endswith("int8"):
        # Pages of a shard that is divided hold other tokens together, and scale with them.
        assert_same({"tokens": ours["logits"].argmax(-1)}, {"tokens": theirs["logits"].argmax(-1)})
    else:
        assert_same(ours, theirs)


def test_the_scenarios_do_what_they_are_there_for(results: Results) -> None:
    """Budgets evict, routing and codecs change results, tiers are used, and so are the presses."""
    plain = results.reference("one", "codec-none")
    for name in STORED:
        result = results.of(2, name)[0]
        if name.startswith("budget-"):
            assert not all(bool(each[0].all()) for each in result["held"]), name
        elif name.startswith(("routing-", "codec-")) and "beams" not in name and name != "codec-none":
            assert not torch.equal(result["logits"], plain["logits"]), name
        elif name.startswith("tiers"):
            assert result["moved"], name
        elif "press-" in name and name not in ("press-lora", "press-pikv"):
            # Of the context's tokens half are left, of those after it all: 220 and 28 of two rows, 200 and 14 of one.
            most = 2 * (214 if name.startswith("kvpress-") else 248)
            assert sum(int(each.sum()) for each in result["held"]) < 0.8 * 3 * most, name
    assert {f"codec-{name}" for name in ALIKE} < {*STORED}


# A share of the memory


@pytest.mark.parametrize(("world", "scenario"), runs_of(MEMORY))
def test_each_rank_stores_its_share(results: Results, world: int, scenario: str) -> None:
    """Within 10% of its share and the window, also where one expert is preferred; no token is lost or kept twice."""
    ranks, one = results.of(world, scenario), results.reference("one", scenario)
    share = (one["bytes"] - one["window"]) / world
    for rank in ranks:
        assert rank["bytes"] <= 1.1 * share + one["window"]
        assert rank["all"] == sum(each["bytes"] for each in ranks)
    for layer, tokens in enumerate(one["tokens"]):
        assert sum(rank["tokens"][layer] for rank in ranks) == tokens
        shards = torch.tensor([rank["shards"][layer] for rank in ranks]).sum(dim=0)
        assert shards.tolist() == list(one["shards"][layer])
        if scenario == "memory-skewed":
            assert shards.max() > 0.7 * tokens


# What is sent


def test_what_is_sent_does_not_depend_on_the_context(results: Results) -> None:
    """Nothing for a prompt; then a message of O(Hq * D) per layer and step, counted as torch.distributed is called."""
    config = small_model().config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    message = 4 * (HEADER + heads * (config.head_dim + 1))
    assert message > 4 * AGREEMENT
    for name in TRAFFIC:
        for rank in results.of(2, name):
            assert rank["prompt"] == []
            assert rank["steps"] == [("all_gather", message)] * (5 * layers)
            # Before the first step, that all have read the same prompt; in a message of the size last agreed on.
            assert [kind for kind, _ in rank["first"]] == ["all_gather"] * (layers + 1)
            assert [size for _, size in rank["first"][1:]] == [message] * layers
            assert rank["counted"] == (sum(size for _, size in rank["first"] + rank["steps"]), 6 * layers)
    short, long = (results.of(2, name)[0] for name in TRAFFIC)
    assert short["steps"] == long["steps"]


# Processes that fail


def failed(results: Results, name: str, ranks: int) -> list[dict[str, Any]]:
    """Return what came of some ranks, all of which ended in time."""
    found = [results[f"{name}-{rank}"] for rank in range(FAILURES[name].world) if ranks >> rank & 1]
    assert all(each["seconds"] < 3 * TIMEOUT for each in found), found
    return found


@pytest.mark.parametrize(
    ("name", "survivors", "message"),
    [
        ("exits", 0b101, "got no answer from all others at layer 2: one of them has died, raised"),
        ("killed", 0b01, "got no answer from all others at layer 2: one of them has died, raised"),
        ("raises", 0b101, "got no answer from all others at layer 2: one of them has died, raised"),
        ("stays", 0b101, f"got no answer from all others at layer 2: .*longer than {TIMEOUT:g} s"),
        ("stops", 0b01, f"got no answer from all others at layer 0: .*longer than {TIMEOUT:g} s"),
        ("budget", 0b101, "got no answer from all others at layer .: rank 1 raised BudgetError: its own budget"),
        ("memory-error", 0b01, "got no answer from all others at layer .: rank 1 raised MemoryError: its own memory"),
        ("attends", 0b101, "rank 1 failed at layer 1: ValueError: its own attention"),
        ("prompt", 0b111, "have read different prompts"),
        ("prompt-one-token", 0b11, "have read different prompts"),
        ("prompt-length", 0b11, "positions seen 6[12] here and 6[12] there"),
        ("prompt-rows", 0b11, "rows [12] here and [12] there"),
        ("prompt-chunks", 0b11, "queries (20|35) here and (20|35) there"),
        ("rows-later", 0b11, "rows [13] here and [13] there"),
        ("seed", 0b11, "attend with different queries.*the same seed"),
        ("weights", 0b11, "different weights"),
    ],
)
def test_the_others_end_with_a_clear_error(results: Results, name: str, survivors: int, message: str) -> None:
    """All that live, within the timeout, saying who, where and what may be wrong."""
    found = failed(results, name, survivors)
    for each in found:
        assert each["error"] == "ProcessError", each
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(each["text"])
        assert "rank" in each["text"]
    if "longer than" not in message:
        assert all(each["seconds"] < TIMEOUT for each in found), "they waited although they could know"


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("raises", "RuntimeError", "a hook's own"),
        ("stays", "RuntimeError", "a hook's own"),
        ("budget", "BudgetError", "its own budget"),
        ("memory-error", "MemoryError", "its own memory"),
        ("attends", "ValueError", "its own attention"),
    ],
)
def test_a_rank_that_fails_keeps_its_own_error(results: Results, name: str, kind: str, text: str) -> None:
    own = results[f"{name}-1"]
    assert (own["error"], own["text"], own["notes"]) == (kind, text, [])


@pytest.mark.parametrize("name", ["attends", "again"])
def test_a_new_cache_works_after_an_error(results: Results, name: str) -> None:
    """In the same processes, whether connections were closed or not."""
    for rank in range(FAILURES[name].world):
        found = results[f"{name}-{rank}"]
        assert found["error"] == ("ProcessError" if rank != 1 else found["error"])
        assert not found["again"]["error"], found["again"]
        assert torch.equal(found["again"]["value"], found["expected"])


def test_an_error_of_all_ranks_harms_none(results: Results) -> None:
    for found in failed(results, "everywhere", 0b11):
        assert found["wrong"]["error"] == "ValueError"
        assert not found["error"], found["text"]
        torch.testing.assert_close(found["value"], found["expected"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["padding", "nan", "zeros", "bfloat16"])
def test_odd_numbers_raise_no_alarm(results: Results, kind: str) -> None:
    first, second = failed(results, f"odd-{kind}", 0b11)
    assert not first["error"], first["text"]
    assert not second["error"], second["text"]
    assert torch.equal(first["value"], second["value"])
    if kind != "bfloat16":
        # There, merging in another order rounds to other tokens.
        assert torch.equal(first["value"], first["expected"])


# Started as users start them

SCRIPT = """
import sys
import torch
from families import FAMILIES, prompts
from pikv_hf import PiKVCache

torch.set_num_threads(1)
model = FAMILIES["mixtral"].build()
cache = PiKVCache.for_model(model, process_group="world", timeout=60, page_size=8, recent_window=16, num_shards=8)
tokens = model.generate(**prompts(), past_key_values=cache, max_new_tokens=16, do_sample=False)
exchange = cache.layers[0].layout.exchange
assert exchange.ranks == 2 and exchange.collectives, exchange.ranks
torch.save(tokens, sys.argv[1] + str(exchange.rank))
"""


@pytest.mark.parametrize(
    "launch",
    [
        ["torchrun", "--standalone", "--nproc_per_node", "2"],
        [
            *("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        ],
    ],
    ids=lambda launch: launch[0],
)
def test_launchers_need_nothing_else(tmp_path: Path, launch: list[str]) -> None:
    """No set-up of torch.distributed in the script. Without a GPU, `--multi_gpu` means gloo."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [str(Path(sys.executable).with_name(launch[0])), *launch[1:], str(script), str(tmp_path / "tokens-")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    from families import FAMILIES, prompts

    model = FAMILIES["mixtral"].build()
    cache = PiKVCache.for_model(model, **SMALL)
    expected = model.generate(**prompts(), past_key_values=cache, max_new_tokens=16, do_sample=False)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"tokens-{rank}"), expected)
