#!/usr/bin/env python3
"""Writes what Python's jinja2, set up as Hugging Face's transformers does it, makes of chat templates, for the tests of
core/text.

    pip install jinja2 gguf
    python3 scripts/text/render_templates.py SmolLM2-135M-Instruct.Q4_1.gguf core/text/tests/data/chat.json
"""

import datetime
import json
import sys

import gguf
import jinja2
import jinja2.ext
import jinja2.sandbox

NOW = datetime.datetime(2024, 7, 6, 5, 4, 3)

SYSTEM = {"role": "system", "content": "Be brief.\n"}
USER = {"role": "user", "content": "  What is <b>\"2 & 2\"</b>?  "}
ASSISTANT = {"role": "assistant", "content": "Four — 4️⃣.\n\nYes."}
CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, ASSISTANT, USER], [SYSTEM, USER, ASSISTANT], []]

# Each uses what templates in the wild use.
TEMPLATES = {
    "alternation": """{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate, found ' ~ message.role ~ ' at ' ~ loop.index) }}
    {%- endif %}
    {{- '<turn>' + message['role'] + '\\n' + message['content'] | trim + '</turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}""",
    "namespace": """{% set ns = namespace(system='', count=0) %}
{% for m in messages %}
  {% if m.role == 'system' %}
    {% set ns.system = m['content'].strip() %}
  {% else %}
    {% set ns.count = ns.count + 1 %}
  {% endif %}
{% endfor %}
[{{ ns.system }}|{{ ns.count }}]
{% for m in messages if m.role != 'system' %}
{{ loop.index }}/{{ loop.length }}{% if loop.last %}!{% endif %}: {{ m.content.split('\\n')[-1].upper().rstrip() }}
{% endfor %}
""",
    "controls": """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role[0] }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}
{%- set last = messages[-1] if messages else none %}
{{ 'none' if last is none else last.content.startswith('  What') }}{{ eos_token }}""",
    "json": """{{ messages | tojson }}
{{ messages | tojson(indent=2) }}
{{ {'a': [1, 2.5, true, none], 'z': {}, 'b': 'é\\t\\u2028/\"'} | tojson }}""",
    "macro": """{% macro turn(m, tag='u') -%}
  <{{ tag }}>{{ m.content | replace('\\n', ' ') | trim }}</{{ tag }}>
{%- endmacro %}
{% for m in messages %}{{ turn(m, tag=m.role) }}{{ '' if loop.last else '; ' }}{% endfor %}

Date: {{ strftime_now('%d %b %Y, %A %H:%M') }}
{% if tools is defined and tools %}tools{% else %}no tools{% endif %}""",
    "slices": """{% set rest = messages[1:] %}{{ rest | length }}{{ messages | map(attribute='role') | join(',') }}
{% if messages and messages[0]['role'] == 'system' %}{{ messages[0].content | length }}{% endif %}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ 'a' in 'abc' and 'role' in (messages[0] or {}) }}
{% for key, value in (messages[0] or {}).items() %}{{ key }}={{ value }};{% endfor %}""",
}


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = NOW.strftime
    return env


def main():
    model, out = sys.argv[1:]
    fields = gguf.GGUFReader(model).fields
    templates = {"smollm2": fields["tokenizer.chat_template"].contents(), **TEMPLATES}
    now = int(NOW.replace(tzinfo=datetime.timezone.utc).timestamp())
    cases = []
    for name, source in templates.items():
        template = environment().from_string(source)
        for messages in CONVERSATIONS:
            for add in (False, True):
                case = {"template": name, "messages": messages, "add_generation_prompt": add}
                try:
                    case["rendered"] = template.render(
                        messages=messages, add_generation_prompt=add, bos_token="<s>", eos_token="</s>"
                    )
                except jinja2.exceptions.TemplateError as error:
                    case["error"] = str(error)
                cases.append(case)
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"now": now, "templates": templates, "cases": cases}, file, ensure_ascii=False, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
