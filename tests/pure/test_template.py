"""Chat templates against transformers' apply_chat_template, and their limits."""

from __future__ import annotations

import copy
import gc
import json
import resource
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from chats import CHATS, SOURCES, TOOL, message
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS
from transformers import AutoTokenizer

from flashformer import LoadError, RequestError
from flashformer.checkpoint.account import TIME_S, Account, LimitError, collections
from flashformer.checkpoint.template import OUTPUT_CHARS, OUTPUT_PER_INPUT, ChatTemplate
from flashformer.checkpoint.tokenizer import load_tokenizer

GOOD = ["chatml", "gemma", "generation", "llama2", "llama3", "macros", "mistral", "phi3", "qwen3"]
BAD = [name for name in SOURCES if name.startswith("bad_")]


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(KINDS["llama 2, first, plain"].write(tmp_path_factory.mktemp("oracle")))


def theirs(oracle: Any, source: str, chat: list[dict[str, Any]], **options: Any) -> str | None:
    """None where transformers raises too."""
    options = {"add_generation_prompt": True} | options
    try:
        return str(oracle.apply_chat_template(copy.deepcopy(chat), chat_template=source, tokenize=False, **options))
    except Exception:
        return None


def ours(source: str, chat: list[dict[str, Any]], **options: Any) -> str | None:
    try:
        return ChatTemplate(source, NAMES).render(chat, **options)
    except RequestError:
        return None


@pytest.mark.parametrize("name", GOOD)
def test_equals_apply_chat_template(oracle: Any, name: str) -> None:
    rendered = []
    for chat in CHATS.values():
        for options in (
            {},
            {"add_generation_prompt": False},
            {"tools": [TOOL, TOOL]},
            {"enable_thinking": False},
            {"enable_thinking": True, "date_string": "1 May 2030", "documents": [{"title": "t", "text": "x"}]},
        ):
            before = copy.deepcopy(chat)
            text = ours(SOURCES[name], chat, **options)
            assert text == theirs(oracle, SOURCES[name], chat, **options)
            assert chat == before
            rendered.append(text)
    assert sum(text is not None for text in rendered) >= 15
    assert len(set(rendered)) >= 6


SNIPPETS = [
    "  {% if true %}  \n x {% endif %}\n\n y\n",
    "{%- for m in messages -%} {{ loop.index }}{{ (loop.previtem or m).role }}{{ (loop.nextitem or m).role }}"
    "{%- endfor -%}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
    "{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{{ messages | tojson }} {{ messages | tojson(indent=4) }} "
    "{{ 'é<>&' | tojson }} {{ 'é' | tojson(ensure_ascii=true) }}",
    "{{ {'b': 1, 'a': [1, 2]} | tojson(sort_keys=true, separators=(',', ':')) }}",
    "{{ messages[0].content.split('l')[-1] }} {{ messages[0]['content'][1:3] }} {{ messages[::-1][0].role }}",
    "{{ 'a' ~ 1 ~ none ~ nothing ~ [1, 'x'] }} {{ 7 // 2 }} "
    "{{ 7 % 3 }} {{ 2 ** 10 }} {{ '-' * 5 }} {{ [1] * 2 + [3] }}",
    "{{ '%s and %05d %%' % ('x', 42) }} {{ '{:>8} {a} {{}}'.format('x', a=[1]) }} {{ '{a}'.format_map({'a': 2}) }}",
    "{{ 'x' | indent(4, true) }} {{ 'a\nb' | indent }} "
    "{{ 'abc' | replace('b', 'xx') }} {{ ' x ' | trim }} {{ 'abc' | length }}",
    "{{ nothing | default('d') }} {{ '' | default('d', true) }} "
    "{{ 1.25 | round(1) }} {{ '12' | int + 1 }} {{ 'x' | int(9) }}",
    "{{ [3, 1, 2] | sort }} {{ [1, 1, 2] | unique | list }} "
    "{{ ['a', 'b'] | join(', ') }} {{ {'k': 'v'}.items() | list }}",
    "{{ [[1], [2]] | sum(start=[]) }} {{ [1, 2] | sum }} "
    "{{ range(7) | batch(3, 'x') | list }} {{ range(7) | slice(3) | list }}",
    "{{ messages | map(attribute='role') | list }} {{ messages | rejectattr('role', 'eq', 'user') | list | length }}",
    "{{ ['a'] | map('upper') | join }} {{ [1, 2, 3] | select('gt', 1) | list }} {{ 'a b' | title }} {{ 'x' in 'xy' }}",
    "{% set ns = namespace(a=1, self=2) %}{% set ns.b = ns.a + 1 %}{{ ns.b }}{{ ns.self }}",
    "{% macro f(a, b='x') %}[{{ a }}{{ b }}{{ caller() if caller }}]{% endmacro %}"
    "{{ f(1) }}{% call f(2, b=3) %}in{% endcall %}",
    "{% set x = 1 %}{% for m in messages %}{% set x = 2 %}"
    "{% endfor %}{{ x }}{% set y %}block{% endset %}{{ y | upper }}",
    "{% generation %}{% set z = 1 %}{{ z }}{% endgeneration %}{{ z }}{% filter lower %}ABC{% endfilter %}",
    "{{ 'a\tb'.expandtabs(4) }} {{ 'x'.center(9, '*') }} "
    "{{ ', '.join(['a', 'b']) }} {{ 'aXb'.replace('X', '--') }} {{ '7'.zfill(3) }}",
    "{% for k, v in {'a': 1}.items() recursive %}{{ k }}{{ v }}{% else %}none{% endfor %}{{ cycler('a', 'b').next() }}",
    "{{ messages is sequence }} {{ messages is mapping }} "
    "{{ 'x' is string }} {{ 4 is divisibleby 2 }} {{ x is defined }}",
    "{{ dict(a=1) }} {{ dict.fromkeys(['a']) }} {{ (1, 2) }} {{ [1, (2,)] == [1, (2,)] }} {{ {'a': 1} != {'a': 2} }}",
    "{{ '<b>' | e }} {{ '<b>' | safe }} {{ 'a b c' | truncate(3, true, '') }} "
    "{{ -5 | abs }} {{ 'abc' | first }} {{ [1] | last }}",
    "{{ bos_token }}{{ eos_token }}{{ tools }}{{ documents }}{{ add_generation_prompt }}",
    "{{ strftime_now('%Y-%m-%d') }}",
    "{{ [ns, messages[0].nothing] | length }}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__ }}|{{ messages.append }}",
    "{{ messages.append(1) }}",
    "{% include 'x' %}",
    "{{ nothing.more }}",
    "{% if %}",
]


