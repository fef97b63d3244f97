"""``pikv chat``: a conversation in the terminal, of which no token is read twice."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pikv_hf.eval.errors import user_input
from pikv_hf.eval.runner.options import MOST_THREADS

if TYPE_CHECKING:
    from pikv_hf import ContextStore

HELP = "/forget [all]  /stats  /save FILE  /quit"


def chat(
    model: Annotated[str, typer.Option(help="Folder, Hub name, smollm2, smollm2-moe or reference.")] = "smollm2",
    store: Annotated[Path | None, typer.Option(help="Folder that keeps contexts; by default memory alone.")] = None,
    budget: Annotated[str | None, typer.Option(help="The most bytes in memory, such as 2GiB.")] = None,
    disk: Annotated[str | None, typer.Option(help="The most bytes in the folder.")] = None,
    codec: Annotated[str, typer.Option(help="Of keys and values.")] = "none",
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit of each answer.")] = 256,
    greedy: Annotated[bool, typer.Option(help="Always the likeliest token.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; by default as saved.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; by default a GPU if any.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = None,
) -> None:
    """Chat with a model; after each answer a line says what was read, what was known, and how long it took.

    A folder given by --store goes on where an earlier chat, or another
    process, has read the same.
    """
    with user_input("cannot chat"):
        import torch

        from pikv_hf import ContextStore
        from pikv_hf.eval.runner.caches import store_options
        from pikv_hf.eval.runner.models import load_model

        if threads is not None:
            torch.set_num_threads(threads)
        loaded, tokenizer = load_model(model, dtype, device)
        contexts = ContextStore(loaded, budget, path=store, disk=disk, **store_options(loaded, codec))
    talk = Conversation(contexts, tokenizer, system, {"max_new_tokens": max_new_tokens})
    if greedy:
        talk.settings["do_sample"] = False
    typer.echo(f"{model}. {HELP}")
    for line in _lines():
        if line == "/quit":
            break
        if line.startswith("/"):
            talk.command(line)
        elif line:
            talk.turn(line)


def _lines() -> Any:
    """Yield what the user types, until there is no more."""
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


class Conversation:
    """What has been said, and the store that knows what of it has been read.

    Parameters
    ----------
    store : ContextStore
        Of the model.
    tokenizer : PreTrainedTokenizerBase
        With a chat template, or else lines follow one another.
    system : str, optional
        The first message.
    settings : dict
        Arguments of `generate`.
    """

    def __init__(self, store: "ContextStore", tokenizer: Any, system: str | None, settings: dict[str, Any]) -> None:
        self.store, self.tokenizer, self.settings = store, tokenizer, settings
        self.messages: list[dict[str, str]] = []
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages += self._first

    def turn(self, said: str) -> None:
        """Answer, and say what that took."""
        self.messages.append({"role": "user", "content": said})
        ids = self._ids().to(self.store.model.device)
        before, shown = self.store.stats(), _Shown(self.tokenizer)
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        given = {"attention_mask": ids.new_ones(ids.shape), "pad_token_id": pad, "streamer": shown}
        output = self.store.generate(ids, **given, **self.settings)
        answer = self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        now = self.store.stats()
        reused, read = now.tokens_reused - before.tokens_reused, now.tokens_read - before.tokens_read
        typer.echo(
            f"[{reused:,} tokens reused, {read:,} read; first token after {shown.seconds:.2f} s; "
            f"{now.nbytes:,} bytes in memory, {now.file_bytes:,} in files]"
        )

    def _ids(self) -> Any:
        from pikv_hf.eval.runner.shared_contexts import message_ids

        return message_ids(self.tokenizer, self.messages)

    def command(self, line: str) -> None:
        """Do what a line with a slash says."""
        name, _, rest = line.partition(" ")
        if name == "/forget":
            if rest.strip() == "all":
                self.store.forget()
            elif self.messages:
                self.store.forget(self._ids())
            self.messages = list(self._first)
            typer.echo("[forgotten]")
        elif name == "/stats":
            typer.echo(str(self.store.stats()))
        elif name == "/save" and rest.strip():
            try:
                Path(rest.strip()).write_text(json.dumps(self.messages, indent=1), encoding="utf-8")
                typer.echo(f"[{len(self.messages)} messages written to {rest.strip()}]")
            except OSError as error:
                typer.echo(f"[cannot write {rest.strip()}: {error.strerror}]")
        else:
            typer.echo(f"[{line}: not known; {HELP}]")


class _Shown:
    """Prints an answer as it comes, and notes when it began; what `generate` takes as a streamer."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import TextStreamer

        self._text = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._begun, self.seconds, self._prompt_seen = time.perf_counter(), 0.0, False

    def put(self, value: Any) -> None:
        """Take the prompt, and then a token at a time."""
        if self._prompt_seen and not self.seconds:
            self.seconds = time.perf_counter() - self._begun
        self._prompt_seen = True
        self._text.put(value)

    def end(self) -> None:
        """Print what is left."""
        self._text.end()
