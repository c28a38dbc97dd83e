import gzip
import json

import numpy as np
import pytest

from ssa.data.shards import TokenShards, is_prepared
from ssa.data.tokenizer import byte_tokenizer, train_bpe
from ssa.errors import UserError
from ssa.eval.documents import document_texts, fingerprint, read_documents, read_texts

TEXT = "Zwölf Boxkämpfer  jagen\nViktor quer über den großen Sylter Deich. "


def test_prepared_documents_are_the_texts_without_their_end(prepared):
    tokenizer = byte_tokenizer()
    shards = TokenShards(prepared, "valid")
    documents, cut = read_documents(prepared, "valid", tokenizer)
    assert not cut and len(documents) == shards.num_documents > 0
    assert sum(d.num_bytes for d in documents) == shards.num_bytes == sum(len(d.tokens) for d in documents)
    texts = list(document_texts(prepared, "valid", tokenizer))
    for document, text in zip(documents, texts, strict=True):
        assert tokenizer.decode(document.tokens.tolist()) == text
        assert document.num_words == len(text.split())


def test_text_files_count_as_prepared_ones_do(prepared):
    """The directory holds the same texts: train and valid of the shards together are the files."""
    tokenizer = byte_tokenizer()
    files, _ = read_documents(prepared.parent / "*.txt", "valid", tokenizer)
    shards = [d for split in ("train", "valid") for d in read_documents(prepared, split, tokenizer)[0]]

    def content(documents):
        return sorted((d.tokens.tobytes(), d.num_bytes, d.num_words) for d in documents)

    assert content(files) == content(shards)


@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, lambda: train_bpe([TEXT * 3], 300)])
def test_bytes_and_words_are_those_of_the_text(tmp_path, make_tokenizer):
    (tmp_path / "a.md").write_text(TEXT, encoding="utf-8")
    (document,), _ = read_documents(tmp_path / "a.md", "valid", make_tokenizer())
    assert (document.num_bytes, document.num_words) == (len(TEXT.encode()), 10)


def test_json_lines_with_word_counts(tmp_path):
    records = [{"text": TEXT}, {"text": TEXT, "words": 99}, {"text": TEXT, "words": "many"}]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    documents, _ = read_documents(tmp_path / "a.jsonl.gz", "valid", byte_tokenizer())
    assert [d.num_words for d in documents] == [10, 99, 10]
    for words in (-1, 9.5):
        (tmp_path / "b.jsonl").write_text(json.dumps({"text": TEXT, "words": words}))
        with pytest.raises(UserError, match=f'"words" = {words} beside a text is no number of words'):
            read_documents(tmp_path / "b.jsonl", "valid", byte_tokenizer())


def test_text_that_is_none_is_an_error_and_broken_text_is_read(tmp_path):
    for name, content in (("a.txt", b""), ("b.txt", b" \n"), ("c.jsonl", b'{"text": ""}\n{"text": null}\n'), ("d.jsonl", b"\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name[0]}\.\w+ holds no text: every document is empty"):
            read_documents(tmp_path / name, "valid", byte_tokenizer())
    (tmp_path / "e.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\\ud800\xe2\x80\xa8b"}\r\n')
    assert list(read_texts(tmp_path / "e.jsonl")) == [("a\ufffd\u2028b", 2)]


@pytest.mark.parametrize("max_tokens", [1, 30, 67, 68, 69, 120, 137, 500])
def test_max_tokens_cuts_the_last_document_and_its_counts(tmp_path, max_tokens):
    tokenizer = byte_tokenizer()
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(TEXT, encoding="utf-8")
    each = len(TEXT.encode())
    documents, cut = read_documents(tmp_path, "valid", tokenizer, max_tokens)
    scored = sum(len(d.tokens) - 1 for d in documents)
    assert scored == min(max_tokens, 2 * (each - 1)) and cut == (max_tokens < 2 * (each - 1))
    for document in documents:
        text = TEXT.encode()[: len(document.tokens)].decode(errors="ignore")
        assert document.num_words in (len(text.split()), len(text.split()) + 1)  # a cut character may count as a word
        assert abs(document.num_bytes - len(document.tokens)) <= 2


def test_fingerprint_sees_tokens_and_borders(tmp_path):
    def of(*texts):
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_text(text)
        documents = [read_documents(tmp_path / f"{i}.txt", "valid", byte_tokenizer())[0][0] for i in range(len(texts))]
        return fingerprint(documents)

    assert of("ab", "c") == of("ab", "c") != of("a", "bc")
    assert of("ab", "c") != of("ab", "d")
    documents = read_documents(tmp_path / "0.txt", "valid", byte_tokenizer())[0]
    wide = [documents[0]._replace(tokens=documents[0].tokens.astype(np.int64))]
    assert fingerprint(documents) == fingerprint(wide)


def test_errors(tmp_path, prepared):
    with pytest.raises(UserError, match="another tokenizer"):
        read_documents(prepared, "valid", train_bpe([TEXT], 280))
    with pytest.raises(UserError, match="no split"):
        read_documents(prepared, "test", byte_tokenizer())
    with pytest.raises(UserError, match="no such file"):
        read_documents(tmp_path / "nothing.txt", "valid", byte_tokenizer())
    with pytest.raises(UserError, match="max_tokens = 0"):
        read_documents(prepared, "valid", byte_tokenizer(), 0)
    assert not is_prepared(tmp_path)
