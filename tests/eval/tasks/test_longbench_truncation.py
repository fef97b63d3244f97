"""LongBench: prompts cut in the middle until they fit, with three kinds of tokenizer."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longbench_records import prompt_of
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pikv_hf.eval.reference.tokenizer import build_tokenizer
from pikv_hf.eval.tasks.longbench import bundled_sample, load, truncate_middle
from pikv_hf.eval.tasks.longbench.fit import fit, frame
from pikv_hf.eval.tasks.longbench.truncate import count_tokens
from pikv_hf.eval.tasks.sample import EvalSample

pytestmark = pytest.mark.slow

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CORPUS = [(bundled_sample() / f"{file}.jsonl").read_text(encoding="utf-8") for file in ("qmsum", "vcsum", "lcc")]


def byte_level(merges: bool) -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes, with or without merges learnt from English, Chinese and code."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": BYTES, "show_progress": False, "special_tokens": ["<s>"]}
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=900 if merges else 257, **options))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>" if merges else None)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2's kind: words with a marked beginning; what is not in the vocabulary becomes bytes."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *letters,
        "th",
        "▁th",
        "▁the",
        "the",
        "会",
        "议",
    ]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("th", "e")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


class SlowBytes(PreTrainedTokenizer):
    """One token per byte, in Python; a cut character is decoded as the replacement character."""

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(byte): byte for byte in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return bytes(ord(token) for token in tokens).decode(errors="replace")


TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {
    "words": build_tokenizer(),
    "bytes": byte_level(merges=False),
    "byte-level BPE": byte_level(merges=True),
    "byte-fallback BPE": byte_fallback(),
    "ByT5": ByT5Tokenizer(),
    "slow bytes": SlowBytes(),
}
TEXTS = st.text("abc the ,.\n12会议记录🙂é", max_size=60) | st.text(max_size=30)


class TestTruncation:
    @pytest.mark.parametrize("name", TOKENIZERS)
    @given(text=TEXTS, limit=st.integers(0, 40), following=st.integers(-5, 60))
    @settings(max_examples=120)
    def test_never_over_the_limit(self, name: str, text: str, limit: int, following: int) -> None:
        tokenizer = TOKENIZERS[name]
        shortened = truncate_middle(text, tokenizer, limit, following)
        assert count_tokens(shortened, tokenizer) <= limit
        assert (shortened == text) or count_tokens(text, tokenizer) > limit

    @pytest.mark.parametrize("name", TOKENIZERS)
    @given(text=st.text("the会议记录🙂é ", max_size=60), limit=st.integers(1, 40))
    @settings(max_examples=60)
    def test_a_beginning_and_an_end_of_whole_characters(self, name: str, text: str, limit: int) -> None:
        shortened = truncate_middle(text, TOKENIZERS[name], limit)
        assert any(
            text.startswith(shortened[:cut]) and text.endswith(shortened[cut:]) for cut in range(len(shortened) + 1)
        )

    @pytest.mark.parametrize("name", ["bytes", "ByT5", "slow bytes"])
    def test_first_and_last_half(self, name: str) -> None:
        tokenizer = TOKENIZERS[name]
        assert truncate_middle("0123456789", tokenizer, 6) == "012789"
        assert truncate_middle("0123456789", tokenizer, 6, following=4) == "012349"
        assert truncate_middle("0123456789", tokenizer, 6, following=-4) == "056789"
        assert truncate_middle("0123456789", tokenizer, 6, following=100) == "012345"
        assert truncate_middle("0123456789", tokenizer, 0) == ""

    @pytest.mark.parametrize("name", ["bytes", "ByT5", "slow bytes"])
    def test_a_character_is_not_cut_in_pieces(self, name: str) -> None:
        # Three bytes each: two of the four bytes on each side make no character.
        assert truncate_middle("会议记录", TOKENIZERS[name], 8) == "会录"
        # Here the two sides hold pieces of the same character.
        assert truncate_middle("a🙂b", TOKENIZERS[name], 4) == "ab"

    def test_most_of_the_limit_is_used(self) -> None:
        text = CORPUS[0][:1000]
        for name, tokenizer in TOKENIZERS.items():
            assert count_tokens(truncate_middle(text, tokenizer, 100), tokenizer) >= 95, name

    def test_a_negative_limit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="max_tokens must be at least 0, got -1"):
            truncate_middle("x", TOKENIZERS["bytes"], -1)


def with_chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = "[user] {{ messages[0].content }}\n[model] "
    return tokenizer


class TestFit:
    @pytest.mark.parametrize("limit", [60, 81, 200])
    def test_the_cut_is_where_it_would_be_in_the_whole_prompt(self, limit: int) -> None:
        tokenizer = TOKENIZERS["bytes"]
        sample = EvalSample("x-0000", "lcc", "0123456789" * 20, "Question: who?", "Answer:", ("x",), 1, 0)
        whole = prompt_of(sample)
        first = limit // 2
        assert prompt_of(fit(sample, tokenizer, limit)) == whole[:first] + whole[first - limit :]

    # ByT5 takes seconds to decode a text of this length.
    @pytest.mark.parametrize("name", sorted(TOKENIZERS.keys() - {"ByT5"}))
    @pytest.mark.parametrize("limit", [120, 333])
    def test_the_pipelines_prompt_fits(self, name: str, limit: int) -> None:
        tokenizer = TOKENIZERS[name]
        for sample in load(["vcsum", "trec", "lcc", "repobench-p"], data_dir=bundled_sample(), limit=1):
            before, between = frame(tokenizer)
            after = count_tokens(sample.question + between + sample.answer_prefix, tokenizer)
            if limit <= after + 1:
                with pytest.raises(ValueError, match=f"{sample.id}: max_context of {limit} tokens leaves none"):
                    fit(sample, tokenizer, limit)
                continue
            fitted = fit(sample, tokenizer, limit)
            assert count_tokens(before + fitted.context, tokenizer) + after <= limit
            assert dataclasses.replace(fitted, context=sample.context) == sample

    def test_load_cuts_only_what_is_too_long(self) -> None:
        tokenizer = TOKENIZERS["byte-level BPE"]
        plain = load(["hotpotqa"], data_dir=bundled_sample(), e=True)
        fitted = load(["hotpotqa"], data_dir=bundled_sample(), e=True, max_context=2000, tokenizer=tokenizer)
        assert [one == other for one, other in zip(plain, fitted, strict=True)] == [True, True, True, False, False]
        assert all(count_tokens(prompt_of(sample), tokenizer) < 2000 for sample in fitted)

    def test_a_chat_template_counts(self) -> None:
        tokenizer = with_chat(byte_level(merges=False))
        assert frame(tokenizer) == ("[user] ", "\n[model] ")
        sample = EvalSample("x-0000", "lcc", "0123456789" * 20, "who?", "It is", ("x",), 1, 0)
        fitted = fit(sample, tokenizer, 50)
        whole = [f"[user] {one.context}who?\n[model] It is" for one in (sample, fitted)]
        assert whole[1] == whole[0][:25] + whole[0][-25:]
        with pytest.raises(ValueError, match="max_context of 25 tokens leaves none for the context, the rest has 25"):
            fit(sample, tokenizer, 25)

    def test_tokens_at_the_border_of_the_frame_count_as_they_are_there(self) -> None:
        # Apart "ab" is one token and "cd" too; together they are "a", "bc" and "d".
        vocabulary = {token: index for index, token in enumerate(["a", "b", "c", "d", "bc", "ab", "cd"])}
        model = models.BPE(vocabulary, [("b", "c"), ("a", "b"), ("c", "d")])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
        tokenizer.chat_template = "ab{{ messages[0].content }}cd"
        fitted = fit(EvalSample("x-0000", "lcc", "cd" * 20, "", "", ("x",), 1, 0), tokenizer, 10)
        assert fitted.context == "cd" * 7
        assert count_tokens("ab" + fitted.context, tokenizer) + count_tokens("cd", tokenizer) == 10

    def test_a_tokenizer_is_needed_to_count(self) -> None:
        with pytest.raises(ValueError, match="max_context of 100 needs a tokenizer"):
            load(["lcc"], data_dir=bundled_sample(), max_context=100)
