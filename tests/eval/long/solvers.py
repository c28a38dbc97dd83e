"""Stand-ins for models: readers that find a task's answers in its prompt, and writers that know how an answer looks but not which."""

import re
from collections import Counter

import numpy as np
import torch

NEEDLE = r"One of the special magic \w+ for (\S+) is: (\S+)\."


def final_question(prompt):
    """The text that is asked about (after the worked example, if any) and the question."""
    if "Memorize and track" in prompt:
        return prompt.split("Memorize and track")[-1].split("\nQuestion:")
    if "numbered list" in prompt:
        return prompt.split("numbered list of words.")[-1].split("\nQuestion:")
    if "coded text" in prompt:
        text, question = prompt.split("\nQuestion:")
        return text.split("Find the three most frequently appeared coded words. ")[1], question
    at = prompt.rindex("\nWhat ")
    return prompt[:at], prompt[at:]


def candidates(prompt):
    """What an answer could be, for one who has not read the question."""
    text, _ = final_question(prompt)
    if "VAR" in text:
        return sorted(set(re.findall(r"VAR ([A-Z]+)", prompt)))
    if re.search(r"\d+\. \w+ \d+\. ", text):
        return sorted(set(re.findall(r"\d+\. ([a-z]+)", text)))
    if "magic" in text:
        return sorted({value for _, value in re.findall(NEEDLE, text)})
    return sorted(set(re.findall(r"\b[a-z]{6}\b", text)))


def read(prompt):
    """The answers, read off the text."""
    text, question = final_question(prompt)
    if "VAR" in text:
        value = re.search(r"value (\d+)", question)[1]
        chain = re.findall(rf"VAR (\w+) = {value}\b", text)
        for new, old in re.findall(r"VAR (\w+) = VAR (\w+)", text):  # in order, so one pass is enough
            chain += [new] if old in chain else []
        return chain
    if re.search(r"\d+\. \w+ \d+\. ", text):
        return [word for word, _ in Counter(re.findall(r"\d+\. ([a-z]+)", text)).most_common(10)]
    if "magic" in text:
        asked = re.search(r"for (.+) mentioned", question)[1].split(" mentioned")[0]
        keys = asked.replace("and ", "").split(", ")
        return [value for key, value in re.findall(NEEDLE, text) if key in keys]
    return [word for word, _ in Counter(re.findall(r"\b[a-z]{6}\b", text)).most_common(3)]


class Writer:
    """Stands where a model does, with `tokens` in the place of `ssa.infer.batch.decoded_tokens`: writes what `answer(prompt)` says, then goes on
    with nonsense for a while."""

    device = torch.device("cpu")
    generation_config = None

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer = tokenizer, answer
        self.config = type("Config", (), {"eos_token_id": None})
        self.batches = []

    def tokens(self, model, prompts, most, **how):
        self.batches.append((len(prompts), max(map(len, prompts))))
        texts = [self.tokenizer.decode(list(prompt)) for prompt in prompts]
        said = [self.tokenizer(" " + self.answer(text), add_special_tokens=False).input_ids for text in texts]
        noise = self.tokenizer(" blah", add_special_tokens=False).input_ids[-1]
        for step in range(min(most, max(map(len, said)) + 3)):
            yield [ids[step] if step < len(ids) else noise for ids in said]


def oracle(prompt):
    return ", ".join(read(prompt))


def liar(prompt):
    """The right form and the wrong content."""
    return ", ".join(re.sub(r"[0-9a-zA-Z]", lambda m: "Q" if m[0] != "Q" else "Z", answer) for answer in read(prompt))


def guesser(seed):
    """As many of the candidates as are asked for, at random."""
    rng = np.random.default_rng(seed)

    def guess(prompt):
        return ", ".join(rng.choice(candidates(prompt), len(read(prompt)), replace=False))

    return guess
