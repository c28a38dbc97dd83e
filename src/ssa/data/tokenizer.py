"""Tokenizers: the built-in byte tokenizer, byte-level BPE trained on one's own text, and any transformers fast tokenizer from disk.

All of them are `PreTrainedTokenizerFast` with an end-of-document token, saved as plain `tokenizer.json` + `tokenizer_config.json`.
No code is ever taken from a tokenizer's directory, and nothing is fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ssa.data.bpe_cache import PieceEncoder
from ssa.data.lines import without_surrogates
from ssa.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerFast

END, PAD = "<|end|>", "<|pad|>"
# End-of-document names of published vocabularies, tried in this order for a bare tokenizer.json, which has no field for it.
_KNOWN_ENDS = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eos|>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0..255 are the bytes of the UTF-8 text, 256 is ``<|end|>`` (bos, eos and document end), 257 ``<|pad|>``."""
    return _with_special_tokens(_byte_backend())


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of ``vocab_size`` ids (specials included) with the byte tokenizer's special tokens.

    Digits stand alone and words are split as GPT-2 does. Any text round-trips. Memory grows with the number of distinct words.
    """
    if vocab_size < 258:
        raise UserError(f"BPE vocabulary of {vocab_size} is too small: 256 bytes and 2 special tokens need at least 258")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((without_surrogates(text) for text in texts), trainer)
    return _with_special_tokens(backend)


def load_tokenizer(spec: str | Path) -> PreTrainedTokenizerFast:
    """``"byte"``, a ``tokenizer.json``, or a directory that holds one (a model, a checkpoint, a prepared corpus).

    The directory's own Python code, if any, is ignored. Raises `UserError` where there is no such file, it is not a fast tokenizer's,
    or it has no end-of-document token.
    """
    if str(spec) == "byte":
        return byte_tokenizer()
    from transformers import PreTrainedTokenizerFast

    path = Path(spec)
    if path.is_dir() and not (path / "tokenizer.json").is_file() and (path / "tokenizer" / "tokenizer.json").is_file():
        path = path / "tokenizer"
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f'no tokenizer at {spec}: give "byte", a tokenizer.json, or a directory that holds one')
    try:
        if path.is_dir():
            # Not AutoTokenizer: it reads config.json too and may ask to run the directory's code.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
            vocabulary = tokenizer.get_vocab()
            tokenizer.eos_token = next((name for name in _KNOWN_ENDS if name in vocabulary), None)
    except Exception as error:  # the Rust parser raises bare Exception
        raise UserError(f"{file} is not a fast tokenizer that transformers can read: {one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer at {spec} has no end-of-text token; set eos_token in tokenizer_config.json beside tokenizer.json"
        )
    return tokenizer


def encoded(tokenizer: PreTrainedTokenizerFast, text: str | list[str], **options: Any) -> BatchEncoding:
    """`tokenizer(text, **options)`. Raises `UserError` for a text that this tokenizer cannot encode."""
    with _library_errors():
        return tokenizer(text, **options)


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """The token ids of each text followed by the end token, as 1-D uint16 (or uint32, see `token_dtype`) arrays.

    Names of special tokens inside a text are text: data cannot end its own document. No other token (bos, say) is added.
    """
    known = _encoders.get(tokenizer)
    if known is None or known[0] != len(tokenizer):  # tokens may have been added since
        known = _encoders[tokenizer] = len(tokenizer), DocumentEncoder(tokenizer.backend_tokenizer, _end_id(tokenizer))
    return known[1].encode(texts)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 over everything that decides ids (vocabulary, merges, normalisation, splitting, added tokens) and the end token."""
    content = json.dumps([_canonical(tokenizer.backend_tokenizer), _end_id(tokenizer)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id, which exceeds ``len(tokenizer)`` where a published vocabulary has holes."""
    return max(tokenizer.get_vocab().values()) + 1


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@contextmanager
def _library_errors() -> Iterator[None]:
    """The tokenizers library raises bare exceptions, e.g. where a vocabulary has no token for an unknown word, and panics, which are none."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"the tokenizer cannot encode the text: {one_line(error)}") from error


# Describing and copying a large vocabulary takes longer than encoding a page.
_encoders: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[int, DocumentEncoder]] = WeakKeyDictionary()


class DocumentEncoder:
    """Texts to token ids without transformers, so that worker processes start fast. See `encode_documents`."""

    def __init__(self, backend: Tokenizer, end_id: int) -> None:
        self.end_id = end_id
        self.dtype = token_dtype(max(backend.get_vocab(with_added_tokens=True).values()) + 1)
        # `backend` belongs to the caller: switches are set on a copy.
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._is_byte = _is_byte(self._backend)
        self._pieces = PieceEncoder.for_backend(self._backend, self.dtype, end_id)

    @classmethod
    def from_directory(cls, directory: Path, end_id: int) -> DocumentEncoder:
        return cls(Tokenizer.from_file(str(directory / "tokenizer.json")), end_id)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        with _library_errors():
            try:
                return self._encode(texts)
            except (UnicodeEncodeError, TypeError):  # a lone surrogate: no valid UTF-8, and no valid Rust string
                return self._encode([without_surrogates(text) for text in texts])

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._is_byte:
            return [self._ended(np.frombuffer(text.encode(), np.uint8)) for text in texts]
        if self._pieces is not None:
            return self._pieces.encode(texts)
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._ended(np.array(encoding.ids, self.dtype)) for encoding in encodings]

    def _ended(self, ids: np.ndarray) -> np.ndarray:
        ended = np.empty(len(ids) + 1, self.dtype)
        ended[:-1] = ids
        ended[-1] = self.end_id
        return ended


@cache
def _byte_backend() -> Tokenizer:
    """BPE without merges over the byte alphabet: each byte's stand-in character has that byte as its id."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    # GPT-2's table: printable bytes stand for themselves, the others for the characters from U+0100 on.
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    backend = Tokenizer(models.BPE(vocab={characters[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END, PAD])
    return backend


def _with_special_tokens(backend: Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    # split_special_tokens: "<|end|>" typed in a text is seven characters, in training data and in prompts alike.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _canonical(backend: Tokenizer) -> dict[str, Any]:
    """What decides the ids of a text: the backend's description without call-time switches and without added bos and the like."""
    description = json.loads(backend.to_str())
    return {k: v for k, v in description.items() if k not in ("truncation", "padding", "post_processor")}


def _is_byte(backend: Tokenizer) -> bool:
    ours, theirs = _canonical(_byte_backend()), _canonical(backend)
    same_rules = all(ours[key] == theirs[key] for key in ("model", "normalizer", "pre_tokenizer"))
    return same_rules and all(token["special"] for token in theirs["added_tokens"])


def _end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token; set its eos_token")
    return int(tokenizer.eos_token_id)
