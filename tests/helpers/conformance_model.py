"""The bundled demo model with a chat template that knows tools: what the conformance suite is run against here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from baton.services.local import demo_model

# As Qwen and Hermes models write it; {{ }} of tool calls is JSON.
CHAT_TEMPLATE = """\
{%- if tools -%}
{{- '<|system|>You may call functions. They are listed within <tools></tools>:\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' ~ (tool | tojson) -}}{%- endfor -%}
{{- '\\n</tools>\\nTo call one, write <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|end|>' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{- '<|user|><tool_response>' ~ message.content ~ '</tool_response><|end|>' -}}
{%- else -%}
{{- '<|' ~ message.role ~ '|>' -}}
{%- if message.reasoning_content -%}{{- '<think>' ~ message.reasoning_content ~ '</think>' -}}{%- endif -%}
{{- message.content or '' -}}
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>' ~ ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) ~ '</tool_call>' -}}
{%- endfor -%}
{{- '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think></think>' -}}{%- endif -%}
{%- endif -%}
"""


def write_model(folder: Path) -> Path:
    """A model folder: the demo model's files, with the template."""
    source = Path(demo_model.__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        shutil.copyfile(source / name, folder / name)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT_TEMPLATE}))
    return folder
