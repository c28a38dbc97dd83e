import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ssa import files
from ssa.errors import UserError
from ssa.files import LOCK, is_plain_name, sole_writer, write_atomically, writer_in_turn

HOLD = """
import sys
from pathlib import Path
from ssa.files import sole_writer
with sole_writer(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_directory_has_one_writer_at_a_time(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="busy"), sole_writer(tmp_path, "busy"):
            pass
        assert (tmp_path / LOCK).is_file()
        other.kill()  # what it leaves bars nobody
        other.wait()
        with sole_writer(tmp_path, "busy"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_file_that_is_gone_is_worth_nothing(tmp_path, monkeypatch):
    """Its last holder removes it between the second one's opening and locking."""

    def late(file, lock=files._locked):
        (tmp_path / LOCK).unlink()
        return lock(file)

    monkeypatch.setattr(files, "_locked", late)
    with pytest.raises(UserError, match="busy"), sole_writer(tmp_path, "busy"):
        pass


def test_a_lock_file_that_goes_once_is_made_again(tmp_path, monkeypatch):
    tries = []

    def late(file, lock=files._locked):
        if not tries:
            (tmp_path / LOCK).unlink()
        tries.append(file)
        return lock(file)

    monkeypatch.setattr(files, "_locked", late)
    with sole_writer(tmp_path, "busy"):
        assert (tmp_path / LOCK).is_file()
    assert len(tries) == 2


@pytest.mark.parametrize("look", [1, 2])
def test_a_lock_file_that_goes_while_it_is_looked_at_is_made_again(tmp_path, monkeypatch, look):
    looks, stat = [], Path.stat

    def late(path, **how):
        looks.append(path)
        if len(looks) == look:
            (tmp_path / LOCK).unlink()
        return stat(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", late)
        with sole_writer(tmp_path, "busy"):
            patch.undo()
            assert (tmp_path / LOCK).is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    import errno
    import fcntl

    def missing(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", missing)
    with sole_writer(tmp_path, "busy"), writer_in_turn(tmp_path):
        pass
    assert "cannot be locked (No locks available): let one process at a time write there" in capsys.readouterr().err


def test_windows_has_locks_of_its_own(tmp_path, monkeypatch):
    calls, refuse = [], False

    def locking(descriptor, mode, count):
        calls.append((mode, count))
        if refuse:
            raise OSError("held")

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    with sole_writer(tmp_path, "busy"):
        assert calls == [(2, 1)]
    refuse = True
    with pytest.raises(UserError, match="busy"), sole_writer(tmp_path, "busy"):
        pass
    files.sync(tmp_path)  # directories cannot be opened there: nothing to do


def test_prepare_needs_no_posix_module():
    code = "import sys; sys.modules['fcntl'] = None; import ssa.data.prepare, ssa.train.run_directory"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_links_under_the_names_of_locks_and_scratch_files_are_not_followed(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("years of work")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".x.json.tmp-{os.getpid()}").symlink_to(mine)
    write_atomically(tmp_path / "out" / "x.json", "new")
    assert (tmp_path / "out" / "x.json").read_text() == "new" and mine.read_text() == "years of work"
    absent = tmp_path / "absent"
    (tmp_path / "out" / LOCK).symlink_to(absent)
    with pytest.raises(OSError), sole_writer(tmp_path / "out", "busy"):
        pass
    with pytest.raises(OSError), writer_in_turn(tmp_path / "out"):
        pass
    assert not absent.exists()


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/a", "../a", "a\\b", "a\0", 3, None])
def test_what_leads_out_of_a_directory_is_no_plain_name(name):
    assert not is_plain_name(name) and is_plain_name("a-00001.x") and is_plain_name("..a")
