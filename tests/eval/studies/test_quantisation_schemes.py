"""The studies behind the packed format: their measure, their schemes, the page guard, and the committed results."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pikv_hf.codecs.page_encoder import GUARD
from pikv_hf.eval.studies.codecs import low_rank_bases as low_rank
from pikv_hf.eval.studies.codecs import quantisation_schemes_study as schemes_study
from pikv_hf.eval.studies.codecs.attention_error import PAGE, WINDOW, Subject
from pikv_hf.eval.studies.codecs.low_rank_bases import (
    FITS,
    Fit,
    byte_share,
    decode,
    fit_basis,
    project,
    rank_of_equal_bytes,
)
from pikv_hf.eval.studies.codecs.page_guard import guard_by_rule, guard_pages, page_errors
from pikv_hf.eval.studies.codecs.quantisation_schemes import (
    KEY_SCHEMES,
    KIND_OF_BITS,
    VALUE_SCHEMES,
    Ranges,
    Shipped,
    Unchanged,
    hadamard,
)
from pikv_hf.eval.studies.codecs.sample_kv import (
    DIFFICULT,
    QUERIES,
    AttentionInput,
    difficult,
    random_inputs,
    reference_inputs,
)
from pikv_hf.kernels.decode_pages import decode_pages
from pikv_hf.kernels.encode_pages import encode_pages
from pikv_hf.kernels.page_codes import CARRIED_ERROR, Kind

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).parents[3] / "eval" / "results"
EXACT = 1e-6
WIDENING: list[Kind] = ["int2", "int4", "int8", "none"]


@pytest.fixture(scope="module")
def layers() -> list[AttentionInput]:
    """Return the four layers of the bundled model on three prompts."""
    return reference_inputs(1024, 1)[:12]


@pytest.fixture(scope="module")
def subjects(layers: list[AttentionInput]) -> list[Subject]:
    return [Subject.of(layer) for layer in layers]


def test_the_measured_attention_is_that_of_torch(layers: list[AttentionInput], subjects: list[Subject]) -> None:
    """The last queries over all keys, each up to its own, as in a model."""
    for layer, subject in zip(layers[:4], subjects, strict=False):
        tokens = layer.keys.shape[1]
        visible = torch.ones(QUERIES, tokens, dtype=torch.bool).tril(tokens - QUERIES)
        expected = torch.nn.functional.scaled_dot_product_attention(
            layer.query[None], layer.keys[None], layer.values[None], visible, enable_gqa=True
        )[0]
        torch.testing.assert_close(subject.output.view_as(expected), expected, atol=1e-5, rtol=1e-4)


def test_the_error_is_that_of_what_was_changed(subjects: list[Subject]) -> None:
    for subject in subjects:
        assert subject.error(subject.key_pages, subject.value_pages) < EXACT
        # Without values in the coded pages, what is missing is their share of the output.
        coded = subject.weights[..., subject.coded] @ subject.layer.values[:, subject.coded]
        missing = subject.error(values=torch.zeros_like(subject.value_pages))
        assert missing == pytest.approx((coded.norm() / subject.output.norm()).item(), rel=1e-4)


def test_sinks_and_window_are_never_coded(layers: list[AttentionInput], subjects: list[Subject]) -> None:
    tokens = layers[0].keys.shape[1]
    assert subjects[0].coded.tolist() == list(range(PAGE, PAGE + len(subjects[0].coded)))
    assert tokens - WINDOW - PAGE < PAGE + len(subjects[0].coded) <= tokens - WINDOW
    for layer in layers:
        subject = Subject.of(layer, by_expert=True)
        assert len(subject.coded.unique()) == len(subject.coded) > 512
        assert subject.coded.min() >= PAGE
        assert subject.coded.max() < len(layer.experts) - WINDOW
        experts = layer.experts[subject.coded].view(-1, PAGE)
        assert (experts == experts[:, :1]).all()
        assert subject.error(subject.key_pages, subject.value_pages) < EXACT


def test_random_models_have_the_geometry_of_their_names() -> None:
    first = random_inputs("gpt-oss-20b", 192)[0]
    assert (first.query.shape, first.keys.shape) == ((64, QUERIES, 64), (8, 192, 64))
    biased = random_inputs("qwen2-57b-a14b, biases", 192)
    assert len(biased) == 2
    # Three channels with large biases, which rotary embedding spreads over up to six.
    spread = biased[0].keys.square().mean(1).sqrt()
    assert (spread.amax(1) / spread.median(1).values > 10).all()


def test_difficult_keys_are_what_they_are_called(layers: list[AttentionInput]) -> None:
    layer = layers[0]
    changed = {case: difficult(layer, case).keys - layer.keys for case in DIFFICULT}
    assert ((changed["offset channels"].abs() > 1).any(1).sum(-1) == 3).all()
    assert ((changed["large channels"].abs() > 1e-3).any(1).sum(-1) == 3).all()
    assert torch.allclose(changed["offset"], torch.tensor(20.0), atol=1e-4)
    for case in ("large token", "large negated token"):
        (token,) = changed[case].abs().sum((0, 2)).nonzero().squeeze(1).tolist()
        assert token in Subject.of(layer).coded
    with pytest.raises(ValueError, match=r"difficult keys are one of .*, not 'huge'"):
        difficult(layer, "huge")


@pytest.mark.parametrize(
    ("part", "name"), [("keys", name) for name in KEY_SCHEMES] + [("values", name) for name in VALUE_SCHEMES]
)
def test_more_bits_are_better(subjects: list[Subject], part: str, name: str) -> None:
    scheme = (KEY_SCHEMES if part == "keys" else VALUE_SCHEMES)[name]
    given = (scheme, None) if part == "keys" else (None, scheme)
    eight, four, two = (schemes_study.measure_scheme(subjects[:4], *given, bits) for bits in (8, 4, 2))
    assert EXACT < 4 * eight < four < two / 2 < 0.25
    assert scheme.page_bytes(8, 32, 64) > scheme.page_bytes(4, 32, 64) > scheme.page_bytes(2, 32, 64)


def test_numbers_on_the_grid_are_exact() -> None:
    """Values that lie on the steps of their range come back, whatever shares the range."""
    torch.manual_seed(0)
    pages = torch.randint(0, 16, (2, 3, 32, 64)).float()
    pages[:, :, :, 0], pages[:, :, :, 63], pages[:, :, 0], pages[:, :, 31] = 0, 15, 0, 15
    for scheme in (Ranges("page"), Ranges("page", finer=4)):
        decoded = scheme(pages, 4)
        assert (decoded - pages).abs().max() <= (1 / 32 + EXACT if scheme.finer else EXACT)
    pages[:, :, 0], pages[:, :, 31] = pages[:, :, 1], pages[:, :, 2]
    torch.testing.assert_close(Ranges("token")(pages, 4), pages)
    assert torch.equal(Unchanged()(pages, 16), pages)


def test_finer_channels_are_the_widest_and_sixteen_times_finer() -> None:
    torch.manual_seed(0)
    pages = torch.randn(1, 2, 32, 16)
    pages[..., [1, 5, 6, 11]] *= 40
    plain, finer = Ranges("page")(pages, 4) - pages, Ranges("page", finer=4)(pages, 4) - pages
    wide = [1, 5, 6, 11]
    assert finer[..., wide].square().mean() < plain[..., wide].square().mean() / 100
    assert torch.equal(finer[..., [0, 2, 3]], plain[..., [0, 2, 3]])


def test_hadamard_is_orthogonal_and_symmetric() -> None:
    matrix = hadamard(64)
    torch.testing.assert_close(matrix @ matrix, torch.eye(64), atol=1e-6, rtol=0)
    assert torch.equal(matrix, matrix.T)
    with pytest.raises(ValueError, match="not 96"):
        hadamard(96)


@pytest.mark.parametrize("keys", [True, False])
def test_shipped_is_what_the_cache_stores(keys: bool) -> None:
    torch.manual_seed(0)
    pages = torch.randn(4, 3, 32, 128)
    for bits, kind in KIND_OF_BITS.items():
        encoded = encode_pages(pages, kind, keys=keys)
        assert torch.equal(Shipped(keys=keys)(pages, bits), decode_pages(encoded, torch.float32))
        held = sum(part.numel() * part.element_size() for part in encoded.tensors())
        assert Shipped(keys=keys).page_bytes(bits, 32, 128) == held / (4 * 3)
    encoded = encode_pages(pages, "fp8", keys=keys)
    held = sum(part.numel() * part.element_size() for part in encoded.tensors())
    assert Shipped(keys=keys, fp8=True).page_bytes(8, 32, 128) == held / (4 * 3)


def test_the_carried_share_is_given_back() -> None:
    torch.manual_seed(0)
    pages = torch.randn(4, 32, 32, 64)
    usual = Shipped(keys=False)(pages, 4)
    without = Shipped(keys=False, carried=0.0)(pages, 4)
    assert not torch.equal(usual, without)
    # Carried errors cancel in the mean over a page, and make single tokens worse.
    assert (usual - pages).mean(2).norm() < 0.9 * (without - pages).mean(2).norm()
    assert (usual - pages).norm() > (without - pages).norm()
    assert torch.equal(Shipped(keys=False)(pages, 4), usual)


def test_bytes_of_pages() -> None:
    # Codes, a floor and a step of two bytes each per channel or token, and four channels with a number and four bits.
    assert Ranges("page").page_bytes(4, 32, 128) == 32 * 64 + 128 * 4
    assert Ranges("page", log_scale=True, normalise=True).page_bytes(4, 32, 128) == 32 * 64 + 128 * 3 + 32
    assert Ranges("token", finer=4).page_bytes(2, 32, 128) == 32 * 32 + 32 * 4 + 4 * 2 + 4 * 16
    assert Ranges("group").page_bytes(8, 32, 128) == 32 * 128 + 32 * 4 * 4
    shares = {(row["part"], row["scheme"], row["bits"]): row["share"] for row in schemes_study.page_sizes()}
    assert shares["both", "shipped", 8] <= 0.55
    assert shares["both", "shipped", 4] <= 0.30
    assert shares["both", "shipped", 2] <= 0.18


@pytest.mark.parametrize("case", DIFFICULT)
def test_int4_with_the_guard_survives_difficult_keys(layers: list[AttentionInput], case: str) -> None:
    ordinary = schemes_study.measure_guard([Subject.of(layer) for layer in layers], "keys", 4)
    assert ordinary["moved"] == 0
    changed = [Subject.of(difficult(layer, case)) for layer in layers]
    found = schemes_study.measure_guard(changed, "keys", 4)
    assert found["error"] <= 2 * ordinary["error"]
    pages = sum(len(subject.coded) // PAGE for subject in changed)
    assert found["moved"] == pytest.approx(len(changed) / pages if "token" in case else 0)
    if "token" in case:
        assert schemes_study.measure_scheme(changed, KEY_SCHEMES["shipped"], None, 4) > 2 * ordinary["error"]


@pytest.mark.parametrize("kind", list(GUARD))
@pytest.mark.parametrize("keys", [True, False])
def test_the_guard_takes_the_narrowest_kind_that_holds_a_page(kind: Kind, keys: bool) -> None:
    """The cache's own choice of codecs is that of the rule written out here."""
    torch.manual_seed(0)
    pages = torch.randn(2, 5, 32, 64)
    pages[0, 1, 3] *= 5000  # Too far for any kind.
    pages[1, 3, 7] *= 100  # Too far for int4.
    pages[1, 4, 7] *= 10  # Too far for int8, whose limit is the nearest to its ordinary error.
    found = guard_pages(pages, kind, keys=keys)
    ruled = guard_by_rule(pages, kind, keys=keys, centred=keys)
    assert found.kinds == ruled.kinds
    assert torch.equal(found.pages, ruled.pages)
    assert found.largest == ruled.largest > GUARD[kind]
    assert (found.kinds[0], found.kinds[1], found.kinds[2]) == (kind, "none", kind)
    for page, chosen in enumerate(found.kinds):
        alone = pages[:, page : page + 1]
        for tried in WIDENING[WIDENING.index(kind) : WIDENING.index(chosen) + 1]:
            decoded = decode_pages(encode_pages(alone, tried, keys=keys), torch.float32)
            assert tried == "none" or (page_errors(alone, decoded, centred=keys) <= GUARD[tried]).all() == (
                tried == chosen
            )
        assert torch.equal(found.pages[:, page : page + 1], decoded)


