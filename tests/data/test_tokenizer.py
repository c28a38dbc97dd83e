import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ssa.data import bpe_cache
from ssa.data.bpe_cache import PieceEncoder
from ssa.data.tokenizer import (
    byte_tokenizer,
    encode_documents,
    fingerprint,
    load_tokenizer,
    token_dtype,
    train_bpe,
    vocabulary_size,
)
from ssa.errors import UserError

TEXTS = [
    "It's the café's 12  tables,\n\n  he said: \"I'll go\"; they've 3.5 km\tto go.",
    "naïve — words\u00a0and <|end|> words " * 9,
]
# Plain letters are rare in st.text(); the boundaries that matter are between letters, spaces, digits, quotes and foreign characters.
BOUNDARIES = st.text(
    st.sampled_from(
        list("ab Z\n\t\r\x0b\x1c'stremvld.,09é÷½漢\u0100\u00a0\u2003\u0301_<|end>~\x00“’…—\u2029\u202f\u2030\u2040\u200b")
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS * 3, 320)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
@example("a<|end|>b<|pad|>")
@example("\x00\x7f\u0080\ud7ff\U0010ffff  \r\n")
def test_byte_ids_are_the_utf8_bytes_in_every_path(reloaded, text):
    expected = list(text.encode())
    assert encode_documents(reloaded, [text])[0].tolist() == [*expected, 256]
    assert reloaded(text).input_ids == byte_tokenizer()(text).input_ids == expected
    assert reloaded.decode(expected) == text


def test_byte_special_tokens(reloaded):
    assert (reloaded.bos_token_id, reloaded.eos_token_id, reloaded.pad_token_id, len(reloaded)) == (256, 256, 257, 258)
    assert reloaded.decode([104, 105, 256], skip_special_tokens=True) == "hi"
    assert reloaded.decode([0xC3, 104]) == "\ufffdh"  # half a character


def test_lone_surrogates_become_replacement_characters(bpe):
    for tokenizer in (byte_tokenizer(), bpe):
        ids = encode_documents(tokenizer, ["a\ud800b"])[0]
        assert tokenizer.decode(ids[:-1]) == "a\ufffdb"


@settings(max_examples=200, deadline=None)
@given(st.one_of(BOUNDARIES, st.text(max_size=40)))
@example("5  é 'sé  9  x\u00a0 y")
def test_piece_path_equals_the_library(bpe, text):
    backend = bpe.backend_tokenizer
    backend.encode_special_tokens = True
    assert encode_documents(bpe, [text])[0].tolist() == [*backend.encode(text, add_special_tokens=False).ids, bpe.eos_token_id]
    assert bpe.decode(encode_documents(bpe, [text])[0][:-1]) == text


@settings(max_examples=200, deadline=None)
@given(BOUNDARIES)
def test_piece_path_equals_the_library_without_digit_splitting(gpt2_like, text):
    backend, encoder = gpt2_like
    assert encoder.encode([text])[0].tolist() == [*backend.encode(text, add_special_tokens=False).ids, 0]


@settings(max_examples=300, deadline=None)
@given(BOUNDARIES.filter(bool), st.booleans())
@example("it'sb 'll'reb\"'s 1's 'llé'd", False)
@example("it'sb 'll'reb\"'s 1's 'llé'd", True)
def test_cuts_are_those_of_the_library(bpe, gpt2_like, text, single_digits):
    splitter = (bpe.backend_tokenizer if single_digits else gpt2_like[0]).pre_tokenizer
    expected = [len(text[:start].encode()) for _, (start, _) in splitter.pre_tokenize_str(text)]
    found = bpe_cache.piece_starts(np.frombuffer(text.encode(), np.uint8), single_digits=single_digits).tolist()
    assert set(found) <= set(expected)
    if not any(character in text for character in "½漢\u0100\u00a0\u2003\u0301\x00÷\u2029\u202f\u2040\u200b"):
        assert found == expected


def test_slices_and_a_full_table_change_nothing(bpe, monkeypatch):
    texts = [f"{TEXTS[i % 2]} {i * 7919} word{i}’s" + "é漢" * i + " b" * (i % 3) + "x" * 80 for i in range(60)] + ["", "a"]
    expected = [x.tolist() for x in encode_documents(bpe, texts)]
    for name, value in (("_SLICE_BYTES", 50), ("_MAX_ENTRIES", 30), ("_TABLE_BITS", 6)):
        monkeypatch.setattr(bpe_cache, name, value)
    small = PieceEncoder.for_backend(bpe.backend_tokenizer, np.dtype(np.uint16), bpe.eos_token_id)
    for _ in range(2):
        assert [x.tolist() for x in small.encode(texts)] == expected
    assert len(small._ids) == 30


def test_pieces_too_long_for_a_key_are_found_again(bpe):
    texts = ["y" * 16 + " " + "y" * 17 + " " + "z" * 200 + "!\x00 !"] * 2
    backend = bpe.backend_tokenizer
    expected = [*backend.encode(texts[0], add_special_tokens=False).ids, bpe.eos_token_id]
    assert [x.tolist() for x in encode_documents(bpe, texts) + encode_documents(bpe, texts)] == [expected] * 4


@pytest.fixture(scope="module")
def gpt2_like():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    backend.encode_special_tokens = True
    encoder = PieceEncoder.for_backend(backend, np.dtype(np.uint16), 0)
    assert encoder is not None
    return backend, encoder


def test_piece_path_is_refused_where_it_would_be_wrong(bpe):
    from tokenizers import Tokenizer, normalizers, pre_tokenizers

    for attribute, value in (("normalizer", normalizers.Lowercase()), ("pre_tokenizer", pre_tokenizers.Whitespace())):
        other = Tokenizer.from_str(bpe.backend_tokenizer.to_str())
        other.encode_special_tokens = True
        assert PieceEncoder.for_backend(other, np.dtype(np.uint16), 0) is not None
        setattr(other, attribute, value)
        assert PieceEncoder.for_backend(other, np.dtype(np.uint16), 0) is None
    other = Tokenizer.from_str(bpe.backend_tokenizer.to_str())
    other.encode_special_tokens = True
    other.add_tokens(["  "])
    assert PieceEncoder.for_backend(other, np.dtype(np.uint16), 0) is None


def test_other_tokenizers_go_through_the_library():
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2, "</s>": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert [ids.tolist() for ids in encode_documents(tokenizer, ["a b", "zebra a", ""])] == [[0, 1, 3], [2, 0, 3], [3]]


def test_encoder_follows_added_tokens(bpe):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer, eos_token="<|end|>")
    before = encode_documents(tokenizer, ["say zzyzx"])[0]
    tokenizer.add_tokens(["zzyzx"])
    after = encode_documents(tokenizer, ["say zzyzx"])[0]
    assert len(after) < len(before) and after[-2] == len(tokenizer) - 1


