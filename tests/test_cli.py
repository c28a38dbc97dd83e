import io
import json
import os
import re
import signal
import subprocess
import sys
from email.message import Message
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssa import __version__, cli
from ssa.cli import VERBS, main
from ssa.cli.call import split_overrides
from ssa.errors import UserError


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "ssa", *arguments], capture_output=True, text=True)


NO_TORCH = """
import sys
from ssa.cli import main
status = main(sys.argv[1:])
heavy = {"torch", "transformers", "numpy", "triton"} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--help", "train"),
        ("--version", __version__),
        ("train tiny --help", "--train.steps"),
        *((f"{verb} --help", "usage") for verb in VERBS),
    ],
)
def test_help_is_there_and_imports_nothing_heavy(arguments, says):
    done = subprocess.run([sys.executable, "-c", NO_TORCH, *arguments.split()], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and says in done.stdout


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("eval no-such-run", "no model at no-such-run: it is not a directory; name a run"),
        ("eval {model} --beside no-such-run", "no model at no-such-run: it is not a directory"),
        ("eval {model} --data no-such-text", "no such file or directory: no-such-text"),
        ("analyze {model} no-such-run", "no model at no-such-run: it is not a directory"),
        ("analyze {model} --data no-such-text", "no such file or directory: no-such-text"),
        ("generate no-such-run --prompt a", "no model at no-such-run: it is not a directory"),
        ("train no-such-recipe", "no recipe 'no-such-recipe'"),
        ("train no-such-run --resume", "no recipe 'no-such-run'"),
        ("train tiny --data.path no-such-text --out {model}/x", "no such file or directory: no-such-text"),
        ("train tiny --model.init_from no-such-run --out {model}/x", "no model at no-such-run"),
    ],
)
def test_what_is_not_there_is_said_before_anything_heavy_is_imported(arguments, says, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    words = arguments.format(model=tmp_path).split()
    done = subprocess.run([sys.executable, "-c", NO_TORCH, *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"ssa: error: {says}") and done.stderr.count("\n") == 1, done.stderr


def test_every_verb_and_argument_is_explained(capsys):
    main([])
    overview = capsys.readouterr().out
    for verb, function in VERBS.items():
        assert verb in overview and function.__doc__.splitlines()[0] in overview


@pytest.mark.parametrize(
    "command, says",
    [
        ("trian", "no verb 'trian'; did you mean train?"),
        ("xyzzy", "there are demo, prepare, train"),
        ("bench foo", "no verb 'bench foo'; did you mean bench plot?"),
        ("train", "ssa train needs CONFIG: A recipe file, or a preset: tiny"),
        ("train no-such-recipe", "no recipe 'no-such-recipe'"),
        ("train tiny --train.stpes 3", "unknown option --train.stpes; did you mean --train.steps?"),
        ("train tiny --steps 3", "unknown option --steps; did you mean --train.steps?"),
        ("train tiny --train.method full", "unknown option --train.method; did you mean --model.method?"),
        ("train tiny --train.save_evry 3", "unknown option --train.save_evry; did you mean --train.save-every?"),
        ("train --bogus", "unknown option --bogus; `ssa train --help` lists what there is"),
        ("train -x tiny", "unknown option -x; `ssa train --help` lists what there is"),
        ("train --train.steps 0 tiny", "train.steps = 0 must be at least 1"),
        ("train tiny --train.steps abc", "--train.steps 'abc' is not a whole number"),
        ("train tiny --train.steps=", "--train.steps '' is not a whole number"),
        ("train tiny --train.save_every many", "--train.save-every 'many' is not a whole number"),
        ("train tiny --train.lr fast", "--train.lr 'fast' is not a number"),
        ("train tiny --train.betas 0.9 a", "--train.betas '0.9 a' is not two numbers"),
        ("train tiny --train.betas 0.9", "--train.betas needs 2 values; `ssa train CONFIG --help` explains it"),
        ("train tiny --train.steps --out x", "--train.steps needs a value; `ssa train CONFIG --help` explains it"),
        ("train tiny --data.mixture a", "--data.mixture 'a' is not a list NAME NUMBER NAME NUMBER ..."),
        ("train tiny --model.method foo", "model.method = 'foo' is not one of full, moba, nsa, ssa"),
        ("train tiny --train.compile=yes", "--train.compile takes no value, but has 'yes'; write --train.compile alone, or --train.no-compile"),
        ("train tiny --no-resume=1", "--no-resume takes no value, but has '1'; write --no-resume alone, or --resume"),
        ("train tiny --out", "--out needs a value; `ssa train --help` explains it"),
        ("train tiny extra", "'extra' is one argument too many; `ssa train --help` shows what there may be"),
        ("train tiny --train.shard-ranks 4", "train.shard_ranks = 4 goes with train.parallel = 'hsdp' only"),
        ("train tiny --train.parallel fsdp", "--train.parallel fsdp needs several processes and this is one: start it with torchrun"),
        ("prepare x.txt", "ssa prepare needs --out DIRECTORY: Directory for the shards"),
        ("convert", "ssa convert needs SOURCE: A run, a model directory, a .gguf file, or the name of a model on the hub; OUT: Directory"),
        ("generate run --mode dense", "--mode 'dense' is not one of sparse, full"),
        ("generate run --prompt -x", "--prompt needs a value; one that begins with - is written --prompt=VALUE"),
        ("doctor --loud", "--loud"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_on_stderr(monkeypatch, capsys, command, says):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(command.split()) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("ssa: error: ") and said.err.count("\n") == 1 and says in said.err
    assert not set("│╭╰─├┤") & set(said.err)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_terminal_gets_to_see_a_box(encoding):
    """tyro draws another one where the output has no UTF-8."""
    for command, says in (
        ("train", "ssa train needs CONFIG: A recipe file, or a preset: tiny, 33m, 60m, 300m, 1b, servable-1b, adapt"),
        ("train tiny --train.steps x", "--train.steps 'x' is not a whole number"),
    ):
        done = subprocess.run([sys.executable, "-m", "ssa", *command.split()], capture_output=True,
                              env={**os.environ, "PYTHONIOENCODING": encoding})  # fmt: skip
        assert (done.returncode, done.stderr.decode(encoding)) == (2, f"ssa: error: {says}\n")


def test_long_values_are_told_whole_on_any_terminal(monkeypatch, capsys):
    value = "a value of many words " * 9 + "w" * 90
    for columns in ("25", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["train", "tiny", "--train.steps", value]) == 2
        assert capsys.readouterr().err == f"ssa: error: --train.steps {value!r} is not a whole number\n"
        assert main(["train", "tiny", "--train.steps", "0", "--data.path", value]) == 2
        assert capsys.readouterr().err == "ssa: error: train.steps = 0 must be at least 1\n"


def test_several_processes_may_be_one(monkeypatch, capsys):
    """torchrun with one process is the first point of many a scaling curve."""
    from ssa.train import trainer
    from ssa.train.trainer import TrainResult

    monkeypatch.setattr(trainer, "train", lambda *a, **k: TrainResult(Path(), Path(), 3, None))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["train", "tiny", "--train.parallel", "fsdp"]) == 0
    monkeypatch.delenv("WORLD_SIZE")
    assert main(["train", "tiny", "--train.parallel", "auto"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_positional_arguments_are(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    usage = capsys.readouterr().out.split("\n\n")[0]
    assert "STR" not in re.sub(r"\[--?\S+ STR\]", "", usage)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(["train", "prepare", "tiny", "--out", "--resume", "--train.steps", "--model.tie-word-embeddings", "="]),
                          st.text(max_size=5)), max_size=5))  # fmt: skip
def test_any_command_line_parses_or_is_one_line(arguments):
    """Verbs are replaced by ones that do nothing: parsing is on trial."""

    def train(config: str, /, out: str = "", resume: bool = False, *, overrides: list[str]) -> int:
        """Train."""
        from ssa.config import load_recipe

        load_recipe(config, overrides)
        return 0

    def prepare(inputs: tuple[str, ...], /, out: str) -> None:
        """Prepare."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "VERBS", {"train": train, "prepare": prepare})
        patch.setattr(sys, "stderr", err := io.StringIO())
        patch.setattr(sys, "stdout", io.StringIO())
        status = main(arguments)
    assert (status, err.getvalue()) == (0, "") or (status == 2 and err.getvalue().rstrip("\n").count("\n") == 0)


