import io
import os
import signal
import threading
import time

import pytest
import torch

from ssa.budget import FULL
from ssa.cli import main
from ssa.data.tokenizer import byte_tokenizer
from ssa.errors import UserError
from ssa.infer import chat as module
from ssa.infer.chat import HELP, Chat, talk
from ssa.infer.crossover import Auto
from ssa.infer.engine import Prompt, Sampling
from ssa.model import BlockCache
from ssa.testing import tiny_model

END = 256
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# earlier answers are left out, as templates of reasoning models leave out what was thought
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' %}[assistant]...<|end|>{% else %}[{{ m.role }}]{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
QUESTIONS = ["What is it?", "And why?", "Tell me more of it, if you please."]


class Letters(torch.nn.Module):
    """A head whose likeliest tokens are letters, so that an answer's text has the tokens that were generated."""

    def __init__(self, head):
        super().__init__()
        self.head, self.weight = head, head.weight
        self.others = torch.ones(head.out_features, dtype=torch.bool)
        self.others[97:123] = False

    def forward(self, hidden):
        return self.head(hidden).masked_fill(self.others, -1e9)


def letters_model(method="ssa", **changes):
    model = tiny_model(method, **({"max_position_embeddings": 512} | changes))
    model.lm_head = Letters(model.lm_head)
    return model


def templated(template=TEMPLATE):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


class Passes:
    """The numbers of tokens in a model's passes."""

    def __init__(self, model, monkeypatch):
        self.tokens, forward = [], model.forward

        def counted(*args, **kwargs):
            self.tokens.append((args[0] if args else kwargs["input_ids"]).shape[1])
            return forward(*args, **kwargs)

        monkeypatch.setattr(model, "forward", counted)


def greedy(most=8, **options):
    return Sampling(most, **options)


def from_scratch(model, segments, most, **reading):
    """Greedy tokens after what was read: segments of (tokens, how they were read), in a pass each over a new cache; then as `reading` says."""
    cache = BlockCache()
    with torch.no_grad():
        for ids, how in segments:
            logits = model(torch.tensor([ids]), cache=cache, use_cache=True, **how).logits
        new = [int(logits[0, -1].argmax())]
        while len(new) < most:
            new.append(int(model(torch.tensor([new[-1:]]), cache=cache, use_cache=True, **reading).logits[0, -1].argmax()))
    return bytes(new).decode()


def ids_of(text):
    """The tokens of a rendered conversation."""
    ids = []
    for part in text.split("<|end|>"):
        ids += [*part.encode(), END]
    return ids[:-1]


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL, None], ids=["template", "forgetful", "plain"])
@pytest.mark.parametrize(
    "method, mode, budget, chunk",
    [("full", "full", None, 8192), ("ssa", "sparse", None, 3), ("ssa", "full", None, 7), ("ssa", "sparse", "2x8", 8192),
     ("moba", "sparse", None, 8192), ("nsa", "sparse", None, 5), ("nosa", "sparse", None, 8192)],
)  # fmt: skip
def test_turns_over_one_cache_equal_the_whole_conversation_from_scratch(method, mode, budget, chunk, template):
    windows = {"mean_size": 4, "mean_stride": 2, "sink_blocks": 1, "local_blocks": 1, "query_blocks": 1}
    changes = {"selector_options": windows, "num_selected_blocks": 5}
    model = letters_model(method, **(changes if method == "nosa" else {}))
    chat = Chat(model, templated(template), greedy(), mode=mode, budget=budget, prompt=Prompt(None, chunk), system="Be kind.")
    turns = []
    for question in QUESTIONS:
        if template is None:
            text = "Be kind.\n\n" + "".join(f"User: {q}\nAssistant:{a}\n" for q, a in turns) + f"User: {question}\nAssistant:"
        else:
            told = [f"[user]{q}<|end|>[assistant]{'...' if template is FORGETFUL else a}<|end|>" for q, a in turns]
            text = "[system]Be kind.<|end|>" + "".join(told) + f"[user]{question}<|end|>[assistant]"
        how = {"attention_mode": mode, "budget": budget}
        expected = from_scratch(model, [(ids_of(text), how)], 8, **how)
        shown = []
        answer = chat.answer(question, shown.append)
        assert answer.text == "".join(shown) == expected and answer.reason == "length" and answer.tokens == 8
        assert chat.cached == ids_of(text) + list(expected.encode())[:-1]
        turns.append((question, expected))
    assert chat.turns == turns


