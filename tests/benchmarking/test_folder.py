"""Result folders appear whole or not at all, and never in place of something else."""

import pytest

from hf_tfast.benchmarking.folder import fresh_name, new_folder


def write(target, text, **options):
    with new_folder(target, mark="results.jsonl", **options) as folder:
        (folder / "results.jsonl").write_text(text)
        assert not target.exists() or options


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_it_appears_whole(tmp_path):
    write(tmp_path / "a" / "out", "1")
    assert (tmp_path / "a" / "out" / "results.jsonl").read_text() == "1"
    assert names(tmp_path / "a") == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_an_unfinished_one(tmp_path, error):
    def breaks_off():
        with new_folder(tmp_path / "out", mark="m") as folder:
            (folder / "half").write_text("x")
            raise error

    with pytest.raises(error):
        breaks_off()
    assert names(tmp_path) == []


def test_an_existing_one_is_kept(tmp_path):
    write(tmp_path / "out", "1")
    with pytest.raises(FileExistsError, match="exists; name another"):
        write(tmp_path / "out", "2")
    assert (tmp_path / "out" / "results.jsonl").read_text() == "1"


def test_overwrite_replaces_an_earlier_result_only_when_done(tmp_path):
    write(tmp_path / "out", "1")
    (tmp_path / "out" / "extra").write_text("of the old one")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", overwrite=True, mark="results.jsonl"):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "results.jsonl").read_text() == "1"
    write(tmp_path / "out", "2", overwrite=True)
    assert names(tmp_path / "out") == ["results.jsonl"]
    assert names(tmp_path) == ["out"]


def test_overwrite_does_not_delete_other_folders(tmp_path):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter").write_text("years")
    with pytest.raises(FileExistsError, match="no earlier result"):
        write(precious, "2", overwrite=True)
    assert names(precious) == ["chapter"]


def test_a_result_without_its_mark_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out", mark="results.jsonl"):
        pass
    assert names(tmp_path) == []


def test_names_are_free(tmp_path):
    first = fresh_name("bench", tmp_path)
    first.mkdir()
    second = fresh_name("bench", tmp_path)
    assert not second.exists()
    assert second.parent == tmp_path
    assert second.name.startswith("bench-")
