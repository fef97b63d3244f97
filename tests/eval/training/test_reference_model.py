"""The bundled reference model: how it is trained, and that the shipped checkpoint is the one that was measured."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from pikv_hf.eval.reference.load import load_reference_model, reference_model_path, verify_digest, write_digest
from pikv_hf.eval.reference.synthetic.words import KEYS
from pikv_hf.eval.reference.tokenizer import build_tokenizer, vocabulary
from pikv_hf.eval.training import trainer as trainer_module
from pikv_hf.eval.training.batches import BatchBuilder
from pikv_hf.eval.training.curriculum import CURRICULUM, FIRST_POOL, Progress, Stage
from pikv_hf.eval.training.documents import TRAINING_TASKS, Segment
from pikv_hf.eval.training.evaluate import (
    answer,
    count_expert_loads,
    entropy_share,
    evaluation_samples,
    expert_balance,
    measure,
)
from pikv_hf.eval.training.model import balance_loss, build_model, build_optimizers
from pikv_hf.eval.training.model_card import accuracy_table, write_model_card
from pikv_hf.eval.training.muon import Muon, orthogonalize
from pikv_hf.eval.training.trainer import Settings, Trainer

pytestmark = pytest.mark.slow

TOKENIZER = build_tokenizer()
TINY = (
    Stage("recall", ((96, 4),), 3, {"recall": 0.5, "repetition": 0.5}, growing=True),
    Stage("tasks", ((192, 2), (256, 2)), 4, {"multikey": 0.5, "vt": 0.5}, 0.5, 1024, decay=True),
)


class TestMuon:
    @pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64), (3, 32, 16)])
    def test_singular_values_come_near_one(self, shape: tuple[int, ...]) -> None:
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonalize(matrices))
        assert values.min() > 0.5
        assert values.max() < 1.3

    def test_keeps_the_singular_vectors(self) -> None:
        u, _, v = torch.linalg.svd(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
        singular = torch.linspace(1, 3, 16)
        aligned = u.T @ orthogonalize(u @ torch.diag(singular) @ v) @ v.T
        torch.testing.assert_close(aligned, torch.diag(aligned.diagonal()), atol=1e-4, rtol=0)

    def test_each_expert_is_a_matrix_of_its_own(self) -> None:
        stack = torch.nn.Parameter(torch.randn(4, 8, 16))
        alone = [torch.nn.Parameter(matrix.detach().clone()) for matrix in stack]
        stack.grad = torch.randn(4, 8, 16)
        for parameter, gradient in zip(alone, stack.grad, strict=True):
            parameter.grad = gradient.clone()
        Muon([stack]).step()
        Muon(alone).step()
        torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in alone]))

    def test_fits_a_linear_map(self) -> None:
        generator = torch.Generator().manual_seed(0)
        target, inputs = torch.randn(8, 8, generator=generator), torch.randn(64, 8, generator=generator)
        weight = torch.nn.Parameter(torch.zeros(8, 8))
        optimizer = Muon([weight], lr=0.05, weight_decay=0.0)
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
            optimizer.zero_grad()
            (inputs @ weight.T - inputs @ target.T).square().mean().backward()
            optimizer.step()
        assert (weight - target).abs().max() < 0.05

    def test_refuses_vectors(self) -> None:
        with pytest.raises(ValueError, match=r"got shape \(3,\)"):
            Muon([torch.nn.Parameter(torch.zeros(3))])

    def test_every_parameter_has_one_optimizer(self) -> None:
        model = build_model(TOKENIZER, 0)
        muon, adam = build_optimizers(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        by_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
        by_adam = {names[id(p)] for group in adam.param_groups for p in group["params"]}
        assert by_muon.isdisjoint(by_adam)
        assert by_muon | by_adam == set(names.values())
        assert all("proj" in name for name in by_muon)
        assert not any("proj" in name for name in by_adam)


class TestBatches:
    BUILDER = BatchBuilder(TOKENIZER)

    def test_weights_follow_the_role_of_each_token(self) -> None:
        segments = [
            Segment("<bos>apple: 1234.", "context"),
            Segment("number is", "prefix"),
            Segment(" 1234, fox: 56.<eos>", "answer"),
        ]
        _, weights = self.BUILDER.encode(segments)
        context, prefix, answer_ = weights[:8], weights[8:10], weights[10:]
        assert context == [0.0] * 8
        assert prefix == [0.1] * 2
        assert answer_ == [2.0, 1.5, 1.5, 1.5, 0.5, 2.0, 0.5, 2.0, 1.5, 0.5, 0.5]

    @pytest.mark.parametrize("length", [192, 256, 1024])
    @pytest.mark.parametrize("task", ["single", "multikey", "multivalue", "multiquery", "vt"])
    def test_supervised_tokens_are_answers_and_documents_fit(self, task: str, length: int) -> None:
        for seed in range(10):
            segments = TRAINING_TASKS[task](random.Random(seed), length, KEYS)
            ids, weights = self.BUILDER.encode(segments)
            assert length - 20 < len(ids) <= length
            answers = "".join(segment.text for segment in segments if segment.role == "answer")
            chosen = [token for token, weight in zip(ids, weights, strict=True) if weight >= 0.5]
            assert chosen == TOKENIZER(answers, add_special_tokens=False)["input_ids"]
            assert TOKENIZER.unk_token_id not in ids

    @pytest.mark.parametrize("task", TRAINING_TASKS)
    def test_segments_tokenize_like_the_whole_text(self, task: str) -> None:
        segments = TRAINING_TASKS[task](random.Random(0), 256, KEYS)
        whole = " ".join(segment.text for segment in segments)
        assert self.BUILDER.encode(segments)[0] == TOKENIZER(whole, add_special_tokens=False)["input_ids"]

    def test_same_rng_same_batch(self) -> None:
        mix = {"recall": 0.5, "vt": 0.5}
        one, same = (self.BUILDER.build(random.Random(1), 192, 4, mix, KEYS, 1024) for _ in range(2))
        assert torch.equal(one.ids, same.ids)
        assert torch.equal(one.positions, same.positions)

    def test_position_skips_stand_after_full_stops(self) -> None:
        batch = self.BUILDER.build(random.Random(0), 256, 16, {"multikey": 1.0}, KEYS, span=2048)
        steps = batch.positions.diff(dim=-1)
        assert steps.min() == 1
        assert steps.max() > 1
        assert batch.positions.max() < 2048
        full_stop = TOKENIZER.convert_tokens_to_ids(".")
        assert (batch.ids[:, :-1][steps > 1] == full_stop).all()

    def test_without_span_positions_count_up(self) -> None:
        batch = self.BUILDER.build(random.Random(0), 192, 2, {"vt": 1.0}, KEYS)
        assert torch.equal(batch.positions, torch.arange(192).repeat(2, 1))


class TestCurriculum:
    def test_pool_doubles_when_recall_is_good(self) -> None:
        progress, stage = Progress(), CURRICULUM[0]
        assert len(progress.keys()) == FIRST_POOL
        for _ in range(30):
            progress.advance(stage, 1.0, 1, 1.0)
        assert progress.pool > FIRST_POOL
        assert set(Progress().keys()) < set(progress.keys())

    def test_pool_waits_while_recall_is_bad(self) -> None:
        progress = Progress()
        for _ in range(30):
            progress.advance(CURRICULUM[0], 0.8, 1, 1.0)
        assert progress.pool == FIRST_POOL

    def test_a_later_stage_has_all_keys(self) -> None:
        progress = Progress()
        while progress.stage == 0:
            progress.advance(CURRICULUM[0], None, 1, 0.01)
        assert progress.keys() == KEYS
        assert progress.stage_ends == [progress.step]

    def test_learning_rate_decays_to_the_end_of_the_last_stage(self) -> None:
        stage = CURRICULUM[-1]
        assert Progress().learning_rate(stage, 1.0) == 1.0
        assert Progress(stage_step=stage.steps).learning_rate(stage, 1.0) == pytest.approx(0.05)
        assert Progress(stage_step=10).learning_rate(CURRICULUM[1], 1.0) == 1.0

    def test_rows_divide_between_two_processes(self) -> None:
        assert all(rows % 2 == 0 for stage in CURRICULUM for _, rows in stage.shapes)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Train like the script: a second thread only spins at this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
class TestTraining:
    def test_balance_loss_is_one_when_balanced_and_grows_with_skew(self) -> None:
        hidden = torch.eye(4)
        assert balance_loss(hidden, torch.eye(4), 1).item() == pytest.approx(1.0)
        assert balance_loss(hidden.abs(), torch.tensor([[9.0] * 4, *[[0.0] * 4] * 3]), 1).item() > 3.9

    def test_position_skips_do_not_cut_attention(self) -> None:
        model = build_model(TOKENIZER, 0).eval()
        ids = torch.randint(4, len(TOKENIZER), (1, 12), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(12)[None].clone()
        positions[:, 6:] += 100
        with torch.no_grad():
            outputs = [
                model.model(i, position_ids=positions, attention_mask=torch.ones_like(i)).last_hidden_state[:, -1]
                for i in (ids, torch.cat([ids[:, 1:2], ids[:, 1:]], -1))
            ]
        assert (outputs[0] - outputs[1]).abs().max() > 1e-4

    def test_loss_falls(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stage = replace(TINY[0], steps=1000, mix={"recall": 1.0}, shapes=((48, 8),))
        monkeypatch.setattr(trainer_module, "CURRICULUM", (stage,))
        trainer = Trainer(Settings(tmp_path), TOKENIZER)
        losses = [trainer.train_step()["loss"][0].item() for _ in range(12)]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

    def test_resumed_run_equals_an_uninterrupted_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trainer_module, "CURRICULUM", TINY)
        whole = Trainer(Settings(tmp_path / "whole"), TOKENIZER)
        (tmp_path / "parts").mkdir()
        for steps in (2, 3, 2):
            part = Trainer(Settings(tmp_path / "parts"), TOKENIZER)
            for _ in range(steps):
                whole.train_step()
                part.train_step()
            part.save()
        assert part.finished
        assert part.progress.runs == 3
        assert part.progress.stage_ends == whole.progress.stage_ends == [3, 7]
        for name, parameter in whole.model.state_dict().items():
            assert torch.equal(parameter, part.model.state_dict()[name]), name

    def test_another_seeds_checkpoint_is_refused(self, tmp_path: Path) -> None:
        Trainer(Settings(tmp_path, seed=1), TOKENIZER).save()
        with pytest.raises(ValueError, match="seed 1, not 2"):
            Trainer(Settings(tmp_path, seed=2), TOKENIZER)

    def test_script_trains_saves_and_verifies(self, tmp_path: Path) -> None:
        work, out = tmp_path / "work", tmp_path / "out"
        # A process of its own: the script sets environment variables and a signal handler.
        script = [sys.executable, "-m", "pikv_hf.eval.training.train", "--steps-scale", "0"]
        subprocess.run([*script, "--work-dir", work, "--out", out], cwd=tmp_path, check=True, capture_output=True)
        verify_digest(out)
        record = json.loads((out / "training.json").read_text())
        assert record["stage_ends"] == [1, 2, 3, 4, 5]
        assert {file.name for file in out.iterdir()} >= {"config.json", "tokenizer.json", "generation_config.json"}


class TestExpertLoad:
    def test_entropy_share(self) -> None:
        assert entropy_share(torch.tensor([5, 5, 5, 5])) == pytest.approx(1.0)
        assert entropy_share(torch.tensor([9, 0, 0, 0])) == 0.0

    def test_every_token_counts_twice_per_layer(self) -> None:
        model = build_model(TOKENIZER, 0)
        with torch.no_grad(), count_expert_loads(model) as loads:
            model(torch.full((2, 5), 7))
        assert [int(load.sum()) for load in loads] == [2 * 5 * 2] * 4


class TestShippedCheckpoint:
    def test_digest_matches_everywhere(self) -> None:
        folder = reference_model_path()
        verify_digest(folder)
        digest = (folder / "SHA256SUMS").read_text().split()[0]
        assert json.loads((folder / "accuracy.json").read_text())["checkpoint_sha256"] == digest
        assert digest in (folder / "README.md").read_text()

    def test_another_checkpoint_is_refused_with_both_digests(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(b"one")
        write_digest(tmp_path)
        recorded = (tmp_path / "SHA256SUMS").read_text().split()[0]
        (tmp_path / "model.safetensors").write_bytes(b"other")
        write_digest(other := Path(shutil.copytree(tmp_path, tmp_path / "other")))
        found = (other / "SHA256SUMS").read_text().split()[0]
        with pytest.raises(ValueError, match=f"{found}, but SHA256SUMS records {recorded}"):
            verify_digest(tmp_path)

    def test_is_small(self) -> None:
        files = {file.name: file.stat().st_size for file in reference_model_path().iterdir()}
        assert files["model.safetensors"] < 16e6
        assert sum(files.values()) - files["model.safetensors"] < 1e5

    def test_tokenizer_is_the_built_one(self) -> None:
        _, tokenizer = load_reference_model()
        assert tokenizer.get_vocab() == vocabulary()
        assert tokenizer("The sky is blue.\n")["input_ids"] == TOKENIZER("The sky is blue.\n")["input_ids"]
        assert tokenizer.padding_side == "left"

    def test_kv_cache_takes_4096_bytes_per_token(self) -> None:
        model, _ = load_reference_model()
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.full((1, 10), 7), past_key_values=cache)
        size = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
        assert size == 10 * 4096

    def test_loads_in_another_dtype_and_attention(self) -> None:
        model, _ = load_reference_model(torch.bfloat16, "eager")
        assert model.dtype == torch.bfloat16
        assert model.config._attn_implementation == "eager"

    @pytest.mark.parametrize(("task", "haystack"), [("single", "noise"), ("single", "essay"), ("multikey", "essay")])
    def test_finds_needles_at_512(self, task: str, haystack: str) -> None:
        model, tokenizer = load_reference_model()
        samples = evaluation_samples(task, haystack, 512, 6, seed=1)
        assert measure(model, tokenizer, samples, 512).exact_match == 1.0

    def test_batched_answers_equal_single_ones(self) -> None:
        model, tokenizer = load_reference_model()
        samples = [evaluation_samples("multiquery", "essay", length, 1, seed=2)[0] for length in (256, 320, 384)]
        batched = answer(model, tokenizer, samples)
        assert [output.split(".")[0] for output in batched] == [
            answer(model, tokenizer, [sample])[0].split(".")[0] for sample in samples
        ]

    def test_experts_are_balanced(self) -> None:
        model, tokenizer = load_reference_model()
        shares = expert_balance(model, tokenizer, evaluation_samples("multikey", "essay", 512, 4, seed=3))
        assert min(shares) > 0.8

    def test_card_is_what_the_recorded_figures_say(self, tmp_path: Path) -> None:
        shutil.copytree(reference_model_path(), tmp_path / "model")
        (tmp_path / "model" / "README.md").unlink()
        write_model_card(tmp_path / "model")
        card = (tmp_path / "model" / "README.md").read_text()
        assert card == (reference_model_path() / "README.md").read_text()
        assert accuracy_table(json.loads((reference_model_path() / "accuracy.json").read_text())["accuracy"]) in card
