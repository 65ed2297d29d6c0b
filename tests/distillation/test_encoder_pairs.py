"""Pairs from files, examples made from texts, and what is left out because it is evaluated."""

import gzip
import json
import random

import pytest

from hf_tfast.distillation.encoder_pairs import QUERY, Example, Query, cloze, pieces, read_pairs, without


def sentence(draw, words=15):
    return " ".join("".join(draw.choices("abcdefgh", k=6)) for _ in range(words)).capitalize() + "."


def story(seed, paragraphs=30, sentences=4):
    draw = random.Random(seed)
    return "\n\n".join(" ".join(sentence(draw) for _ in range(sentences)) for _ in range(paragraphs))


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_lines_of_one_document_are_one_example(tmp_path, name):
    lines = [{"query": "a?", "document": "one"}, {"queries": ["b?", "c?"], "document": "two"}]
    lines.append({"query": "d?", "document": "one"})
    data = "\n\n".join(map(json.dumps, lines)).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = [(e.text, [q.text for q in e.queries]) for e in read_pairs(tmp_path / name)]
    assert found == [("one", ["a?", "d?"]), ("two", ["b?", "c?"])]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2.*got list"),
        ('{"query": "a"}', "line 2.*got query"),
        ('{"query": " ", "document": "d"}', "line 2.*not empty"),
        ('{"queries": [], "document": "d"}', "line 2.*queries"),
        ('{"queries": ["a", 3], "document": "d"}', "line 2.*queries"),
        ('{"query": "a", "document": 7}', "line 2.*document"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "document": "d"}\n' + line)
    with pytest.raises(ValueError, match=words):
        read_pairs(tmp_path / "pairs.jsonl")


def test_no_pairs(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no pairs"):
        read_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match="not a file"):
        read_pairs(tmp_path / "none.jsonl")


@pytest.mark.parametrize("seed", range(3))
def test_clozes_leave_the_document_and_know_their_place(seed):
    text = story(seed)
    example = cloze("a", text, 6, seed)
    assert len(example.queries) == 6
    assert sum(q.place is not None for q in example.queries) == 3
    assert len(example.text) > 0.75 * len(text)
    for query in example.queries:
        assert len(query.text.split()) >= QUERY[0]
        for part in query.text.split(". "):
            assert part in text.replace("\n", " ")
            assert part not in example.text
        if query.place is not None:  # what stood around the query stands in its place
            at = text.index(query.text)
            start, end = query.place
            gone = " ".join(q.text for q in example.queries)
            for beside in (text[max(at - 20, 0) : at], text[at + len(query.text) :][:20]):
                assert beside.strip() in example.text[start:end] or beside.strip() in gone
    assert cloze("a", text, 6, seed) == example
    assert cloze("b", text, 6, seed) != example


def test_a_short_text_makes_no_cloze():
    assert cloze("a", story(0, paragraphs=1, sentences=1), 6) is None
    some = cloze("a", story(0, paragraphs=6), 6)
    assert 1 <= len(some.queries) < 6
    assert len(some.text) > 0.75 * len(story(0, paragraphs=6))
    assert cloze("a", "No sentence here", 2) is None


def test_pieces_are_cut_at_paragraphs():
    text = story(1)
    found = pieces(text, 1000, 300)
    assert all(300 <= len(piece) <= 1000 for piece in found)
    assert "\n\n".join(found) in (text, text[: len("\n\n".join(found))])
    assert pieces("x" * 50 + "\n\n" + "y " * 400, 100, 10) == ["x" * 50]


def test_passages_cover_the_document():
    example = Example("a", story(2) + "\n   \n", ())
    passages = example.passages
    assert len(passages) > 3
    assert "".join(example.text[a:b] for a, b in passages) == example.text.rstrip() + "\n"
    assert all(len(example.text[a:b].split()) >= 100 for a, b in passages[:-1])


def test_what_is_evaluated_is_left_out():
    clean, copied, asked = (Example(str(n), story(n), (Query(sentence(random.Random(n))),)) for n in range(3))
    part = story(7, paragraphs=6)
    copied = Example("copied", copied.text + part.upper().replace(". ", ".\n"), copied.queries)
    asked = Example("asked", asked.text, (Query(sentence(random.Random(5), words=40)),))
    evaluated = [story(9) + part, sentence(random.Random(5), words=40)]
    kept, out = without([clean, copied, asked], evaluated)
    assert kept == [clean]
    assert out == ["copied", "asked"]
