"""Chat templates in the ways of well-known families of models, none of them a copy of one."""

TEMPLATES = {
    # any role's name is passed on
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # three roles, others vanish
    "three roles": "{% for m in messages %}{% if m.role == 'system' %}<|system|>{{ m.content }}<|end|>"
    "{% elif m.role == 'user' %}<|user|>{{ m.content }}<|end|>"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>{% endif %}{% endfor %}<|assistant|>",
    # what is not the user's is the assistant's
    "user or assistant": "{% for m in messages %}{% if m.role == 'user' %}### User: {% else %}### Assistant: {% endif %}"
    "{{ m.content }}\n{% endfor %}### Assistant:",
    # as phi: role names are marks, tools in the first system message
    "phi": "{% for m in messages %}{% if m.role == 'system' and loop.first and tools %}"
    "<|system|>{{ m.content }}<|tool|>{{ tools | tojson }}<|/tool|><|end|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}<|assistant|>",
    # as Qwen: tools in the system message, results in the user's turn
    "qwen": "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}{% for c in m.tool_calls %}"
    '\n<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}}"
    "\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n{% endif %}"
    "{% endfor %}<|im_start|>assistant\n",
    # as Llama 3: one call at a time, results under a name of their own
    "llama": "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set messages = messages[1:] %}"
    "{% else %}{% set first = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\n{% if tools %}Environment: ipython\n{% endif %}{{ first }}<|eot_id|>"
    "{% if tools %}<|start_header_id|>user<|end_header_id|>\n\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|eot_id|>{% endif %}"
    "{% for m in messages %}{% if m.role in ('tool', 'ipython') %}"
    "<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% elif m.tool_calls is defined %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    # as Mistral: turns alternate, ids are nine letters, the system's words go into the last turn of the user
    "mistral": "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{% set ns = namespace(n=0) %}"
    "{% for m in turns if not (m.role == 'tool' or m.tool_calls is defined) %}"
    "{% if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{% for m in turns %}{% if m.role == 'user' %}"
    "{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{% if loop.last and first is defined %}{{ first }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.tool_calls is defined %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{{ '' if loop.last else ', ' }}{% endfor %}]</s>{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}"
    "{{ raise_exception('ids have nine letters') }}{% endif %}"
    '[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% else %}{{ raise_exception('only user, assistant and tool') }}{% endif %}{% endfor %}",
    # as Gemma: no system, turns alternate
    "gemma": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "<start_of_turn>model\n",
    # as DeepSeek: arguments are pasted as text, the system's words are gathered at the top
    "deepseek": "{% set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}"
    "{% set ns.system = ns.system + ('\n\n' if ns.system else '') + m.content %}{% endfor %}{{ ns.system }}"
    "{% for t in tools or [] %}\n## {{ t.function.name }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' and m.tool_calls is defined %}<|Assistant|><|calls|>{% for c in m.tool_calls %}"
    "{{ '<|call|>' + c.type + '<|sep|>' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}{% endfor %}<|end|>"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content }}<|end|>"
    "{% elif m.role == 'tool' %}<|output|>{{ m.content }}<|/output|>{% endif %}{% endfor %}<|Assistant|>",
    # as GLM: arguments are written one by one
    "glm": "{% if tools %}<|system|>{% for t in tools %}\n{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|observation|>{{ m.content }}"
    "{% elif m.tool_calls is defined %}<|assistant|>{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}"
    "{% for key, value in c.function.arguments.items() %}<arg_key>{{ key }}</arg_key>"
    "<arg_value>{{ value }}</arg_value>{% endfor %}"
    "</tool_call>{% endfor %}{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}<|assistant|>",
    # as gpt-oss: the developer has a turn of his own
    "developer": "{% for m in messages %}{% if m.role in ('system', 'developer') %}<|start|>{{ m.role }}<|message|>"
    "{% if m.role == 'developer' %}# Instructions\n{% endif %}{{ m.content }}<|end|>"
    "{% elif m.role in ('user', 'assistant') %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>"
    "{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}<|start|>assistant",
    # a list of names, and one system message, at the beginning
    "strict": "{% for m in messages %}{% if m.role == 'system' %}{% if not loop.first %}"
    "{{ raise_exception('the system message must be first') }}{% endif %}<|system|>{{ m.content }}"
    "{% elif m.role in ('user', 'assistant', 'critic') %}<|{{ m.role }}|>{{ m.content }}"
    "{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}<|assistant|>",
    # the last system message counts, and documents are shown
    "last system": "{% set ns = namespace(s='') %}{% for m in messages if m.role == 'system' %}"
    "{% set ns.s = m.content %}{% endfor %}"
    "<|system|>{{ ns.s }}{% for d in documents or [] %}<|doc|>{{ d.title }}: {{ d.text }}{% endfor %}"
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>",
}
