"""Chat templates: the text that transformers makes, and programs that must not do harm."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from sparserve.engine import chat
from sparserve.engine.chat import ChatTemplate, Conversation
from sparserve.errors import ChatUnavailable, InvalidRequest

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRIPPING = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
WITH_TOOLS = """{%- if tools %}
    {{- 'Tools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == "skip" %}{% continue %}{% endif %}
    {%- if m.tool_calls %}
        {%- for call in m.tool_calls %}
            {{- '<call>' + call.function.name + ' ' + call.function.arguments | tojson + '</call>' }}
        {%- endfor %}
    {%- else %}
        {{- '<' + m.role + '>' + m.content }}
    {%- endif %}
{% endfor %}
{% set ns = namespace(found=false) %}{% set ns.found = true %}
{{ ns.found }} {{ enable_thinking is defined and not enable_thinking }} {{ documents is none }}
{% generation %}said{% endgeneration %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
TEMPLATES = [CHATML, STRIPPING, WITH_TOOLS]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How it is <outside> & ü",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
    ],
}


def by_transformers(template: str, conversation: Conversation) -> str:
    (text,), _ = render_jinja_template(
        [[dict(m) for m in conversation.messages]],
        tools=list(conversation.tools) or None,
        chat_template=template,
        continue_final_message=conversation.continue_final_message,
        add_generation_prompt=not conversation.continue_final_message,
        **SPECIAL,
        **conversation.arguments,
    )
    return text


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "skip"]), "content": TEXTS}
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(messages=MESSAGES)
def test_the_text_is_that_of_transformers(template, messages):
    conversation = Conversation(messages)
    assert ChatTemplate(template, SPECIAL).render(conversation) == by_transformers(
        template, conversation
    )


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(messages=MESSAGES, last=TEXTS)
def test_a_message_is_continued_as_by_transformers_or_not_at_all(template, messages, last):
    messages = [*messages, {"role": "assistant", "content": last}]
    conversation = Conversation(messages, continue_final_message=True)
    ours = ChatTemplate(template, SPECIAL)
    try:
        expected = by_transformers(template, conversation)
    except ValueError:
        with pytest.raises(InvalidRequest):
            ours.render(conversation)
    else:
        assert ours.render(conversation) == expected
        assert messages[-1]["content"] == last  # the caller's own is not touched


def test_tools_calls_and_more_names_are_those_of_transformers():
    conversation = Conversation(
        [{"role": "user", "content": "Rain?"}, CALL, {"role": "tool", "content": "no"}],
        tools=[TOOL],
        arguments={"enable_thinking": False},
    )
    text = ChatTemplate(WITH_TOOLS, SPECIAL).render(conversation)
    assert text == by_transformers(WITH_TOOLS, conversation)
    assert '<call>weather {"city": "Zürich"}</call>' in text
    assert "True True True" in text


def test_ordinary_arithmetic_works():
    template = (
        "{{ 3 * 4 }} {{ 10**9 * 10**9 }} {{ 2 ** 10 }} {{ '-' * 3 }} {{ 0.5 * 4 }} {{ 3 * [1] }}"
    )
    text = ChatTemplate(template, {}).render(Conversation([{"role": "user", "content": "x"}]))
    assert text == "12 1000000000000000000 1024 --- 2.0 [1, 1, 1]"


def test_tools_are_refused_where_the_template_does_not_look_at_them():
    conversation = Conversation([{"role": "user", "content": "tools"}], tools=[TOOL])
    with pytest.raises(InvalidRequest, match="does not know tools") as refused:
        ChatTemplate("{{ 'tools' }}{# tools #}" + CHATML, {}).render(conversation)
    assert refused.value.field == "tools"


