"""Parts of another library, unchanged, that can be called alone: statements of a long function, or some definitions of a
module whose imports need a cluster.

TRL's trainers have all of PPO in one method each. The code that is timed must be theirs, not a copy.
"""

import __future__

import ast
import inspect
import textwrap
import types


def excerpt(function, first, last, *, inputs, outputs):
    """A function of `inputs` (names) that runs the statements of `function` from the one that starts with the text
    `first` to the one that starts with `last`, both in the same block, and returns a tuple of `outputs` (names)."""
    source = textwrap.dedent(inspect.getsource(function))
    chosen = _statements(ast.parse(source), source, first, last)
    if chosen is None:
        raise LookupError(f"{function.__qualname__} has no statements from {first!r} to {last!r}")
    header = f"def {function.__name__}_excerpt({', '.join(inputs)}): return ({', '.join(outputs)},)"
    module = ast.parse(header)
    module.body[0].body[:0] = chosen
    scope = dict(function.__globals__)
    exec(compile(ast.fix_missing_locations(module), inspect.getsourcefile(function) or "<excerpt>", "exec"), scope)
    return scope[f"{function.__name__}_excerpt"]


def definitions(source, names, **scope):
    """The functions and classes of these names in the text of a module, without their decorators. `scope`: what they find
    in the module instead of its imports."""
    chosen = [node for node in ast.parse(source).body if getattr(node, "name", None) in names]
    missing = set(names) - {node.name for node in chosen}
    if missing:
        raise LookupError(f"the module has no {', '.join(sorted(missing))}")
    for node in chosen:
        node.decorator_list = []
    module = ast.Module(chosen, [])
    flags = __future__.annotations.compiler_flag  # annotations may name what is not imported
    exec(compile(module, "<definitions>", "exec", flags=flags, dont_inherit=True), scope)
    return types.SimpleNamespace(**{name: scope[name] for name in names})


def _statements(tree, source, first, last):
    """The statements from `first` to `last` of the first block that has both; None if no block has."""
    for node in ast.walk(tree):
        for block in (getattr(node, name, None) for name in ("body", "orelse")):
            if not isinstance(block, list):
                continue
            texts = [ast.get_source_segment(source, statement) or "" for statement in block]
            starts = [i for i, text in enumerate(texts) if text.startswith(first)]
            ends = [i for i, text in enumerate(texts) if text.startswith(last)]
            if starts and ends and starts[0] <= ends[-1]:
                return block[starts[0] : ends[-1] + 1]
    return None
