"""A Jinja environment for templates that nobody has read: bounded time, memory and output, in any thread.

Templates come with models, so they are other people's programs. `ImmutableSandboxedEnvironment` keeps them away from
Python's inside; what is added here is an account (`account.py`). Loops, macros and calls are counted by statements that
`_Meter` puts into the syntax tree; every operation that can make something large (`+ * % ** ~`, slices, filters,
methods, output) states the size of its result first, before anything is allocated. Operations that walk nested data
(comparison, `tojson`, conversion to text) are measured before they start, because a list of lists that share their
elements can be exponentially larger than its memory. No threads, no signals.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import _PassArg
from jinja2.visitor import NodeTransformer

from .account import FILTERS, METHODS, OPERATORS, Growth, braces, current, numbered, size_of, small

# Filters without a use in chats, whose results are hard to bound, or differ from call to call.
_WITHHELD = ("filesizeformat", "pprint", "random", "urlencode", "urlize", "wordwrap", "xmlattr")
# Filters that look at the outside of their value only, and tests that compare.
_SHALLOW = frozenset(
    (
        *("d", "default", "length", "count", "first", "last", "list", "items", "attr", "batch", "slice", "reverse"),
        *("map", "select", "selectattr", "reject", "rejectattr"),
    )
)
_COMPARING = frozenset(
    ("==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ne", "lt", "lessthan", "le", "gt", "greaterthan", "ge", "in")
)
_OF_LISTS = frozenset({"index", "count"})  # methods that compare elements


def _metered(name: str, function: Callable[..., Any], shallow: bool, growth: Growth | None) -> Callable[..., Any]:
    """A filter or test that accounts for what it reads and makes. Runs at render time only, never while compiling."""
    passed = _PassArg.from_obj(function)
    prefix: Callable[[Context], tuple[Any, ...]] = {
        _PassArg.context: lambda context: (context,),
        _PassArg.eval_context: lambda context: (context.eval_ctx,),
        _PassArg.environment: lambda context: (context.environment,),
        None: lambda context: (),
    }[passed]

    @pass_context
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        account = current()
        account.tick()
        if not shallow or growth is not None:
            value = _listed(value)
        if not shallow:
            small(value)
        values = numbered(args, kwargs, unlimited=growth is None and shallow)
        for argument in values.values():
            small(argument)
        if growth is not None:
            account.spend(growth(value, values), 4)
        result = function(*prefix(context), value, *args, **kwargs)
        if isinstance(result, str | list | tuple):
            account.spend(len(result), 4 if isinstance(result, str) else 32)
        return result

    return metered


def _spend(n: int) -> None:
    """At the start of the body of a loop or macro, and before text of the template itself."""
    current().spend(n, 4)


def _joined(*parts: Any) -> str:
    """The operator ~."""
    current().spend(sum(size_of(part) for part in parts), 4)
    return "".join(map(str, parts))


def _sliced(value: Any, start: Any, stop: Any, step: Any) -> Any:
    if isinstance(value, str | list | tuple):
        current().spend(len(range(*slice(start, stop, step).indices(len(value)))), 8)
    return value[start:stop:step]


def _listed(value: Any) -> Any:
    """What a filter such as `map` yields, as a list, so that it can be weighed."""
    return list(value) if isinstance(value, Iterator | KeysView | ValuesView | ItemsView | range) else value


class Generation(Extension):
    """`{% generation %}`: marks what the assistant wrote, for training; its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class Meter(Extension):
    """Not a tag: gives the syntax tree names for the functions of this module."""

    spend = staticmethod(_spend)
    joined = staticmethod(_joined)
    sliced = staticmethod(_sliced)
    small = staticmethod(small)


_METER_FUNCTIONS = (_spend, _joined, _sliced, small)


class _Meter(NodeTransformer):
    """Puts the account into a syntax tree."""

    def _call(self, name: str, *args: nodes.Expr, line: int) -> nodes.Call:
        call = nodes.Call(nodes.ExtensionAttribute(Meter.identifier, name), list(args), [], None, None)
        call.set_lineno(line)
        return call

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
            node.body.insert(0, self._spend(0, node.lineno))
        return node

    def _spend(self, n: int, line: int) -> nodes.Node:
        return nodes.ExprStmt(self._call("spend", nodes.Const(n), line=line)).set_lineno(line)

    def visit_Output(self, node: nodes.Output) -> Any:  # noqa: N802  names of Jinja's nodes
        self.generic_visit(node)
        n = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        return [self._spend(n, node.lineno), node] if n else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._call("joined", *node.nodes, line=node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            cut = (node.arg.start, node.arg.stop, node.arg.step)
            bounds = (part or nodes.Const(None) for part in cut)
            return self._call("sliced", node.node, *bounds, line=node.lineno)
        if not isinstance(node.arg, nodes.Const):
            node.arg = self._call("small", node.arg, line=node.lineno)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = self._call("small", node.key, line=node.lineno)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if sum(not isinstance(side, nodes.Const) for side in sides) > 1:
            node.expr = self._call("small", node.expr, line=node.lineno)
            for operand in node.ops:
                operand.expr = self._call("small", operand.expr, line=node.lineno)
        return node


@pass_context
def _finished(context: Context, value: Any) -> Any:
    """Every value that a template writes."""
    current().spend(size_of(value), 4)
    return value


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment, with transformers' settings and extensions."""

    intercepted_binops = frozenset(OPERATORS)

    def __init__(self, filters: Mapping[str, Any], names: Mapping[str, Any]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, Meter, loopcontrols],
            finalize=_finished,
            cache_size=0,
        )
        self.filters.update(filters)
        self.filters = {
            name: _metered(name, function, name in _SHALLOW, FILTERS.get(name))
            for name, function in self.filters.items()
            if name not in _WITHHELD
        }
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: _metered(name, test, name not in _COMPARING, None) for name, test in tests.items()}
        del self.globals["lipsum"]
        self.globals.update(names)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Meter().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        OPERATORS[operator](left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            braces(value.__self__, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return formatted

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if any(__obj is function for function in _METER_FUNCTIONS):
            return __obj(*args)
        account = current()
        account.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, bytes | bytearray | int | float):
            raise SecurityError(f"methods of {type(owner).__name__} are not for templates")
        if isinstance(owner, str | list | tuple | dict):
            name = __obj.__name__
            args = tuple(_listed(argument) for argument in args)
            values = numbered(args, kwargs)
            if name in ("translate", "encode", "maketrans"):
                raise SecurityError(f"the method {name!r} is not for templates")
            if name in _OF_LISTS:
                small(owner)
            for argument in values.values():
                small(argument)
            if isinstance(owner, str) and name in METHODS:
                account.spend(METHODS[name](owner, values), 4)
        elif not isinstance(__obj, Macro):
            for argument in (*args, *kwargs.values()):
                small(argument)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str | list | tuple) and owner is not None:
            account.spend(len(result), 4 if isinstance(result, str) else 64)
        return result


class Namespace(jinja2.utils.Namespace):
    """`namespace()` in templates: no private names, and a text of its own that is short."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may give a name `self`
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no private names such as {name[:100]!r}")
