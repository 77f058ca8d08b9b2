"""Chat templates against transformers, and the flat format that phones use against the template."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from edgellama.errors import ResourceError, TokenizerError
from edgellama.text import chat, template_sandbox
from edgellama.text.chat import ChatFormat, ChatTemplate, Message, derive_format
from tests.helpers.paths import TINY

# Templates of common families, rewritten. They render the same text as the published ones.
CHATML_DEFAULT_SYSTEM = """
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
LLAMA_3 = """
{%- for message in messages %}
    {%- set turn = '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' ~ message.content | trim ~ '<|eot_id|>' %}
    {{- bos_token ~ turn if loop.first else turn }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
LLAMA_3_2 = """
{{- bos_token }}
{%- if tools is not none %}{{- raise_exception('no tools here') }}{%- endif %}
{%- if strftime_now is defined %}
    {%- set today = strftime_now('%d %b %Y') %}
{%- else %}
    {%- set today = '26 Jul 2024' %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set instructions = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set instructions = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' + today }}
{{- '\n\n' + instructions + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""
ZEPHYR = """{% for message in messages %}
    {% if message['role'] in ['system', 'user', 'assistant'] %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}
    {% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
LLAMA_2 = """
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set content = system + message.content if loop.first else message.content %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
LLAMA_GUARD = """
{%- set who = 'User' if messages | length % 2 else 'Agent' %}
{{- '[INST] Judge whether the last ' + who + ' message is safe.\n\n<BEGIN CONVERSATION>\n\n' }}
{%- for message in messages %}
    {{- ('User' if message.role == 'user' else 'Agent') + ': ' + message.content | trim + '\n\n' }}
{%- endfor %}
{{- '<END CONVERSATION>\n\nFirst line: safe or unsafe. [/INST]' }}"""
NO_SYSTEM_ROLE = """{% for message in messages %}
{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{ '<start_of_turn>' + message.role + '\n' + message.content | trim + '<end_of_turn>' }}
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
FORGETS_THINKING = CHATML_DEFAULT_SYSTEM.replace(
    "message['content']",
    "(message['content'] if loop.last else message['content'].split('</think>')[-1])",
)
LAST_TURN_DIFFERS = CHATML_DEFAULT_SYSTEM.replace(
    "'<|im_end|>' +", "'<|im_end|>' + ('' if loop.last else ' ') +"
)
COUNTS_TURNS = CHATML_DEFAULT_SYSTEM.replace(
    "message['role'] + '\n'", "message['role'] + '\n' * (1 + loop.index // 6)"
)
GENERATION_TAG = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ '<' + m.role + '>' + m.content }}{% endif %}{% endfor %}"
)

FLAT = {
    "ChatML with a default system message": CHATML_DEFAULT_SYSTEM,
    "Llama 3": LLAMA_3,
    "Llama 3.2": LLAMA_3_2,
    "Zephyr": ZEPHYR,
    "generation tag": GENERATION_TAG,
}
NOT_FLAT = {
    "Llama 2": (LLAMA_2, "between system and user message depends on more than the two roles"),
    "Llama Guard": (LLAMA_GUARD, "depends on more than the two roles"),
    "no system role": (NO_SYSTEM_ROLE, "System role not supported"),
    "forgets thinking": (FORGETS_THINKING, "2 messages of thinking"),
    "last turn differs": (LAST_TURN_DIFFERS, "between assistant and user message"),
    "counts turns": (COUNTS_TURNS, "6 messages of plain words: at character"),
    "first word only": ("{{ messages[0].content.split() | first }}", "the user message does not appear"),
    "no conversation at all": ("hello", "the system message does not appear"),
}


def template(source: str) -> ChatTemplate:
    """Template of `source` with the tokens <s> and </s>."""
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


def talk(*contents: str, system: str | None = None) -> list[Message]:
    """Conversation of `contents`, user and assistant in turn, with an optional system message first."""
    turns: list[Message] = [
        {"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)
    ]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


CONVERSATIONS = (
    talk("Hi"),
    talk("Hi", "Hello!", "你好 🙂 ", "  ok\n"),
    talk("Hi", system=" Be brief.\n"),
    talk("", "{{ x }}", "<|im_end|>", system=""),
)


@pytest.fixture(scope="module")
def transformers_tokenizer() -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(TINY / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("name", FLAT)
def test_renders_as_transformers_does(name: str, transformers_tokenizer: Any) -> None:
    source = FLAT[name].replace("strftime_now is defined", "false")  # transformers has a clock
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            expected = transformers_tokenizer.apply_chat_template(
                messages, chat_template=source, add_generation_prompt=prompt, tokenize=False
            )
            assert template(FLAT[name]).render(messages, add_generation_prompt=prompt) == expected


def test_json_filter_is_that_of_transformers(transformers_tokenizer: Any) -> None:
    source = "{{ messages | tojson }}{{ messages[0] | tojson(indent=2, sort_keys=true) }}"
    messages = talk('<b> & ü "quoted" \'')
    assert template(source).render(messages) == transformers_tokenizer.apply_chat_template(
        messages, chat_template=source, tokenize=False
    )


def test_the_date_is_the_template_s_own() -> None:
    assert "Today Date: 26 Jul 2024\n" in template(LLAMA_3_2).render(talk("Hi"))


@pytest.mark.parametrize("name", FLAT)
def test_flat_templates_have_a_format(name: str) -> None:
    chat_format, reason = derive_format(template(FLAT[name]))
    assert chat_format is not None, reason
    assert reason == ""
    assert ChatFormat.from_dict(json.loads(json.dumps(chat_format.to_dict()))) == chat_format
    for messages in CONVERSATIONS:
        for prompt in (False, True) if messages[-1]["role"] == "user" else (False,):
            expected = template(FLAT[name]).render(messages, add_generation_prompt=prompt)
            assert chat_format.render(messages, add_generation_prompt=prompt) == expected


def test_the_format_of_smollm2_word_for_word() -> None:
    assert derive_format(template(CHATML_DEFAULT_SYSTEM))[0] == ChatFormat(
        no_system="<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n",
        system_prefix="<|im_start|>system\n",
        system_suffix="<|im_end|>\n",
        user_prefix="<|im_start|>user\n",
        user_suffix="<|im_end|>\n",
        assistant_prefix="<|im_start|>assistant\n",
        assistant_suffix="<|im_end|>\n",
        generation_prompt="<|im_start|>assistant\n",
        trim=False,
    )


def test_the_format_of_llama_3_2_word_for_word() -> None:
    head = "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    assert derive_format(template(LLAMA_3_2))[0] == ChatFormat(
        no_system=head + "Today Date: 26 Jul 2024\n\n<|eot_id|>",
        system_prefix=head + "Today Date: 26 Jul 2024\n\n",
        system_suffix="<|eot_id|>",
        user_prefix="<|start_header_id|>user<|end_header_id|>\n\n",
        user_suffix="<|eot_id|>",
        assistant_prefix="<|start_header_id|>assistant<|end_header_id|>\n\n",
        assistant_suffix="<|eot_id|>",
        generation_prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
        trim=True,
    )


@pytest.mark.parametrize("name", NOT_FLAT)
def test_other_templates_have_a_reason(name: str) -> None:
    source, expected = NOT_FLAT[name]
    chat_format, reason = derive_format(template(source))
    assert chat_format is None
    assert expected in reason


@pytest.mark.parametrize("field", [field for field in ChatFormat.__dataclass_fields__ if field != "trim"])
def test_the_proof_catches_a_wrong_affix(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = chat._read_off(template(LLAMA_3_2))
    monkeypatch.setattr(chat, "_read_off", lambda _: replace(right, **{field: getattr(right, field) + " "}))
    assert derive_format(template(LLAMA_3_2))[0] is None


def test_the_proof_catches_contents_that_are_not_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chat._read_off(template(LLAMA_3_2))
    monkeypatch.setattr(chat, "_read_off", lambda _: replace(right, trim=False))
    assert "spaces around" in derive_format(template(LLAMA_3_2))[1]


@pytest.mark.parametrize(
    "roles", [[], ["system"], ["assistant"], ["user", "user"], ["user", "system"], ["user", "tool"]]
)
def test_a_format_renders_only_conversations_it_was_proven_on(roles: Sequence[str]) -> None:
    chat_format, _ = derive_format(template(LLAMA_3))
    assert chat_format is not None
    with pytest.raises(TokenizerError, match="the conversation has the roles"):
        chat_format.render([{"role": role, "content": "x"} for role in roles])


def test_a_format_opens_no_second_assistant_turn() -> None:
    chat_format, _ = derive_format(template(LLAMA_3))
    assert chat_format is not None
    with pytest.raises(TokenizerError, match="ends with the assistant"):
        chat_format.render(talk("Hi", "Hello"), add_generation_prompt=True)


@pytest.mark.parametrize("change", [{"trim": "yes"}, {"user_prefix": None}])
def test_a_damaged_format_is_refused(change: dict[str, Any]) -> None:
    chat_format, _ = derive_format(template(LLAMA_3))
    assert chat_format is not None
    with pytest.raises(TokenizerError, match=f"chat format: {next(iter(change))} must be"):
        ChatFormat.from_dict(chat_format.to_dict() | change)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "not valid jinja"),
        ("{% nonsense %}", "not valid jinja"),
        ("{{ " + "(" * 5000, "not valid jinja"),
        ("x" * 300_000, "300000 characters"),
    ],
)
def test_a_broken_template_is_refused(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        template(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate"),
        ("{{ undefined_name.attribute }}", "undefined"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange too big"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "characters of output"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_fails_is_one_error(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        template(source).render(talk("Hi"))


def test_a_token_that_the_tokenizer_lacks_is_undefined_in_the_template() -> None:
    source = "{{ 'no bos' if bos_token is not defined else bos_token }}{{ eos_token }}"
    assert ChatTemplate(source, bos_token=None, eos_token="</s>").render(talk("Hi")) == "no bos</s>"


GREEDY = {
    "loops in loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% if a %}{% endif %}{% endfor %}{% endfor %}",
        "did not end within 2 seconds",
    ),
    "one long string": ("{{ 'x' * 10**10 }}", "MiB of memory"),
    "a string as wide as asked": ("{{ '%%%ds' % 10**10 % 'x' }}", "memory|OverflowError|too"),
    "a power, while it compiles": ("{{ 9 ** (9 ** 9) }}", "did not end|memory"),
    "doubling": (
        "{% set x = namespace(s='x') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}{{ x.s }}",
        "memory|did not end",
    ),
    "output that does not end": (
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "more than 16777216 characters",
    ),
    "a filter": ("{{ 'x' | center(10**10) }}", "memory|OverflowError"),
    "a list": ("{{ ([0] * 10**9) | length }}", "memory"),
    "nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nesting or recursion"),
}


@pytest.mark.parametrize("name", GREEDY)
@pytest.mark.slow
def test_a_template_beyond_a_limit_is_stopped(name: str) -> None:
    """The next request succeeds."""
    source, reason = GREEDY[name]
    with pytest.raises(TokenizerError, match=reason):
        template(source).render(talk("Hi"))
    assert template("{{ messages[0].content }}").render(talk("next")) == "next"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{% set _ = messages.append(1) %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
    ],
)
def test_a_template_reaches_nothing_outside(source: str) -> None:
    """The template gets an error, or jinja's undefined value, which renders as empty text."""
    try:
        assert template(source).render(talk("Hi")) == ""
    except TokenizerError as error:
        assert "chat template" in error.message


def test_a_template_that_is_killed_by_the_system_is_one_error() -> None:
    """The out-of-memory killer can end the sandbox process at any time."""
    chat_template = template("{{ messages[0].content }}")
    assert chat_template.render(talk("Hi")) == "Hi"
    child = template_sandbox._child
    assert child is not None
    child._process.kill()
    child._process.wait()
    assert chat_template.render(talk("Hi")) == "Hi"
    child = template_sandbox._child
    assert child is not None
    os.kill(child._process.pid, signal.SIGSTOP)
    killer = threading.Timer(0.2, child._process.kill)
    killer.start()
    with pytest.raises(TokenizerError, match="cannot render"):
        chat_template.render(talk("Hi"))
    killer.join()
    assert chat_template.render(talk("Hi")) == "Hi"


@pytest.fixture
def no_child() -> Iterator[None]:
    """No sandbox process before the test, and none after it."""
    template_sandbox._end()
    yield
    template_sandbox._end()


def test_a_process_that_cannot_start_is_no_fault_of_the_template(
    no_child: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bundle would lose its chat format silently if this were taken for the template's own failure."""
    broken = tmp_path / "python"
    broken.write_text(
        "#!/bin/sh\necho 'libpython3.11.so.1.0: cannot open shared object file' >&2\nexit 127\n"
    )
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    for use in (
        lambda: template("{{ messages[0].content }}").render(talk("Hi")),
        lambda: template("{{ 1 }}"),
    ):
        with pytest.raises(ResourceError, match=r"could not work: .*libpython3.11.so.1.0"):
            use()


@pytest.mark.parametrize(
    ("kind", "limit", "reason"),
    [("RLIMIT_CPU", 1, "processor time"), ("RLIMIT_AS", 200 << 20, "200 MiB of address space")],
)
@pytest.mark.skipif(sys.platform != "linux", reason="these limits hold on Linux")
def test_limits_of_the_machine_are_no_fault_of_the_template(kind: str, limit: int, reason: str) -> None:
    """In a process of its own, because a hard limit cannot be raised again."""
    program = f"""
import resource
from edgellama.errors import ResourceError
from edgellama.text import template_sandbox
start = template_sandbox._Child.__init__
def limited(child):
    start(child)
    resource.prlimit(child._process.pid, resource.{kind}, ({limit}, {limit}))
template_sandbox._Child.__init__ = limited
try:
    template_sandbox.render_template("{{{{ 'x' * count }}}}", {{"count": 1 << 28}})
except ResourceError as error:
    print(error.message)
"""
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert "could not work" in output and reason in output


def test_variables_that_a_python_needs_to_start_are_kept(
    no_child: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/python/lib")
    monkeypatch.setenv("PYTHONSTARTUP", "/home/me/startup.py")
    environment = template_sandbox._environment_of_child()
    assert environment == {"PYTHONHASHSEED": "0", "LD_LIBRARY_PATH": "/opt/python/lib"}
    assert template("{{ messages[0].content }}").render(talk("Hi")) == "Hi"
