"""What a mutant is: one small change of one line of a module, made on its text.

Only what a run does is changed. Annotations, docstrings, messages and what only people read (`say`, loggers, phases of
the heartbeat) are left alone: tests need not hold their words.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}  # fmt: skip

# Names that are easily taken for each other, and both of which are often there.
CONFUSED = (
    ("height", "width"), ("heights", "widths"), ("min", "max"), ("first", "last"), ("sizes", "orig_sizes"),
    ("train", "val"), ("top", "left"), ("lr", "lr_backbone"), ("size", "max_size"), ("mean", "std"),
    ("rank", "world_size"), ("image_ids", "positions"), ("labels", "category_ids"), ("best", "latest"),
    ("padded_pixels", "image_pixels"), ("forward", "backward"), ("start", "stop"), ("epochs", "max_steps"),
    ("steps_per_epoch", "total_steps"), ("train_loader", "evaluation_loader"), ("crop_min", "crop_max"),
)  # fmt: skip
OTHER_NAME = {a: b for pair in CONFUSED for a, b in (pair, pair[::-1])}
# Whole expressions that are taken for each other at the seams.
OTHER_EXPRESSION = {
    "self.ema.module": "self.model",
    "self.model.state_dict()": "self.ema.module.state_dict()",
    "batch.mask": "None",
    "checkpoint['ema']": "checkpoint['model']",
    "outputs": "outputs['aux_outputs'][0]",
}

_ONLY_FOR_PEOPLE = re.compile(
    r"\b(say|_say|tell|enter|debug|info|warning|error|warn|write_line|flush|fail|_fail|progress|pace)$"
)
_CONFIG_KEY = re.compile(r"\b(?:config|data|train|augment|model|optim|eval|loss|run|tracking)\.([a-z_]+)$")


@dataclass(frozen=True, order=True)
class Mutant:
    """One change.

    Attributes:
        path: the module, relative to the project's root.
        line: where, from 1.
        start: first byte that is replaced.
        end: the byte after the last one.
        replacement: what stands there instead.
        change: what is changed, for people.
        first: first line of the statement that it is in.
        last: its last line; of one that holds others, the last before them.
        at_import: whether the statement runs when the module is imported.
    """

    path: str
    line: int
    start: int
    end: int
    replacement: str
    change: str
    first: int
    last: int
    at_import: bool

    def apply(self, source: bytes) -> bytes:
        """The module with the change."""
        return source[: self.start] + self.replacement.encode() + source[self.end :]

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.change}"


def mutants_of(path: str, source: bytes, defaults: dict[str, Any]) -> list[Mutant]:
    """All mutants of a module that can be parsed, each once, in the order of the lines.

    Args:
        path: the module, relative to the project's root.
        source: its text.
        defaults: name of a configuration key without its sections -> default, where all keys of that name agree.
    """
    finder = _Finder(path, source, defaults)
    finder.visit(ast.parse(source))
    found = {}
    for mutant in sorted(finder.found):
        try:
            ast.parse(mutant.apply(source))
        except SyntaxError:
            continue
        found.setdefault((mutant.start, mutant.end, mutant.replacement), mutant)
    return list(found.values())


class _Finder(ast.NodeVisitor):
    """Walks what runs and notes the changes."""

    def __init__(self, path: str, source: bytes, defaults: dict[str, Any]) -> None:
        self.path, self.source, self.defaults = path, source, defaults
        self.found: list[Mutant] = []
        self.function_depth = 0
        self.statement = (1, 1)
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    # Where to look

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            inner = getattr(node, "body", None)
            last = inner[0].lineno - 1 if inner else node.end_lineno
            self.statement = (node.lineno, max(node.lineno, last or 0))
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)):
            self.visit(default)
        self.function_depth += 1
        for statement in node.body:
            self.visit(statement)
        self.function_depth -= 1

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Whether it is raised matters; its words do not."""
        self._replace(node, "pass", "does not raise")

    def visit_Assert(self, node: ast.Assert) -> None:
        """What asserts say holds by construction."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """A text for people or a file's name: not worth a mutant a number."""

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        if not _is_annotation(node) and not isinstance(node.slice, ast.Constant | ast.Tuple):
            self.visit(node.slice)

    # What to change

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            return
        self._negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            other = COMPARISONS[type(node.ops[0])]()
            self._swap(node, ast.Compare(node.left, [other], node.comparators))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
            return
        if type(node.op) in ARITHMETIC:
            self._swap(node, ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        self._swap(node, ast.BoolOp(other, node.values))
        for value in node.values:
            rest = [other for other in node.values if other is not value]
            self._swap(node, rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub | ast.Invert):
            self._swap(node, node.operand)
        if not isinstance(node.operand, ast.Constant):
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace(node, str(not node.value), f"{node.value} -> {not node.value}")
        elif isinstance(node.value, int):
            self._replace(node, str(node.value + 1), f"{node.value} -> {node.value + 1}")
        elif isinstance(node.value, float):
            self._replace(node, repr(node.value * 2 + 0.5), f"{node.value} -> {node.value * 2 + 0.5}")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        if isinstance(node.value, ast.Call):
            name = ast.unparse(node.value.func)
            if _ONLY_FOR_PEOPLE.search(name):
                return
            self._replace(node, "pass", f"dropped {_short(node)}")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._replace(node, "pass", f"dropped {_short(node)}")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(isinstance(target, ast.Subscript | ast.Attribute) for target in node.targets):
            self._replace(node, "pass", f"dropped {_short(node)}")
        self.visit(node.value)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self._replace(node, "return None", f"{_short(node)} -> return None")
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        if _ONLY_FOR_PEOPLE.search(name):
            return
        if name.rpartition(".")[2] in ("transpose", "permute", "view", "reshape", "unbind"):
            return self.visit(node.func)  # other axes only crash
        for place, (one, next_one) in enumerate(pairwise(node.args)):
            if isinstance(one, ast.Name | ast.Attribute) and isinstance(next_one, ast.Name | ast.Attribute):
                swapped = [*node.args[:place], next_one, one, *node.args[place + 2 :]]
                change = f"{name}(...) with {_short(one)} and {_short(next_one)} swapped"
                self._swap(node, ast.Call(node.func, swapped, node.keywords), change)
        for keyword in node.keywords:
            rest = [other for other in node.keywords if other is not keyword]
            if keyword.arg not in (None, "daemon", "name", "help", "metavar", "strict"):
                change = f"{name}(...) without {keyword.arg}={_short(keyword.value)}"
                self._swap(node, ast.Call(node.func, node.args, rest), change)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id in OTHER_NAME:
            self._replace(node, OTHER_NAME[node.id], f"{node.id} -> {OTHER_NAME[node.id]}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if not isinstance(node.ctx, ast.Load):
            return
        text = ast.unparse(node)
        if text in OTHER_EXPRESSION:
            self._replace(node, OTHER_EXPRESSION[text], f"{text} -> {OTHER_EXPRESSION[text]}")
        key = _CONFIG_KEY.search(text)
        if key and key[1] in self.defaults:
            default = self.defaults[key[1]]
            self._replace(node, repr(default), f"{text} -> its default {default!r}")
        elif node.attr in OTHER_NAME:
            other = OTHER_NAME[node.attr]
            self._swap(node, ast.Attribute(node.value, other, node.ctx), f"{text} -> .{other}")
        self.visit(node.value)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "strict":
            self.visit(node.value)

    # How it is noted

    def _negate(self, test: ast.expr) -> None:
        if not isinstance(test, ast.Compare | ast.UnaryOp):
            self._replace(test, f"(not ({self._text(test)}))", f"negated {_short(test)}")

    def _swap(self, node: ast.expr, other: ast.expr, change: str = "") -> None:
        text = ast.unparse(ast.fix_missing_locations(other))
        replacement = f"({text})" if isinstance(node, ast.Compare | ast.BinOp | ast.BoolOp | ast.UnaryOp) else text
        self._replace(node, replacement, change or f"{_short(node)} -> {_short(other)}")

    def _replace(self, node: ast.stmt | ast.expr, replacement: str, change: str) -> None:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[node.end_lineno - 1] + node.end_col_offset
        where = (*self.statement, self.function_depth == 0)
        self.found.append(Mutant(self.path, node.lineno, start, end, replacement, change, *where))

    def _text(self, node: ast.expr) -> str:
        return ast.get_source_segment(self.source.decode(), node) or ast.unparse(node)


def _is_annotation(node: ast.Subscript) -> bool:
    """Whether a subscript is a type such as ``list[int]``."""
    return isinstance(node.value, ast.Name) and node.value.id in (
        "list",
        "dict",
        "tuple",
        "set",
        "Callable",
        "Iterator",
    )


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else f"{text[:60]} ... {text[-25:]}"