def test_split_overrides():
    words = "tiny --train.betas 0.9 0.95 --out x --model.no-attention-gate --train.compile --data.path=a=b --train.save-every 3 --resume"
    overrides, rest = split_overrides(words.split())
    assert rest == ["tiny", "--out", "x", "--resume"]
    assert overrides == (
        [
            "--train.betas",
            "0.9",
            "0.95",
            "--model.no-attention-gate",
            "--train.compile",
            "--data.path=a=b",
            "--train.save-every",
            "3",
        ]
    )


@pytest.mark.parametrize(
    "error, status", [(UserError("bad"), 2), (KeyboardInterrupt(), 130), (BrokenPipeError(), 141), (ZeroDivisionError(), None)]
)
def test_exit_status_of_what_a_verb_raises(monkeypatch, capfd, error, status):
    def verb() -> None:
        """Fail."""
        print("to stderr", file=sys.stderr)  # what a verb prints is not part of parsing
        raise error

    monkeypatch.setitem(VERBS, "fail", verb)
    monkeypatch.setattr(cli.os, "dup2", lambda *a: None)
    if status is None:
        with pytest.raises(ZeroDivisionError):
            main(["fail"])
    else:
        assert main(["fail"]) == status
    assert "to stderr" in capfd.readouterr().err


