"""Chat templates: which one a folder carries, and rendering it as transformers' apply_chat_template does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoadError, RequestError
from .files import member, read_json, read_text, shown

if TYPE_CHECKING:
    import jinja2

MAX_TEMPLATE_CHARS = 1 << 20
OUTPUT_PER_INPUT, OUTPUT_CHARS = 4, 64 << 10  # output is at most OUTPUT_PER_INPUT x input + OUTPUT_CHARS characters
MAX_VALUE_DEPTH = 32  # of messages, tools and variables

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, the first is what templates read
_FOLDER, _SINGLE = "additional_chat_templates", "chat_template.jinja"


@dataclass(frozen=True)
class Templates:
    """The chat templates of a folder by name; the usual one is `default`. `folder` is for messages."""

    folder: str
    by_name: Mapping[str, str]

    def source(self, *, tools: bool) -> str | None:
        """As transformers chooses: `tool_use` for tools where there is one, else `default`."""
        if tools and "tool_use" in self.by_name:
            return self.by_name["tool_use"]
        return self.by_name.get("default")

    def missing(self) -> str:
        found = f", only {', '.join(sorted(self.by_name))}" if self.by_name else ""
        return (
            f"{self.folder}: the model has no default chat template{found}: it was probably not trained to chat. Give "
            f"it a plain prompt, take the model's instruct or chat version, or put the right template into {_SINGLE}"
        )


def read_templates(folder: Path, config: Mapping[str, Any], where: str) -> Templates:
    """Chat templates of a model folder: chat_template.jinja and additional_chat_templates/*.jinja, else the
    `chat_template` of tokenizer_config.json (text, or a list of named ones), else chat_template.json.

    Raises LoadError.
    """
    files: dict[str, str] = {}
    single = member(folder, _SINGLE)
    if single is not None:
        files["default"] = read_text(single)
    if (folder / _FOLDER).is_dir():
        for path in sorted((folder / _FOLDER).glob("*.jinja")):
            found = member(folder, f"{_FOLDER}/{path.name}")
            if found is not None:
                files[path.name.removesuffix(".jinja")] = read_text(found)
    if files:
        return Templates(str(folder), files)
    stated = config.get("chat_template")
    legacy = member(folder, "chat_template.json") if stated is None else None
    if legacy is not None:
        stated, where = read_json(legacy).get("chat_template"), str(legacy)
    return Templates(str(folder), _named(stated, where))


def _named(stated: Any, where: str) -> dict[str, str]:
    if stated is None:
        return {}
    entries = stated if isinstance(stated, list) else [{"name": "default", "template": stated}]
    named: dict[str, str] = {}
    for entry in entries:
        fields = entry if isinstance(entry, dict) else {}
        name, template = fields.get("name"), fields.get("template")
        if not isinstance(name, str) or not isinstance(template, str):
            raise LoadError(
                f"{where}: chat_template: expected text, or a list of name and template, found {shown(entry)}"
            )
        named[name] = template
    return named


class ChatTemplate:
    """A template, compiled on first use in a sandbox with limits (`sandbox.py`). May be used from several threads.

    `special_tokens`: "bos_token" -> its text, and so on; templates read them as variables.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation, as apply_chat_template(tokenize=False) of transformers gives it.

        Messages, tools and variables hold text, numbers, booleans, None, lists and mappings with text as keys.
        Raises RequestError for anything else, where the template is wrong or refuses (with its own words), and where
        it asks for more than the limits: OUTPUT_PER_INPUT x input + OUTPUT_CHARS, and those of `sandbox.py`.
        """
        return self.render_with(
            lambda text: text, messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables
        )

    def render_with(
        self,
        change: Callable[[str], str],
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """`render` with every text in messages, tools and variables passed through `change`."""
        size = 0

        def plain(value: Any, where: str, depth: int = 0) -> Any:
            nonlocal size
            size += 1
            if value is None or isinstance(value, bool | float):
                return value
            if isinstance(value, int):
                if value.bit_length() > 256:
                    raise RequestError(f"{where}: an integer of {value.bit_length()} bits; at most 256 are accepted")
                return value
            if isinstance(value, str):
                size += len(value)
                return change(_unicode(value, where))
            if depth == MAX_VALUE_DEPTH:
                raise RequestError(f"{where}: nested more than {MAX_VALUE_DEPTH} deep")
            if isinstance(value, Mapping):
                for key in value:
                    if not isinstance(key, str):
                        raise RequestError(f"{where}: key {shown(key)}: expected text")
                size += sum(map(len, value))
                return {
                    change(_unicode(k, where)): plain(v, f"{where}[{shown(k)}]", depth + 1) for k, v in value.items()
                }
            if isinstance(value, list | tuple):
                return [plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
            raise RequestError(
                f"{where}: {type(value).__name__}: expected text, numbers, True, False, None, lists and mappings"
            )

        chat = [_message(plain(m, f"messages[{i}]"), i) for i, m in enumerate(_listed(messages, "messages"))]
        if not chat:
            raise RequestError("messages: empty; expected at least one message")
        listed = None if tools is None else [plain(t, f"tools[{i}]") for i, t in enumerate(_listed(tools, "tools"))]
        given = {name: plain(value, name) for name, value in variables.items()}
        names = {
            **self._special_tokens,
            **given,
            "messages": chat,
            "tools": listed,
            "documents": given.get("documents"),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        return self._run(names, OUTPUT_PER_INPUT * size + OUTPUT_CHARS)

    def _run(self, names: Mapping[str, Any], limit: int) -> str:
        from .account import LimitError, accounted

        compiled = self._compiled  # no conversation pays for that
        parts: list[str] = []
        total = 0
        try:
            with accounted(limit) as account:
                for part in compiled.generate(**names):
                    account.tick()
                    total += len(part)
                    if total > limit:
                        raise LimitError(f"it writes more than {limit} characters for this input")
                    parts.append(part)
        except RequestError:
            raise
        except LimitError as error:
            raise RequestError(
                f"chat template stopped: {error}; shorten the conversation, or use another template"
            ) from None
        except Exception as error:  # whatever a template makes Python or Jinja raise
            raise RequestError(_failure(error)) from None
        return "".join(parts)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        from jinja2 import TemplateSyntaxError

        from .sandbox import Sandbox

        if len(self.source) > MAX_TEMPLATE_CHARS:
            raise RequestError(
                f"chat template of {len(self.source)} characters: at most {MAX_TEMPLATE_CHARS} are accepted"
            )
        try:
            return Sandbox({"tojson": _to_json}, _globals()).from_string(self.source)
        except TemplateSyntaxError as error:
            where = f"chat template, line {error.lineno}: {_short(error.message)}"
            raise RequestError(f"{where}; this version cannot use the model's template") from None
        except Exception as error:  # too deep for a compiler, a number too long, ...
            raise RequestError(
                f"chat template: {_short(error)}; this version cannot use the model's template"
            ) from None


def _listed(value: Any, name: str) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise RequestError(f"{name}: {type(value).__name__}: expected a list of mappings")
    for i, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise RequestError(f"{name}[{i}]: {type(item).__name__}: expected a mapping")
    return value


def _message(message: dict[str, Any], i: int) -> dict[str, Any]:
    """As transformers prepares one: keys that are None go, reasoning is found under every name that it goes by."""
    stated = {key: value for key, value in message.items() if value is not None}
    if "role" not in stated:
        raise RequestError(f"messages[{i}]: no role; expected for example {{'role': 'user', 'content': 'text'}}")
    reasoning = next((stated[name] for name in _REASONING if name in stated), None)
    return stated if reasoning is None else {"thinking": reasoning, **stated, "reasoning_content": reasoning}


def _unicode(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{where}: a lone surrogate at character {error.start}; expected valid Unicode") from None
    return str(text)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 500 else f"{text[:500]}... ({len(text)} characters)"


class _RefusalError(Exception):
    """raise_exception in a template."""


def _failure(error: BaseException) -> str:
    if isinstance(error, _RefusalError):
        return f"the chat template refuses this conversation: {_short(error)}"
    if isinstance(error, RecursionError):
        return "chat template stopped: it recurses without end"
    return f"chat template failed: {type(error).__name__}: {_short(error)}"


def _raise_exception(message: object) -> None:
    raise _RefusalError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 256 or re.search(r"\d{3}", form):
        raise RequestError("chat template stopped: its date format is longer than any date")
    return datetime.now().strftime(form)


class _Dict:
    """The name `dict` in templates: makes one, and has no way to the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _globals() -> dict[str, Any]:
    from .sandbox import Namespace

    return {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": Namespace,
    }


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` as transformers has it: plain JSON, nothing escaped for HTML."""
    from .account import bound_layout

    bound_layout(x, indent, separators)
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
