"""Recording the routing of a run: the primary expert of every token that a model reads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.demo.caches import CacheKind
from pikv_hf.eval.demo.task import DemoTask
from pikv_hf.eval.errors import InputError
from pikv_hf.integration.expert_router import ExpertRouter
from pikv_hf.planning.simulate.routing_trace import RoutingTrace


class Recorder:
    """Keeps what routers choose.

    Parameters
    ----------
    routers : dict of int to ExpertRouter
        By model layer.
    """

    def __init__(self, routers: dict[int, ExpertRouter]) -> None:
        self._routers = dict(sorted(routers.items()))
        self._chosen: dict[int, list[torch.Tensor]] = {layer: [] for layer in self._routers}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record every forward pass until the block ends."""
        handles = [router.listen(self._chosen[layer].append) for layer, router in self._routers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def trace(self, model: str, prompt_tokens: int) -> RoutingTrace:
        """Return what was recorded.

        Raises
        ------
        InputError
            If no layer has a router, or they have different numbers of experts.
        """
        counts = {router.num_experts for router in self._routers.values()}
        if len(counts) != 1:
            found = f"routers of {sorted(counts)} experts" if counts else "no router"
            raise InputError(f"a trace needs routers with the same number of experts, {model} has {found}")
        rows = torch.stack([torch.cat(chosen).cpu() for chosen in self._chosen.values()])
        return RoutingTrace(rows.numpy(), counts.pop(), tuple(self._routers), model, prompt_tokens)


@torch.no_grad()
def record_trace(
    task: DemoTask, kind: CacheKind, routers: dict[int, ExpertRouter], max_new_tokens: int
) -> RoutingTrace:
    """Do once more what a cache is measured on, and return the routing: the context, then each question and answer.

    Recording apart from measuring keeps the measured times those of the cache alone.

    Parameters
    ----------
    task : DemoTask
        Model, context and questions.
    kind : CacheKind
        The cache; the model is attached if it needs that.
    routers : dict of int to ExpertRouter
        Of the model, see :attr:`pikv_hf.integration.attachment.Attachment.expert_routers`.
    max_new_tokens : int
        Limit of each answer.

    Raises
    ------
    InputError
        See :meth:`Recorder.trace`.
    """
    recorder = Recorder(routers)
    with recorder.listening():
        context = kind.make()
        task.model(input_ids=task.context, **cache_argument(context), logits_to_keep=1)
        for prompt in task.prompts:
            ids = torch.cat([task.context, prompt.ids], dim=1)
            task.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **cache_argument(kind.copy(context)),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=task.pad_token_id,
            )
    return recorder.trace(task.name, task.context.shape[1])
