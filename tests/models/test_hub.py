"""Where a checkpoint lies: a folder, or the hub, which a stub stands in for."""

import pathlib

import huggingface_hub
import pytest

from sparseattn_jax.models import hub


def test_a_folder_is_itself(tmp_path):
    assert hub.folder_of(tmp_path) == hub.folder_of(str(tmp_path)) == tmp_path


def test_a_name_is_fetched_from_the_hub(tmp_path, monkeypatch):
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options.pop("revision")))
        assert options.keys() == {"allow_patterns"}
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.folder_of("organisation/model-1.5", revision="v2") == tmp_path
    assert hub.folder_of("organisation/model") == tmp_path
    assert calls == [("organisation/model-1.5", "v2"), ("organisation/model", None)]


def test_the_hub_gives_only_what_is_read():
    """A repository may hold the weights in several formats."""
    wanted = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]
    others = [
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "tokenizer.model",
        "README.md",
    ]
    matches = huggingface_hub.utils.filter_repo_objects(
        wanted + others, allow_patterns=list(hub._FILES)
    )
    assert list(matches) == wanted


def test_what_the_hub_refuses_is_said(monkeypatch):
    def snapshot_download(name, **_):
        raise OSError("no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    sentence = "source='no/such' is no folder here, and the hub does not give it: no such repos"
    with pytest.raises(ValueError, match=sentence):
        hub.folder_of("no/such")


@pytest.mark.parametrize(
    "source", ["no_such_folder", "a/b/c", "", "../up", pathlib.Path("no/such")], ids=str
)
def test_refuses_what_is_neither_folder_nor_name(source):
    with pytest.raises(ValueError, match="is neither a folder nor the name of a model on the hub"):
        hub.folder_of(source)


def test_a_folder_has_no_revisions(tmp_path):
    with pytest.raises(ValueError, match="revision='v2' chooses among versions on the hub"):
        hub.folder_of(tmp_path, revision="v2")
