import io
import json

import pytest
import torch

from ssa.errors import UserError
from ssa.infer.engine import Sampling, complete, generate, read_prompts
from ssa.testing import tiny_model

PROMPTS = ["A prompt of some length that spans several blocks of keys.", "x", "", "Zwölf Boxkämpfer", "x" * 33]
CALLS = [
    ("ssa", "full", None), ("ssa", "sparse", None), ("ssa", "sparse", "1x4"), ("ssa", "sparse", "2x8"), ("ssa", "sparse", "5x3"),
    ("nsa", "full", None), ("nsa", "sparse", "2x8"), ("full", "sparse", "40x2"), ("moba", "sparse", None),
]  # fmt: skip


def greedy_without_cache(model, tokenizer, prompt, steps, mode, budget):
    ids = tokenizer(prompt, add_special_tokens=False).input_ids or [256]
    written = []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(torch.tensor([ids + written]), attention_mode=mode, budget=budget, use_cache=False).logits
        written.append(int(logits[0, -1].argmax()))
        if written[-1] == 256:
            return written[:-1]
    return written


@pytest.mark.parametrize("method, mode, budget", CALLS)
def test_left_padded_batches_equal_single_prompts_without_a_cache(tokenizer, method, mode, budget):
    model = tiny_model(method)
    expected = [greedy_without_cache(model, tokenizer, prompt, 9, mode, budget) for prompt in PROMPTS]
    for batch_size in (1, 3):
        found = complete(model, tokenizer, PROMPTS, Sampling(9), mode=mode, budget=budget, batch_size=batch_size)
        assert [c.token_ids for c in found] == expected
        assert [c.prompt for c in found] == PROMPTS
        assert all(c.text == tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in found)


