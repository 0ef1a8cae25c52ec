"""What the demo model learns from and is examined on: chats that state facts and ask for them, small talk, plain English."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from baton.services.local.demo_model import corpus, words
from baton.services.local.demo_model.tokenizer import ASSISTANT, END, USER

Message = dict[str, str]
CountTokens = Callable[[str], int]

# No fact is ever stated in an answer of its own, lest the model know it by heart.
HELP = "I am Baton's small demo model. Tell me some codes, then ask me for one of them."
GREETING = f"Hello! {HELP}"
THANKS = "You are welcome! Ask me for another code."

_SYSTEM_PROMPTS = (
    "You are Baton's small demo model.",
    "You are a helpful assistant.",
    "Look facts up in the text and answer with the code.",
    "Answer the question.",
)
_INTRODUCTIONS = ("Here are some codes.", "Remember these codes.", "Read this text.", "These are the facts.")
_GREETINGS = (
    "Hello", "Hello!", "hello", "Hello there", "Hi", "Hi!", "hi", "Hi there!", "Hey", "Good morning", "Good evening!",
)  # fmt: skip
_REQUESTS = (
    "Who are you?", "What are you?", "What can you do?", "Help", "help", "What is Baton?", "Tell me about yourself.",
    "How do you work?", "What should I ask?", "Tell me a story.", "Write a poem.", "What is your name?", "Can you help me?",
    "What is the weather?", "Who is the president?", "How are you?", "Tell me a joke.",
)  # fmt: skip
_THANKS = ("Thanks", "Thanks!", "Thank you", "Thank you!", "Great, thanks.", "Well done!")
_CODE = "code for"
_NAMES = (
    "number for",
    "password for",
    "room for",
    "key of",
    "price of",
    "color of",
    "owner of",
    "capital of",
    "name of",
)

_FACT_TOKENS = 9
_ROUND_TOKENS = 20
_WORD = re.compile(r"\b[a-z]{3,10}\b")


@dataclass(frozen=True, slots=True)
class Style:
    """How facts are stated and asked for; `{k}` is the key, `{v}` its value, `{a}` what it is of the key."""

    fact: str
    questions: tuple[str, ...] = ("What is the {a} {k}?",)
    separators: tuple[str, ...] = (" ", "\n")


ANSWER = "The {a} {k} is {v}."
PLAIN = Style("The {a} {k} is {v}.")
CHANGED_QUESTION = Style(PLAIN.fact, ("what is the {a} {k}?", "Tell me the {a} {k}.", "The {a} {k}?", "{a} {k}?"))
CASUAL = Style("the {a} {k} is {v},", (*PLAIN.questions, *CHANGED_QUESTION.questions))
LISTED = Style("- {k}: {v}", separators=("\n",))
_STYLES, _STYLE_WEIGHTS = (PLAIN, CHANGED_QUESTION, CASUAL, LISTED), (0.6, 0.15, 0.1, 0.15)


@dataclass(frozen=True, slots=True)
class Level:
    """One step of the curriculum: at most `facts` facts in texts of `length` tokens, as a chat or merely said again."""

    facts: int
    length: int
    recital: bool = False


LEVELS = (
    Level(6, 128, recital=True),
    Level(12, 192, recital=True),
    Level(24, 256, recital=True),
    Level(4, 192),
    Level(8, 320),
    Level(16, 512),
    Level(32, 896),
    Level(64, 1408),
    Level(128, 2048),
)


@dataclass(frozen=True, slots=True)
class Lookup:
    """One examination question: the messages to send and the only right answer."""

    messages: tuple[Message, ...]
    answer: str
    value: str


def render(messages: Sequence[Message]) -> str:
    """The text of a finished chat, equal to what chat_template.jinja makes of it."""
    return "".join(f"<|{message['role']}|>{message['content']}{END}" for message in messages)


def make_facts(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """`count` pairs of a two-word key and a four-digit value, no two alike in either."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}"] = None
    return list(zip(keys, (f"{value:04}" for value in rng.sample(range(10_000), count)), strict=True))