def test_the_guard_has_limits_for_integer_kinds_only() -> None:
    for guard in (guard_pages, partial(guard_by_rule, centred=True)):
        with pytest.raises(ValueError, match="not for 'fp8'"):
            guard(torch.randn(1, 1, 8, 8), "fp8", keys=True)


def test_equal_values_are_no_error_by_their_size() -> None:
    """Pages of one expert hold runs of one word, whose values are equal in a layer that sees no position."""
    torch.manual_seed(0)
    values = torch.randn(2, 1, 1, 32).expand(2, 1, 32, 32)
    assert guard_by_rule(values, "int4", keys=False, centred=True).kinds == ("none",)
    assert guard_pages(values, "int4", keys=False).kinds == ("int4",)


def test_bases() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(2, 300, 6) @ torch.randn(2, 6, 32)
    experts = torch.randint(0, 8, (300,))
    basis = fit_basis(tokens, 6)
    torch.testing.assert_close(basis.transpose(1, 2) @ basis, torch.eye(6).expand(2, -1, -1), atol=0.01, rtol=0)
    for fit in FITS.values():
        errors = [(project(tokens, experts, fit, rank) - tokens).norm() / tokens.norm() for rank in (2, 4, 6)]
        # Of six dimensions six columns hold everything, up to the rounding of bf16.
        assert errors[0] > errors[1] > 0.05 > 0.01 > errors[2]
    moved = tokens.clone()
    moved[:, 256:] = 0
    assert torch.equal(
        project(moved, experts, Fit(first=256), 3)[:, :256], project(tokens, experts, Fit(first=256), 3)[:, :256]
    )


