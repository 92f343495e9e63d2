"""Conversations by chat templates: ids and masks as transformers gives them, and text that stays text."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dynamic_transformers.data.conversations import (
    BREAK,
    PLAIN_TEMPLATE,
    ConversationEncoder,
    _of_tokens,
)
from dynamic_transformers.data.tokenization import END_OF_TEXT, exact_tokenizer, train_tokenizer
from dynamic_transformers.settings import UserError

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|head|>", "<|/head|>"]
BEGIN, END = "{% generation %}", "{% endgeneration %}"
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nBe of use.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
# Refuses a system message and closes the conversation behind its last turn.
PHI = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system,\nplease') }}{% endif %}"
    "{{ '<|head|>' + m.role + '<|/head|>\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|eot_id|>' }}"
    "{% if loop.last and not add_generation_prompt %}{{ '\n' + eos_token }}{% endif %}{% endgeneration %}"
    "{% else %}{{ m.content + '<|eot_id|>' }}{% endif %}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|head|>assistant<|/head|>\n' }}{% endif %}"
)
# No special tokens: the end of a turn is white space.
ALPACA = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '### Response:\n' }}"
    "{% generation %}{{ m.content + '\n\n' }}{% endgeneration %}"
    "{% else %}{{ '### Instruction:\n' + m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
# Calls of tools; answers of tools, one after the other, share one turn of the user.
TOOLS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{% if m.content is defined %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% elif m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}{{ '<|im_start|>user\n' }}{% endif %}"
    "{{ '[' + m.content + ']' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thoughts stay in the last turn only, which has some even if they are empty.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set thought, _, answer = m.content.rpartition('</think>\n\n') %}"
    "{% if loop.last %}{{ (thought or '<think>') + '</think>\n\n' }}{% endif %}"
    "{% generation %}{{ answer + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA,
    "phi": PHI,
    "alpaca": ALPACA,
    "tools": TOOLS,
    "plain": PLAIN_TEMPLATE,
}


def without_generation(template):
    return template.replace(BEGIN, "").replace(END, "")


def talk(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


CALL = {"function": {"name": "score", "arguments": {"router": "東京", "depth": [1, 2]}}}
CONVERSATIONS = {
    "single": talk("the gate?", "a token 🙂"),
    "multi": talk("the gate?", "a router.", "und résumé", "12 + 7\n\nnaïve", "prior?", "layer"),
    "system": talk("hi", "token", "a", "b", system="select a router"),
    "space": talk(" hi \n", "\n  token\n", "\n", " \n"),
    "empty": talk("hi", "", "and?", "token"),
    "open": talk("hi", "token", "and then?"),
    "tools": [
        {"role": "user", "content": "the score?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "12"},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "12 + 7", "tool_calls": None},
    ],
}
PAIRS = [
    (template, name)
    for template in TEMPLATES
    for name in CONVERSATIONS
    if (template, name) != ("phi", "system") and (name != "tools" or template == "tools")
]


@pytest.fixture(scope="module")
def backend(make_texts):
    backend = train_tokenizer([*make_texts(200), " <|im_end|>user\n\n\n"], 600).backend_tokenizer
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return backend


@pytest.fixture(scope="module")
def make_tokenizer(backend):
    return lambda template: exact_tokenizer(
        backend, chat_template=template, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def by_transformers(tokenizer, messages):
    out = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    return out["input_ids"], out["assistant_masks"]


def target_text(tokenizer, encoded):
    """What has a loss, a bar before each run of it."""
    first = encoded.targets & ~np.concatenate([[False], encoded.targets[:-1]])
    runs = np.split(np.where(encoded.targets, encoded.input_ids, -1), np.flatnonzero(first))
    return ["".join(tokenizer.decode(run[run >= 0])) for run in runs if (run >= 0).any()]


@pytest.mark.parametrize(("template", "name"), PAIRS)
def test_ids_and_mask_are_those_of_transformers(make_tokenizer, template, name):
    tokenizer = make_tokenizer(TEMPLATES[template])
    encoded = ConversationEncoder(tokenizer)(CONVERSATIONS[name])
    ids, mask = by_transformers(tokenizer, CONVERSATIONS[name])
    assert encoded.input_ids.tolist() == ids and encoded.targets.tolist() == [bool(value) for value in mask]
    assert [array.dtype for array in encoded] == [np.int32, np.uint32, np.bool_]


@pytest.mark.parametrize(("template", "name"), PAIRS)
def test_without_generation_blocks_the_prefixes_give_the_same(make_tokenizer, template, name, caplog):
    marked = ConversationEncoder(make_tokenizer(TEMPLATES[template]))(CONVERSATIONS[name])
    plain = ConversationEncoder(make_tokenizer(without_generation(TEMPLATES[template])))(CONVERSATIONS[name])
    for one, other in zip(marked, plain, strict=True):
        assert one.tolist() == other.tolist()
    assert not caplog.records


def test_generation_blocks_decide_where_the_prefixes_would_say_another_thing(make_tokenizer):
    tokenizer = make_tokenizer(QWEN3)
    encoded = ConversationEncoder(tokenizer)(CONVERSATIONS["multi"])
    ids, mask = by_transformers(tokenizer, CONVERSATIONS["multi"])
    assert encoded.input_ids.tolist() == ids and encoded.targets.tolist() == [bool(value) for value in mask]
    assert target_text(tokenizer, encoded)[0] == "a router.<|im_end|>\n"


def test_turns_by_eye(make_tokenizer):
    tokenizer = make_tokenizer(without_generation(CHATML))
    encoded = ConversationEncoder(tokenizer)(CONVERSATIONS["multi"])
    assert target_text(tokenizer, encoded) == [
        "a router.<|im_end|>",
        "12 + 7\n\nnaïve<|im_end|>",
        "layer<|im_end|>",
    ]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("rewrite", [str, without_generation])
def test_target_bytes_are_those_of_the_answers(make_tokenizer, name, rewrite):
    messages = CONVERSATIONS[name]
    encoded = ConversationEncoder(make_tokenizer(rewrite(TOOLS)))(messages)
    answers = [m["content"] or "" for m in messages if m["role"] == "assistant"]
    expected = sum(len(answer.encode()) for answer in answers)
    if name == "tools":
        call = '<tool_call>{"name": "score", "arguments": {"router": "東京", "depth": [1, 2]}}</tool_call>'
        expected += 2 * len(call.encode())
    assert encoded.num_bytes[encoded.targets].sum() == expected
    special = np.isin(encoded.input_ids, make_tokenizer(TOOLS).convert_tokens_to_ids(SPECIAL))
    assert encoded.num_bytes[special].sum() == 0


def test_a_token_shared_by_header_and_answer_counts_the_answers_bytes(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    assert "\n\n" in [tokenizer.decode(id_) for id_ in range(len(tokenizer))]
    encoded = ConversationEncoder(tokenizer)(talk("hi", "\nab"))
    assert target_text(tokenizer, encoded) == ["\n\nab<|im_end|>"]
    assert encoded.num_bytes[encoded.targets].sum() == 3


pieces = st.sampled_from([*SPECIAL, END_OF_TEXT, " ", "\n", "<", "|", "|>", "<|im_", "東", "🙂", "a"])
strings = st.lists(pieces, min_size=1, max_size=6).map("".join)


@given(contents=st.lists(strings, min_size=2, max_size=5))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("rewrite", [str, without_generation])
def test_spellings_in_messages_stay_text(make_tokenizer, rewrite, contents):
    tokenizer = make_tokenizer(rewrite(CHATML))
    encoder = ConversationEncoder(tokenizer)
    encoded = encoder(talk(*contents))
    ids = []
    for turn, content in zip(talk(*contents, system="Be of use."), ["Be of use.", *contents], strict=False):
        plain = tokenizer(f"{turn['role']}\n{content}", split_special_tokens=True)["input_ids"]
        start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        ids += [start, *plain, end, *tokenizer("\n")["input_ids"]]
    assert encoded.input_ids.tolist() == ids
    assert encoded.num_bytes[encoded.targets].sum() == sum(len(text.encode()) for text in contents[1::2])


def test_spellings_in_the_arguments_of_tools_stay_text(make_tokenizer):
    tokenizer = make_tokenizer(TOOLS)
    call = {"function": {"name": "a", "arguments": {"<|im_end|>": ["<|im_start|>"]}}}
    messages = [*talk("hi"), {"role": "assistant", "tool_calls": [call]}]
    encoded = ConversationEncoder(tokenizer)(messages)
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    specials = np.isin(encoded.input_ids, tokenizer.convert_tokens_to_ids(SPECIAL))
    assert specials.sum() == 4


def test_a_tokenizer_with_a_word_marker_at_the_beginning(make_texts):
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "▁", *"abcdefgh<>/s\n"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    template = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token + ' ' }}{% endfor %}"
    tokenizer = exact_tokenizer(backend, bos_token="<s>", eos_token="</s>", chat_template=template)
    encoder = ConversationEncoder(tokenizer)
    encoded = encoder(talk("ab c", "de"))
    ids = tokenizer.apply_chat_template(talk("ab c", "de"), return_dict=False)
    assert encoded.input_ids.tolist() == ids and encoded.num_bytes[encoded.targets].sum() == len("de")
    assert (encoder(talk("ab <s></s>", "de")).input_ids < 2).sum() == 3


def test_a_tokenizer_without_special_tokens():
    backend = Tokenizer(models.BPE({"a": 0, "\n": 1}, []))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    encoded = ConversationEncoder(exact_tokenizer(backend, chat_template=template))(talk("aa", "a\n"))
    assert [array.tolist() for array in encoded] == [[0, 0, 0, 1], [1, 1, 1, 1], [False, False, True, True]]


def test_a_template_that_takes_thoughts_out_gives_a_loss_to_the_last_turn(make_tokenizer, caplog):
    tokenizer = make_tokenizer(without_generation(QWEN3))
    encoder = ConversationEncoder(tokenizer)
    thought = "<think>hm</think>\n\n"
    with caplog.at_level(logging.WARNING):
        encoded = encoder(talk("a", thought + "b", "c", thought + "d"))
        assert target_text(tokenizer, encoded) == [thought + "d<|im_end|>"]
        assert target_text(tokenizer, encoder(talk("a", "b", "c", "d"))) == ["<think></think>\n\nd<|im_end|>"]
    assert len(caplog.records) == 1 and "have no loss" in caplog.text
    with pytest.raises(ValueError, match="another way once others follow"):
        encoder(talk("a", thought + "b", "c"))


@pytest.mark.parametrize("begun", ["<think>\n", "<think>\n\n</think>\n\n"])
def test_a_thought_that_only_the_prompt_begins_is_no_part_of_the_turn(make_tokenizer, begun):
    template = without_generation(CHATML).replace("assistant\n' }}", f"assistant\n{begun}' }}}}")
    assert template != without_generation(CHATML)
    tokenizer = make_tokenizer(template)
    encoded = ConversationEncoder(tokenizer)(talk("a", "<b>", "c", "d"))
    assert target_text(tokenizer, encoded) == ["<b><|im_end|>", "d<|im_end|>"]


def test_a_template_that_writes_the_question_in_another_way_once_answered_gives_no_loss(make_tokenizer):
    template = CHATML.replace("{% else %}", "{% else %}{{ 'Now: ' if loop.last else '' }}")
    with pytest.raises(ValueError, match="another way once others follow"):
        ConversationEncoder(make_tokenizer(without_generation(template)))(talk("a", "b"))


def test_bytes_of_offsets_that_step_back():
    assert _of_tokens(np.array([1, 1, 2, 1, 1]), np.array([1, 3, 2, 5])).tolist() == [1, 3, 0, 2]


def test_an_opening_turn_that_the_template_does_not_allow_first_has_no_loss(make_tokenizer):
    template = without_generation(CHATML).replace("{% for", "{{ messages[0].role[:0] }}{% for", 1)
    tokenizer = make_tokenizer(template)
    encoded = ConversationEncoder(tokenizer)([{"role": "assistant", "content": "hi"}, *talk("a", "b")])
    assert target_text(tokenizer, encoded) == ["b<|im_end|>"]


def test_the_first_token_has_no_loss(make_tokenizer):
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    encoded = ConversationEncoder(make_tokenizer(template))([{"role": "assistant", "content": "12"}])
    assert encoded.targets.tolist() == [False, True]


def test_a_template_that_writes_the_date_writes_the_same_every_day(make_tokenizer):
    today = "strftime_now('%d %b %Y') + strftime_now( \"|%Y-%m-%d\" )"
    tokenizer = make_tokenizer(f"{{% if strftime_now is defined %}}{{{{ {today} }}}}{{% endif %}}{CHATML}")
    encoded = ConversationEncoder(tokenizer)(talk("a", "b"))
    assert tokenizer.decode(encoded.input_ids).startswith("26 Jul 2024|2024-07-26<|im_start|>")


def test_the_plain_template_needs_the_end_of_text_only(make_texts):
    tokenizer = train_tokenizer(make_texts(20), 300, PLAIN_TEMPLATE)
    encoded = ConversationEncoder(tokenizer)(talk("a", "b", "c", "d", system="s"))
    text = (
        "<|endoftext|>system\ns<|endoftext|>user\na<|endoftext|>assistant\nb<|endoftext|>user\nc<|endoftext|>"
    )
    assert tokenizer.decode(encoded.input_ids) == f"{text}assistant\nd<|endoftext|>"
    assert target_text(tokenizer, encoded) == ["b<|endoftext|>", "d<|endoftext|>"]


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (PHI, talk("a", "b", system="c"), "the chat template refuses it: no system, please"),
        (CHATML, talk(None, "b"), "the chat template refuses it: .*content"),
        (CHATML, talk(5, "b"), "the chat template refuses it"),
        (CHATML, [], "there is no turn of the assistant"),
        (CHATML, talk("a"), "there is no turn of the assistant"),
        (without_generation(CHATML), talk("a"), "there is no turn of the assistant"),
        (CHATML, talk("a\ud800", "b"), "no valid UTF-8"),
        (CHATML, talk(BREAK, "b"), "U\\+FDD0"),
        (
            CHATML.replace("m.content", "m.content.replace('<|im_end|>', '')"),
            talk("<|im_end|>", "b"),
            "spelling",
        ),
    ],
)
def test_what_cannot_be_encoded_has_a_reason(make_tokenizer, template, messages, reason):
    with pytest.raises(ValueError, match=reason) as error:
        ConversationEncoder(make_tokenizer(template))(messages)
    assert not isinstance(error.value, UserError) and "\n" not in str(error.value)


def test_a_special_token_that_is_looked_for_in_normalized_text_is_refused_within_messages(backend):
    backend = Tokenizer.from_str(backend.to_str())
    backend.add_tokens([AddedToken("<odd>", special=True, normalized=True)])
    encoder = ConversationEncoder(exact_tokenizer(backend, chat_template=CHATML))
    encoder(talk("a", "<od"))
    with pytest.raises(ValueError, match="cannot take as text"):
        encoder(talk("a", "<odd>"))


@pytest.mark.parametrize(
    ("template", "reason"), [(None, "has no chat template"), ("\n{% for %}", "line 2 of the chat template")]
)
def test_a_tokenizer_without_a_sound_template_is_a_users_mistake(make_tokenizer, template, reason):
    with pytest.raises(UserError, match=reason):
        ConversationEncoder(make_tokenizer(template))
