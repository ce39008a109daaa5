"""Text to tokens and back, chats included, by the tokenizer files of a Hugging Face folder."""

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from sparseattn_jax.models import hub

type Message = Mapping[str, Any]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """The tokenizer of a model.

    Attributes:
        eos_ids: tokens that end a text, none if the folder names none.
        vocab_size: one more than the largest token id.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        """A tokenizer of these parts; `load` finds them in a folder.

        Args:
            backend: of the tokenizers library.
            eos_ids: tokens that end a text.
            chat_template: in Jinja, as `apply_chat_template` of transformers reads it.
            special_tokens: what the template knows as `bos_token` and the like.
        """
        self.eos_ids = tuple(eos_ids)
        self.vocab_size = 1 + max(backend.get_vocab().values(), default=-1)
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self._template = None if chat_template is None else _compiled(chat_template)

    @classmethod
    def load(cls, source: str | pathlib.Path, *, revision: str | None = None) -> "Tokenizer":
        """The tokenizer of a checkpoint: tokenizer.json and, where there are, its settings.

        Args:
            source: a folder, or `organisation/name` on Hugging Face's hub.
            revision: branch, tag or commit on the hub.

        Raises:
            ValueError: there is no tokenizer.json, or a file is broken.
        """
        folder = hub.folder_of(source, revision=revision)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"{folder} lacks {path.name}; other formats of tokenizers are not read"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises no class of its own
            raise ValueError(f"{path} is no tokenizer: {error}") from error
        backend.no_padding()
        backend.no_truncation()
        settings = _settings(folder, "tokenizer_config.json")
        special_tokens = {}
        for role in _ROLES:
            token = settings.get(role)
            if isinstance(token, dict):
                token = token.get("content")
            if token is not None:
                special_tokens[role] = token
        return cls(
            backend,
            eos_ids=_eos_ids(folder, backend, special_tokens.get("eos_token")),
            chat_template=_chat_template(folder, settings),
            special_tokens=special_tokens,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text; those that spell special tokens become these.

        Args:
            text: any text.
            add_special_tokens: put those around it that tokenizer.json's post-processor has, such
                as the beginning of a text.
        """
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens. Bytes that are no UTF-8 become U+FFFD, and ids past the vocabulary,
        which models with padded tables can emit, nothing.

        Args:
            ids: the tokens.
            skip_special_tokens: leave out special tokens, such as the end of a text.

        Raises:
            ValueError: an id is negative.
        """
        ids = [int(i) for i in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"token ids must not be negative; one is {min(ids)}")
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """The tokens of a conversation in the form that the model was trained on.

        Args:
            messages: each with a `role`, as system, user or assistant, and its `content`.
            add_generation_prompt: end with the words that open an answer.

        Raises:
            ValueError: the tokenizer has no chat template, or its template refuses the messages.
        """
        if self._template is None:
            raise ValueError("the tokenizer has no chat template; encode the text itself")
        try:
            text = self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        # What is special is in the template already.
        return self.encode(text, add_special_tokens=False)

    def stream(self, *, skip_special_tokens: bool = True) -> "TextStream":
        """Turns tokens that come one by one into text."""
        return TextStream(self, skip_special_tokens=skip_special_tokens)


class TextStream:
    """Text of tokens as they come, in pieces that hold whole characters.

    The pieces, that of `finish` last, make up the text that all tokens together decode to.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # Tokens of the last piece and since. The last piece is decoded again with what follows,
        # because decoders treat the first token of a text specially.
        self._ids: list[int] = []
        self._num_given = 0

    def push(self, token: int) -> str:
        """What text the next token completes; empty while a character lacks bytes."""
        self._ids.append(token)
        text = self._pending()
        # A character that lacks bytes decodes to U+FFFD; so do bytes that are none, which wait for
        # the next token, or for `finish`.
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._ids = self._ids[self._num_given :]
        self._num_given = len(self._ids)
        return text

    def finish(self) -> str:
        """The text that still waited for its last bytes."""
        text = self._pending()
        self._ids, self._num_given = [], 0
        return text

    def _pending(self) -> str:
        given = self._decode(self._ids[: self._num_given])
        return self._decode(self._ids)[len(given) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


def _settings(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """A JSON file that may be absent."""
    return hub.read_json(folder / name) if (folder / name).is_file() else {}


def _eos_ids(
    folder: pathlib.Path, backend: tokenizers.Tokenizer, token: str | None
) -> tuple[int, ...]:
    """The tokens that end a text, from the first of the files that names any."""
    for name in ("generation_config.json", "config.json"):
        found = _settings(folder, name).get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"{folder / name}: eos_token_id={found!r} must be one id or a list")
        return tuple(ids)
    found = None if token is None else backend.token_to_id(token)
    return () if found is None else (found,)


def _chat_template(folder: pathlib.Path, settings: dict[str, Any]) -> str | None:
    """The template, from its own file or the settings; of several, the one called default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        settings = hub.read_json(folder / "chat_template.json")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ValueError(f"{folder} has chat templates {sorted(named)}, but no default")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder}: chat_template must be text, not {type(template).__name__}")
    return template


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what a model learns to say, marks nothing here."""

    tags = {"generation"}  # noqa: RUF012  (as its base class declares it)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compiled(source: str) -> jinja2.Template:
    """A chat template, which is another's code, in a sandbox with the helpers it may call."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno} of the chat template: {error}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    """Without the escapes for HTML that Jinja's own has."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
