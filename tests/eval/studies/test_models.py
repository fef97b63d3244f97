"""The table of docs/models.md, from results: made-up ones, and those that are committed."""

from pathlib import Path

from pikv_hf.eval.studies.models.families import families, model_classes
from pikv_hf.eval.studies.models.outcome import SAME, Outcome
from pikv_hf.eval.studies.models.run import FOLDER
from pikv_hf.eval.studies.models.table import BEGIN, END, PAGE, experts_of, read_results, tables

ROOT = Path(__file__).parents[3]
EQUAL = {"greedy": SAME, "beams": SAME}
RESULTS = {
    "5.2.0": {
        "paged": Outcome("paged", "in place", None, "expert", 2, {"PiKVLayer": 2}, 9, EQUAL),
        "hybrid": Outcome("hybrid", "refused", "has layers of type mamba; ask for others"),
    },
    "5.24.0": {
        "paged": Outcome("paged", "densely", "its keys_change", None, None, {"PiKVLayer": 2}, 2, EQUAL),
        "hybrid": Outcome("hybrid", "in place", None, "hash", 0, {"PiKVLayer": 1, "ConvLayer": 1}, 9, EQUAL),
        "wrong": Outcome("wrong", "in place", None, "hash", 0, {"PiKVLayer": 1}, 9, {"greedy": "other tokens"}),
        "broken": Outcome("broken", "not run", "DynamicCache: ValueError: no"),
    },
}


def test_a_row_has_both_releases() -> None:
    lines = tables(RESULTS, {"paged", "hybrid", "wrong", "broken"}).splitlines()
    assert "| paged | in place | 2/2 | 2/2 | dense | none | 2/2 (few tokens) |" in lines
    assert "| hybrid | refused |  |  | in place + own | none | 2/2 |" in lines
    assert "| wrong | - | - | - | in place | none | 0/1 |" in lines


def test_counts() -> None:
    lines = tables(RESULTS, {"paged", "hybrid", "wrong", "broken"}).splitlines()
    assert lines[0] == "| decoders with experts | 5.2.0 | 5.24.0 |"
    assert "| equal in all strategies | 1 | 2 |" in lines
    assert "| refused, with the reason | 1 | 0 |" in lines
    assert "| other tokens than DynamicCache's | 0 | 1 |" in lines


def test_reasons_are_told_without_advice() -> None:
    text = tables(RESULTS, {"paged", "hybrid", "wrong", "broken"})
    assert "- hybrid (5.2.0), refused: has layers of type mamba\n" in text
    assert "- wrong (5.24.0), greedy: other tokens" in text


def test_others_are_in_a_line() -> None:
    assert "- 5.2.0, in place: paged\n" in tables(RESULTS, {"hybrid"})


def test_the_page_is_of_the_committed_results() -> None:
    results = read_results(ROOT / FOLDER)
    experts = {name for release in results for name in experts_of(ROOT / FOLDER, release)}
    written = (ROOT / PAGE).read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert written.strip() == tables(results, experts)


def test_families_are_found() -> None:
    found = families()
    assert {"qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"} <= {name for name, each in found.items() if each.experts}
    assert not {"llama", "gpt2"} & {name for name, each in found.items() if each.experts}
    assert {each.model_type for each in found.values()} <= set(model_classes())
    assert not {"switch_transformers", "nllb-moe"} & set(found)