@pytest.mark.parametrize("source", SNIPPETS)
def test_language(oracle: Any, source: str) -> None:
    for chat in (CHATS["one"], CHATS["tools"]):
        text = ours(source, chat)
        assert text == theirs(oracle, source, chat)
        assert text is not None or source in SNIPPETS[-7:]


# ---- limits


BOMBS = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{% set x = [0] * 10**9 %}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='') %}"
    "{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}aa{% endset %}{% endfor %}",
    "{% set ns = namespace(x=10) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ '1'.zfill(10**9) }}",
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10**9) }}",
    "{{ ('a' * 60000).replace('', 'a' * 60000) }}",
    "{{ ('a' * 60000) | replace('a', 'b' * 60000) }}",
    "{{ ('a' * 60000).join('b' * 60000) }}",
    "{{ (['a' * 60000] * 60000) | join }}",
    "{{ ','.join((['a' * 60000] * 60000) | map('string')) }}",
    "{{ 'a\nb' | indent(10**9) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ messages | tojson(separators=('a' * 60000, 'b' * 60000)) }}",
    "{{ [1] | batch(10**9, 'x') | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{{ 1.5 | round(10**9, 'floor') }}",
    "{{ ([[1]] * 60000) | sum(start=[]) }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ ('x'.encode() | string) }}",
    "{{ lipsum(n=10**8) }}",
    "{{ range(10**10) | list }}",
    "{% for i in range(100000) %}{{ messages }}{% endfor %}",
    "{% for i in range(100000) %}some text of the template{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(l=[]) %}{% for i in range(100000) %}{% set ns.l = ns.l + [('a' * 60000) ~ i] %}{% endfor %}",
    "{% set b = 'a ' * 30000 %}{% for i in range(100000) %}{% set x = b.split() %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{{ strftime_now('%1000000000Y') }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ 1" + " + 1" * 20000 + " }}",
    "{% if true %}" * 300 + "{% endif %}" * 300,
    "{{ " + "9" * 100_000 + " }}",
    "x" * (1 << 21),
    *(
        "{% set ns = namespace(x=(1,), y=(1,)) %}{% for i in range(60) %}"
        f"{{% set ns.x = (ns.x, ns.x) %}}{{% set ns.y = (ns.y, ns.y) %}}{{% endfor %}}{use}"
        for use in (
            "{{ ns.x }}",
            "{{ ns.x ~ '' }}",
            "{{ ns.x | string }}",
            "{{ ns.x == ns.y }}",
            "{{ ns.x is eq ns.y }}",
            "{{ [ns.x].index(ns.y) }}",
            "{{ {ns.x: 1} }}",
            "{{ {}[ns.x] }}",
            "{{ {}.get(ns.x) }}",
            "{{ dict([(ns.x, 1)]) }}",
            "{{ [ns.x, ns.y] | unique | list }}",
            "{{ [ns.x, ns.y] | sort }}",
            "{{ {'a': ns.x}.values() }}",
            "{{ '%s' % ns.x }}",
            "{{ '{}'.format(ns.x) }}",
            "{{ raise_exception(ns.x) }}",
        )
    ),
]


