"""What the code of a module tells before it runs: whether it is an attention that PiKV's can stand in for.

In place, a layer of the cache hands an attention module the new K/V alone. That is right where the module passes them
on to transformers' attention interface, and wrong where it computes anything else from what it takes for the K/V of all
tokens, as sparse attention does that chooses tokens by them.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..common.transformers_release import CACHE_ARGUMENTS
from .attention_implementation import ATTENTION_NAME
from .call_arguments import KNOWN_ARGUMENTS
from .chosen_tokens import BLOCK_INDICES
from .latent_attention import EXPANSION

# What all attention functions have in common.
_COMMON = {"query", "key", "value", "attention_mask", "dropout", "scaling"}
_FUNCTION_NAMES = {"attention_interface", "attn_interface", "attention_function"}
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
#: By which an indexer hands its keys to the cache, or to its layer.
INDEXER_UPDATES = {"update_indexer", "update_index"}


def takes_cache(module: nn.Module) -> bool:
    """Return whether a module is handed the cache."""
    return any(name in inspect.signature(type(module).forward).parameters for name in CACHE_ARGUMENTS)


def running_code(module: nn.Module) -> Any:
    """Return what runs when a module is called: the code within wrappers that say what they wrap, as accelerate's do.

    It does not keep the module alive.
    """
    forward = module.forward
    if hasattr(forward, "__wrapped__"):
        forward = inspect.unwrap(forward)
    return getattr(forward, "__code__", type(forward))


def calls_interface(module: nn.Module) -> bool:
    """Return whether a module leaves its attention to transformers' attention interface."""
    return any(_INTERFACE in code.co_names for code in _forward_codes(type(module)))


def _forward_codes(kind: type) -> Iterator[Any]:
    """Yield the code of a module's `forward`, and of those that it calls by `super()`."""
    for parent in kind.__mro__:
        code = getattr(inspect.unwrap(vars(parent).get("forward", object)), "__code__", None)
        if code is not None:
            yield code
            if "super" not in code.co_names:
                return


def why_not_in_place(module: nn.Module) -> str | None:
    """Return what an attention module does with the cache or its K/V that needs those of all tokens; None if nothing.

    Code whose source is not there, and updates outside of `forward`, cannot be judged: None as well.
    """
    forward = _parsed_forward(type(module))
    return None if forward is None else _judge(forward)


def changes_cached_keys(kind: type[nn.Module]) -> bool:
    """Return whether an attention class changes the keys that the cache has returned before it attends to them.

    As JetMoE does, which repeats them: they do not lead to the cache's layer any more. Without source: False.
    """
    if (forward := _parsed_forward(kind)) is None:
        return False
    assigned = [node for node in ast.walk(forward) if isinstance(node, ast.Assign)]
    updates = [node for node in assigned if _is_update(node.value) and isinstance(node.targets[0], ast.Tuple)]
    keys = {name for node in updates for name in _names(node.targets[0].elts[0])}  # type: ignore[attr-defined]
    first = min((node.lineno for node in updates), default=0)
    return any(node.lineno > first and not _is_update(node.value) and keys & _targets(node) for node in assigned)