def test_nothing_is_computed_twice(monkeypatch):
    model = letters_model()
    passes, chat = Passes(model, monkeypatch), Chat(model, templated(), greedy())
    chat.answer("abc")
    before = sum(passes.tokens)
    assert before == len(ids_of("[user]abc<|end|>[assistant]")) + 7 == len(chat.cached)
    answer = chat.answer("defg")
    # the last token of the answer before, its end, and the new question
    assert sum(passes.tokens) - before == answer.prefilled + 7 and answer.prefilled == 2 + len(
        ids_of("[user]defg<|end|>[assistant]")
    )
    assert sum(passes.tokens) == len(chat.cached)
    chat.undo()
    passes.tokens.clear()
    assert chat.answer("define").prefilled == len(ids_of("ine<|end|>[assistant]"))  # "[user]def" is there
    assert chat.answer("more").prefilled == 2 + len(ids_of("[user]more<|end|>[assistant]"))
    chat.undo()
    assert chat.answer("more").prefilled == 1  # the logits of the last token are needed
    chat.reset()
    assert chat.cached == [] and chat.turns == []
    assert chat.answer("abc").prefilled == len(ids_of("[user]abc<|end|>[assistant]"))


def test_what_is_cached_stays_as_it_was_read_when_mode_or_budget_changes():
    model = letters_model(num_hidden_layers=3, initializer_range=0.6)
    chat = Chat(model, templated(), greedy())
    sparse, small, full = {"attention_mode": "sparse"}, {"attention_mode": "sparse", "budget": "1x4"}, {"attention_mode": "full"}
    segments, done, answers, wholes = [], [], [], []
    for question, how, change in (
        (QUESTIONS[0], sparse, (None, None)), (QUESTIONS[1], full, ("full", None)), (QUESTIONS[2], small, (None, "1x4")),
        ("x", full, (None, "full")), ("y", small, ("sparse", None)), ("Is this all?", full, ("full", None)),
    ):  # fmt: skip
        chat.read(*change)
        ids = chat.rendered(question)
        assert ids[: len(done)] == done
        segments.append((ids[len(done) :], how))
        answers.append(chat.answer(question).text)
        assert answers[-1] == from_scratch(model, segments, 8, **how)
        segments.append((list(answers[-1].encode())[:-1], how))  # as it was read while it was generated
        done = chat.cached
        wholes.append(from_scratch(model, [(ids, how)], 8, **how))
    assert wholes != answers  # the test sees how earlier turns were read


def test_prompts_may_be_read_in_another_mode():
    model = letters_model()
    chat = Chat(model, templated(), greedy(), mode="sparse", budget="1x4", prompt=Prompt("full"))
    ids = chat.rendered(QUESTIONS[2])
    full, sparse = {"attention_mode": "full"}, {"attention_mode": "sparse", "budget": "1x4"}
    text = chat.answer(QUESTIONS[2]).text
    assert text == from_scratch(model, [(ids, full)], 8, **sparse) != from_scratch(model, [(ids, sparse)], 8, **sparse)


def test_auto_reads_everything_until_sparse_steps_are_no_slower(monkeypatch):
    model, seen = letters_model(), []
    monkeypatch.setattr(module, "auto_for", lambda device, config, rows: Auto(len(ids_of(QUESTIONS[2])) + 40, "auto"))
    chat = Chat(model, templated(), greedy(), mode="auto", budget="1x4")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **kw: seen.append(kw["attention_mode"]) or forward(*a, **kw))
    for question in QUESTIONS:
        chat.answer(question)
    assert seen[0] == "full" and seen[-1] == "sparse" and seen == sorted(seen)  # once, and for good
    assert str(chat.reading) == "1x4"
    chat.read("full", None)
    assert chat.auto is None and chat.reading is FULL


