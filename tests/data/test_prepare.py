import gzip
import hashlib
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssa.data import encode, sources
from ssa.data import prepare as prepare_module
from ssa.data.encode import count_words, document_hash, valid_threshold
from ssa.data.prepare import prepare
from ssa.data.shards import TokenShards
from ssa.errors import UserError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "naïve", "漢字", "2024", "\n"]


def some_texts(count, seed=0):
    rng = random.Random(seed)
    return [f"{i}: " + " ".join(rng.choices(WORDS, k=rng.randint(1, 80))) for i in range(count)]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def texts_of(out, split="train"):
    shards = TokenShards(out, split)
    return [bytes(tokens[:-1].tolist()).decode() for tokens, _, _ in shards.documents()]


def contents(out):
    """Every file of a prepared directory by hash."""
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@given(st.text(max_size=60))
def test_words_are_counted_as_split_does(text):
    assert count_words(text, text.encode()) == len(text.split())


def test_split_follows_the_hash_of_the_text_alone(tmp_path):
    texts = some_texts(400)
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_jsonl(tmp_path / "b.jsonl", texts[::-1])
    prepare([tmp_path / "a.jsonl"], tmp_path / "a", valid_fraction=0.1)
    prepare([tmp_path / "b.jsonl"], tmp_path / "b", valid_fraction=0.1)
    expected = [text for text in texts if document_hash(text.encode()) < valid_threshold(0.1)]
    assert 20 < len(expected) < 70
    assert texts_of(tmp_path / "a", "valid") == expected == texts_of(tmp_path / "b", "valid")[::-1]
    assert sorted(texts_of(tmp_path / "a") + expected) == sorted(texts)


def test_formats_hold_the_same_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    texts = some_texts(50)
    plain = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain[:500]) + gzip.compress(plain[500:]))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(plain))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(compress(plain[:700]) + compress(plain[700:]))
    parquet.write_table(pyarrow.table({"text": texts, "other": range(50)}), tmp_path / "a.parquet", row_group_size=20)
    for suffix in ("jsonl", "jsonl.gz", "jsonl.xz", "jsonl.zst", "parquet"):
        prepare([tmp_path / f"a.{suffix}"], tmp_path / suffix, valid_fraction=0)
        assert texts_of(tmp_path / suffix) == texts


def test_blocks_are_invisible(tmp_path, monkeypatch):
    texts = [*some_texts(60), "", "   ", "long " * 500]
    path = write_jsonl(tmp_path / "a.jsonl.gz", texts)
    path.write_bytes(gzip.compress(path.read_bytes().rstrip(b"\n").replace(b"\n", b"\r\n\n")))
    summary = prepare([path], tmp_path / "one", valid_fraction=0)
    assert summary.skipped_documents == 2
    monkeypatch.setattr(sources, "BLOCK_BYTES", 300)
    prepare([path], tmp_path / "many", valid_fraction=0)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert texts_of(tmp_path / "one") == [*texts[:60], texts[-1]]