def only_indexes(kind: type[nn.Module]) -> bool:
    """Return whether a class of module has no other business with the cache than the keys of an indexer."""
    if (forward := _parsed_forward(kind)) is None:
        return False
    nodes = list(ast.walk(forward))
    calls = [node.func for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    updates = [func for func in calls if func.attr in INDEXER_UPDATES and any(map(_is_cache, ast.walk(func)))]
    named = [node for node in nodes if _is_cache(node) and isinstance(getattr(node, "ctx", None), ast.Load)]
    asked = [node for node in nodes if isinstance(node, ast.Compare) and _is_cache(node.left)]
    return len(updates) == 1 and len(named) == 1 + len(asked)


def _is_cache(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in CACHE_ARGUMENTS


class _WithPiKV(ast.NodeTransformer):
    """Leaves out what a module does with other attention, by the names that it asks for, and without positions.

    Models say the positions of all tokens; attention whose tokens a block's indexer chooses is refused without them.
    """

    def __init__(self, gets_positions: bool) -> None:
        self._gets_positions = gets_positions

    def visit_If(self, node: ast.If) -> Any:
        """Take the other branch of a question for the name of the attention that does not name PiKV's."""
        self.generic_visit(node)
        test = node.test
        if self._gets_positions and ast.unparse(test) == "position_ids is None":
            return node.orelse or ast.Pass(lineno=node.lineno, col_offset=0)
        asks = isinstance(test, ast.Compare) and isinstance(test.left, ast.Attribute)
        if not asks or test.left.attr != "_attn_implementation" or not isinstance(test.ops[0], ast.In):  # type: ignore[attr-defined]
            return node
        try:
            names = ast.literal_eval(test.comparators[0])  # type: ignore[attr-defined]
        except ValueError:
            return node
        return node if ATTENTION_NAME in names else node.orelse or ast.Pass(lineno=node.lineno, col_offset=0)


def _parsed_forward(kind: type[nn.Module]) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, TypeError):
        return None


def _judge(forward: ast.AST) -> str | None:
    chooses_blocks = any(BLOCK_INDICES in _keywords(node) for node in ast.walk(forward) if isinstance(node, ast.stmt))
    forward = _WithPiKV(chooses_blocks).visit(forward)
    if any(isinstance(node, ast.Attribute) and _is_layers_of_cache(node) for node in ast.walk(forward)):
        return "reads layers of the cache by itself"
    assigned = [node for node in ast.walk(forward) if isinstance(node, ast.Assign)]
    updates = [node for node in assigned if _is_update(node.value)]
    # What latents are expanded to is of the same tokens.
    held = {name for node in assigned if _is_update(node.value) or _is_expansion(node.value) for name in _targets(node)}
    after = max((node.lineno for node in updates), default=0)
    statements = [node for node in ast.walk(forward) if isinstance(node, ast.stmt) and node.lineno > after]
    outputs = {name for node in statements if _attention_calls(node) for name in _targets(node)}
    for node in statements:
        if unknown := sorted(_keywords(node) - KNOWN_ARGUMENTS - _COMMON):
            return f"calls its attention with {', '.join(unknown)}, which PiKV's does not know"
        if used := _computes_from(node, held, outputs):
            return f"computes `{ast.unparse(node)}` from {used}, which it takes for those of all tokens"
    return None


def _computes_from(node: ast.stmt, held: set[str], outputs: set[str]) -> str | None:
    """Return which of the names of K/V a statement computes anything from but other K/V and the attention itself."""
    if isinstance(node, (ast.If, ast.While)):
        expression: ast.AST | None = node.test
    elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr)):
        targets = _targets(node)
        expression = None if targets and targets <= held | outputs else node.value
    else:
        return None
    if expression is None or isinstance(expression, (ast.Name, ast.Tuple)):
        return None
    used = {x.id for x in ast.walk(expression) if isinstance(x, ast.Name)} & held
    return ", ".join(sorted(used)) or None


def _targets(node: ast.stmt) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {name for target in targets for name in _names(target)}


def _names(target: ast.AST | None) -> set[str]:
    if isinstance(target, ast.Name):
        return {target.id}
    if isinstance(target, (ast.Tuple, ast.List)):
        return {name for part in target.elts for name in _names(part)}
    return set()


def _is_layers_of_cache(node: ast.Attribute) -> bool:
    return node.attr == "layers" and _is_cache(node.value)


def _is_update(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update"


def _is_expansion(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == EXPANSION


def _keywords(node: ast.stmt) -> set[str]:
    return {each.arg for call in _attention_calls(node) for each in call.keywords if each.arg is not None}


def _attention_calls(node: ast.stmt) -> list[ast.Call]:
    """Return the calls of functions got from the interface, by the names that models have for these."""
    if not isinstance(node, (ast.Assign, ast.Return, ast.Expr)):
        return []
    calls = (x for x in ast.walk(node) if isinstance(x, ast.Call))
    return [call for call in calls if _names(call.func) & _FUNCTION_NAMES]
