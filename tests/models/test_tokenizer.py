"""Text to tokens and back, chats, and text of tokens that come one by one."""

import datetime
import json

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers, processors

from sparseattn_jax.models.tokenizer import Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<s>", "</s>", "<|turn|>"]
BOS, EOS, TURN = range(256, 259)
CHAT = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ("user", "assistant") %}
        {{- raise_exception("no role " + message.role) }}
    {%- endif %}
<|turn|>{{ message.role }}: {{ message.content | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|turn|>assistant:
{%- endif %}
"""
MESSAGES = [{"role": "user", "content": " 1 < 2? "}, {"role": "assistant", "content": "ja, ü"}]


def backend():
    """Bytes as tokens, with <s> before a text."""
    vocab = {character: i for i, character in enumerate(ALPHABET)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return made


def write(folder, *, settings=None, **files):
    """A folder with the tokenizer and further files, as objects or text."""
    backend().save(str(folder / "tokenizer.json"))
    if settings is not None:
        files["tokenizer_config.json"] = settings
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def with_template(template, **special_tokens):
    return Tokenizer(backend(), chat_template=template, special_tokens=special_tokens)


def shown(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_encodes_as_tokenizer_json_says(tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path))
    plain = tokenizer.encode("ab", add_special_tokens=False)
    assert plain == [ALPHABET.index("a"), ALPHABET.index("b")]
    assert tokenizer.encode("ab") == [BOS, *plain]
    assert tokenizer.encode("ab</s>", add_special_tokens=False) == [*plain, EOS]
    assert tokenizer.vocab_size == 259


def test_padding_and_truncation_of_tokenizer_json_are_off(tmp_path):
    """Files from training have them; a prompt must be neither cut nor filled up."""
    made = backend()
    made.enable_padding(length=9)
    made.enable_truncation(max_length=4)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert [len(tokenizer.encode(text)) for text in ("a", "abcdefgh")] == [2, 9]


@hypothesis.given(text=st.text(max_size=20))
def test_decoding_undoes_encoding(text):
    tokenizer = Tokenizer(backend())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert shown(tokenizer, tokenizer.encode(text)) == "<s>" + text


def test_decoding_passes_over_ids_past_the_vocabulary():
    tokenizer = Tokenizer(backend())
    assert tokenizer.decode([ALPHABET.index("a"), 4000, ALPHABET.index("b")]) == "ab"
    with pytest.raises(ValueError, match="token ids must not be negative; one is -1"):
        tokenizer.decode([3, -1])


@hypothesis.given(ids=st.lists(st.integers(0, 258), max_size=12), skip=st.booleans())
def test_a_stream_gives_the_same_text_in_whole_characters(ids, skip):
    """Whatever the bytes, also those that are no UTF-8."""
    tokenizer = Tokenizer(backend())
    stream = tokenizer.stream(skip_special_tokens=skip)
    pieces = [stream.push(token) for token in ids]
    assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces)
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_stream_waits_for_the_bytes_of_a_character():
    tokenizer = Tokenizer(backend())
    ids = tokenizer.encode("né🎉!", add_special_tokens=False)
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids] == ["n", "", "é", "", "", "", "🎉", "!"]
    assert stream.finish() == ""
    # And it starts anew.
    assert [stream.push(token) for token in ids[3:5]] == ["", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_stream_keeps_spaces_that_decoders_strip_at_the_start():
    """As of LLaMA 2, whose decoder drops the space of the first word."""
    vocab = {"<unk>": 0, "▁so": 1, "▁it": 2, "s": 3}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    stream = Tokenizer(made).stream()
    assert [stream.push(token) for token in (1, 2, 3)] == ["so", " it", "s"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, (), id="none"),
        pytest.param({"config.json": {"eos_token_id": 7}}, (7,), id="config"),
        pytest.param(
            {
                "config.json": {"eos_token_id": 7},
                "generation_config.json": {"eos_token_id": [8, 9]},
            },
            (8, 9),
            id="generation-first",
        ),
        pytest.param(
            {"config.json": {"eos_token_id": 7}, "generation_config.json": {}}, (7,), id="silent"
        ),
        pytest.param({"settings": {"eos_token": "</s>"}}, (EOS,), id="token"),
        pytest.param({"settings": {"eos_token": {"content": "</s>"}}}, (EOS,), id="added-token"),
        pytest.param({"settings": {"eos_token": "</gone>"}}, (), id="unknown-token"),
    ],
)
def test_finds_what_ends_a_text(files, expected, tmp_path):
    assert Tokenizer.load(write(tmp_path, **files)).eos_ids == expected


CHATTED = "<s><|turn|>user: 1 < 2?</s>\n<|turn|>assistant: ja, ü</s>\n"
ROLES = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"settings": {**ROLES, "chat_template": CHAT}}, id="settings"),
        pytest.param(
            {
                "settings": {
                    **ROLES,
                    "chat_template": [
                        {"name": "tool_use", "template": "no"},
                        {"name": "default", "template": CHAT},
                    ],
                }
            },
            id="list",
        ),
        pytest.param(
            {"settings": {**ROLES, "chat_template": "no"}, "chat_template.jinja": CHAT}, id="jinja"
        ),
        pytest.param({"settings": ROLES, "chat_template.json": {"chat_template": CHAT}}, id="json"),
    ],
)
def test_chats_by_the_template_wherever_it_is(files, tmp_path):
    tokenizer = Tokenizer.load(write(tmp_path, **files))
    # The template has <s>, so that encoding adds no second one.
    assert shown(tokenizer, tokenizer.chat(MESSAGES, add_generation_prompt=False)) == CHATTED
    assert shown(tokenizer, tokenizer.chat(MESSAGES)) == CHATTED + "<|turn|>assistant:"
    assert TURN in tokenizer.chat(MESSAGES)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "ü", "content": "<&>"}]'),
        ("{% for m in messages %}{% break %}{% endfor %}x", "x"),
        ("{% generation %}a{{ messages[0].role }}{% endgeneration %}b", "aüb"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
        ("{{ unk_token is defined }} {{ tools is defined }}", "False False"),
        ("{{ strftime_now('%Y') }}", str(datetime.datetime.now().year)),
    ],
    ids=["tojson", "break", "generation", "trimmed", "undefined", "now"],
)
def test_templates_have_the_helpers_of_transformers(template, expected):
    tokenizer = with_template(template)
    assert shown(tokenizer, tokenizer.chat([{"role": "ü", "content": "<&>"}])) == expected


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "the tokenizer has no chat template; encode the text itself"),
        (CHAT, "the chat template refuses the messages: no role system"),
        ("{{ messages.append(1) }}", "the chat template refuses the messages: .*append"),
        ("{{ messages.__class__.__mro__ }}", "the chat template refuses the messages"),
        ("{{ messages[0].content + 1 }}", "the chat template refuses the messages"),
    ],
    ids=["none", "role", "changes-them", "reaches-out", "type"],
)
def test_chat_refuses(template, sentence):
    with pytest.raises(ValueError, match=sentence):
        with_template(template).chat([{"role": "system", "content": "hello"}])


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"tokenizer.json": "{}"}, r"tokenizer.json is no tokenizer"),
        ({"settings": "["}, r"tokenizer_config.json is not JSON"),
        ({"settings": {"chat_template": 3}}, r"chat_template must be text, not int"),
        ({"settings": {"chat_template": "{% if %}"}}, r"line 1 of the chat template"),
        (
            {"settings": {"chat_template": [{"name": "rag", "template": ""}]}},
            r"has chat templates \['rag'\], but no default",
        ),
        (
            {"config.json": {"eos_token_id": ["2"]}},
            r"config.json: eos_token_id=\['2'\] must be one id or a list",
        ),
    ],
    ids=["tokenizer", "json", "template-type", "template-syntax", "templates", "eos"],
)
def test_load_refuses(files, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        Tokenizer.load(write(tmp_path, **files))


def test_a_folder_without_tokenizer_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lacks tokenizer.json; other formats of tokenizers"):
        Tokenizer.load(tmp_path)
