"""What the code of latent attention tells: whether it expands latents to keys and values before it caches these.

Up to transformers 5.15 DeepSeek's attention does, and those that are copies of it. What it then hands to a cache is
known to come of the input of one projection, and of a rotary key that all heads share.
"""

import ast
import copy
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

#: The projection that expands latents, as all of these modules call it.
PROJECTION = "kv_b_proj"

_SPLIT = "torch.split({expanded}, [self.qk_nope_head_dim, self.v_head_dim], dim=-1)"
_KEYS = "torch.cat(({split}[0], {rotary}.expand(*{split}[0].shape[:-1], -1)), dim=-1)"
_ONE_HEAD = ", 1, hidden_states.shape[:-1][1], self.qk_rope_head_dim)"


@functools.cache
def caches_expanded_latents(kind: type[nn.Module]) -> bool:
    """Return whether a class of attention hands a cache what its projection makes of latents, and one rotary key.

    Read from the source of its `forward`, whatever it calls its variables: the keys and values of an update are the
    halves of the projection's output, and the keys have behind them a rotary key that is the same in all heads.
    """
    if (update := _update_of(kind)) is None or len(update.args) < 2:
        return False
    keys, values = update.args[:2]
    projections = {ast.unparse(node): node for node in ast.walk(values) if _is_projection(node)}
    if len(projections) != 1:
        return False
    expanded = ast.unparse(values).removesuffix("[1]")
    (projected,) = projections
    halves = "(hidden_states.shape[:-1][0], hidden_states.shape[:-1][1], -1, self.qk_nope_head_dim + self.v_head_dim)"
    split = _SPLIT.format(expanded=f"{projected}.view({halves}).transpose(1, 2)")
    rotary = _expanded_rotary(keys)
    return rotary is not None and expanded == split and ast.unparse(keys) == _KEYS.format(split=split, rotary=rotary)


def _is_projection(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{PROJECTION}"


def _expanded_rotary(keys: ast.expr) -> str | None:
    """Return what the keys of an update have behind their halves, before it is repeated for all heads."""
    if not isinstance(keys, ast.Call) or not keys.args or not isinstance(keys.args[0], ast.Tuple):
        return None
    last = keys.args[0].elts[-1]
    if not isinstance(last, ast.Call) or not isinstance(last.func, ast.Attribute):
        return None
    rotary = ast.unparse(last.func.value)
    return rotary if _ONE_HEAD in rotary else None


def _update_of(kind: type[nn.Module]) -> ast.Call | None:
    """Return the call by which an attention updates a cache, in terms of what its `forward` is called with."""
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    assert isinstance(parsed, ast.FunctionDef)
    known: dict[str, ast.expr] = {}
    for statement in parsed.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update":
                updated: ast.Call = _in_terms_of(node, known)
                return updated
        _follow(statement, known)
    return None


def _follow(statement: ast.stmt, known: dict[str, ast.expr]) -> None:
    """Note what a statement assigns to variables, in terms of what `forward` is called with."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        value, target = _in_terms_of(statement.value, known), statement.targets[0]
        if isinstance(target, ast.Name):
            known[target.id] = value
        elif isinstance(target, ast.Tuple):
            for place, variable in enumerate(target.elts):
                known[ast.unparse(variable)] = ast.Subscript(value, ast.Constant(place), ast.Load())
    elif isinstance(statement, ast.If):
        branches = dict(known), dict(known)
        for branch, body in zip(branches, (statement.body, statement.orelse), strict=True):
            for each in body:
                _follow(each, branch)
        for name in branches[0].keys() & branches[1].keys():
            one, other = (branch[name] for branch in branches)
            alike = ast.dump(one) == ast.dump(other)
            known[name] = one if alike else ast.Call(ast.Name("either", ast.Load()), [one, other], [])


def _in_terms_of(node: Any, known: dict[str, ast.expr]) -> Any:
    """Return a copy of an expression with variables replaced by what they were assigned."""

    class Replace(ast.NodeTransformer):
        def visit_Name(self, name: ast.Name) -> ast.expr:
            return copy.deepcopy(known.get(name.id, name))

    return Replace().visit(copy.deepcopy(node))
