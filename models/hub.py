"""Where a model in Hugging Face's format lies: in a folder, or on the hub, which is fetched."""

import json
import pathlib
import re
from typing import Any

_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.*",
)


def folder_of(source: str | pathlib.Path, *, revision: str | None = None) -> pathlib.Path:
    """The local folder of a model.

    Args:
        source: a folder, or `organisation/name` on the hub, whose files are fetched into
            huggingface_hub's cache unless they are there.
        revision: branch, tag or commit on the hub; its main branch unless given.

    Raises:
        ValueError: source is neither, or the hub does not give it.
    """
    folder = pathlib.Path(source)
    if str(source) and folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} chooses among versions on the hub, but source={source} is "
                "a folder; leave it out"
            )
        return folder
    if not isinstance(source, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise ValueError(
            f"source={source} is neither a folder nor the name of a model on the hub, as in "
            "'organisation/name'"
        )
    # Here, because folders need none of it, and it loads a web client.
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            source, revision=revision, allow_patterns=list(_FILES)
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"source={source!r} is no folder here, and the hub does not give it: {error}"
        ) from error
    return pathlib.Path(found)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: there is no such file, or it holds no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} lacks {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold an object, not {type(value).__name__}")
    return value
