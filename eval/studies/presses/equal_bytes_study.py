"""Presses at equal bytes on a pretrained model: many presses, budgets and samples, in parts that go on.

Each prompt is read once for all presses of kvpress, and their answers are written in batches; without that nine presses
at five budgets take two cores twelve hours for 120 samples. What is measured is kept sample by sample in a folder, and
not measured again; results are made of all that is kept there.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pikv_hf.eval.provenance import package_version
from pikv_hf.eval.real_model.load import REAL_MODELS
from pikv_hf.eval.runner.models import load_model
from pikv_hf.eval.runner.options import EvalOptions
from pikv_hf.eval.runner.protocol import Asker
from pikv_hf.eval.runner.quiet import quiet_transformers, warn_once
from pikv_hf.eval.runner.suites import build_set
from pikv_hf.eval.studies.kept_rows import keep, kept
from pikv_hf.eval.studies.presses.equal_bytes_rows import SUFFIX, write_results
from pikv_hf.eval.studies.presses.equal_bytes_sample import FULL, INT4, Method, Row, SampleRunner, check
from pikv_hf.eval.tasks.sample import EvalSample
from pikv_hf.presses.joint_press import JointPress

#: Of RULER's tasks those that SmolLM2-135M answers with all of its cache.
TASKS = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
SHARES = (0.5, 0.25, 0.125, 0.0625, 0.025)
#: kvpress's presses that need no training and no download, by themselves and around the scores they are used with.
PRESSES = (
    "KVzipPress",
    "KVzipPress(kvzip_plus_normalization=True)",
    "KVgradPress",
    "KVComposePress",
    "KeyDiffPress",
    "ExpectedAttentionPress",
    "SnapKVPress",
    "TOVAPress",
    "KnormPress",
    "StreamingLLMPress",
    "RandomPress",
    "PyramidKVPress",
    "LagKVPress",
    "CURPress",
    "CapPress",
    "LeverageScorePress",
    "NonCausalAttnPress",
    "CompactorPress",
    "AdaKVPress(SnapKVPress)",
    "AdaKVPress(ExpectedAttentionPress)",
    "AdaKVPress(KeyDiffPress)",
    "AdaKVPress(CompactorPress)",
    "CriticalKVPress(SnapKVPress)",
    "CriticalKVPress(ExpectedAttentionPress(use_vnorm=False))",
    "CriticalKVPress(KeyDiffPress)",
    "CriticalAdaKVPress(SnapKVPress)",
    "CriticalAdaKVPress(ExpectedAttentionPress(use_vnorm=False))",
    "CriticalAdaKVPress(KeyDiffPress)",
    "ChunkKVPress(SnapKVPress)",
    "ChunkPress(SnapKVPress, chunk_length=256)",
    "BlockPress(KeyDiffPress)",
    "KeyRerotationPress(KeyDiffPress)",
    "MergingPress(KeyDiffPress)",
    "EntropyGatedChunkKVPress(SnapKVPress)",
)
#: The others that kvpress 0.5.5 exports, and why they are not here.
LEFT_OUT = {
    "FastKVzipPress": "trained gates, a download, and none for this model",
    "KVzapPress": "a trained scorer, a download, and none for this model",
    "LUKVPress": "budget curves, a download, and none for this model",
    "RestoreKVPress": "a trained adapter, a download, and none for this model",
    "QFilterPress": "filters, a download, and none for this model",
    "ExpectedAttentionStatsPress": "statistics, a download, and none for this model",
    "DuoAttentionPress": "head patterns, a download, and none for this model",
    "DMSPress": "a threshold for its scores instead of a budget",
    "SimLayerKVPress": "a threshold for its layers instead of a budget",
    "PerLayerCompressionPress": "a ratio for each layer has to be given",
    "FinchPress": "needs the question, behind a token that parts it from the context",
    "ObservedAttentionPress": "needs eager attention over the whole prompt",
    "ThinKPress": "zeroes channels of keys and frees none",
    "ComposedPress": "a sequence of others",
    "DecodingPress, CAMPress, CompressionRatioDecodingPress, PrefillDecodingPress": "act while answers are written",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """What scores of one file of parts have in common."""

    model: str
    dtype: str
    length: int
    query_aware: bool
    seed: int

    def file(self, folder: Path) -> Path:
        """Return where its parts are kept."""
        question = "aware" if self.query_aware else "unseen"
        return folder / f"{Path(self.model).name}-{self.dtype}-{self.length}-{question}-{self.seed}{SUFFIX}"


def version_of(method: Method, own: str) -> str:
    """Return what rows of a method are kept under: those of another version are measured anew."""
    is_own = method.name == INT4 or isinstance(method.press(), JointPress)
    return own if is_own else f"kvpress {package_version('kvpress')}"


def measure(
    runner: SampleRunner, samples: Sequence[EvalSample], methods: Sequence[Method], own: str, file: Path
) -> Iterator[list[Row]]:
    """Yield the rows of each sample that has methods left to measure, and append them to the file."""
    versions = {method: version_of(method, own) for method in methods}
    known = {(row["press"], row["share"], row["version"], row["id"]) for row in kept(file)}
    for sample in samples:
        left = [each for each in methods if (each.name, each.share, versions[each], sample.id) not in known]
        if not left:
            continue
        rows = [row | {"version": versions[Method(row["press"], row["share"])]} for row in runner.measure(sample, left)]
        keep(file, rows)
        yield rows


def ordered(samples: Sequence[EvalSample], per_task: int) -> list[EvalSample]:
    """Return one sample of each task, then a second one, so that what was stopped has about as many of all."""
    return [samples[first] for index in range(per_task) for first in range(index, len(samples), per_task)]


def methods_of(names: Sequence[str], shares: Sequence[float]) -> list[Method]:
    """Return every press at every share, and caches without a press once."""
    return [Method(name, share) for name in names for share in ((1.0,) if name in (FULL, INT4) else shares)]


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, then write what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as of pikv eval")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=0, help="per task; 0 only writes what is there")
    parser.add_argument("--tasks", nargs="+", help="of RULER; by default those that the model can do")
    parser.add_argument("--presses", nargs="+", default=PRESSES, help=f"presses, {FULL!r} or {INT4!r}")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the bytes in bf16")
    parser.add_argument("--query-aware", action="store_true", help="presses see the question")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--version", default="1", help="of this project's presses: another one is measured anew")
    parser.add_argument("--parts", type=Path, required=True, help="folder to keep samples in")
    parser.add_argument("--output", type=Path, help="file for the results of all parts in the folder")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False)
    warn_once()
    methods = methods_of(arguments.presses, arguments.shares)
    check(methods)
    if arguments.samples:
        given = arguments.model, arguments.dtype, arguments.length, arguments.query_aware, arguments.seed
        _measure(Setting(*given), arguments, methods, console)
    if arguments.output is not None:
        write_results(arguments.parts, arguments.output, arguments.version, LEFT_OUT)


def _measure(setting: Setting, arguments: Any, methods: Sequence[Method], console: Console) -> None:
    tasks = arguments.tasks or (TASKS if setting.model in REAL_MODELS else ())
    options = EvalOptions(
        suite="ruler",
        model=setting.model,
        length=setting.length,
        samples=arguments.samples,
        tasks=tuple(tasks),
        seed=setting.seed,
    )
    with quiet_transformers():
        asker = Asker(*load_model(setting.model, setting.dtype))
        drawn = build_set(options, asker.model, asker.tokenizer)
        runner = SampleRunner(asker, drawn.score, query_aware=setting.query_aware)
        samples = ordered(drawn.samples, arguments.samples)
        for rows in measure(runner, samples, methods, arguments.version, setting.file(arguments.parts)):
            scores = [row["score"] for row in rows if "score" in row]
            mean = sum(scores) / max(1, len(scores))
            console.print(f"{rows[0]['id']}: {len(rows)} rows, mean score {mean:.3f}", soft_wrap=True)


if __name__ == "__main__":
    main()
