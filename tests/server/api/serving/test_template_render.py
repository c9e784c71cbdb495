"""What templates of adapters come to, beside transformers' own renderer."""

import subprocess
import sys
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from loraplex_server.text.template_render import render

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Über <b>alles</b> & 'mehr'",
            "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"n": 3, "z": "é☃😀"}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "hi  "}],
    "turns": [
        {"role": "system", "content": "be <brief>\n"},
        {"role": "user", "content": "grüß dich 😀"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None},
        {"role": "tool", "content": '{"n": 1}', "tool_call_id": "c1"},
        {"role": "assistant", "content": " so it is ", "thinking": "hm"},
    ],
}
TEMPLATES = {
    "chatml": """{% for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + (m.content or '') + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "white space": "  {% if true %}\n  a\n  {%- endif %}\n{# x #}\n {{ 1 }}\n\n  {{- 2 -}}  \n3\n",
    "tools": """{% if tools %}{{ tools | tojson }}{{ tools | tojson(indent=2) }}
{{- tools | tojson(ensure_ascii=true, separators=[',', ':'], sort_keys=true) }}{% endif %}
{%- for m in messages if m.tool_calls is defined %}
{%- for c in m.tool_calls %}{{ c.function.arguments | tojson }}{{ c }}{% endfor %}{% endfor %}""",
    "documents": "{{ documents is none }}{{ tools is none }}{{ unknown is defined }}{{ unknown }}",
    "macro": """{% macro turn(m, n=2) -%}
[{{ m.role | upper }}:{{ caller() if caller else n }}]{%- endmacro %}
{%- for m in messages %}{{ turn(m) }}{% call turn(m, n=3) %}x{{ loop.index }}{% endcall %}
{%- endfor %}
{%- filter upper %}so{% endfilter %}{% set block %}b{% endset %}{{ block }}""",
    "namespace": """{% set ns = namespace(n=0, last='') %}{% for m in messages %}
{%- set ns.n = ns.n + 1 %}{% set ns.last = m.role %}{% endfor %}{{ ns.n }} {{ ns.last }}""",
    "namespace self": "{% set ns = namespace({'b': 2}, self=1) %}{{ ns.self }}{{ ns.b }}",
    "loop controls": """{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}
{{- loop.index0 }}{{ m.role }}{% if loop.index == 3 %}{% break %}{% endif %}
{%- else %}none{% endfor %}""",
    "generation": """{% for m in messages %}
{% generation %}{{ m.content }}{% endgeneration %}
{% endfor %}""",
    "date": "{{ strftime_now('%Y-%m-%d') }}",
    "dict": """{{ dict(a=1, b='2') | tojson }}{{ dict.fromkeys(['a'], 2) }}
{{- {'a': 1}.items() | list }}""",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{% endfor %}",
    "strings": """{{ messages[0].content.split(' ') | join('-') | trim | replace('h', 'H') }}
{{- messages[0]['content'][::-1] }}{{ '%s' | format(1) }}{{ "{:>4}".format(2) }}
{{- messages | map(attribute='role') | list }}{{ messages | length }}{{ bos_token ~ eos_token }}""",
    "keyed": "{{ 'name' in messages[-1] }}{{ messages[-1].get('name', 'no') }}{{ mood or 'calm' }}",
    # what fails must fail
    "raises": "{{ raise_exception('roles must alternate') }}",
    "underscores": "{% set ns = namespace() %}{% set ns._a = 1 %}{{ ns._a }}",
    "underscores at once": "{{ namespace(__class__=1) }}",
    "changes a list": "{{ messages.append(1) }}",
    "class": "{{ messages.__class__ }}{{ ''.__class__.__mro__ }}{{ dict.mro() }}",
    "import": "{% import 'os' as os %}",
    "syntax": "{% if %}",
    "missing": "{{ nothing.at.all }}",
    "adds types": "{{ 1 + 'a' }}",
    "tojson of undefined": "{{ nothing | tojson }}",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "prompted": {"add_generation_prompt": True},
    "tools": {"tools": TOOLS, "add_generation_prompt": False, "mood": "glad"},
    "continued": {"continue_final_message": True, "add_generation_prompt": False},
    "both": {"continue_final_message": True, "add_generation_prompt": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_renders_as_in_transformers(
    tokenizer: PreTrainedTokenizerFast, template: str, chat: str, options: str
) -> None:
    source, messages, given = TEMPLATES[template], CHATS[chat], dict(OPTIONS[options])
    try:
        expected = tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, **given
        )
    except Exception:
        expected = None
    continued = given.pop("continue_final_message", False)
    given = {**tokenizer.special_tokens_map, **given}
    if expected is None:
        with pytest.raises((TemplateError, TypeError, ValueError)):
            render(source, messages, given, continued)
    else:
        assert render(source, messages, given, continued) == expected


def test_the_templates_that_should_render_do(tokenizer: PreTrainedTokenizerFast) -> None:
    """Else the comparison would be one of failures."""
    failing = set(list(TEMPLATES)[list(TEMPLATES).index("raises") :])
    for name, source in TEMPLATES.items():
        if name not in failing:
            given = {**tokenizer.special_tokens_map, **OPTIONS["tools"]}
            assert render(source, CHATS["turns"], given, False), name


def test_the_base_s_own_template_is_the_same_here(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " well "}]
    for options in ({"add_generation_prompt": True}, {"continue_final_message": True}):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        given: dict[str, Any] = {**tokenizer.special_tokens_map, **options}
        continued = given.pop("continue_final_message", False)
        assert render(tokenizer.get_chat_template(), messages, given, continued) == expected


def test_a_message_is_not_changed() -> None:
    messages = [{"role": "assistant", "content": "x"}]
    assert render("{{ messages[0].content }}", messages, {}, True) == "x"
    assert messages == [{"role": "assistant", "content": "x"}]


def test_the_renderer_imports_little() -> None:
    """A process that renders must start fast and stay small."""
    script = (
        "import sys, loraplex_server.text.template_render; "
        "print({'torch', 'transformers', 'numpy', 'fastapi', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )
    assert done.stdout.strip() == "set()"