def test_undo_goes_back_to_what_was():
    model = letters_model()
    chat, other = (Chat(model, templated(), greedy()) for _ in range(2))
    chat.answer("a")
    chat.answer("something else")
    chat.undo()
    other.answer("a")
    assert chat.answer("b") == other.answer("b") or chat.turns == other.turns
    assert chat.turns == other.turns and chat.cached == other.cached
    for _ in range(2):
        chat.undo()
    with pytest.raises(UserError, match="nothing to take back"):
        chat.undo()


def test_seeds_decide_the_draws_and_a_question_again_gets_another_answer():
    model = letters_model()
    state = torch.get_rng_state()

    def texts(seed):
        chat = Chat(model, templated(), Sampling(8, 1.0, seed=seed))
        found = [chat.answer("a").text]
        chat.undo()
        return [*found, chat.answer("a").text]

    assert texts(1) == texts(1) != texts(2) and len(set(texts(1))) == 2
    assert torch.equal(state, torch.get_rng_state())


class Reciter(torch.nn.Module):
    """Says these tokens one after the other, whatever it has read."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.weight = list(tokens), torch.zeros(1)

    def forward(self, hidden):
        logits = torch.zeros(*hidden.shape[:2], 259)
        logits[:, -1, self.tokens.pop(0)] = 9.0
        return logits


def test_an_answer_ends_at_the_end_token_or_where_the_user_would_speak():
    model = tiny_model(vocab_size=259)
    model.lm_head = Reciter([*b" Yes.\nUser:", *b" No.", END])
    chat = Chat(model, byte_tokenizer(), Sampling(64, stop=("zzz",)))
    answer = chat.answer("Is it?")
    assert (answer.text, answer.reason) == (" Yes.", "stop")
    answer = chat.answer("I ask.")
    assert (answer.text, answer.reason) == (" No.", "end")
    assert answer.prefilled == len(": I ask.\nAssistant:")  # "\nUser" is there


def test_the_token_behind_an_answer_in_the_template_ends_it():
    tokenizer = templated(TEMPLATE.replace("<|end|>", "\n<|turn|>\n"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    model = tiny_model(vocab_size=259)
    model.lm_head = Reciter([*b"Yes.", 258, *b"never"])
    answer = Chat(model, tokenizer, Sampling(64)).answer("Is it?")
    assert (answer.text, answer.reason, answer.tokens) == ("Yes.", "end", 5)


def test_a_full_context_is_said_and_nothing_is_lost():
    model = letters_model(max_position_embeddings=60)
    chat = Chat(model, templated(), greedy())
    chat.answer("a")
    before = list(chat.turns)
    with pytest.raises(UserError, match=r"the context is full: .* 78 tokens, and the model reads 60; /undo takes back the last"):
        chat.answer("x" * 32)
    assert chat.turns == before
    answer = chat.answer("y" * 9)
    assert answer.reason == "length" and answer.tokens == 60 - len(
        ids_of(f"[user]a<|end|>[assistant]{before[0][1]}<|end|>[user]{'y' * 9}<|end|>[assistant]")
    )
    with pytest.raises(UserError, match="send a shorter one"):
        Chat(model, templated(), greedy()).answer("x" * 60)


def test_the_cache_grows():
    """Beyond what it made room for with the first turn."""
    model = letters_model(max_position_embeddings=2048)
    chat, turns = Chat(model, templated(), greedy(150)), 3
    for number in range(turns):
        ids = chat.rendered(str(number) * 99)
        assert chat.answer(str(number) * 99).text == from_scratch(model, [(ids, {})], 150)
    assert len(chat.cached) > 700


def interrupting(after):
    seen = []

    def show(text):
        seen.append(text)
        if len(seen) == after:
            raise KeyboardInterrupt

    return show


def test_ctrl_c_ends_an_answer_and_keeps_what_came(monkeypatch):
    model = letters_model()
    passes, chat = Passes(model, monkeypatch), Chat(model, templated(), greedy(100))
    answer = chat.answer("abc", interrupting(5))
    assert answer.reason == "interrupted" and len(answer.text) == 5 and chat.turns == [("abc", answer.text)]
    ids = chat.rendered("b")
    text = chat.answer("b").text
    assert sum(passes.tokens) == len(chat.cached)
    assert text == from_scratch(model, [(ids, {})], 100)


def test_a_signal_is_seen_between_two_tokens():
    model, chat = letters_model(), None
    chat = Chat(model, templated(), greedy(400))
    before = signal.getsignal(signal.SIGINT)
    shown = []

    def show(text):
        shown.append(text)
        if len(shown) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    answer = chat.answer("abc", show)
    assert answer.reason == "interrupted" and answer.tokens in (3, 4) and signal.getsignal(signal.SIGINT) is before
    ids = chat.rendered("b")
    assert chat.answer("b").text == from_scratch(model, [(ids, {})], 400)


def test_a_signal_while_the_message_is_read_leaves_no_trace(monkeypatch):
    model = letters_model()
    chat, forward = Chat(model, templated(), greedy(), prompt=Prompt(None, 8)), model.forward

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", signalled)
    answer = chat.answer("abc")
    assert (answer.reason, answer.text, answer.tokens) == ("interrupted", "", 0) and chat.turns == [] and len(chat.cached) == 8
    monkeypatch.setattr(model, "forward", forward)
    ids = chat.rendered("b")
    assert chat.answer("b").text == from_scratch(model, [(ids, {})], 8)


def test_an_interrupt_amid_a_pass_throws_the_cache_away(monkeypatch):
    model = letters_model()
    chat = Chat(model, templated(), greedy())
    chat.answer("a")
    layer, calls = model.model.layers[1], []
    forward = layer.forward

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", interrupted)
    answer = chat.answer("b")
    assert answer.reason == "interrupted" and len(answer.text) == 2 and chat.cached == []
    monkeypatch.setattr(layer, "forward", forward)
    ids = chat.rendered("c")
    answer = chat.answer("c")
    assert answer.prefilled == len(ids) and answer.text == from_scratch(model, [(ids, {})], 8)


def test_elsewhere_than_in_the_main_thread():
    chat, found = Chat(letters_model(), templated(), greedy()), []
    thread = threading.Thread(target=lambda: found.append(chat.answer("a").text))
    thread.start()
    thread.join()
    assert len(found[0]) == 8


def test_keys_read():
    chat = Chat(letters_model(), templated(), greedy())
    assert chat.keys_read == 0
    chat.answer("abcdefgh")
    context = len(chat.cached)
    assert chat.keys_read == 12 and context > 12
    chat.read(None, "100x16")
    assert chat.keys_read == context
    chat.read("full", None)
    assert chat.keys_read == context and chat.reading is FULL
    chat.read(None, "2x4")
    assert chat.keys_read == 8
    tuned = letters_model(layer_budgets=["1x4", "full"])
    chat = Chat(tuned, templated(), greedy())
    chat.answer("abcdefgh")
    assert chat.keys_read == (4 + context) / 2


def talked(lines, chat=None, prompts=False):
    """(answers, what else is said) of a conversation of these lines."""
    chat = chat or Chat(letters_model(), templated(), greedy())
    out, err, waiting, seen = io.StringIO(), io.StringIO(), list(lines), []

    def read(prompt):
        seen.append(prompt)
        if not waiting:
            raise EOFError
        return waiting.pop(0) + "\n"

    talk(chat, read, out, err, prompts)
    return out.getvalue(), err.getvalue().splitlines(), seen, chat


@pytest.mark.parametrize(
    "line, says",
    [
        ("/budgte 3x3", "no command '/budgte'; /help lists them"),
        ("/", "no command '/'"),
        ("/budget", "/budget needs a value: /budget 32x16"),
        ("/budget 32", "budget '32' is not BLOCKSxSIZE"),
        ("/budget 0x4", "budget 0x4 needs at least 1 block"),
        ("/mode", "/mode needs a value: /mode full, sparse or auto"),
        ("/mode dense", "mode 'dense' is neither 'sparse' nor 'full'"),
        ("/undo", "there is nothing to take back"),
        ("/undo 3", "/undo takes no value, but has '3'"),
        ("/quit now", "/quit takes no value, but has 'now'"),
        ("caf\udce9", r"'caf\udce9' is no text"),
        ("x" * 600, "the context is full"),
    ],
)
def test_mistakes_are_a_line_and_the_chat_goes_on(line, says):
    out, err, _, chat = talked([line, "hello"])
    assert says in err[0] and err[1] == "(stopped after --max-new-tokens 8)" and err[2].startswith("sparse 3x4, 12 of ")
    assert len(err) == 3
    assert out == chat.turns[0][1] + "\n" and len(chat.turns) == 1


def test_commands():
    out, err, seen, chat = talked(
        ["/help", "a", "", "/mode full", "b", "/undo", "/budget 2x4", "//c", "/system Be brief.", "/quit", "unread"], prompts=True
    )
    assert err[: len(HELP.splitlines())] == HELP.splitlines()
    assert [q for q, _ in chat.turns] == ["a", "/c"] and chat.system == "Be brief." and len(out.splitlines()) == 3
    assert seen[0] == "[sparse 3x4] > " and len(seen) == 10
    assert seen[2].startswith("[sparse 3x4, 12 of 26 keys a token, ") and seen[2].endswith(" tokens/s] > ")
    assert "[full, 26 of 26 keys a token" in seen[4] and "[sparse 2x4, 8 of " in seen[7]
    assert not talked(["/reset", "/system x", "/system", "a"])[3].system


def test_a_template_without_system_texts():
    with pytest.raises(UserError, match="the model's chat template does not take this conversation: System role not supported"):
        Chat(letters_model(), templated(NO_SYSTEM), greedy(), system="x")
    _, err, _, chat = talked(["/system x", "a"], Chat(letters_model(), templated(NO_SYSTEM), greedy()))
    assert "System role not supported" in err[0] and chat.system == "" and len(chat.turns) == 1


def test_notes_behind_answers():
    assert "(stopped after --max-new-tokens 8)" in talked(["a"])[1]
    full = Chat(letters_model(max_position_embeddings=32), templated(), greedy(20))
    assert "(the context of 32 tokens is full: /undo takes back" in talked(["a"], full)[1][0]


def test_logits_that_are_no_numbers_are_a_line():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    _, err, _, chat = talked(["a", "b"], Chat(model, templated(), greedy()))
    assert len(err) == 2 and all(line.startswith("the model's logits are nan") for line in err) and chat.turns == []


def test_a_gone_reader_ends_the_chat():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        talk(Chat(letters_model(), templated(), greedy()), lambda prompt: "a", Gone(), io.StringIO(), False)


def test_from_the_command_line(saved, monkeypatch, capsys):
    path = str(saved(max_position_embeddings=512))
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/budget nonsense\n/mode full\nthere"))
    assert main(["chat", path, "--max-new-tokens", "5", "--temperature", "0", "--budget", "2x8"]) == 0
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert lines[0] == "the model has no chat template: turns are written plainly, User: ... Assistant: ..."
    assert sum("no chat template" in line for line in lines) == 1 and any("budget 'nonsense'" in line for line in lines)
    assert any(line.startswith("sparse 2x8, 16 of ") for line in lines) and lines[-1].startswith("full, ")
    assert said.out
    for words in (["--budget", "16"], ["--mode", "full", "--budget", "2x8"], ["--top-p", "0"], ["--max-new-tokens", "0"]):
        assert main(["chat", path, *words]) == 2
        assert capsys.readouterr().err.startswith("ssa: error: ")
    monkeypatch.setattr("sys.stdin", None)
    assert main(["chat", path]) == 0


def test_ctrl_c_at_the_prompt_leaves(saved, monkeypatch):
    class Interrupted(io.StringIO):
        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Interrupted())
    assert main(["chat", str(saved())]) == 130


def test_a_template_that_is_saved_with_the_model(saved, monkeypatch, capsys):
    path = saved(max_position_embeddings=512)
    templated().save_pretrained(path)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi"))
    started = time.monotonic()
    assert main(["chat", str(path), "--max-new-tokens", "3"]) == 0
    assert "no chat template" not in capsys.readouterr().err and time.monotonic() - started < 60