def test_text_files_directories_and_globs(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_bytes("\ufeffsecond\r\nline".encode())
    (folder / "a.md").write_text("first")
    (folder / "sub" / "c.txt").write_text("third é")
    (folder / ".hidden.txt").write_text("no")
    (folder / "image.png").write_bytes(b"\x89")
    prepare([folder], tmp_path / "dir", valid_fraction=0)
    prepare([str(folder / "*.md"), folder / "b.txt", folder], tmp_path / "glob", valid_fraction=0)
    assert texts_of(tmp_path / "dir") == texts_of(tmp_path / "glob") == ["first", "second\r\nline", "third é"]


@pytest.mark.parametrize("line", ["some words é\n", "no line ends 漢字"])
def test_long_text_files_are_cut_without_loss(tmp_path, line):
    text = line * 20_000
    (tmp_path / "a.txt").write_text(text)
    summary = prepare([tmp_path / "a.txt"], tmp_path / "out", valid_fraction=0, document_bytes=100_000)
    pieces = texts_of(tmp_path / "out")
    assert "".join(pieces) == text
    assert len(pieces) == -(-len(text.encode()) // 100_000) == summary.splits["train"].documents
    assert max(map(len, pieces)) < 1.1 * min(map(len, pieces))
    if "\n" in line:
        assert all(piece.endswith("\n") for piece in pieces)


def test_workers_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(prepare_module, "_BYTES_PER_WORKER", 1)
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", some_texts(150, ord(name)))
    options = {"train_bpe": 300, "valid_fraction": 0.1, "shard_tokens": 3000}
    for workers in (1, 2):
        prepare([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / str(workers), workers=workers, **options)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(TokenShards(tmp_path / "1").shards) > 2


def test_worker_errors_reach_the_caller(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_BYTES_PER_WORKER", 1)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"content": "b"}\n')
    with pytest.raises(UserError, match=r'a\.jsonl:3 has no field "text" \(it has content\)'):
        prepare([path], tmp_path / "out", workers=2)


KILLED_RUN = """
import os, signal, sys
from ssa.data import prepare, sources
if __name__ == "__main__":
    sources.BLOCK_BYTES, prepare._COMMIT_BLOCKS, prepare._BYTES_PER_WORKER = 1500, 8, int(sys.argv[3])
    save, append, left = prepare.save, prepare.ShardWriter.append, []
    def count():
        left[:] = [left[0] - 1] if left else []
        if left == [-1]:
            os.kill(os.getpid(), signal.SIGKILL)
    def saved(*arguments):
        save(*arguments)
        left[:] = left or [int(word) for word in sys.argv[4:]]
        count()
    def appended(*arguments):
        append(*arguments)
        count()
    prepare.save, prepare.ShardWriter.append = saved, appended
    prepare.prepare([sys.argv[1]], sys.argv[2], valid_fraction=0.05, shard_tokens=9000, workers=2)
"""


@pytest.mark.parametrize(
    ("bytes_per_worker", "attempts"),
    [
        pytest.param(1 << 30, 2, id="in process"),
        pytest.param(1, 1, id="with workers"),
        pytest.param(1, 8, marks=pytest.mark.slow),
    ],
)
def test_killed_runs_go_on_to_the_same_bytes(tmp_path, bytes_per_worker, attempts):
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(2000))
    prepare([source], tmp_path / "expected", valid_fraction=0.05, shard_tokens=9000)
    (tmp_path / "run.py").write_text(KILLED_RUN)
    command = [sys.executable, tmp_path / "run.py", source, tmp_path / "out", str(bytes_per_worker)]
    environment = os.environ | {"PYTHONPATH": str(Path(prepare_module.__file__).parents[2])}
    rng, places = random.Random(1), []
    for _ in range(attempts):  # each is killed so many writes after it has got further than the last one
        done = subprocess.run([*command, str(rng.randint(0, 12))], env=environment, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        places.append(json.loads((tmp_path / "out" / ".progress.json").read_text())["position"])
    assert places == sorted(places) and len({tuple(place) for place in places}) == attempts
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop_at", range(1, 40, 3))
def test_interruptions_at_any_write_go_on_to_the_same_bytes(tmp_path, monkeypatch, stop_at):
    """As above without luck: stop before the n-th file operation that matters, in the forced second pass too."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 400)
    monkeypatch.setattr(prepare_module, "_COMMIT_BLOCKS", 2)
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(30))
    call = {"inputs": [source], "valid_fraction": 1e-9, "shard_tokens": 2000}
    prepare(out=tmp_path / "expected", **call)
    calls, rename = [], Path.rename

    def failing_rename(path, target):
        calls.append(path)
        if len(calls) == stop_at:
            raise StoppedError
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    try:
        prepare(out=tmp_path / "out", **call)
    except StoppedError:
        prepare(out=tmp_path / "out", **call)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_few_documents_still_fill_both_splits(tmp_path):
    texts = some_texts(5)
    write_jsonl(tmp_path / "a.jsonl", texts)
    by_hash = sorted(texts, key=lambda text: document_hash(text.encode()))
    prepare([tmp_path / "a.jsonl"], tmp_path / "low", valid_fraction=1e-9)
    assert texts_of(tmp_path / "low", "valid") == by_hash[:1]
    prepare([tmp_path / "a.jsonl"], tmp_path / "high", valid_fraction=1 - 1e-9)
    assert texts_of(tmp_path / "high", "train") == by_hash[-1:]
    (tmp_path / "one.txt").write_text("only")
    with pytest.raises(UserError, match="single document"):
        prepare([tmp_path / "one.txt"], tmp_path / "one")
    assert not (tmp_path / "one").exists()
    for name in ("two.txt", "three.txt"):
        (tmp_path / name).write_text("only")
    with pytest.raises(UserError, match="the input is one document 3 times, which cannot be split"):
        prepare([tmp_path / f"{name}.txt" for name in ("one", "two", "three")], tmp_path / "copies")
    assert not (tmp_path / "copies").exists()


def test_splits_can_be_added_and_replaced(tmp_path):
    for name in ("train", "valid", "other"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text")
    out = tmp_path / "out"
    prepare([tmp_path / "train.txt"], out, split="train", train_bpe=270)
    with pytest.raises(UserError, match="another tokenizer"):
        prepare([tmp_path / "valid.txt"], out, split="valid")
    prepare([tmp_path / "valid.txt"], out, split="valid", tokenizer=out)
    prepare([tmp_path / "other.txt"], out, split="valid", tokenizer=out, overwrite=True)
    for split, text in (("train", "train text"), ("valid", "other text")):
        shards = TokenShards(out, split)
        shards.verify()
        assert shards.load_tokenizer().decode(shards.read(0, shards.num_tokens - 1)) == text
    summary = prepare([tmp_path / "train.txt", tmp_path / "other.txt"], out, valid_fraction=0.5, overwrite=True)
    assert set(summary.splits) == {"train", "valid"} and summary.vocab_size == 258
    assert len(str(summary).splitlines()) == 2 and "train" in str(summary)


def test_a_finished_run_is_left_alone(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(20))
    first = prepare([source], tmp_path / "out", valid_fraction=0.2)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert prepare([source], tmp_path / "out", valid_fraction=0.2) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times
    with pytest.raises(UserError, match="already prepared"):
        prepare([source], tmp_path / "out", valid_fraction=0.3)
    prepare([source], tmp_path / "out", valid_fraction=0.3, overwrite=True)


def test_an_interrupted_run_resumes_only_itself(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(60))
    monkeypatch.setattr(sources, "BLOCK_BYTES", 400)
    monkeypatch.setattr(prepare_module, "_COMMIT_BLOCKS", 2)
    encoded_block, blocks = encode.BlockEncoder.__call__, []

    def stopping(self, block):
        blocks.append(block)
        if len(blocks) == 9:
            raise StoppedError
        return encoded_block(self, block)

    monkeypatch.setattr(encode.BlockEncoder, "__call__", stopping)
    with pytest.raises(StoppedError):
        prepare([source], tmp_path / "out")
    with pytest.raises(UserError, match="differs in text_field"):
        prepare([source], tmp_path / "out", text_field="other")
    with pytest.raises(UserError, match="differs in tokenizer"):
        prepare([source], tmp_path / "out", train_bpe=300)
    with pytest.raises(UserError, match="half prepared"):
        TokenShards(tmp_path / "out")
    blocks.clear()
    monkeypatch.setattr(encode.BlockEncoder, "__call__", lambda self, block: blocks.append(block) or encoded_block(self, block))
    prepare([source], tmp_path / "out")
    assert blocks[0].number == 8  # eight were committed and not encoded again


def test_other_directories_are_not_touched(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("!")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="something else"):
            prepare([tmp_path / "a.txt"], tmp_path / "mine", overwrite=overwrite)
    with pytest.raises(UserError, match="is a file"):
        prepare([tmp_path / "a.txt"], tmp_path / "a.txt")
    assert contents(tmp_path / "mine").keys() == {"precious"}


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path):
    files = {
        "list.jsonl": b"[1]\n",
        "null.jsonl": b'{"text": null}\n',
        "number.jsonl": b'{"text": "a"}\n{"text": 5}\n',
        "json.jsonl": b'{"text": "a"\n',
        "deep.jsonl": b"[" * 100_000 + b"\n",
        "latin.txt": "é".encode("latin-1"),
        "cut.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 99)[:-12],
        "cut.jsonl.xz": lzma.compress(b'{"text": "a"}\n' * 99)[:-12],
        "bad.jsonl.xz": b"no such thing",
        "x.csv": b"a,b",
        "empty.txt": b"",
        "bad.parquet": b"PAR1",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    expected = {
        "list.jsonl": "list.jsonl:1 is not a JSON object",
        "null.jsonl": "every document is empty",
        "number.jsonl": 'number.jsonl:2: field "text" holds int',
        "json.jsonl": "json.jsonl:1 is not JSON",
        "deep.jsonl": "deep.jsonl:1 is not",
        "latin.txt": "not UTF-8 at byte 0",
        "cut.jsonl.gz": "is damaged",
        "cut.jsonl.xz": "is damaged",
        "bad.jsonl.xz": "is damaged",
        "x.csv": "unknown kind of file",
        "empty.txt": "every document is empty",
        "bad.parquet": "is damaged or no Parquet file",
        "folder": "no .txt .md",
        "nowhere.txt": "no such file",
        "nothing*.txt": "no such file",
    }
    for name, message in expected.items():
        with pytest.raises(UserError) as caught:
            prepare([tmp_path / name], tmp_path / "out", valid_fraction=0)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    for inputs, options, message in (
        (["builtin:perl"], {}, "unknown corpus"),
        ([], {}, "nothing to prepare"),
        (["builtin:python"], {"valid_fraction": 1.5}, "valid_fraction = 1.5"),
        (["builtin:python"], {"split": "../x"}, "no name"),
        (["builtin:python"], {"workers": -1}, "workers"),
        (["builtin:python"], {"train_bpe": 300, "tokenizer": "byte"}, "tokenizer = 'byte' names one"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(inputs, tmp_path / "out", **options)


def test_truncated_zstd_is_noticed(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    whole = zstandard.ZstdCompressor().compress(b"".join(b'{"text": "%d"}\n' % i for i in range(5000)))
    (tmp_path / "a.jsonl.zst").write_bytes(whole[:-20])
    with pytest.raises(UserError, match="damaged"):
        prepare([tmp_path / "a.jsonl.zst"], tmp_path / "out")


def test_parquet_columns_are_checked(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["a", None, "b"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'no column "text" \(it has body, n\)'):
        prepare([tmp_path / "a.parquet"], tmp_path / "out")
    with pytest.raises(UserError, match='column "n" holds int64'):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", text_field="n")
    prepare([tmp_path / "a.parquet"], tmp_path / "out", text_field="body", valid_fraction=0)
    assert texts_of(tmp_path / "out") == ["a", "b"]


def test_hugging_face_names(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "gone":
            raise FileNotFoundError("no dataset\ngone")
        return iter([{"text": "a"}, {"text": None}, {"text": "b"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for i, name in enumerate(("hf:org/set", "hf:org/set:validation", "hf:org/set:en", "hf:org/set:en:test")):
        prepare([name], tmp_path / str(i), valid_fraction=0, workers=1)
        assert texts_of(tmp_path / str(i)) == ["a", "b"]
    assert asked == [
        ("org/set", *rest, True) for rest in ((None, "train"), (None, "validation"), ("en", "train"), ("en", "test"))
    ]
    for name, message in (("hf:gone", "cannot be read: no dataset gone"), ("hf:a:b:c:d", "write hf:NAME")):
        with pytest.raises(UserError, match=message):
            prepare([name], tmp_path / "out", workers=1)


@pytest.mark.parametrize(("module", "name"), [("datasets", "hf:x"), ("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet")])
def test_missing_extras_are_named(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"x")
    source = name if name.startswith("hf:") else tmp_path / name
    with pytest.raises(UserError, match=rf'{module}: pip install "sparse-sparse-attention\[data\]"'):
        prepare([source], tmp_path / "out", workers=1)


def test_surrogates_and_special_names_survive_as_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b<|end|>c"}\n')
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", valid_fraction=0)
    shards = TokenShards(tmp_path / "out")
    shards.verify()
    assert texts_of(tmp_path / "out") == ["a\ufffdb<|end|>c"]
    assert shards.num_bytes == len("a\ufffdb<|end|>c".encode())


def test_one_directory_one_run(tmp_path):
    import fcntl

    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            prepare([tmp_path / "a.txt"], tmp_path / "out")
    assert prepare([tmp_path / "a.txt"], tmp_path / "out", valid_fraction=0).splits["train"].documents == 1
    assert not (tmp_path / "out" / ".lock").exists()


def test_large_vocabularies_take_32_bits(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, "last": 70_000} | {f"w{i}": i for i in range(1, 70_000)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("w5 last what")
    prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tmp_path / "tokenizer", valid_fraction=0)
    shards = TokenShards(tmp_path / "out")
    assert shards.dtype == np.uint32 and shards.vocab_size == 70_001
    assert shards.read(0, 4).tolist() == [5, 70_000, 1, 0]


def test_a_vocabulary_that_the_text_cannot_fill_is_said(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["ab ab cd", "ab cd cd"])
    summary = prepare([source], tmp_path / "out", train_bpe=400, valid_fraction=0)
    assert summary.vocab_size < 400 == summary.asked_vocab_size
    assert f"{summary.vocab_size} token ids (uint16) instead of the 400 asked for" in str(summary)
    assert str(prepare([source], tmp_path / "out", train_bpe=400, valid_fraction=0)) == str(summary)
    reached = prepare([source], tmp_path / "other", train_bpe=260, valid_fraction=0)
    assert (reached.vocab_size, reached.asked_vocab_size) == (260, 0)


def test_what_of_a_directory_is_left_out_is_said(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.txt", ".b.txt", "sub/c.txt", "image.png", "data", "1.csv", "2.csv", ".DS_Store"):
        (folder / name).write_text("words")
    (folder / "empty.txt").touch()
    (folder / "lost.md").symlink_to(folder / "nowhere")
    (folder / "linked").symlink_to(tmp_path)
    (folder / ".git").mkdir()
    walk = os.walk

    def some_unreadable(top, onerror):
        yield from walk(top, onerror=onerror)
        onerror(PermissionError(13, "Permission denied", f"{top}/closed"))

    monkeypatch.setattr(sources.os, "walk", some_unreadable)
    summary = prepare([folder], tmp_path / "out", valid_fraction=0)
    assert texts_of(tmp_path / "out") == ["words", "words"] and summary.skipped_documents == 0
    said = capsys.readouterr().err
    assert said.startswith(f"ssa: warning: left out of {folder}: ") and said.count("\n") == 1
    for part in (
        f"{folder}/.b.txt, {folder}/.git (hidden)",
        f"{folder}/.DS_Store, {folder}/1.csv, {folder}/2.csv and 2 more (of another kind)",
        f"{folder}/empty.txt (empty)",
        f"{folder}/lost.md (no file, or a link to none)",
        f"{folder}/linked (link to a directory)",
        f"{folder}/closed (Permission denied)",
    ):
        assert part in said
    for name in ("a.txt", "sub/c.txt"):
        (folder / name).unlink()
    (folder / "empty.txt").unlink()
    with pytest.raises(UserError, match=r"no \.txt .* file in .*closed \(Permission denied\)"):
        prepare([folder], tmp_path / "none")


def test_an_empty_name_is_not_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private.txt").write_text("words")
    for inputs, out in ([""], "out"), (["private.txt", ""], "out"), (["private.txt"], ""):
        with pytest.raises(UserError, match="a shell variable that is not set"):
            prepare(inputs, out)
    assert [path.name for path in tmp_path.iterdir()] == ["private.txt"]


def test_edits_that_keep_size_and_time_are_noticed(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(20))
    out = tmp_path / "out"
    prepare([source], out, valid_fraction=0)
    times = source.stat().st_atime_ns, source.stat().st_mtime_ns
    source.write_text(source.read_text().replace("quick", "Quick"))
    os.utime(source, ns=times)
    with pytest.raises(UserError, match="already prepared, and the input has changed since"):
        prepare([source], out, valid_fraction=0)
    prepare([source], out, valid_fraction=0, overwrite=True)
    os.utime(source, ns=(1, 1))  # another time alone is no other text
    prepare([source], out, valid_fraction=0)
    assert any("Quick" in text for text in texts_of(out))


def test_links_in_the_place_of_our_files_are_not_followed(tmp_path):
    precious, folder = tmp_path / "precious", tmp_path / "folder"
    precious.write_text("!")
    folder.mkdir()
    (folder / "tokenizer.json").write_text("!")
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(20))
    out = tmp_path / "out"
    prepare([source], out, valid_fraction=0.5)
    for name in (
        ".progress.json.partial",
        "index.json.partial",
        "train-00000.tokens.npy.partial",
        "valid-00000.docs.npy.partial",
    ):
        (out / name).symlink_to(precious)
    (out / "tokenizer.partial").symlink_to(folder)
    prepare([source], out, valid_fraction=0.5, overwrite=True)
    assert precious.read_text() == "!" and [path.name for path in folder.iterdir()] == ["tokenizer.json"]
    assert (folder / "tokenizer.json").read_text() == "!"
    prepare([source], tmp_path / "expected", valid_fraction=0.5)
    assert contents(out) == contents(tmp_path / "expected")


def test_a_half_written_shard_that_is_a_link_is_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 400)
    monkeypatch.setattr(prepare_module, "_COMMIT_BLOCKS", 1)
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(60))
    encoded_block = encode.BlockEncoder.__call__

    def stopping(self, block):
        if block.number == 5:
            raise StoppedError
        return encoded_block(self, block)

    monkeypatch.setattr(encode.BlockEncoder, "__call__", stopping)
    with pytest.raises(StoppedError):
        prepare([source], tmp_path / "out", valid_fraction=0)
    partial, elsewhere = tmp_path / "out" / "train-00000.tokens.npy.partial", tmp_path / "elsewhere"
    partial.rename(elsewhere)
    elsewhere.write_bytes(elsewhere.read_bytes() + b"more")
    partial.symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link"):
        prepare([source], tmp_path / "out", valid_fraction=0)
    assert elsewhere.read_bytes().endswith(b"more")


def test_lines_and_rows_have_a_longest_length(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = ["short", "x" * ((2 << 20) + 1), "short"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(UserError, match=r"a\.jsonl:2 is longer than 2,097,152 bytes"):
        prepare([path], tmp_path / "out", valid_fraction=0, max_line_bytes=2 << 20)
    for number, dictionary in enumerate((False, True)):
        table = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.table({"text": texts}), table, use_dictionary=dictionary)
        with pytest.raises(UserError, match=rf"{number}\.parquet, row 2 is longer than 2,097,152 bytes"):
            prepare([table], tmp_path / "out", valid_fraction=0, max_line_bytes=2 << 20)
        prepare([table], tmp_path / f"{number}", valid_fraction=0)
        assert texts_of(tmp_path / f"{number}") == texts
    table = tmp_path / "one.parquet"
    parquet.write_table(pyarrow.table({"text": texts[1:2]}), table)
    with pytest.raises(UserError, match=r"one\.parquet: a row is longer"):  # before it is read
        prepare([table], tmp_path / "out", valid_fraction=0, max_line_bytes=2 << 20)
    with pytest.raises(UserError, match="max_line_bytes of 5 is too small"):
        prepare([path], tmp_path / "out", max_line_bytes=5)
    assert not (tmp_path / "out").exists()


def test_large_dictionaries_are_not_repeated_in_memory(tmp_path):
    """A hundred rows of one text of 12 MiB, which the file has once; arrays of 64 rows would take 768 MiB."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100, pyarrow.int32()), pyarrow.array(["ab " * (4 << 20)]))
    parquet.write_table(pyarrow.table({"text": column}).cast(pyarrow.schema([("text", pyarrow.large_string())])), tmp_path / "a.parquet",
                        data_page_size=1 << 30, dictionary_pagesize_limit=1 << 30)  # fmt: skip
    group = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0)
    assert sources._rows_at_once(tmp_path / "a.parquet", group, "text", 16 << 20) == 5
    rows = sources._parquet(tmp_path / "a.parquet", sources.Reading(), 100)
    for number, (text, read_bytes) in zip(range(1, 8), rows, strict=False):
        assert len(text) == 12 << 20 and read_bytes == number
    plain = pyarrow.table({"text": [f"text {i}" for i in range(1000)]})
    parquet.write_table(plain, tmp_path / "b.parquet")
    assert (
        sources._rows_at_once(
            tmp_path / "b.parquet", parquet.ParquetFile(tmp_path / "b.parquet").metadata.row_group(0), "text", 100
        )
        == 64
    )


def test_parquet_text_that_is_not_utf8_names_its_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array([b"fine"] * 70 + [None, b"caf\xe9", b"fine"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", row_group_size=40)
    with pytest.raises(UserError, match=r"a\.parquet, row 72 is not UTF-8 at byte 3"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out")


def test_what_a_tokenizer_cannot_encode_is_one_line(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.setattr(prepare_module, "_BYTES_PER_WORKER", 1)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("a word")
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"the tokenizer cannot encode the text: .*\[UNK\]"):
            prepare(
                [tmp_path / "a.txt"], tmp_path / "out", tokenizer=tmp_path / "tokenizer.json", valid_fraction=0, workers=workers
            )


def test_a_disk_that_refuses_is_one_line_and_the_run_goes_on_afterwards(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(30))
    append = prepare_module.ShardWriter.append

    def failing(self, tokens, docs):
        raise OSError(27, "File too large")

    monkeypatch.setattr(prepare_module.ShardWriter, "append", failing)
    with pytest.raises(UserError, match=r"out: File too large; what is done is kept, run again to go on"):
        prepare([source], tmp_path / "out")
    monkeypatch.setattr(prepare_module.ShardWriter, "append", append)
    prepare([source], tmp_path / "out")
    with pytest.raises(UserError, match=r"o: File name too long$"):
        prepare([source], tmp_path / ("o" * 300))


def test_too_little_validation_text_is_said_with_the_fraction_that_would_do(tmp_path, capsys):
    texts = [f"{text} " * 30 for text in some_texts(500)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    prepare([source], tmp_path / "out")
    said = capsys.readouterr().err
    found = re.fullmatch(
        r"ssa: warning: the split valid has [\d,]+ documents and [\d,]+ tokens, too few for figures that mean much: "
        r"--valid-fraction (\S+) sets at least 20 documents and 50,000 tokens apart\n", said,
    )  # fmt: skip
    assert found
    summary = prepare([source], tmp_path / "better", valid_fraction=float(found[1]))
    valid = summary.splits["valid"]
    assert capsys.readouterr().err == "" and valid.documents >= 20 and valid.tokens >= 50_000
    less = prepare([source], tmp_path / "less", valid_fraction=float(found[1]) * 0.89).splits["valid"]
    assert less.documents < 20 or less.tokens < 50_000
    capsys.readouterr()
    prepare([write_jsonl(tmp_path / "b.jsonl", some_texts(40))], tmp_path / "small")
    assert "too few for figures that mean much: give it more text" in capsys.readouterr().err
    prepare([source], tmp_path / "apart", split="valid", overwrite=True)
    assert capsys.readouterr().err == ""


def test_documents_in_both_training_and_validation_text_are_counted_and_named(tmp_path, capsys, monkeypatch):
    from ssa.data import split_checks

    monkeypatch.setattr(split_checks, "_AT_ONCE", 7)
    texts = [f"{text} " * 30 for text in some_texts(100)]
    write_jsonl(tmp_path / "train.jsonl", [*texts[:90], texts[3], "x"])
    write_jsonl(tmp_path / "valid.jsonl", [*texts[88:], texts[3], *(f"{text} " * 30 for text in some_texts(99, seed=1))])
    out = tmp_path / "out"
    prepare([tmp_path / "train.jsonl"], out, split="train")
    assert capsys.readouterr().err == ""
    prepare([tmp_path / "valid.jsonl"], out, split="valid")
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "3 of the 112 documents in valid are in train, too, for example '88: " in said
        and "'3: " in said
    )
    prepare([tmp_path / "train.jsonl"], out, split="recent")  # training text of another kind may share some
    assert "3 of the 112 documents in valid are in recent, too" in capsys.readouterr().err
    prepare([write_jsonl(tmp_path / "other.jsonl", texts[:50])], out, split="books")
    assert "1 of the 112 documents in valid are in books" in capsys.readouterr().err


def test_copies_that_fill_a_split_are_said(tmp_path, capsys):
    low, high = sorted(("one text " * 100, "same text " * 100), key=lambda text: document_hash(text.encode()))
    source = write_jsonl(tmp_path / "a.jsonl", [low] * 500 + [high])
    assert prepare([source], tmp_path / "out", valid_fraction=1e-9).splits["valid"].documents == 500
    said = capsys.readouterr().err
    assert f"most of the text is in the split valid: {500 * len(low) + 500:,} tokens, and {len(high) + 1:,} in train" in said
    assert f"499 of the 500 documents in valid are copies of others there; '{low[:40]}...' is there 500 times" in said
