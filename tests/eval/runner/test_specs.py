"""Caches and presses by name, and options from Python and YAML."""

import kvpress
import pytest
from transformers import DynamicCache

import pikv_hf.presses
from pikv_hf import PiKVCache
from pikv_hf.eval.errors import InputError
from pikv_hf.eval.runner.caches import cache_factory
from pikv_hf.eval.runner.calls import Call, parse_call
from pikv_hf.eval.runner.options import EvalOptions, read_options
from pikv_hf.eval.runner.presses import press_classes, press_factory


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("SnapKVPress", Call("SnapKVPress", (), {})),
        ("A(B(x=1), 'text')", Call("A", (Call("B", (), {"x": 1}), "text"), {})),
        ("A([B, C(y=-0.5)], flag=True)", Call("A", ([Call("B", (), {}), Call("C", (), {"y": -0.5})],), {"flag": True})),
    ],
)
def test_calls_are_read_as_written(text, call):
    assert parse_call(text) == call


@pytest.mark.parametrize(
    "text", ["", "1", "A(", "A(**x)", "A(b.c())", "__import__('os').system('x')", "A(x=lambda: 1)"]
)
def test_anything_else_is_refused_and_never_evaluated(text):
    with pytest.raises(InputError, match=r"expected|cannot read"):
        parse_call(text)


def test_each_press_is_fresh():
    factory = press_factory("AdaKVPress(SnapKVPress(window_size=8))", 0.25)
    one, other = factory.make(), factory.make()
    assert one is not other
    assert one.press is not other.press
    assert (one.press.compression_ratio, one.press.window_size, factory.ratio) == (0.25, 8, 0.25)
    assert factory.label == "AdaKV(SnapKV(window_size=8)) 25%"


def test_every_press_that_needs_nothing_but_a_ratio_takes_it():
    made = {}
    for name in press_classes():
        try:
            made[name] = press_factory(name, 0.5).ratio
        except InputError:
            continue
    assert {"SnapKVPress", "TOVAPress", "ThinKPress", "KnormPress", "PyramidKVPress"} <= set(made)
    assert set(made.values()) == {0.5}
    assert {*pikv_hf.presses.__all__} - {"RowwisePress"} <= set(made)


def test_presses_of_this_project_stand_beside_those_of_kvpress():
    known = press_classes()
    assert {*pikv_hf.presses.__all__} < set(known)
    assert {"SnapKVPress", "AdaKVPress"} < set(known)
    assert isinstance(press_factory("RowwisePress(SnapKVPress)", 0.5).make().press, kvpress.SnapKVPress)
    control = press_factory('ExpertPress(router="random", seed=3)', 0.9375)
    assert (control.make().router, control.make().seed, control.make().compression_ratio) == ("random", 3, 0.9375)
    assert control.label == 'Expert(router="random", seed=3) 93.75%'


def test_a_budget_is_as_good_as_a_ratio():
    assert press_factory("PiKVPress(budget='25%')").ratio == 0.75
    assert press_factory("PiKVPress(budget='2 MiB')").ratio == 0.0
    assert press_factory("LoRAPress(rank=4)").make().rank == 4


def test_presses_of_a_composed_one_share_the_ratio():
    factory = press_factory("ComposedPress([LoRAPress, ChunkKVPress(SnapKVPress)])", 0.75)
    assert [press.compression_ratio for press in factory.make().presses] == [0.5, 0.5]
    assert factory.ratio == 0.75
    assert (
        press_factory("ComposedPress([KnormPress(compression_ratio=0.5), KnormPress(compression_ratio=0.2)])").ratio
        == 0.6
    )


def test_a_composed_press_hands_the_ratio_to_those_that_take_one():
    press = press_factory("ComposedPress([SnapKVPress, ThinKPress(key_channel_compression_ratio=0.5)])", 0.25).make()
    assert [press.presses[0].compression_ratio, press.presses[1].key_channel_compression_ratio] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("spec", "ratio", "message"),
    [
        ("SnapKVPres", 0.5, "unknown press 'SnapKVPres', did you mean 'SnapKVPress'"),
        ("snapkvpress", 0.5, "did you mean 'SnapKVPress'"),
        ("SnapKVPress(windowsize=3)", 0.5, "no option 'windowsize', did you mean 'window_size'"),
        ("SnapKVPress", None, "needs --ratio"),
        ("SnapKVPress", 1.0, "below 1, got 1.0"),
        ("AdaKVPress", 0.5, "cannot make AdaKVPress"),
        ("DMSPress(KnormPress, threshold=0.5)", 0.5, "no compression ratio for --ratio 0.5"),
        ("ScorerPress", 0.5, "unknown press"),
        ("PiKVPres", 0.5, "did you mean 'PiKVPress'"),
        ("PiKVPress", None, "needs --ratio"),
        ("PiKVPress(budget='25%')", 0.5, "has a budget, '25%', and cannot take --ratio 0.5"),
        ("PiKVPress(budget='a bit')", None, "cannot make PiKVPress: a budget is written like"),
    ],
)
def test_wrong_presses_are_named(spec, ratio, message):
    with pytest.raises(InputError, match=message):
        press_factory(spec, ratio)