def test_a_basis_per_shard_holds_what_lies_in_few_directions_per_shard() -> None:
    torch.manual_seed(0)
    experts = torch.randint(0, 8, (4000,))
    tokens = torch.einsum("nr,nrd->nd", torch.randn(4000, 2), torch.randn(8, 2, 32)[experts])[None]
    error = {name: (project(tokens, experts, FITS[name], 2) - tokens).norm() / tokens.norm() for name in FITS}
    assert error["per expert shard"] < 0.01 < 0.5 < error["per random shard"] <= error["per head"]
    assert Fit("random").labels(experts).bincount().tolist() == experts.bincount().tolist()


def test_a_residual_takes_the_error_away(subjects: list[Subject]) -> None:
    subject = subjects[1]
    experts = subject.layer.experts[subject.coded]
    errors = [
        subject.error(decode(subject.key_pages, experts, Fit(), 8, kind, keys=True))
        for kind in ("none", "int2", "int4", "int8")
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[2]


def test_bytes_of_bases() -> None:
    # 1,024 tokens of 32 channels; of rank 8, 8 numbers per token and 8 bases of 8 x 32 numbers.
    assert byte_share("keys", Fit("expert"), 8, 32, "none", 1024) == (1024 * 8 + 8 * 8 * 32) / (1024 * 32)
    residual = Shipped(keys=False).page_bytes(4, 32, 32) / (32 * 32 * 2)
    assert byte_share("values", Fit(), 8, 32, "int4", 1024) == (1024 * 8 + 8 * 32) / (1024 * 32) + residual
    for rank in (4, 8, 16, 24):
        equal = rank_of_equal_bytes(rank, 32, 1024)
        of_shards = byte_share("keys", Fit("expert"), rank, 32, "none", 1024)
        assert byte_share("keys", Fit(), equal, 32, "none", 1024) <= of_shards
        assert byte_share("keys", Fit(), equal + 1, 32, "none", 1024) > of_shards


def test_commands_write_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], layers: list[AttentionInput]
) -> None:
    def few(*_: int) -> list[AttentionInput]:
        return layers[4:6]

    whole: Callable[..., Any] = schemes_study.measure
    for module in (schemes_study, low_rank):
        monkeypatch.setattr(module, "reference_inputs", few)
    monkeypatch.setattr(schemes_study, "measure", lambda samples: whole(samples, models=()))
    monkeypatch.setattr(low_rank, "PROMPTS", {1024: 1})
    for module, name in ((schemes_study, "codec-schemes"), (low_rank, "low-rank-bases")):
        module.main(["--output", str(tmp_path), "--threads", "1"])
        written = json.loads((tmp_path / f"{name}.json").read_text())
        assert written["metric"].startswith("error: ")
        assert written["versions"]["torch"] == torch.__version__
        assert len(written["results"]) > 60
        assert all(row["error"] > 0 for row in written["results"])
    assert "Difficult keys" in capsys.readouterr().out


