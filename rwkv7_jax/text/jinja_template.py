"""The chat template in Jinja, for the `chat_template.jinja` of folders that `transformers` opens.

Its constants come from `chat_template`, and both format every conversation identically.
"""

import json

from rwkv7_jax.text import chat_template as chat

# Names in capitals between dollar signs are replaced by the constants of `chat_template`.
_SOURCE = """
{%- set modes = $MODES$ -%}
{%- set think = think if think is defined else (
    'off' if enable_thinking is not defined else ('free' if enable_thinking else 'fast')) -%}
{%- if think not in modes -%}
  {{- raise_exception('think must be one of $MODE_NAMES$') -}}
{%- endif -%}
{%- set mode = modes[think] -%}
{%- set functions = tools if tools is defined and tools else [] -%}

{#- Without blank lines, which end turns, and without blanks at the ends. -#}
{%- macro clean(text) -%}
  {%- set found = namespace(any=false) -%}
  {%- for line in text.replace('\\r\\n', '\\n').split('\\n') -%}
    {%- if line.strip() -%}
      {%- set before_blanks = loop.last or not loop.nextitem.strip() -%}
      {%- set kept = line.rstrip() if before_blanks else line -%}
      {{- '\\n' ~ kept if found.any else kept.lstrip() -}}
      {%- set found.any = true -%}
    {%- endif -%}
  {%- endfor -%}
{%- endmacro -%}

{%- macro words(message) -%}
  {{- clean(message.content) if message.content is string else '' -}}
{%- endmacro -%}

{%- macro thought(message) -%}
  {{- clean(message.reasoning_content) if message.reasoning_content is string else '' -}}
{%- endmacro -%}

{%- macro json(value) -%}
  {{- value | tojson(separators=(',', ':')) -}}
{%- endmacro -%}

{%- macro tool(described) -%}
  {%- set function = described.function if described.function else described -%}
  {%- set properties = function.parameters.properties if function.parameters else none -%}
  {%- set arguments = function.arguments | default(none) -%}
  {%- set arguments = properties | default(none) if arguments is none else arguments -%}
  {%- set arguments = {} if arguments is none else arguments -%}
  {{- '{"name":' ~ json(function.name) -}}
  {{- ',"description":' ~ json(function.description) if function.description else '' -}}
  {{- ',"arguments":' ~ json(arguments) ~ '}' -}}
{%- endmacro -%}

{%- macro tool_list() -%}
  {{- $TOOLS_BEGIN$ -}}
  {%- for described in functions -%}
    {{- tool(described) ~ ('' if loop.last else $TOOLS_BETWEEN$) -}}
  {%- endfor -%}
  {{- $TOOLS_END$ -}}
{%- endmacro -%}

{%- macro call(made) -%}
  {%- set function = made.function if made.function else made -%}
  {%- set arguments = function.arguments | default(none) -%}
  {%- set arguments = {} if arguments is none else arguments -%}
  {{- '{"name":' ~ json(function.name) ~ ',"arguments":' -}}
  {{- (clean(arguments) if arguments is string else json(arguments)) ~ '}' -}}
{%- endmacro -%}

{%- macro calls(made) -%}
  {{- $CALL_BEGIN$ ~ '\\n' ~ ('[' if made | length > 1 else '') -}}
  {%- for one in made -%}
    {{- call(one) ~ ('' if loop.last else ',') -}}
  {%- endfor -%}
  {{- (']' if made | length > 1 else '') ~ $CALL_END$ -}}
{%- endmacro -%}

{%- macro thinks(message) -%}
  {{- 'yes' if thought(message) or words(message).startswith($THOUGHT_BEGIN$) else '' -}}
{%- endmacro -%}

{%- macro answer(message) -%}
  {%- if thought(message) -%}
    {{- ' ' ~ $THOUGHT_BEGIN$ ~ '>\\n' ~ thought(message) ~ $THOUGHT_END$ -}}
  {%- elif mode.filler and not thinks(message) -%}
    {{- mode.opening ~ mode.filler -}}
  {%- else -%}
    {{- ' ' -}}
  {%- endif -%}
  {{- words(message) -}}
  {%- if message.tool_calls -%}
    {{- ('\\n' if words(message) else '') ~ calls(message.tool_calls) -}}
  {%- endif -%}
{%- endmacro -%}

{%- if functions and (not messages or messages[0].role != 'system') -%}
  {{- $SYSTEM$ ~ ' ' ~ tool_list() ~ ($TURN_END$ if messages else '') -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '' if loop.first else $TURN_END$ -}}
  {%- if message.role == 'system' -%}
    {{- $SYSTEM$ ~ ' ' ~ words(message) -}}
    {%- if loop.first and functions -%}
      {{- ('\\n' if words(message) else '') ~ tool_list() -}}
    {%- endif -%}
  {%- elif message.role == 'user' -%}
    {{- $USER$ ~ ' ' ~ words(message) -}}
    {{- mode.suffix if (add_generation_prompt if loop.last else thinks(loop.nextitem)) else '' -}}
  {%- elif message.role == 'tool' -%}
    {{- $USER$ ~ ' ' ~ $OUTPUT_BEGIN$ ~ words(message) -}}
  {%- elif message.role == 'assistant' -%}
    {{- $ASSISTANT$ ~ answer(message).rstrip('\\n') -}}
  {%- else -%}
    {{- raise_exception('role must be $ROLES$; got ' ~ message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- ($TURN_END$ if messages or functions else '') ~ $ASSISTANT$ -}}
  {{- mode.opening if mode.opening else (' ' ~ $CALL_BEGIN$ if functions else '') -}}
{%- endif -%}
"""


def chat_template_jinja() -> str:
    """Writes the template for the Jinja of `transformers`.

    Besides `messages`, `tools` and `add_generation_prompt` it reads `think`, a key of
    `chat_template.THINK_MODES`. Without `think`, `enable_thinking` selects "free" or, if false,
    "fast". Without both, the mode is "off".
    """
    modes = {name: mode._asdict() for name, mode in chat.THINK_MODES.items()}
    texts = {
        "MODES": json.dumps(modes).replace("null", "none"),
        "MODE_NAMES": ", ".join(chat.THINK_MODES),
        "ROLES": ", ".join(chat.SPEAKERS),
        "SYSTEM": json.dumps(chat.turn_start("system")),
        "USER": json.dumps(chat.turn_start("user")),
        "ASSISTANT": json.dumps(chat.turn_start("assistant")),
    }
    for name in (
        "TURN_END",
        "TOOLS_BEGIN",
        "TOOLS_BETWEEN",
        "TOOLS_END",
        "CALL_BEGIN",
        "CALL_END",
        "OUTPUT_BEGIN",
        "THOUGHT_BEGIN",
        "THOUGHT_END",
    ):
        texts[name] = json.dumps(getattr(chat, name))
    source = _SOURCE
    for name, text in texts.items():
        source = source.replace(f"${name}$", text)
    return source.lstrip()
