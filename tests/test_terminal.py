import errno
import io
import os
import sys

import pytest
from rich.table import Table

from ssa import terminal
from ssa.terminal import Visible, console, lasting_output, named_output, open_standard_streams, tell, visible, warn


def test_what_a_terminal_would_obey_is_made_visible():
    assert visible("a\x1b[31mb\x07\r\n\tc\x7f\x9b\ud800é漢\u200d") == "a\\x1b[31mb\\x07\\r\n\tc\\x7f\\x9b\\ud800é漢\u200d"
    assert not any(not c.isprintable() for c in visible("".join(map(chr, [*range(9), *range(11, 32), *range(127, 160)]))))


def test_streams_and_tables_show_it(capsys):
    out = io.StringIO()
    stream = Visible(out)
    assert stream.write("one\x1b") == 4  # a sequence that comes in parts
    stream.write("[2Jtwo\n")
    stream.flush()
    table = Table("name\x1b[1m")
    table.add_row("[bold]cell[/bold]\x1b]0;title\x07")
    console(file=out, width=80, force_terminal=True).print(table, "\x1b[2J", "[red]red")
    written = out.getvalue()
    assert (
        written.startswith("one\\x1b[2Jtwo\n") and "\\x1b[1m" in written and "\x1b[1mcell" in written and "\x1b]" not in written
    )
    assert "\x1b[2J" not in written and "\x1b[31mred" in written
    tell("two\nlines\u2028\t\x1b")
    assert capsys.readouterr().err == "two\\nlines\\u2028\\t\\x1b\n"


def test_one_rank_warns(monkeypatch, capsys):
    for rank, said in (("1", ""), ("0", "ssa: warning: careful\n")):
        monkeypatch.setenv("RANK", rank)
        warn("careful")
        assert capsys.readouterr().err == said


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error, self.tries = error, 0

    def write(self, text):
        self.tries += 1
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize("error", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_output_that_is_gone_ends_some_work_and_not_other(monkeypatch, capsys, error):
    monkeypatch.setattr(sys, "stdout", broken := Broken(error))
    with pytest.raises(OSError, match=os.strerror(error)) as raised, named_output():
        print("words")
    assert raised.value.filename == "standard output" and sys.stdout is broken
    monkeypatch.setattr(terminal, "silence", lambda stream: setattr(stream, "write", len))
    with lasting_output():
        print("words", flush=True)
        print("more")
        assert sys.stdout.isatty() is False and sys.stdout is not broken
    assert sys.stdout is broken and broken.tries == 2
    assert capsys.readouterr().err == f"ssa: warning: standard output is gone ({os.strerror(error)}): going on without it\n"
    with lasting_output(), monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal.Output(Broken(error), lambda error: None))
        print("nobody hears", file=sys.stderr)


def test_closed_streams_are_opened(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    open_standard_streams()
    print("nowhere", flush=True)
    assert sys.stdout.name == os.devnull
    sys.stdout.close()