def test_a_press_with_options_of_its_own_needs_no_ratio():
    assert isinstance(press_factory("DMSPress(KnormPress, threshold=0.5)").make(), kvpress.DMSPress)
    assert press_factory("SnapKVPress(compression_ratio=0.5)").ratio == 0.5


def test_caches_by_name(reference_model):
    model, _ = reference_model
    assert isinstance(cache_factory("dynamic").make(model), DynamicCache)
    factory = cache_factory("pikv:page_size=16, placement=hash")
    with factory.prepare(model):
        one, other = factory.make(model), factory.make(model)
        assert model.config._attn_implementation == "pikv"
    assert model.config._attn_implementation == "sdpa"
    assert isinstance(one, PiKVCache)
    assert one is not other
    assert (one.pikv_config.page_size, one.pikv_config.placement) == (16, "hash")
    assert factory.label == "PiKVCache page_size=16 placement=hash"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dynamik", "unknown cache 'dynamik', did you mean 'dynamic'"),
        ("dynamic:x", "has no options, got 'x'"),
        ("pikv:page_sise=3", "did you mean 'page_size'"),
        ("pikv:page_size=0", "at least 1, got 0"),
        ("pikv:page_size", "expected option=value"),
        ("quantized:quant:4", "did you mean 'quanto'"),
        ("quantized:quanto:5", "2, 4 bits, got '5'"),
    ],
)
def test_wrong_caches_are_named(spec, message):
    with pytest.raises(InputError, match=message):
        cache_factory(spec)


def test_options_survive_plain_values():
    options = EvalOptions(suite="needle", lengths=(64, 128), press="SnapKVPress", ratio=0.5)
    assert EvalOptions.from_dict(options.to_dict()) == options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"suite": "rulr"}, "did you mean 'ruler'"),
        ({"suite": "ruler", "lenght": 3}, "did you mean 'length'"),
        ({"suite": "ruler", "length": "3"}, "length must be int, got '3'"),
        ({"suite": "ruler", "length": True}, "length must be int, got True"),
        ({"suite": "ruler", "samples": 0}, "samples must be at least 1, got 0"),
        ({"suite": "ruler", "ratio": 0.5}, "needs a press"),
        ({"suite": "ruler", "press": "SnapKVPress", "batch_size": 2}, "needs batch_size 1, got 2"),
        ({"suite": "needle", "depths": [101]}, "0 to 100, got 101"),
        ({"suite": "perplexity", "length": 64, "prefill": 64}, "below length - 1 = 63, got 64"),
        ({"suite": "perplexity", "query_aware": True}, "asks no question"),
        ({"model": "x"}, "suite is missing"),
    ],
)
def test_wrong_options_are_named(given, message):
    with pytest.raises(InputError, match=message):
        EvalOptions.from_dict(given)


def test_a_yaml_file_expands_to_runs(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(
        """
suite: ruler
samples: 7
tasks: [vt, niah_single_1]
runs:
  - cache: [dynamic, pikv]
  - {press: [SnapKVPress, KnormPress], ratio: [0.25, 0.5]}
"""
    )
    runs = read_options(file)
    assert [(run.cache, run.press, run.ratio) for run in runs] == [
        ("dynamic", None, None),
        ("pikv", None, None),
        ("dynamic", "SnapKVPress", 0.25),
        ("dynamic", "SnapKVPress", 0.5),
        ("dynamic", "KnormPress", 0.25),
        ("dynamic", "KnormPress", 0.5),
    ]
    assert {(run.samples, run.tasks) for run in runs} == {(7, ("vt", "niah_single_1"))}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold a mapping"),
        ("suite: [", "cannot read"),
        ("suite: ruler\nruns: 3", "runs in .* must be a list"),
        ("suite: ruler\nlenght: 3", "grid.yaml: unknown option 'lenght'"),
    ],
)
def test_a_wrong_yaml_file_is_named(tmp_path, text, message):
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_options(file)
    with pytest.raises(InputError, match=r"missing\.yaml"):
        read_options(tmp_path / "missing.yaml")


def test_folders_have_kvpress_names_and_differ_when_results_do():
    plain = EvalOptions(suite="ruler", press="SnapKVPress", ratio=0.5)
    assert plain.folder_name(0.5) == "ruler__1024__reference__SnapKVPress__0.50"
    hub = EvalOptions(suite="ruler", model="owner/name", cache="pikv:page_size=16", query_aware=True, threads=2)
    assert hub.folder_name(0.0) == "ruler__1024__owner--name__no_press__0.00__pikv-page_size=16__query_aware"
    names = {
        EvalOptions(suite="ruler", **options).folder_name(0.0)
        for options in ({}, {"seed": 1}, {"samples": 3}, {"dtype": "float16"}, {"max_context": 9}, {"tasks": ("vt",)})
    }
    assert len(names) == 6
