import pytest

from ssa.data.corpus import python_corpus
from ssa.errors import UserError

PROSE = "Explain at some length what this does and why anybody would want it. " * 5


@pytest.fixture
def stdlib(tmp_path):
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {{'assert': {PROSE!r}, 'del': 'The del statement.'}}")
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    source = f'''"""{PROSE}"""
raise SystemExit("imported!")
# Comments that go on
# for three lines of
# prose are kept too
if True:
    class Thing:
        """A thing."""
        def method(self, a, *, b=1):
            """Do it."""
'''
    (tmp_path / "pkg" / "__init__.py").write_text(source)
    (tmp_path / "pkg" / "test" / "hidden.py").write_text(f'"""{PROSE} hidden"""')
    (tmp_path / "broken.py").write_text("def (:")
    return tmp_path


def test_docstrings_are_read_without_running_anything(stdlib):
    documents = dict(python_corpus(stdlib))
    assert list(documents) == ["module/pkg/__init__.py", "topic/assert", "topic/del"]
    text = documents["module/pkg/__init__.py"]
    parts = [
        "module pkg\n\nExplain",
        "Comments that go on\nfor three",
        "class pkg.Thing\n\nA thing.",
        "pkg.Thing.method(self, a, *, b=1)\n\nDo it.",
    ]
    assert all(part in text for part in parts)
    assert sorted(parts, key=text.index) == parts


def test_equal_texts_come_once(stdlib):
    copy = (stdlib / "pydoc_data" / "topics.py").read_text().replace("'del'", f"'zzz': {PROSE!r}, 'del'")
    (stdlib / "pydoc_data" / "topics.py").write_text(copy)
    assert [name for name, _ in python_corpus(stdlib)].count("topic/zzz") == 0


def test_a_stripped_installation_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no docstrings"):
        list(python_corpus(tmp_path))


def test_this_python_has_a_real_corpus():
    documents = list(python_corpus())
    assert [name for name, _ in documents] == sorted(name for name, _ in documents)
    assert sum(len(text.encode()) for _, text in documents) > 2_000_000
    assert len({text for _, text in documents}) == len(documents)
