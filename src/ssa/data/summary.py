"""What a prepared directory holds, for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssa.data.progress import digest
from ssa.data.shards import read_index


@dataclass(frozen=True)
class SplitSummary:
    tokens: int
    documents: int
    bytes: int
    words: int
    shards: int


@dataclass(frozen=True)
class PrepareSummary:
    """What a prepared directory holds."""

    out: Path
    splits: dict[str, SplitSummary]
    vocab_size: int
    dtype: str
    skipped_documents: int
    asked_vocab_size: int = 0
    """Of a BPE that was to be trained, where the text did not yield as many ids; 0 otherwise."""

    def __str__(self) -> str:
        splits = "; ".join(
            f"{name} {split.tokens:,} tokens, {split.documents:,} documents, {split.shards} shard{'s' * (split.shards != 1)}"
            for name, split in self.splits.items()
        )
        rate = sum(split.bytes for split in self.splits.values()) / sum(split.tokens for split in self.splits.values())
        empty = f", {self.skipped_documents:,} empty documents left out" if self.skipped_documents else ""
        asked = ""
        if self.asked_vocab_size:
            asked = f" instead of the {self.asked_vocab_size:,} asked for: the text has no more pairs to merge"
        return f"{self.out}: {splits}\n{self.vocab_size:,} token ids ({self.dtype}){asked}, {rate:.2f} bytes a token{empty}"


def summarize(out: Path, asked_vocab_size: int) -> PrepareSummary:
    index = read_index(out)
    splits = {
        name: SplitSummary(split["tokens"], split["documents"], split["bytes"], split["words"], len(split["shards"]))
        for name, split in index["splits"].items()
    }
    # Splits written by one run carry that run's count each.
    skipped = {digest(split["source"]["plan"]): split["source"]["skipped_documents"] for split in index["splits"].values()}
    vocab_size, dtype = index["tokenizer"]["vocab_size"], index["tokenizer"]["dtype"]
    asked = asked_vocab_size if asked_vocab_size > vocab_size else 0
    return PrepareSummary(out, splits, vocab_size, dtype, sum(skipped.values()), asked)