def test_a19_the_limits_hold_in_any_thread() -> None:
    """In a thread, so that a limit cannot depend on signals; memory over all of them together."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: dict[str, Any] = {}

    def run() -> None:
        for source in (*BOMBS, *(SOURCES[name] for name in BAD)):
            try:
                outcomes[source] = ChatTemplate(source).render(CHATS["turns"])
            except Exception as error:
                outcomes[source] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=(len(BOMBS) + len(BAD)) * 10 * TIME_S)
    assert not thread.is_alive()
    assert len(outcomes) == len(BOMBS) + len(BAD)
    wrong = {source[:80]: outcome for source, outcome in outcomes.items() if not isinstance(outcome, RequestError)}
    assert wrong == {}
    assert all(len(str(error)) < 1000 for error in outcomes.values())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10
    assert ChatTemplate(SOURCES["chatml"]).render(CHATS["one"])


def test_a19_output_is_bounded_by_the_input() -> None:
    source = "{% for i in range(n) %}{{ messages[0].content }}{% endfor %}"
    chat = [message("user", "x" * 10_000)]
    assert len(ChatTemplate(source).render(chat, n=10)) == 100_000
    with pytest.raises(RequestError, match=f"{OUTPUT_PER_INPUT}|writes more than"):
        ChatTemplate(source).render(chat, n=11 + OUTPUT_CHARS // 10_000)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('Roles must alternate') }}", ("refuses", "Roles must alternate")),
        ("a\n{% for %}", ("line 2",)),
        ("{{ ''.__class__.__mro__ }}", ("__class__", "unsafe")),
        ("{{ ''|attr('__class__')|attr('mro') }}", ("__class__", "unsafe")),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", ("__class__", "unsafe")),
        ("{{ cycler.__init__.__globals__ }}", ("__init__", "unsafe")),
        ("{% set ns = namespace(__class__=1) %}", ("private",)),
        ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", ("250 ms",)),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ("recurses",)),
        ("{{ 1 | nothing }}", ("line 1", "nothing")),
        ("{{ nothing.more }}", ("nothing",)),
    ],
)
def test_a19_messages(source: str, words: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source).render(CHATS["one"])
    for word in words:
        assert word in str(caught.value)


WORDS = [
    *"{}%#-|~*+()[],.'\"0199 \n",
    *(
        "{%",
        "%}",
        "{{",
        "}}",
        "for ",
        " in ",
        "endfor",
        "if ",
        "endif",
        "set ",
        "messages",
        "range(9)",
        "loop",
        "x",
        "=",
    ),
    *("macro f()", "endmacro", "f()", "tojson", "'a'"),
]


@settings(max_examples=150)
@given(st.lists(st.sampled_from(WORDS), max_size=30))
def test_any_text_is_a_template_or_an_error(parts: list[str]) -> None:
    with suppress(RequestError):
        assert isinstance(ChatTemplate("".join(parts)).render(CHATS["one"]), str)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], ("messages", "empty")),
        ("hi", ("messages", "str")),
        (["hi"], ("messages[0]",)),
        ([{"content": "x"}], ("messages[0]", "role")),
        ([message("user", object())], ("messages[0]['content']", "object")),
        ([message("user", {1: 2})], ("key 1",)),
        ([message("user", "a\ud800")], ("messages[0]['content']", "surrogate at character 1")),
        ([message("user", 1 << 300)], ("301 bits",)),
        ([message("user", json.loads("[" * 50 + "]" * 50))], ("deep",)),
    ],
)
def test_b23_bad_messages(messages: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(SOURCES["chatml"]).render(messages)
    for word in words:
        assert word in str(caught.value)


# ---- where templates are found


def test_sources(tmp_path: Path) -> None:
    kind = KINDS["llama 3"]
    assert load_tokenizer(kind.write(tmp_path)).chat_template is None
    with pytest.raises(RequestError, match=r"no default chat template.*instruct"):
        load_tokenizer(tmp_path).encode_chat(CHATS["one"])
    (tmp_path / "chat_template.json").write_text('{"chat_template": "legacy"}')
    assert load_tokenizer(tmp_path).render_chat(CHATS["one"]) == "legacy"
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    for extra in ("none", "extra", "single", "both"):
        if extra in ("extra", "both"):
            (tmp_path / "additional_chat_templates").mkdir(exist_ok=True)
            (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("three")
        if extra in ("single", "both"):
            (tmp_path / "chat_template.jinja").write_text("four é", encoding="utf-8")
        if extra == "single":
            (tmp_path / "additional_chat_templates" / "tool_use.jinja").unlink()
        tokenizer, oracle = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        for tools in (None, [TOOL]):
            try:
                due = oracle.apply_chat_template(CHATS["one"], tools=tools, tokenize=False)
            except ValueError:
                with pytest.raises(RequestError, match="only tool_use"):
                    tokenizer.render_chat(CHATS["one"], tools=tools)
            else:
                assert tokenizer.render_chat(CHATS["one"], tools=tools) == due
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "default"}]}))
    with pytest.raises(LoadError, match="chat_template"):
        load_tokenizer(tmp_path)


def test_the_garbage_collector_counts_for_nobody() -> None:
    """In a large process one collection can take longer than a template may."""
    began, garbage = collections.spent, [[] for _ in range(300_000)]
    charged = Account(1000)
    while collections.spent - began < 1.5 * TIME_S:
        gc.collect()
    charged.tick()
    end = time.thread_time() + 1.5 * TIME_S
    while time.thread_time() < end:
        pass
    with pytest.raises(LimitError, match="ran for more than"):
        charged.tick()
    assert garbage
