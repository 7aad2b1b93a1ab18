"""Chat templates that tests render with."""

from tiny_base import CHATML

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn", "days": None}}}


CALLING = {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]}


RESULT = {"role": "tool", "content": "wet"}


PAIR = {"prompt": "2+3=", "completion": "5"}


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]


WITHOUT_CALLS = CHATML.replace("message.tool_calls", "[]")


WITHOUT_CONTENT = CHATML.replace(
    "{{ message.content }}", "{% if not message.tool_calls %}{{ message.content }}{% endif %}"
)


WITHOUT_TOOL_TURNS = CHATML.replace("in messages %}", "in messages if message.role != 'tool' %}")


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)


ENDLESS_TURNS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
