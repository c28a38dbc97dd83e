import json
import pickle

import numpy as np
import pytest

from ssa.data.prepare import prepare
from ssa.data.shards import TokenShards
from ssa.errors import UserError

TEXTS = [f"document {i} " + "x" * (i * 7 % 40) for i in range(60)] + ["y"]


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([tmp_path / "in.jsonl"], tmp_path / "out", valid_fraction=0, shard_tokens=100)
    return tmp_path / "out"


def test_documents_come_back(corpus):
    shards = TokenShards(corpus)
    documents = list(shards.documents())
    assert [bytes(tokens[:-1].tolist()).decode() for tokens, _, _ in documents] == TEXTS
    assert all(tokens[-1] == shards.end_id for tokens, _, _ in documents)
    assert [counts for _, *counts in documents] == [[len(text.encode()), len(text.split())] for text in TEXTS]
    assert shards.num_documents == len(TEXTS)
    assert shards.num_tokens == sum(len(text) + 1 for text in TEXTS)
    assert shards.num_bytes == sum(map(len, TEXTS)) and shards.num_words == sum(len(text.split()) for text in TEXTS)
    assert len(shards.shards) > 5 and all(shard.tokens <= 100 for shard in shards.shards)
    assert shards.load_tokenizer().decode(shards.read(0, 10)) == "document 0"


def test_reads_across_shards_equal_the_whole(corpus):
    shards = pickle.loads(pickle.dumps(TokenShards(corpus)))
    whole = np.concatenate([tokens for tokens, _, _ in shards.documents()])
    starts = np.cumsum([0] + [len(tokens) for tokens, _, _ in shards.documents()])[:-1]
    mask = np.zeros(len(whole), bool)
    mask[starts] = True
    rng = np.random.default_rng(0)
    ranges = [
        (0, len(whole)),
        (0, 0),
        (len(whole), len(whole)),
        *(sorted(rng.integers(0, len(whole) + 1, 2)) for _ in range(300)),
    ]
    for start, stop in ranges:
        assert np.array_equal(shards.read(start, stop), whole[start:stop])
        positions = shards.positions(start, stop)
        assert np.array_equal(positions == 0, mask[start:stop] | (np.arange(start, stop) == start))
        assert ((np.diff(positions) == 1) | (positions[1:] == 0)).all()


def test_reading_outside_is_an_index_error(corpus):
    shards = TokenShards(corpus)
    for start, stop in ((-1, 2), (0, shards.num_tokens + 1), (5, 4)):
        with pytest.raises(IndexError):
            shards.read(start, stop)


def test_files_are_plain_npy_without_pickles(corpus):
    tokens = np.load(corpus / "train-00000.tokens.npy", allow_pickle=False)
    docs = np.load(corpus / "train-00000.docs.npy", allow_pickle=False)
    assert tokens.dtype == np.uint16 and docs.dtype == np.int64
    assert docs.shape[1] == 3 and docs[-1, 0] == len(tokens)


def test_verify_finds_damage(corpus):
    shards = TokenShards(corpus)
    shards.verify()
    path = corpus / "train-00001.tokens.npy"
    original = path.read_bytes()
    path.write_bytes(original[:-2] + bytes([original[-2] ^ 1, original[-1]]))
    with pytest.raises(UserError, match=r"train-00001\.tokens\.npy is damaged"):
        TokenShards(corpus).verify()
    path.write_bytes(original[:-2])
    with pytest.raises(UserError, match=r"train-00001\.tokens\.npy is missing or damaged"):
        TokenShards(corpus).verify()
    path.unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        TokenShards(corpus).read(0, 300)


def test_pickled_shards_are_refused(corpus):
    np.save(corpus / "train-00000.tokens.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match="missing or damaged"):
        TokenShards(corpus).read(0, 1)


def test_bad_directories_are_one_line_errors(corpus, tmp_path):
    with pytest.raises(UserError, match='no split "valid": it has train'):
        TokenShards(corpus, "valid")
    with pytest.raises(UserError, match="no prepared corpus"):
        TokenShards(tmp_path)
    index = json.loads((corpus / "index.json").read_text())
    (corpus / "index.json").write_text(json.dumps(index | {"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        TokenShards(corpus)
    (corpus / "index.json").write_text("[]")
    with pytest.raises(UserError, match="not an index"):
        TokenShards(corpus)
    (corpus / "index.json").rename(corpus / ".progress.json")
    with pytest.raises(UserError, match="half prepared"):
        TokenShards(corpus)


@pytest.mark.parametrize(
    "place, value, says",
    [
        (("splits", "train", "shards", 0, "name"), "../out/train-00000", r"'\.\./out/train-00000' does not lie beside it"),
        (("splits", "train", "shards", 0, "name"), "..", "does not lie beside it"),
        (("splits", "train", "shards", 0, "tokens"), -1, "counts that cannot be"),
        (("splits", "train", "shards", 0, "tokens"), 1 << 50, r"train-00000\.tokens\.npy is missing or damaged"),
        (("splits", "train", "shards", 0, "tokens"), "7", r"splits\.train\.shards\[0\]\.tokens = '7' is not int"),
        (("splits", "train", "shards", 0, "odd"), 1, "odd is not known"),
        (("splits", "train"), [], r"splits\.train = \[\] is not an object"),
        (("tokenizer", "dtype"), "O", "tokenizer.dtype = 'O'"),
        (("tokenizer", "vocab_size"), 1e308, "vocab_size"),
    ],
)
def test_an_index_is_checked_before_anything_is_opened(corpus, place, value, says):
    index = json.loads((corpus / "index.json").read_text())
    *above, last = place
    inner = index
    for key in above:
        inner = inner[key]
    inner[last] = value
    (corpus / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=says) as caught:
        TokenShards(corpus)
    assert "\n" not in str(caught.value)
