import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssa.data.tokenizer import byte_tokenizer, train_bpe
from ssa.infer.transcript import Transcript

END = 256
BYTES = byte_tokenizer()
BPE = train_bpe(["Zwölf Boxkämpfer jagen Viktor. 你好，世界 🙂🙃"] * 3, 300)


def run(tokens, stop=(), tokenizer=BYTES, end=frozenset([END])):
    transcript = Transcript(tokenizer, end, stop)
    pieces = [transcript.push(t) for t in tokens]
    pieces.append(transcript.finish())
    assert "".join(pieces) == transcript.text
    return transcript, pieces


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=40))
@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["byte", "bpe"])
def test_any_text_comes_out_as_it_went_in_and_in_whole_characters(tokenizer, text):
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    transcript, pieces = run(tokens, tokenizer=tokenizer, end=frozenset())
    assert transcript.text == text and transcript.reason == "length" and transcript.token_ids == tokens
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=40))
def test_any_bytes_decode_as_the_tokenizer_does_at_once(tokens):
    assert run(tokens)[0].text == BYTES.decode(tokens)


def test_a_character_appears_with_its_last_byte():
    _, pieces = run("é🙂x".encode())
    assert pieces == ["", "é", "", "", "", "🙂", "x", ""]


def test_the_end_token_ends_and_the_rest_is_ignored():
    transcript, _ = run([*b"abc", END, *b"def", END])
    assert (transcript.text, transcript.reason, transcript.token_ids) == ("abc", "end", list(b"abc"))


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_they_first_end(text, stop):
    transcript, _ = run(text.encode(), stop)
    for length in range(len(text) + 1):  # the first moment that any stop string is there
        found = [text[:length].find(s) for s in stop if s in text[:length]]
        if found:
            assert (transcript.text, transcript.reason) == (text[: min(found)], "stop")
            assert len(transcript.token_ids) == length
            return
    assert (transcript.text, transcript.reason) == (text, "length")


def test_what_may_become_a_stop_string_is_held_back():
    _, pieces = run(b"a\n\nb\n", ["\n\n\n"])
    assert pieces == ["a", "", "", "\n\nb", "", "\n"]
