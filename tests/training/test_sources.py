"""Texts: where they come from, what is refused, and the split by document."""

import random
import sys

import pytest

from hf_tfast.training import sources
from hf_tfast.training.sources import Document, documents, hub_documents, python_documents, shuffled, split_documents
from tests.training.tiny import write_texts


def test_python_reads_itself():
    found = python_documents()
    names = [document.name for document in found]
    assert "python/ast.py" in names
    assert "python/help/if" in names
    assert len(set(names)) == len(names)
    assert not any("site-packages" in name or name.startswith("python/test/") for name in names)
    assert sum(len(document.text) for document in found) > 1_000_000


def test_a_python_without_sources_is_told(monkeypatch):
    monkeypatch.setattr(sources, "python_files", dict)
    with pytest.raises(ValueError, match="name texts of your own"):
        python_documents()


def test_files_globs_and_folders_give_the_same(tmp_path):
    folder = write_texts(tmp_path / "texts")
    (folder / ".hidden").write_bytes(b"\xff")
    by_folder = documents([str(folder)])
    assert len(by_folder) == 8
    assert by_folder == documents([str(folder / "*.txt")])
    assert documents([str(folder / "3.txt"), str(folder / "3.*")]) == [by_folder[3]]
    assert by_folder[3].text == (folder / "3.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p.mkdir(), "holds no files"),
        (lambda p: None, "matches no file"),
        (lambda p: p.write_bytes(b"abc\xff\xfe"), "not text in UTF-8"),
        (lambda p: p.write_bytes(b"abc\0def"), "holds NUL bytes"),
    ],
)
def test_bad_texts_are_told(tmp_path, make, words):
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=words):
        documents([str(tmp_path / "x")])


def test_no_text_is_told():
    with pytest.raises(ValueError, match="no text was named"):
        documents([])


def test_the_hub_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"hf_tfast\[data\]"):
        hub_documents("wikitext")


class Rows:
    """Stands for a data set of `datasets`."""

    column_names = ("text", "label")

    def __init__(self, texts):
        self.texts = texts

    def __getitem__(self, column):
        return self.texts if column == "text" else [0] * len(self.texts)


@pytest.fixture
def hub(monkeypatch):
    asked = []

    def load(*given, **options):
        asked.append((given, options))
        return Rows(["one", "", "three"])

    monkeypatch.setitem(sys.modules, "datasets", type("datasets", (), {"load_dataset": staticmethod(load)}))
    return asked


def test_hub_rows_are_documents(hub):
    found = hub_documents("wikitext", "raw", "test")
    assert [document.text for document in found] == ["one", "", "three"]
    assert [document.name for document in found] == ["wikitext/test/0", "wikitext/test/1", "wikitext/test/2"]
    assert hub == [(("wikitext", "raw"), {"split": "test"})]


@pytest.mark.parametrize(("column", "words"), [("body", "no column 'body'"), ("label", "row 0 is int")])
@pytest.mark.usefixtures("hub")
def test_hub_columns_have_to_be_text(column, words):
    with pytest.raises(ValueError, match=words):
        hub_documents("wikitext", column=column)


def test_a_local_data_set(tmp_path):
    """The real library, over files and without a network."""
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one", "n": 1}\n{"text": "two", "n": 2}\n')
    found = hub_documents(str(tmp_path / "set"))
    assert [document.text for document in found] == ["one", "two"]
    with pytest.raises(ValueError, match="no column 'body'; it has text, n"):
        hub_documents(str(tmp_path / "set"), column="body")


@pytest.mark.parametrize("seed", range(20))
def test_split(seed):
    draw = random.Random(seed)
    found = [Document(f"d{n}", "x" * draw.randrange(0, 50)) for n in range(draw.randrange(3, 40))]
    found += [Document("a", "y"), Document("b", "z")]
    share = draw.uniform(0.01, 0.95)
    train, held = split_documents(found, share, seed)
    full = {document.name for document in found if document.text}
    assert {d.name for d in train} | {d.name for d in held} == full
    assert len(train) + len(held) == len(full)
    assert train
    assert held
    size = sum(len(document.text) for document in found)
    if len(train) > 1:
        assert sum(len(document.text) for document in held) >= share * size
    assert sum(len(document.text) for document in held[:-1]) < share * size
    assert (train, held) == split_documents(draw.sample(found, len(found)), share, seed)  # whatever their order was


def test_split_depends_on_the_seed():
    found = [Document(f"d{n}", "x") for n in range(30)]
    assert len({split_documents(found, 0.1, seed)[1][0].name for seed in range(10)}) > 3
    assert shuffled(found[:20], 3) == [document for document in shuffled(found, 3) if int(document.name[1:]) < 20]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_share_is_checked(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_documents([Document("a", "x"), Document("b", "y")], share)


def test_one_document_cannot_be_split():
    with pytest.raises(ValueError, match="at least two documents that are not empty, got 1"):
        split_documents([Document("a", "x"), Document("b", "")], 0.1)