@pytest.mark.parametrize(
    "error, says",
    [
        (FileNotFoundError(2, "No such file or directory", "a/b"), "a/b: No such file or directory"),
        (OSError(36, "File name too long", "o" * 300), "o" * 300 + ": File name too long"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "unexpected end of data"), "a text cannot be read or written: 'utf-8' codec can't"),
        (MemoryError(), "out of memory: MemoryError"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you\ntried"), "out of memory: [enforce"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: CUDA out of memory."),
    ],
    ids=range(7),
)  # fmt: skip
def test_files_text_and_memory_are_told_in_a_line_and_bugs_are_not(monkeypatch, capsys, error, says):
    def verb() -> None:
        """Fail."""
        raise error

    monkeypatch.setitem(VERBS, "fail", verb)
    monkeypatch.delenv("SSA_DEBUG", raising=False)
    assert main(["fail"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ssa: error: {says}") and said.endswith(" (SSA_DEBUG=1 shows where)\n") and said.count("\n") == 1
    monkeypatch.setenv("SSA_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["fail"])
    for bug in (ValueError("bug"), RuntimeError("bug"), KeyError("bug"), AssertionError("bug")):
        error = bug
        with pytest.raises(type(bug)):
            main(["fail"])


def test_control_characters_are_shown_in_errors_and_not_sent(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(json.dumps({"\x1b]0;t\x07\x1b[31mred\nline": 1}))
    assert main(["prepare", "a.jsonl", "--out", "out"]) == 2
    assert main(["train", "\x1b[2J\u2028\x9b1m\r\n\t"]) == 2
    said = capsys.readouterr().err
    assert (
        not set(said) & {*map(chr, range(10)), *map(chr, range(11, 32)), *map(chr, range(127, 160)), "\u2028"}
        and said.count("\n") == 2
    )
    assert r"(it has \x1b]0;t\x07\x1b[31mred\nline)" in said and r"\x1b[2J\u2028\x9b1m" in said


@pytest.mark.parametrize(
    "command", ["prepare|a.txt||--out|out", "prepare|a.txt|--out|", "eval|", "convert|run|", "analyze|run|", "train|"]
)
def test_an_empty_word_is_no_name(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert main(command.split("|")) == 2
    name = {"prepare": "INPUTS" if command.endswith("out") else "--out", "convert": "OUT", "train": "CONFIG"}.get(
        command.split("|")[0], "RUN"
    )
    assert (
        capsys.readouterr().err
        == f"ssa: error: {name}{'S' * command.startswith('analyze')} is '' (a shell variable that is not set?)\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_word_that_may_be_left_out_may_be_empty(monkeypatch, capsys):
    def verb(run: str = "", /, out: str = "") -> None:
        """Look."""
        print(f"{run!r} {out!r}")

    monkeypatch.setitem(VERBS, "look", verb)
    for words in ([], [""], ["", "--out", ""]):
        assert main(["look", *words]) == 0
    assert capsys.readouterr().out == "'' ''\n" * 3


def test_a_full_and_a_closed_standard_output():
    """In other processes: the interpreter's own flush at its end is on trial, too."""
    here = f"{sys.executable} -m ssa"
    for command, status, error in (
        (f"{here} --help >/dev/full", 2, "ssa: error: standard output: No space left on device (SSA_DEBUG=1 shows where)\n"),
        (f"{here} nonsense >/dev/full 2>/dev/full", 2, ""),
        (f"{here} --help <&- >&-", 0, ""),
        (f"{here} --help <&- >&- 2>&-", 0, ""),
    ):
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (status, error)


def test_names_that_are_no_text_here(tmp_path):
    """Read they are; the tokenizers library writes to none, which is told."""
    name = os.fsdecode(b"caf\xe9 \xe6\xbc\xa2")
    (tmp_path / f"{name}.txt").write_text("some text")
    for number, setting in enumerate(({"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"})):
        for out, status in ((f"{number}", 0), (f"{name}{number}", 2)):
            command = [sys.executable, "-m", "ssa", "prepare", f"{name}.txt", "--out", out, "--valid-fraction", "0"]
            done = subprocess.run(command, capture_output=True, cwd=tmp_path, env={**os.environ, **setting})
            assert done.returncode == status and done.stderr.count(b"\n") == (status == 2), done
            assert b"train 10 tokens" in done.stdout if status == 0 else b"ssa: error: 'caf\\udce9" in done.stderr


def test_a_closed_pipe_is_quiet():
    done = subprocess.run(
        f"{sys.executable} -m ssa train tiny --help | true; echo ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash",
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == "" and done.stdout.strip() in ("0", "141")


def test_prepare_and_train(tmp_path, monkeypatch, capsys):
    """The two verbs end to end, and again with --resume."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"line {i} of the text"}) + "\n" for i in range(200)))
    assert main(["prepare", "text.jsonl", "--out", "data", "--valid-fraction", "0.1", "--workers", "1"]) == 0
    small = [
        "--data.path",
        "data",
        "--data.context",
        "32",
        "--model.num-hidden-layers",
        "1",
        "--train.batch-size",
        "1",
        "--train.device",
        "cpu",
    ]
    assert main(["train", "tiny", *small, "--train.steps", "1"]) == 0
    assert (tmp_path / "runs" / "tiny-ssa" / "checkpoints" / "step-00000001" / "model.safetensors").is_file()
    assert "done: step 1, validation loss full " in capsys.readouterr().out
    assert main(["train", "tiny", *small, "--train.steps", "2"]) == 2
    assert main(["train", "tiny", *small, "--train.steps", "2", "--resume"]) == 0


def test_a_budget_that_holds_the_context_is_told(monkeypatch, capsys):
    from ssa.train import trainer
    from ssa.train.trainer import TrainResult

    monkeypatch.setattr(trainer, "train", lambda *a, **k: TrainResult(Path(), Path(), 3, None))
    for words, warned in (
        (["--data.context", "256"], True),
        (["--data.context", "258"], False),
        (["--data.context", "256", "--model.method", "full"], False),
    ):
        assert main(["train", "tiny", *words, "--model.num-selected-blocks", "16", "--model.block-size", "16"]) == 0
        said = capsys.readouterr().err
        assert said.count("\n") == ("16 blocks of 16 keys hold the whole context of 256" in said) == warned


def test_errors_name_flags_and_not_parameters(monkeypatch, capsys):
    def verb(run: str, /, max_tokens: int = 0, data: str = "", seed: int = 0) -> None:
        """Fail."""
        raise UserError(
            "max_tokens = 0 in data/max_tokens of a run, seed = 3, train.seed = 4 and config.json: max_tokens = 5: data"
        )

    monkeypatch.setitem(VERBS, "fail", verb)
    assert main(["fail", "x"]) == 2
    expected = "--max-tokens = 0 in data/max_tokens of a run, --seed = 3, train.seed = 4 and config.json: max_tokens = 5: data"
    assert capsys.readouterr().err == f"ssa: error: {expected}\n"


@pytest.mark.parametrize(
    "command, says",
    [
        ("generate run --mode full --budget 4x4", "--mode 'full' and --budget '4x4' contradict each other"),
        ("analyze run --budget 4", "--budget '4' is not BLOCKSxSIZE"),
        ("prepare builtin:python --out out --split BAD", "--split 'BAD' is no name"),
        ("prepare builtin:python --out out --document-bytes 5", "--document-bytes of 5 is too small"),
        ("prepare text.jsonl --out out --valid-fraction 0", "(it has body): name it as --text-field"),
    ],
)
def test_what_the_library_says_names_what_was_typed(tmp_path, monkeypatch, capsys, command, says):
    from ssa.testing import save_checkpoint, tiny_model

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"body": "words"}\n')
    save_checkpoint(tmp_path / "run", 1, tiny_model(), None, None, {})
    if command.startswith("generate"):
        command += " --prompt x"
    assert main(command.split()) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_ctrl_c_saves_and_exits_130(tmp_path, monkeypatch, capsys):
    from ssa.train import trainer
    from ssa.train.trainer import TrainResult

    stopped = TrainResult(tmp_path, tmp_path, 3, None, "SIGINT")
    monkeypatch.setattr(trainer, "train", lambda *a, **k: stopped)
    assert main(["train", "tiny"]) == 130


@pytest.fixture
def installed(monkeypatch):
    """What the doctor sees: this project's requirements as pyproject.toml has them, and releases that a test chooses."""
    import tomllib

    from ssa import doctor

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    metadata, releases = Message(), {}
    for requirement in project["dependencies"]:
        metadata["Requires-Dist"] = requirement
    for extra, requirements in project["optional-dependencies"].items():
        metadata["Provides-Extra"] = extra
        for requirement in requirements:
            name, _, marker = requirement.partition(";")
            metadata["Requires-Dist"] = f"{name}; {f'({marker}) and ' if marker else ''}extra == '{extra}'"
    monkeypatch.setattr(doctor, "SMOKE_TESTS", {})
    monkeypatch.setattr(doctor.importlib.metadata, "metadata", lambda name: metadata)
    version = doctor.importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: releases.get(name) or version(name))
    return releases


def test_windows_are_those_of_the_project(installed):
    from ssa.doctor import requirements, tested_windows

    assert {"", "data", "plots", "track", "wandb", "trackio", "gguf", "bench", "eval", "trainers", "dev"} == set(requirements())
    assert [requirement.name for requirement in requirements()["bench"]] == ["fla-core", "matplotlib"]
    windows = tested_windows()
    fast = {"torch", "transformers", "tokenizers", "safetensors", "triton", "lm-eval", "accelerate", "trl", "peft"}
    assert {*windows, "triton"} == fast  # triton on Linux alone
    assert all(re.fullmatch(r">=[\d.]+,<[\d.]+", window) for window in windows.values())


@pytest.mark.parametrize(
    "releases, cure",
    [
        ({"transformers": "5.25.0"}, '"transformers>=5.17,<5.25"'),
        ({"transformers": "5.16.1", "lm-eval": "0.5.0.dev1"}, '"transformers>=5.17,<5.25" "lm-eval>=0.4.12,<0.4.14"'),
        ({"torch": "2.15.0.dev20261201+cpu"}, '"torch>=2.11,<2.15"'),
        ({"torch": "2.14.1+cu130", "transformers": "5.17.0"}, ""),
    ],
)
def test_doctor_names_releases_that_are_not_tested_and_the_cure(installed, capsys, releases, cure):
    installed.update(releases)
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    if not cure:
        assert "not tested" not in report and report.endswith("all well\n")
        return
    for name, release in releases.items():
        assert f"\n  {name} {release}: not tested, >=" in report
    assert f" -m pip install {cure}\n" in report and report.endswith(
        "all well, on releases that are not tested: see the versions\n"
    )


def test_doctor_works_without_an_installation(monkeypatch, capsys):
    from ssa import doctor

    monkeypatch.setattr(doctor, "PROJECT", "a-project-that-nobody-installed")
    assert main(["doctor"]) == 0
    assert "which releases are tested is unknown (pip install -e .)" in capsys.readouterr().out


def test_doctor(monkeypatch, capsys):
    from ssa import doctor

    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    for word in (__version__, "torch", "block_sparse_attention", "all well"):
        assert word in report

    def broken(device):
        raise ArithmeticError("tokens differ")

    monkeypatch.setitem(doctor.SMOKE_TESTS, "a test", broken)
    assert main(["doctor"]) == 1
    assert "a test: FAILED: ArithmeticError: tokens differ" in capsys.readouterr().out
    monkeypatch.setattr(
        doctor, "_implementations", lambda: broken("cpu")
    )  # as with a torch that is too old to import the operations
    assert main(["doctor"]) == 1
    assert "implementations\n  FAILED: ArithmeticError: tokens differ" in capsys.readouterr().out


def test_other_ranks_leave_errors_to_the_first_and_stay_until_it_has_spoken(monkeypatch, capsys):
    from ssa.cli import training

    waits = []
    monkeypatch.setattr(training.time, "sleep", waits.append)
    for rank, said, waited in (("0", "train.steps = 0", []), ("1", "", [training.PATIENCE])):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "tiny", "--train.steps", "0"]) == 2
        error = capsys.readouterr().err
        assert (said in error if said else not error) and waits == waited


TWICE = """
import atexit, os, signal, sys
from ssa import cli

def again():
    os.kill(os.getpid(), signal.SIGINT)
    print("cleaned up")

def interrupted(*arguments):
    raise KeyboardInterrupt

atexit.register(again)  # stands for what torch does when the interpreter leaves
cli.call_verb = interrupted
sys.exit(cli.main(["doctor"]))
"""


def test_interrupted_twice_there_is_no_traceback():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stderr == "" and "cleaned up" not in done.stdout
