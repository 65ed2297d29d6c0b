"""The corpora of the quick start: what is a query, what is left in the document, and what a JSONL file may hold."""

import json
import subprocess
import sys

import pytest

from hf_tfast.quickstart import corpus as made
from hf_tfast.quickstart.corpus import load_corpus


@pytest.fixture(scope="module")
def python():
    return load_corpus(documents=12, queries=4)


def plain(text):
    return " ".join(text.lower().split())


def test_queries_are_gone_from_every_document(python):
    everything = plain("\n".join(d.text for d in python.documents))
    assert len(python.queries) > 30
    for query, _, _ in python.queries:
        assert plain(query) not in everything


def test_a_query_is_the_sentence_its_passage_lost(python):
    originals = {name: " ".join(plain(body) for _, body in entries) for name, entries in made._texts()}
    for query, n, at in python.queries:
        document = python.documents[n]
        start, end = document.passages[at]
        passage = document.text[start:end]
        # The passage may begin with a signature; what follows it stood right behind the query.
        rests = [plain(passage), plain(passage.partition("\n")[2])]
        assert any(f"{plain(query)} {rest[:60]}" in originals[document.name] for rest in rests)


def test_passages_lie_in_order_and_cover_the_text(python):
    for document in python.documents:
        at = 0
        for start, end in document.passages:
            assert at <= start < end <= len(document.text)
            assert not document.text[at:start].strip()
            at = end
        assert not document.text[at:].strip()


def test_documents_are_long_and_queries_lie_deep(python):
    assert all(made.SHORTEST * 0.8 <= len(d.text) <= made.LONGEST for d in python.documents)
    starts = [python.documents[n].passages[at][0] for _, n, at in python.queries]
    deep = sum(start > 512 * 5 for start in starts)  # more characters than 512 tokens have
    assert deep > 0.5 * len(starts)


def test_another_process_makes_the_same_corpus(python):
    code = (
        "from hf_tfast.quickstart.corpus import load_corpus; print(load_corpus(documents=12, queries=4).fingerprint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == python.fingerprint


def test_nothing_of_the_standard_library_is_imported():
    code = (
        "import sys; from hf_tfast.quickstart.corpus import load_corpus; load_corpus(documents=3);"
        "print(sorted({'turtle', 'tkinter', 'nntplib', 'antigravity', 'xmlrpc.server'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_jsonl_is_read(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [{"document": "one two\n\nthree", "queries": ["1", "2"]}, {"document": "four", "queries": ["4"]}]
    path.write_text(json.dumps(lines[0]) + "\n\n" + json.dumps(lines[1]) + "\n")
    found = load_corpus(path)
    assert [d.text for d in found.documents] == ["one two\n\nthree", "four"]
    assert found.queries == [("1", 0, None), ("2", 0, None), ("4", 1, None)]


GOOD = json.dumps({"document": "text", "queries": ["a"]})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "not JSON"),
        ("[1]", "got list"),
        ('{"document": "x"}', "got document"),
        ('{"document": "x", "queries": ["a"], "more": 1}', "more"),
        ('{"document": "  ", "queries": ["a"]}', "not empty"),
        ('{"document": 3, "queries": ["a"]}', "not empty"),
        ('{"document": "x", "queries": []}', "at least one"),
        ('{"document": "x", "queries": "a"}', "at least one"),
        ('{"document": "x", "queries": [""]}', "none of them empty"),
        (b'{"document": "\xff", "queries": ["a"]}', "utf-8"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, says):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(f"{GOOD}\n\n".encode() + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError, match=f"mine.jsonl, line 3: .*{says}"):
        load_corpus(path)


def test_too_few_documents_and_no_file(tmp_path):
    (tmp_path / "one.jsonl").write_text(GOOD + "\n")
    with pytest.raises(ValueError, match="holds 1 documents"):
        load_corpus(tmp_path / "one.jsonl")
    with pytest.raises(ValueError, match="is not a file"):
        load_corpus(tmp_path / "none.jsonl")