def test_committed_results_are_of_these_schemes() -> None:
    written = json.loads((RESULTS / "codec-schemes.json").read_text())
    assert written["guard_limits"] == GUARD
    rows = written["results"]
    keys, values = (
        {row["scheme"] for row in rows if row["part"] == part and row["case"] == "ordinary"}
        for part in ("keys", "values")
    )
    assert keys >= set(KEY_SCHEMES)
    assert values >= set(VALUE_SCHEMES) | {f"carried error {CARRIED_ERROR:.2f}"}
    hard = [row for row in rows if row["scheme"] == "shipped + guard" and row["case"] != "ordinary"]
    assert {row["case"] for row in hard} == set(DIFFICULT)
    assert all(row["relative"] <= 2 for row in hard)
    judged = {(row["scheme"], row["part"]) for row in rows if "moved" in row and row["case"] == "ordinary"}
    parts = ("keys", "values", "both")
    assert judged == {(name, part) for name in schemes_study.GUARDS for part in parts} - {
        (schemes_study.BY_DEVIATION, "keys")
    }
    for now, then in zip(schemes_study.page_sizes(), written["sizes"], strict=True):
        assert now == {**then, **{name: pytest.approx(then[name], rel=1e-3) for name in ("bytes", "share")}}
    bases = json.loads((RESULTS / "low-rank-bases.json").read_text())["results"]
    assert {row["fit"] for row in bases} == set(FITS)