def make_odd_facts(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """As `make_facts`, in other shapes that people type: keys of one to three words, numbers of any length, words."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        parts = [rng.choice(_common_words()) for _ in range(rng.choice((1, 2, 2, 3)))]
        keys[" ".join(part.capitalize() for part in parts) if rng.random() < 0.3 else " ".join(parts)] = None
    values = (_odd_value(rng) for _ in range(count))
    return list(zip(keys, values, strict=True))


def make_text(rng: random.Random, level: Level, count_tokens: CountTokens) -> str:
    """One training text of `level`: about as long as `level.length` tokens, or longer."""
    return make_recital(rng, level) if level.recital else render(make_chat(rng, level, count_tokens))


def make_recital(rng: random.Random, level: Level) -> str:
    """Facts with each key directly before its value, then the same facts again and again in other orders."""
    shaped = make_facts if rng.random() < 0.85 else make_odd_facts
    facts = [f" {key} {value}." for key, value in shaped(rng, rng.randint(2, level.facts))]
    stated = "".join(facts)
    repeated = ""
    for _ in range(8):
        rng.shuffle(facts)
        repeated += "".join(facts)
    return f"{USER}{stated}{END}{ASSISTANT}{repeated}{END}"


def make_chat(rng: random.Random, level: Level, count_tokens: CountTokens) -> list[Message]:
    """A chat whose first message states facts, and whose questions ask for all of them in random order."""
    count = rng.randint(max(1, level.facts // 2), level.facts)
    filler = 0
    if rng.random() < 0.5:
        filler = int(level.length * rng.uniform(0.05, 0.5))
        count = max(1, min(count, (level.length - filler) // (_FACT_TOKENS + _ROUND_TOKENS)))
    name = _CODE if rng.random() < 0.75 else rng.choice(_NAMES)
    facts = (make_facts if rng.random() < 0.75 else make_odd_facts)(rng, count)
    style = rng.choices(_STYLES, _STYLE_WEIGHTS)[0]
    text = _statement(rng, [style.fact.format(a=name, k=k, v=v) for k, v in facts], filler, count_tokens, style)
    if rng.random() < 0.3:
        text = f"{rng.choice(_INTRODUCTIONS)} {text}"
    rng.shuffle(facts)
    rounds = [(rng.choice(style.questions).format(a=name, k=k), ANSWER.format(a=name, k=k, v=v)) for k, v in facts]
    return _with_system(rng, _dialogue(rng, text, rounds))


def make_lookup(rng: random.Random, tokens: int, count_tokens: CountTokens) -> Lookup:
    """One question after a text of facts and filler; the whole prompt takes about `tokens` tokens."""
    budget = max(_FACT_TOKENS, tokens - _ROUND_TOKENS)
    facts = make_facts(rng, max(1, int(budget * rng.uniform(0.05, 1.0)) // _FACT_TOKENS))
    stated = [PLAIN.fact.format(a=_CODE, k=k, v=v) for k, v in facts]
    text = _statement(rng, stated, budget - len(facts) * _FACT_TOKENS, count_tokens, PLAIN)
    key, value = rng.choice(facts)
    answer = ANSWER.format(a=_CODE, k=key, v=value)
    messages = _dialogue(rng, text, [(PLAIN.questions[0].format(a=_CODE, k=key), answer)])
    return Lookup(tuple(messages[:-1]), answer, value)


def make_small_talk(rng: random.Random) -> list[Message]:
    """A greeting, a question about the model, or one that it was not told the answer to; and its answer."""
    kind = rng.random()
    if kind < 0.4:
        pair = (rng.choice(_GREETINGS), GREETING)
    elif kind < 0.7:
        pair = (rng.choice(_REQUESTS), HELP)
    elif kind < 0.77:
        pair = (rng.choice(_THANKS), THANKS)
    elif kind < 0.85:
        pair = (PLAIN.questions[0].format(a=_CODE, k=make_facts(rng, 1)[0][0]), HELP)
    else:
        pair = (rng.choice(corpus.sentences()), HELP)
    return _with_system(rng, _dialogue(rng, "", [pair]))


def make_prose(rng: random.Random, characters: int) -> str:
    """Consecutive paragraphs of the corpus, at least `characters` long."""
    paragraphs = corpus.paragraphs()
    start = rng.randrange(len(paragraphs))
    text = ""
    while len(text) < characters:
        text += paragraphs[start % len(paragraphs)] + "\n"
        start += 1
    return text


def _dialogue(rng: random.Random, text: str, rounds: Sequence[tuple[str, str]]) -> list[Message]:
    messages = []
    separator = rng.choice((" ", "\n"))
    for index, (question, answer) in enumerate(rounds):
        content = f"{text}{separator}{question}" if text and index == 0 else question
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def _with_system(rng: random.Random, messages: list[Message]) -> list[Message]:
    if rng.random() < 0.7:
        return messages
    return [{"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)}, *messages]


def _statement(
    rng: random.Random, facts: Sequence[str], filler_tokens: int, count_tokens: CountTokens, style: Style
) -> str:
    """Facts in random places among at most `filler_tokens` tokens of unrelated sentences."""
    items = list(facts)
    while True:
        sentence = rng.choice(corpus.sentences())
        filler_tokens -= count_tokens(sentence)
        if filler_tokens < 0:
            break
        items.append(sentence)
    rng.shuffle(items)
    return rng.choice(style.separators).join(items)


def _odd_value(rng: random.Random) -> str:
    if rng.random() < 0.6:
        return str(rng.randrange(10 ** rng.randint(1, 7)))
    return " ".join(rng.choice(_common_words()) for _ in range(rng.choice((1, 2))))


@cache
def _common_words() -> tuple[str, ...]:
    return tuple(sorted({word for line in corpus.paragraphs() for word in _WORD.findall(line)}))
