"""The demo: one context read once and several questions, answered with `DynamicCache` and three `PiKVCache`s."""

import dataclasses

import torch
import transformers

import pikv_hf
from pikv_hf import attach
from pikv_hf.eval.demo.caches import CacheKind, dynamic_cache, int4_cache, make_pikv, pikv_cache, pressed_cache
from pikv_hf.eval.demo.measure import Measurement, Run, first_difference, largest_difference, measure
from pikv_hf.eval.demo.options import DemoOptions
from pikv_hf.eval.demo.result import DemoResult, Disagreement
from pikv_hf.eval.demo.routing_recorder import record_trace
from pikv_hf.eval.demo.task import DemoTask, build_task
from pikv_hf.eval.demo.token_spread import token_spread
from pikv_hf.eval.errors import user_input
from pikv_hf.eval.runner.quiet import quiet_transformers
from pikv_hf.eval.runner.refusals import refusals
from pikv_hf.integration.expert_router import ExpertRouter
from pikv_hf.integration.model_modules import find_expert_routers
from pikv_hf.planning.simulate.routing_trace import save_trace


def run_demo(options: DemoOptions) -> DemoResult:
    """Answer the questions with every cache and compare them.

    Raises
    ------
    InputError
        If something the user gave is missing, unknown or does not fit; see :func:`build_task`.
    """
    torch.set_num_threads(options.threads)
    with quiet_transformers():
        task = build_task(options)
        placement = options.pikv.placement or ("expert" if find_expert_routers(task.model) else "hash")
        options = dataclasses.replace(options, pikv=dataclasses.replace(options.pikv, placement=placement))
        _check_supported(task, options)
        # Before attaching: the baseline is the model as it is loaded, with transformers' own attention.
        with refusals(f"cannot run {task.name} with DynamicCache"):
            dynamic = measure(task, dynamic_cache(task.model), options.max_new_tokens)
        with attach(task.model, placement) as attached:
            kind = pikv_cache(task.model, options.pikv, options.cache_devices)
            pikv = measure(task, kind, options.max_new_tokens)
            _save_trace(task, kind, attached.expert_routers, options)
            int4 = measure(task, int4_cache(task.model, options.pikv, options.cache_devices), options.max_new_tokens)
            press, missing = _measure_pressed(task, options)
    return DemoResult(
        model=task.name,
        model_type=task.model.config.model_type,
        dtype=str(task.model.dtype).removeprefix("torch."),
        device=str(task.context.device),
        parameters=task.model.num_parameters(),
        options=options,
        versions=versions(),
        context_tokens=task.context.shape[1],
        questions=tuple(prompt.question for prompt in task.prompts),
        subjects=tuple(prompt.subject for prompt in task.prompts),
        expected=tuple(None if prompt.sample is None else prompt.sample.answer for prompt in task.prompts),
        dynamic=dynamic.measurement,
        pikv=pikv.measurement,
        int4=int4.measurement,
        press=press,
        press_missing=missing,
        logit_difference=largest_difference(pikv, dynamic),
        disagreements=_disagreements(pikv, dynamic),
        spread=tuple(token_spread(pikv.context)),
        per_device=pikv.context.memory_report().per_device,
        stats=pikv.context.stats(),
    )


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {"pikv_hf": pikv_hf.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _check_supported(task: DemoTask, options: DemoOptions) -> None:
    """Refuse a model that PiKV cannot serve before the baseline takes its time."""
    with user_input(f"cannot use {task.name} with PiKVCache"), attach(task.model, options.pikv.placement or "expert"):
        make_pikv(task.model, options.pikv, options.cache_devices)


def _save_trace(task: DemoTask, kind: CacheKind, routers: dict[int, ExpertRouter], options: DemoOptions) -> None:
    """Write the routing of the exact cache's run where the options want it."""
    if options.record_trace is not None:
        trace = record_trace(task, kind, routers, options.max_new_tokens)
        with user_input(f"cannot write --record-trace {options.record_trace}"):
            save_trace(trace, options.record_trace)


def _measure_pressed(task: DemoTask, options: DemoOptions) -> tuple[Measurement | None, str | None]:
    """Measure PiKVPress, or say why the model is not for it."""
    try:
        kind = pressed_cache(task.model, options.pikv, options.cache_devices)
        return measure(task, kind, options.max_new_tokens).measurement, None
    except ValueError as error:
        return None, str(error)


def _disagreements(pikv: Run, dynamic: Run) -> tuple[Disagreement, ...]:
    pairs = zip(pikv.measurement.answers, dynamic.measurement.answers, strict=True)
    parted = [(question, first_difference(ours, theirs)) for question, (ours, theirs) in enumerate(pairs)]
    return tuple(Disagreement(question, token) for question, token in parted if token is not None)