# It writes what it knows and nothing of other roles.
STRICT = (
    "{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }}{% elif m['role'] == 'assistant' %}"
    "A {{ m.content }}{% endif %}{% endfor %}"
)
RESULT = {"role": "tool", "content": "no", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("template", "message", "field"),
    [
        (CHATML, CALL, "tool_calls"),
        (STRICT, CALL, "tool_calls"),
        (CHATML, RESULT, "tool_call_id"),
        (STRICT, {"role": "tool", "content": "no"}, "role"),
        (CHATML, {"role": "user", "content": "x", "name": "Ann"}, "name"),
        ("{# m.tool_calls #}tool_calls" + CHATML, CALL, "tool_calls"),
    ],
)
def test_what_a_template_would_leave_out_is_refused(template, message, field):
    conversation = Conversation([{"role": "user", "content": "x"}, message])
    with pytest.raises(InvalidRequest, match="does not know") as refused:
        ChatTemplate(template, SPECIAL).render(conversation)
    assert refused.value.field == f"messages[1].{field}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML, {"role": "tool", "content": "no"}),  # it writes any role
        (STRICT.replace("user", "tool"), {"role": "tool", "content": "no"}),
        (WITH_TOOLS, RESULT),  # by the order of calls and results
        ("{{ messages[1].name }}", {"role": "user", "content": "x", "name": "Ann"}),
        ("{{ messages[1]['name'] }}", {"role": "user", "content": "x", "name": "Ann"}),
        ("{{ messages[1].get('tool_call_id') }}" + CHATML, RESULT),
    ],
)
def test_what_a_template_knows_is_rendered_as_by_transformers(template, message):
    conversation = Conversation([{"role": "user", "content": "x"}, message])
    ours = ChatTemplate(template, SPECIAL).render(conversation)
    assert ours == by_transformers(template, conversation)
    without = Conversation([conversation.messages[0], {**message, "content": "", "name": ""}])
    assert ours != by_transformers(template, without)  # it is in the prompt


def test_only_what_the_assistant_said_can_be_continued():
    conversation = Conversation([{"role": "user", "content": "x"}], continue_final_message=True)
    with pytest.raises(InvalidRequest) as refused:
        ChatTemplate(CHATML, {}).render(conversation)
    assert refused.value.field == "continue_final_message"
    assert str(refused.value) == "the last message's role is 'user'; it must be assistant"


def test_what_the_server_sets_cannot_be_an_argument():
    for name in ("messages", "tools", "documents", "add_generation_prompt"):
        conversation = Conversation([{"role": "user", "content": "x"}], arguments={name: 1})
        with pytest.raises(InvalidRequest) as refused:
            ChatTemplate(CHATML, {}).render(conversation)
        assert refused.value.field == f"template_arguments.{name}"


@pytest.mark.parametrize("source", ["{% for", "{{ 1 +", "{% include 'x' %}", "{{ x | nope }}"])
def test_a_template_that_is_none_cannot_chat(source):
    with pytest.raises((ChatUnavailable, InvalidRequest)) as refused:
        ChatTemplate(source, {}).render(Conversation([{"role": "user", "content": "x"}]))
    assert "chat template" in str(refused.value)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must"),
        ("{{ messages[5].x.y }}", "failed on these messages: UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "s of work"),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "characters of text"),
        ("{{ 'a' * 10 ** 15 }}", "too large"),
        ("{{ 10 ** 15 * 'a' }}", "too large"),
        ("{{ 7 ** (9 ** 99) }}", "too large"),
    ],
)  # fmt: skip
def test_a_template_that_fails_is_one_clear_refusal_and_soon(monkeypatch, source, told):
    monkeypatch.setattr(chat, "MAX_RENDER_SECONDS", 0.5)
    begun = time.thread_time()
    with pytest.raises((InvalidRequest, ChatUnavailable), match="chat template") as refused:
        ChatTemplate(source, {}).render(Conversation([{"role": "user", "content": "x"}]))
    assert told in str(refused.value)
    assert refused.value.field == "messages"
    assert time.thread_time() - begun < 5