def test_trained_bpe_is_deterministic_and_loads_back(bpe, tmp_path):
    again = train_bpe(TEXTS * 3, 320)
    bpe.save_pretrained(tmp_path)
    assert fingerprint(bpe) == fingerprint(again) == fingerprint(load_tokenizer(tmp_path))
    assert fingerprint(bpe) == fingerprint(load_tokenizer(tmp_path / "tokenizer.json"))
    assert fingerprint(bpe) != fingerprint(byte_tokenizer())
    assert fingerprint(bpe) != fingerprint(train_bpe(TEXTS * 3, 300))
    assert vocabulary_size(bpe) == len(bpe) <= 320
    assert len(encode_documents(bpe, [TEXTS[1]])[0]) < len(TEXTS[1])


def test_dtype_grows_with_the_vocabulary():
    assert token_dtype(1 << 16) == np.uint16
    assert token_dtype((1 << 16) + 1) == np.uint32


def test_bad_tokenizers_are_one_line_errors(tmp_path, bpe):
    bpe.save_pretrained(tmp_path / "no_end")
    config = tmp_path / "no_end" / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for spec, message in (
        (tmp_path / "missing", "no tokenizer at"),
        (tmp_path / "empty", "no tokenizer at"),
        (tmp_path / "broken.json", "not a fast tokenizer"),
        (tmp_path / "no_end", "no end-of-text token"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(spec)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="at least 258"):
        train_bpe(TEXTS, 100)


def test_code_in_a_tokenizer_directory_is_never_run(tmp_path, bpe):
    bpe.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(bpe)
    assert not (tmp_path / "ran").exists()
