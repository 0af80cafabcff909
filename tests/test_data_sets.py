"""`hf_topk.documents`: data sets, with a replaced `load_dataset`."""

import sys

import pytest
from support.documents import check_unreadable

from hf_topk import documents
from hf_topk.documents import read_documents
from hf_topk.model.errors import InputError


@pytest.fixture
def hub(monkeypatch):
    """Replaces `load_dataset`: streams `hub.rows` or raises `hub.error`; `hub.calls` has the arguments."""
    datasets = pytest.importorskip("datasets")

    class Hub:
        def __init__(self):
            self.rows, self.error, self.calls = [], None, []

        def load_dataset(self, name, config, *, split, streaming):
            self.calls.append((name, config, split, streaming))
            if self.error:
                raise self.error
            if isinstance(self.rows, list):
                return datasets.Dataset.from_list(self.rows).to_iterable_dataset()
            return datasets.IterableDataset.from_generator(self.rows)  # its columns are not known beforehand

    fake = Hub()
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    return fake


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("wikitext", ("wikitext", None, "train", True)),
        ("owner/set-1.0", ("owner/set-1.0", None, "train", True)),
        ("owner/set:en", ("owner/set", "en", "train", True)),
        ("owner/set:20231101.en:test", ("owner/set", "20231101.en", "test", True)),
        ("owner/set::validation", ("owner/set", None, "validation", True)),
    ],
)
def test_data_set_name(hub, source, call):
    hub.rows = [{"text": "one", "n": 1}, {"text": " ", "n": 2}, {"text": "two", "n": 3}]
    assert read_documents(source) == ["one", "two"]
    assert hub.calls == [call]


def test_data_set_stops_at_the_limit(hub, monkeypatch):
    monkeypatch.setattr(documents, "TEXT_LIMIT", 10)
    hub.rows = [{"body": "x" * 6} for _ in range(100)]
    assert read_documents("owner/set") == ["x" * 6] * 2


def test_data_set_without_a_text_key(hub):
    hub.rows = [{"q": "x", "a": "y"}]
    assert check_unreadable("owner/set", "'q', 'a'").startswith("Data set owner/set, row 1: no 'text'")


ERRORS = [
    ("builtins", "ConnectionError", "Couldn't reach 'owner/set' on the Hub (LocalEntryNotFoundError)"),
    ("builtins", "ValueError", "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"),
    ("builtins", "RuntimeError", "Dataset scripts are no longer supported, but found set.py"),
    ("builtins", "ImportError", "To support decoding images, please install 'Pillow'."),
    ("datasets.exceptions", "DatasetNotFoundError", "Dataset 'owner/set' doesn't exist on the Hub"),
    ("huggingface_hub.errors", "HTTPError", "Name or service not known"),
    ("huggingface_hub.errors", "OfflineModeIsEnabled", "offline mode is enabled"),
    ("pyarrow", "ArrowInvalid", "Not an Arrow file"),
]


@pytest.mark.parametrize(("module", "name", "message"), ERRORS)
def test_data_set_that_cannot_be_read(hub, module, name, message):
    hub.error = getattr(pytest.importorskip(module), name)(message)
    with pytest.raises(InputError) as caught:
        read_documents("owner/set")
    assert caught.value.__cause__ is hub.error
    one_line = " ".join(message.split())
    check_unreadable("owner/set", "no file or folder 'owner/set'", one_line, "check the name", "network", "give a file")


def test_data_set_that_fails_while_streaming(hub):
    def rows():
        yield {"body": "one"}
        raise ConnectionError("the line went dead")

    hub.rows = rows
    check_unreadable("owner/set", "the line went dead")


def test_data_set_offline(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    check_unreadable("owner/no-such-set", "Couldn't reach 'owner/no-such-set' on the Hub", "network")


@pytest.mark.parametrize("name", ["text", "json", "csv"])
def test_data_set_named_like_a_file_reader_does_not_read_the_folder(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    check_unreadable(name, "There is no file or folder", "check the path")
    assert not hub.calls


def test_datasets_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitexts").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    check_unreadable("wikitext", "'wikitext'", "did you mean wikitexts?", "pip install 'hf-topk[datasets]'")
