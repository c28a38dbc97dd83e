"""`prepare`: text to token shards, in parallel, resumable, the same bytes whatever the workers and however often it was killed.

One process reads blocks in a fixed order, workers encode them, and their results are appended in that order, so nothing about the
output depends on timing. Every so often the shards are made durable and the place reached is noted in `.progress.json`; the next run
cuts the shards back to that place and goes on. `index.json` comes last and makes the corpus visible.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import progress as rich_progress

from ssa.data.encode import EncoderSpec, encode_blocks, valid_threshold
from ssa.data.lines import MAX_LINE_BYTES
from ssa.data.progress import Progress, begin, digest, remove, remove_tree, save, write_json
from ssa.data.shard_writer import ShardWriter
from ssa.data.shards import FORMAT, INDEX, PROGRESS, TOKENIZER, VERSION, ShardInfo, TokenizerRecord, read_index
from ssa.data.sources import BLOCK_BYTES, Reading, Source, expand_inputs, read_blocks, read_texts
from ssa.data.split_checks import LowestHashes, findings
from ssa.data.summary import PrepareSummary, summarize
from ssa.data.tokenizer import fingerprint, load_tokenizer, token_dtype, train_bpe, vocabulary_size
from ssa.errors import UserError, one_line
from ssa.files import sole_writer
from ssa.terminal import console, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_COMMIT_BLOCKS = 64
_BPE_TRAINING_BYTES = 256 << 20
_BYTES_PER_WORKER = 4 << 20  # on disk; for less, starting a process takes longer than it saves
_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]*")


def prepare(
    inputs: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    train_bpe: int = 0,
    valid_fraction: float = 0.01,
    split: str | None = None,
    text_field: str = "text",
    shard_tokens: int = 1 << 28,
    document_bytes: int = 256 << 10,
    max_line_bytes: int = MAX_LINE_BYTES,
    workers: int = 0,
    overwrite: bool = False,
    show_progress: bool = True,
) -> PrepareSummary:
    """Encode text into the token shards of ``out`` (`ssa.data.shards` has the format) and say what came out.

    ``inputs``: files, directories or globs of .txt .md .jsonl (.gz .xz .zst) .parquet, ``builtin:python`` (see `ssa.data.corpus`), or
    ``hf:NAME[:CONFIG][:SPLIT]``. A text file is one document, cut at line ends into documents of equal size where it has more than
    ``document_bytes``; a JSON line or a Parquet row is one document, its text in ``text_field``, and an error where it is longer than
    ``max_line_bytes``. Empty documents are left out.

    ``tokenizer``: see `load_tokenizer`, bytes by default; or ``train_bpe`` > 0 trains a byte-level BPE of that many ids (fewer where the
    text has not as many pairs to merge, which the summary says) on at most 256 MiB of the inputs.

    A document goes to split "valid" with probability ``valid_fraction``, decided by its text's hash alone, else to "train"; where that
    leaves one of them empty, the document with the extreme hash goes there. ``split`` puts everything into the one split it names and,
    if ``out`` already holds other splits of the same tokenizer, adds it to them.

    ``workers`` processes (0: one a core, fewer for little text). Running the same call again after an interruption continues it; after
    completion it changes nothing. ``overwrite`` starts anew. What a directory holds beside text, and splits that are too small or share
    documents, are said on stderr. Raises `UserError` for whatever is wrong with the arguments and the input.
    """
    if not os.fspath(out):
        raise UserError("out = '' (a shell variable that is not set?): name a directory for the shards")
    out = Path(out)
    given = [os.fspath(one) for one in ([inputs] if isinstance(inputs, str | os.PathLike) else inputs)]
    _check_options(valid_fraction, split, shard_tokens, document_bytes, max_line_bytes, workers)
    if train_bpe and tokenizer is not None:
        raise UserError(
            f"train_bpe = {train_bpe} makes a tokenizer and tokenizer = {str(tokenizer)!r} names one: leave one of them out"
        )
    sources = expand_inputs(given, tell=True)
    loaded = None if train_bpe else load_tokenizer(os.fspath(tokenizer or "byte"))
    plan: dict[str, Any] = {
        "tokenizer": f"BPE of {train_bpe} ids trained on the inputs" if loaded is None else fingerprint(loaded),
        "inputs": given,
        "files": sum(len(source.paths) for source in sources),
        "bytes": sum(source.num_bytes for source in sources),
        "digest": digest([[s.kind, s.name, [[str(path), path.stat().st_size] for path in s.paths]] for s in sources]),
        "text_field": text_field,
        "valid_fraction": 0.0 if split else valid_fraction,
        "split": split,
        "shard_tokens": shard_tokens,
        "document_bytes": document_bytes,
    }
    if any(source.kind == "builtin" for source in sources):
        plan["python"] = sys.version.split()[0]
    splits = (split,) if split else ("train", "valid") if valid_fraction else ("train",)
    with _write_errors_reported(out), _sole_writer(out):
        modified = digest([[path.stat().st_mtime_ns for path in s.paths] for s in sources])
        fresh = Progress(plan, modified, valid_below=valid_threshold(plan["valid_fraction"]))
        content = _ContentHash(sources)
        progress = begin(out, fresh, splits, overwrite, content.get)
        if progress is None:
            return summarize(out, train_bpe)
        how = Reading(text_field, document_bytes, max_line_bytes)
        try:
            with content:
                _run(out, progress, splits, sources, how, loaded, train_bpe, workers, show_progress, content)
        except UserError:
            if progress.position == (0, 0):  # nothing worth keeping: correct the call and run it again
                remove(out, splits)
                (out / PROGRESS).unlink()
            raise
        for finding in findings(out, splits, plan["valid_fraction"], LowestHashes(progress.lowest)):
            warn(finding)
        return summarize(out, train_bpe)


def _run(
    out: Path,
    progress: Progress,
    splits: tuple[str, ...],
    sources: list[Source],
    how: Reading,
    loaded: PreTrainedTokenizerFast | None,
    bpe_size: int,
    workers: int,
    show_progress: bool,
    content: _ContentHash,
) -> None:
    if progress.tokenizer is None:
        tokenizer = loaded or train_bpe(_bpe_training_texts(sources, how), bpe_size)
        progress.tokenizer = _install_tokenizer(out, tokenizer)
        save(out, progress)
    while True:
        written = _write_splits(out, progress, splits, sources, how, workers, show_progress)
        empty = [name for name in splits if not written[name]]
        if not empty:
            break
        if progress.hashes is None:
            progress.position = (0, 0)
            raise UserError(f"no text in {', '.join(progress.plan['inputs'])}: every document is empty")
        lowest, highest = progress.hashes
        if lowest == highest:
            progress.position = (0, 0)
            copies = sum(shard.documents for shards in written.values() for shard in shards)
            found = "a single document" if copies == 1 else f"one document {copies} times"
            raise UserError(
                f"the input is {found}, which cannot be split into train and valid: lower document_bytes to cut it, "
                "or set valid_fraction to 0"
            )
        # Few documents and bad luck. The corpus is small then, and a second pass simpler than moving a document between shards.
        progress.valid_below = lowest + 1 if empty == ["valid"] else highest
        progress.position, progress.writers, progress.skipped, progress.lowest = (0, 0), {}, 0, []
        save(out, progress)
    _write_index(out, progress, written, content.get())
    (out / PROGRESS).unlink()


def _write_splits(
    out: Path, progress: Progress, splits: tuple[str, ...], sources: list[Source], how: Reading, workers: int, show_progress: bool
) -> dict[str, list[ShardInfo]]:
    """Encode everything from the place reached on and return the finished shards."""
    assert progress.tokenizer is not None
    plan, dtype = progress.plan, np.dtype(progress.tokenizer["dtype"])
    spec = EncoderSpec(out / TOKENIZER, progress.tokenizer["end_id"], how.text_field, progress.valid_below, splits)
    blocks = read_blocks(sources, how, progress.position)
    writers = {name: ShardWriter(out, name, dtype, plan["shard_tokens"], progress.writers.get(name)) for name in splits}
    encoded = encode_blocks(blocks, spec, _workers(workers, sources))
    lowest = LowestHashes(progress.lowest)
    try:
        with _progress_bar(sources, show_progress) as report:
            for count, block in enumerate(encoded, start=1):
                for name, tokens in block.tokens.items():
                    writers[name].append(tokens, block.docs[name])
                    hashes = block.hashes[name]
                    extremes = int(hashes.min()), int(hashes.max())
                    least, most = progress.hashes or extremes
                    progress.hashes = min(least, extremes[0]), max(most, extremes[1])
                    if plan["valid_fraction"]:
                        lowest.add(hashes, np.diff(block.docs[name][:, 0], prepend=0))
                progress.skipped += block.skipped
                reached = block.block[0], block.block[1] + 1
                if count % _COMMIT_BLOCKS == 0:
                    progress.position = reached
                    progress.writers = {name: writer.commit() for name, writer in writers.items()}
                    progress.lowest = lowest.state()
                    save(out, progress)
                report(block.block[0], block.read_bytes)
        progress.lowest = lowest.state()
        return {name: writer.finish() for name, writer in writers.items()}
    finally:
        encoded.close()
        for writer in writers.values():
            writer.abandon()


def _install_tokenizer(out: Path, tokenizer: PreTrainedTokenizerFast) -> TokenizerRecord:
    partial = out / f"{TOKENIZER}.partial"
    remove_tree(partial)
    tokenizer.save_pretrained(partial)
    remove_tree(out / TOKENIZER)
    partial.rename(out / TOKENIZER)
    size = vocabulary_size(tokenizer)
    return {
        "fingerprint": fingerprint(tokenizer),
        "vocab_size": size,
        "end_id": tokenizer.eos_token_id,
        "dtype": token_dtype(size).name,  # type: ignore[typeddict-item]
    }


def _bpe_training_texts(sources: list[Source], how: Reading) -> Iterator[str]:
    # The same share of every source rather than all of the first ones.
    for source in sources:
        yield from read_texts(source, how, _BPE_TRAINING_BYTES // len(sources))


class _ContentHash:
    """sha256 over the bytes of all input files in order, computed beside other work while it is open."""

    def __init__(self, sources: list[Source]) -> None:
        self._paths = [path for source in sources for path in source.paths]
        self._stop, self._digest = threading.Event(), ""
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="content hash", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def get(self) -> str:
        """The digest, in hexadecimal digits; waits for it. Raises `OSError` for a file that cannot be read."""
        if self._thread is None:
            self._run()
        else:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digest

    def _run(self) -> None:
        digest = hashlib.sha256()
        try:
            for path in self._paths:
                with path.open("rb") as file:
                    while not self._stop.is_set() and (chunk := file.read(1 << 20)):
                        digest.update(chunk)
            self._digest = digest.hexdigest()
        except OSError as error:
            self._error = error


def _write_index(out: Path, progress: Progress, written: dict[str, list[ShardInfo]], content: str) -> None:
    splits = read_index(out)["splits"] if (out / INDEX).is_file() else {}
    for name, shards in written.items():
        counts = {key: sum(getattr(shard, key) for shard in shards) for key in ("tokens", "documents", "bytes", "words")}
        source = {"plan": progress.plan, "skipped_documents": progress.skipped, "content": content}
        splits[name] = {**counts, "source": source, "shards": [asdict(shard) for shard in shards]}
    index = {"format": FORMAT, "version": VERSION, "tokenizer": progress.tokenizer, "splits": dict(sorted(splits.items()))}
    write_json(out / INDEX, index)


def _check_options(
    valid_fraction: float, split: str | None, shard_tokens: int, document_bytes: int, max_line_bytes: int, workers: int
) -> None:
    if not 0 <= valid_fraction < 1:
        raise UserError(
            f'valid_fraction = {valid_fraction} is not in [0, 1): for validation text only, set split to "valid" (--split valid)'
        )
    if split is not None and not _SPLIT_NAME.fullmatch(split):
        raise UserError(f"split {split!r} is no name: use lower-case letters, digits and _, such as valid")
    for name, value, least in (
        ("shard_tokens", shard_tokens, 1),
        ("document_bytes", document_bytes, 1024),
        ("max_line_bytes", max_line_bytes, BLOCK_BYTES),
        ("workers", workers, 0),
    ):
        if value < least:
            raise UserError(f"{name} of {value} is too small: at least {least}")


def _workers(asked: int, sources: list[Source]) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if any(source.kind == "hf" for source in sources):
        return asked or cores
    return min(asked or cores, 1 + sum(source.num_bytes for source in sources) // _BYTES_PER_WORKER)


@contextmanager
def _progress_bar(sources: list[Source], show: bool) -> Iterator[Any]:
    """A callable for (source number, bytes of it read), shown on a terminal only."""
    terminal = console(stderr=True)
    before = np.cumsum([0, *(source.num_bytes for source in sources)])
    columns = (
        "preparing",
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=terminal, disable=not (show and terminal.is_terminal), transient=True) as bar:
        task = bar.add_task("prepare", total=int(before[-1]) or None)
        yield lambda source, read: bar.update(task, completed=int(before[source]) + read)


@contextmanager
def _sole_writer(out: Path) -> Iterator[None]:
    """Make the directory and keep a second `prepare` out of it; where nothing was written, nothing is left."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose a directory for the shards")
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be created: {error.strerror}; name another directory with --out") from None
    try:
        with sole_writer(out, f"{out} is being prepared by another process: wait for it, or choose another directory"):
            yield
    finally:
        if not existed and not any(out.iterdir()):
            out.rmdir()


@contextmanager
def _write_errors_reported(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = "; what is done is kept, run again to go on" if os.path.exists(out / PROGRESS) else ""
        raise UserError(f"{error.filename or out}: {error.strerror or one_line(error)}{kept}") from error
