"""The study of codecs on latents: what it measures, and what its committed results say."""

import json
from pathlib import Path

import pytest
import torch

from pikv_hf.eval.studies.codecs.latent_codecs import PAIRS, PER_TOKEN, main, measure
from pikv_hf.eval.studies.codecs.latent_inputs import CASES, LATENT, ROTARY, latent_input
from pikv_hf.eval.studies.codecs.latent_logits import model_errors

RESULTS = Path(__file__).parents[3] / "eval" / "results" / "latent-codecs.json"


def test_inputs_are_what_their_case_says() -> None:
    ordinary, large = (latent_input(case, 0, 512, 4) for case in ("ordinary", "one channel x50"))
    sizes = large.latents.square().mean(dim=0).sqrt()
    assert sizes[7] / sizes.median() == pytest.approx(50, rel=0.1)
    assert torch.equal(ordinary.rotary, large.rotary)
    out = ordinary.output(ordinary.latents, ordinary.rotary)
    logits = ordinary.query[0, -1] @ torch.cat([ordinary.latents, ordinary.rotary], dim=-1).T
    expected = logits.softmax(dim=-1) @ ordinary.latents @ ordinary.values[0].T
    torch.testing.assert_close(out[0, -1], expected, atol=1e-5, rtol=1e-4)


def test_exact_is_exact_and_wider_is_better() -> None:
    rows = {(row.latents, row.rotary): row for row in measure(1, 512, 4, ["ordinary"])}
    assert len(rows) == len(PAIRS) + len(PER_TOKEN)
    assert rows["none", "none"].error == 0
    assert rows["none", "none"].bytes == 2 * (LATENT + ROTARY)
    errors, sizes = (
        [getattr(rows[name, "none"], what) for name in ("int2", "int4", "int8")] for what in ("error", "bytes")
    )
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)


def test_models_are_compared_with_themselves_without_codecs() -> None:
    rows = list(model_errors(tokens=300, pairs=[("int8", "int8"), ("int4", "int8")]))
    if not rows:
        pytest.skip("this transformers caches expanded keys and values")
    for eight, four in (rows[:2], rows[2:]):
        assert 0 < eight.error < 0.05
        assert eight.error < four.error


def test_committed_results_say_what_docs_codecs_says() -> None:
    written = json.loads(RESULTS.read_text())
    rows = {(row["case"], row["latents"], row["rotary"]): row for row in written["results"]}
    assert {case for case, _, _ in rows} == set(CASES)
    for case in CASES:
        found = {pair: rows[case, *pair]["error"] for pair in PAIRS}
        # One bad channel does not hurt: ranges are those of a channel.
        assert found["int8", "int8"] < 0.005
        assert found["int4", "int8"] < 0.06
        # Rotary keys in int8 cost next to nothing beside latents in int4; narrower ones do.
        assert found["int4", "int8"] < 1.02 * found["int4", "none"]
        assert found["int8", "int4"] > 4 * found["int8", "int8"]
        assert found["fp8", "none"] > 4 * found["int8", "none"]
    assert rows["one channel x50", "int4, a range per token", "none"]["error"] > 0.2


def test_the_command_writes_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pikv_hf.eval.studies.codecs import latent_codecs

    monkeypatch.setattr(latent_codecs, "measure", lambda seeds: measure(seeds, 300, 2, ["ordinary"]))
    monkeypatch.setattr(latent_codecs, "model_errors", lambda: iter(()))
    main(["--output", str(tmp_path), "--seeds", "1"])
    written = json.loads((tmp_path / "latent-codecs.json").read_text())
    assert written["metric"].startswith("error: ")
    assert len(written["results"]) == len(PAIRS) + len(PER_TOKEN)