def test_a_pretrained_model_has_judged_the_schemes() -> None:
    """All schemes and layers; ranges per channel for keys, which stand, and rotated ranges per token for values."""
    written = json.loads((RESULTS / "codec-schemes-smollm2.json").read_text())
    errors = {(row["part"], row["scheme"], row["bits"]): row["error"] for row in written["results"]}
    assert {name for part, name, _ in errors if part == "keys"} >= set(KEY_SCHEMES)
    assert {name for part, name, _ in errors if part == "values"} >= set(VALUE_SCHEMES)
    assert [row["layer"] for row in written["layers"]] == list(range(30))
    for bits in (8, 4, 2):
        assert 1.5 * errors["keys", "shipped", bits] < errors["keys", "Hadamard, per token", bits]
        assert errors["values", "shipped", bits] > 1.5 * errors["values", "Hadamard, per token", bits]


def test_what_is_said_of_layers(subjects: list[Subject]) -> None:
    own = subjects[:1]
    keys = own[0].layer.keys
    [row] = schemes_study.measure_layers({7: own})
    channels = keys.square().mean(1).sqrt()
    assert row["layer"] == 7
    assert row["widest_channel_keys"] == pytest.approx(float((channels.max(1)[0] / channels.median(1)[0]).max()))
    norms = keys.norm(dim=-1)
    assert row["first_token_keys"] == pytest.approx(float((norms[:, 0] / norms.median(1)[0]).mean()))
    assert row["keys_int4"] == pytest.approx(own[0].error(keys=Shipped(keys=True)(own[0].key_pages, 4)))
    assert row["values_int2"] > row["values_int4"] > 0
