"""What `pikv demo` does: one text, several questions, and what each cache answers, holds and costs.

It may import the runner and the reference model of :mod:`pikv_hf.eval`, the presses and everything of the core; of the
rest of the evaluation, only the command line and the studies import it. A
:class:`~pikv_hf.eval.demo.options.DemoOptions` comes in, a :class:`~pikv_hf.eval.demo.result.DemoResult` goes out,
which :mod:`pikv_hf.eval.demo.view` shows as tables or JSON.
"""