class Reciter(torch.nn.Module):
    """Stands in for a model's head: after the prompt's t-th token it says the t-th byte of a text, whatever it has read."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.said = tokens, 0

    def forward(self, hidden):
        logits = torch.zeros(*hidden.shape[:2], 258)
        logits[:, -1, self.tokens[min(self.said, len(self.tokens) - 1)]] = 9.0
        self.said += 1
        return logits


def reciting_model(text):
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head = Reciter([*text.encode(), 256])
    return model


class Recorder(io.StringIO):
    def __init__(self):
        super().__init__()
        self.writes = []

    def write(self, text):
        self.writes.append(text)
        return super().write(text)


def test_streamed_text_is_the_returned_text_in_whole_characters(tokenizer):
    text, live = "Grüße, 世界 🙂!", Recorder()
    (completion,) = complete(reciting_model(text), tokenizer, ["hi"], Sampling(64), live=live)
    assert completion.text == live.getvalue() == text
    assert completion.finish_reason == "end" and completion.token_ids == list(text.encode())
    assert live.writes == list(text)


def test_a_text_cut_inside_a_character(tokenizer):
    live = Recorder()
    (completion,) = complete(reciting_model("aé"), tokenizer, ["hi"], Sampling(2), live=live)
    assert completion.text == live.getvalue() == tokenizer.decode(list("aé".encode())[:2])
    assert completion.finish_reason == "length"


def test_stop_strings(tokenizer):
    live = Recorder()
    model = reciting_model("one two. three")
    (completion,) = complete(model, tokenizer, ["hi."], Sampling(64, stop=(". ", "zzz")), live=live)
    assert completion.text == live.getvalue() == "one two" and completion.finish_reason == "stop"
    assert model.lm_head.said == len("one two. ")  # no step more


def test_rows_end_by_themselves(tokenizer):
    model = reciting_model("abc")
    assert [c.text for c in complete(model, tokenizer, ["x", "yy"], Sampling(10))] == ["abc", "abc"]


def test_generation_uses_a_cache_of_the_length_it_needs(tokenizer, monkeypatch):
    model, seen = tiny_model(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **kw: seen.append(kw["cache"]) or forward(*a, **kw))
    complete(model, tokenizer, ["abc", "d"], Sampling(20))
    assert {cache.max_length for cache in seen} == {23} and len(set(map(id, seen))) == 1


def test_sampling_is_seeded_and_leaves_the_callers_random_state_alone(tokenizer):
    model = tiny_model()
    before = torch.get_rng_state()

    def draw(seed, **options):
        return complete(model, tokenizer, ["abc", "d"], Sampling(20, temperature=1.0, seed=seed, **options))

    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert draw(1, top_k=1) == draw(2, top_p=1e-6) == complete(model, tokenizer, ["abc", "d"], Sampling(20))


def test_generate_from_a_directory(saved, tokenizer):
    path = saved()
    out, err = Recorder(), io.StringIO()
    (completion,) = generate(path, ["hello"], max_new_tokens=9, mode="full", device="cpu", out=out, err=err)
    assert out.getvalue() == completion.text + "\n" and len(out.writes) > 2
    assert completion.token_ids == complete(tiny_model(), tokenizer, ["hello"], Sampling(9), mode="full")[0].token_ids
    assert "9 tokens" in err.getvalue() and "full attention, cpu float32" in err.getvalue()
    whole = Recorder()
    generate(path, ["hello"], max_new_tokens=9, mode="full", device="cpu", out=whole, stream=False)
    assert whole.getvalue() == out.getvalue() and len(whole.writes) == 1


def test_several_prompts_print_under_headings(saved):
    out, err = io.StringIO(), io.StringIO()
    found = generate(saved(), ["a\nb", "c" * 99], max_new_tokens=5, budget="2x8", batch_size=1, out=out, err=err)
    assert out.getvalue() == f"[1/2] a b\n{found[0].text}\n\n[2/2] {'c' * 59}…\n{found[1].text}\n"
    assert err.getvalue().startswith("2 completions, ") and "sparse attention, 2x8" in err.getvalue()


def test_saved_generation_settings_do_not_mix_in(saved, tokenizer):
    path = saved()
    (path / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 5.0, "repetition_penalty": 9.0, "max_length": 3}'
    )
    assert generate(path, ["hello"], max_new_tokens=9) == complete(tiny_model(), tokenizer, ["hello"], Sampling(9))


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"prompts": []}, "no prompt"),
        (
            {"prompts": ["x" * 60], "max_new_tokens": 5},
            "60 tokens and 5 new ones exceed the model's 64 positions; set --max-new-tokens to 4",
        ),
        ({"prompts": ["x" * 64]}, "shorten the prompt"),
        ({"mode": "dense"}, "mode 'dense'"),
        ({"budget": "16"}, "budget '16'"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"temperature": -1.0}, "--temperature -1"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_p": 0.0}, "--top-p 0"),
        ({"top_k": 5}, "--top-k 5 has no effect without sampling: add --temperature"),
        ({"top_p": 0.9}, "--top-p 0.9 has no effect"),
        ({"stop": [""]}, "--stop string is empty"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"seed": 2**63, "temperature": 1.0}, r"seed = 9223372036854775808 is too large"),
        ({"prompts": ["fine", "caf\udce9"]}, r"the prompt 'caf\\udce9' is no text"),
    ],
)
def test_errors(saved, arguments, match):
    path = saved(max_position_embeddings=64)
    with pytest.raises(UserError, match=match):
        generate(path, **({"prompts": ["hello"]} | arguments))


def test_a_prompt_that_the_tokenizer_cannot_encode_is_one_line(saved):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = saved()
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(path)
    generate(path, ["a a"], max_new_tokens=1)
    with pytest.raises(UserError, match=r"the tokenizer cannot encode the text: .*\[UNK\]"):
        generate(path, ["a word"], max_new_tokens=1)


def test_a_tokenizer_that_panics_is_one_line(saved):
    """Its own regular expression asks for more backtracking than the library is willing to do."""
    path = saved()
    described = json.loads((path / "tokenizer.json").read_text())
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [slow, described["pre_tokenizer"]]}
    (path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"the tokenizer cannot encode the text: .*retry-limit"):
        generate(path, ["a" * 40 + "!"], max_new_tokens=1)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_where_prompts_come_from(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("from a file\n\n", encoding="utf-8")
    assert read_prompts(["a", ""], None, io.StringIO("unread")) == ["a", ""]
    assert read_prompts(["a"], file, Terminal()) == ["a", "from a file\n"]
    assert read_prompts([], None, io.StringIO("piped\n")) == ["piped"]
    assert read_prompts([], "-", io.StringIO("piped")) == ["piped"]
    with pytest.raises(UserError, match="no prompt"):
        read_prompts([], None, Terminal())
    for empty in ("", "\n", "\r\n"):
        with pytest.raises(UserError, match="standard input is empty"):
            read_prompts([], None, io.StringIO(empty))
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts([], tmp_path / "missing", Terminal())
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_prompts([], file, Terminal()) == ["one\ntwo"] == read_prompts([], "-", io.StringIO("\ufeffone\r\ntwo\r\n"))
    file.write_text("\n")
    with pytest.raises(UserError, match=r"prompt\.txt is empty"):
        read_prompts(["a"], file, Terminal())
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts([], file, Terminal())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_end_generation_in_one_line(saved, tokenizer, value, temperature, capsys):
    from ssa.cli import main

    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    directory = saved()
    model.save_pretrained(directory)
    words = ["generate", str(directory), "--prompt", "a", "--max-new-tokens", "3", "--temperature", str(temperature)]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("ssa: error: the model's logits are nan or infinite") and "Traceback" not in said
