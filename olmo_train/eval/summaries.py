"""ROUGE of the texts that a model writes in answer to the prompts of a test set, beside the first sentence of each document.

Scores are those of the package rouge_score 0.1.2 (Google's ROUGE-1.5.5 in Python), with stemming: F1, mean over the examples.
Batches depend on the test set alone and are distributed over the ranks, so every number of ranks writes the same texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from olmo_train.data.prepare.readers import chat_segments, message_of
from olmo_train.data.templates import ChatFormat
from olmo_train.data.tokenizer import Tokenizer
from olmo_train.errors import ConfigError, DataError
from olmo_train.eval.heldout import Watch
from olmo_train.eval.tasks import spread
from olmo_train.model.generate import generate
from olmo_train.model.transformer import Transformer

SCORES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}  # rouge_score's name: title
INSTALL = "pip install rouge_score==0.1.2, or olmo-train with its extra: pip install 'olmo-train[rouge]'"
SEED = 0  # of the bootstrap
# The end of a sentence: a mark before a blank and no small letter, as after "e.g.", or at the end of the text.
SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s+[^a-z\s]|\s*$)|[。！？]")


class Example(NamedTuple):
    """A record of the test set."""

    line: int
    turns: tuple[tuple[str, str], ...]  # (role, text) of the messages before the reference
    reference: str
    is_chat: bool  # written as messages

    @property
    def document(self) -> str:
        """What is summarized: the last message of the prompt."""
        return self.turns[-1][1]


@dataclass(frozen=True)
class Answer:
    """What the model wrote."""

    text: str
    tokens: int  # with the stop token
    ended: bool  # by its stop token, not at the limit


@dataclass(frozen=True)
class Interval:
    """A mean over the examples, and its 95% interval by bootstrap over them."""

    f1: float
    low: float
    high: float


@dataclass(frozen=True)
class Summaries:
    """The results of a test set."""

    examples: int
    scores: dict[str, Interval]  # by rouge_score's names
    lead_1: dict[str, Interval]  # of the first sentence of each document
    words: dict[str, float]  # mean length of prediction, reference, lead_1 and document
    ended: float  # share of the answers that ended by their stop token
    cut_prompts: int  # documents that were cut to fit into seq_len


def check_installed() -> None:
    """Raises ConfigError when rouge_score is missing."""
    if find_spec("rouge_score") is None:
        raise ConfigError("--rouge", f"needs the package rouge_score, which is not installed; {INSTALL}")


def read_examples(file: Path, limit: int | None = None) -> list[Example]:
    """The records of a JSONL file, each {"prompt", "response"} or {"messages"}, whose last assistant message is the reference.

    `limit`: at most this number of records, evenly spread. Raises DataError with the line of a record that has neither.
    """
    examples = []
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    examples.append(_example(json.loads(line), number))
    except OSError as problem:
        raise DataError(file, f"cannot be read: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise DataError(file, f"is not UTF-8: {problem}") from problem
    except json.JSONDecodeError as problem:
        raise DataError(file, f"line {number} is not JSON: {problem}") from problem
    except ValueError as problem:
        raise DataError(file, f"line {number} {problem}; a record is {{'prompt', 'response'}} or {{'messages'}}") from problem
    if not examples:
        raise DataError(file, "holds no records")
    return list(spread(examples, limit))


def _example(record: Any, number: int) -> Example:
    """Raises ValueError, which says what is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"is no record with fields, but {type(record).__name__}")
    turns = [("user", record.get("prompt")), ("assistant", record.get("response", record.get("completion")))]
    if is_chat := isinstance(record.get("messages"), list):
        turns = list(map(message_of, record["messages"]))
        answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
        if not answers:
            raise ValueError("has no assistant message")
        turns = turns[: answers[-1] + 1]
    names = [f"{role} message" for role, _ in turns] if is_chat else ["prompt", "response"]
    if len(turns) < 2:
        raise ValueError("has no message before the assistant's")
    for name, (_, text) in zip(names, turns, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"has no {name}" if text is None else f"has a {name} that is {type(text).__name__}, not text")
    for name, (_, text) in list(zip(names, turns, strict=True))[-2:]:
        if not text.strip():
            raise ValueError(f"has an empty {name}")
    return Example(number, tuple(turns[:-1]), turns[-1][1], is_chat)


def plain_ids(tokenizer: Tokenizer, example: Example) -> list[int]:
    """The ids of a prompt as prepare-data writes it without a template: each part is encoded separately."""
    if not example.is_chat:
        return tokenizer.encode(example.document)
    segments = chat_segments([*example.turns, ("assistant", "")])
    return [id for text, _ in segments for id in tokenizer.encode(text)]


def chat_ids(chat: ChatFormat, example: Example) -> list[int]:
    """The ids of a prompt as prepare-data --template writes it. Raises DataError for messages that the template cannot write."""
    if refusal := chat.refusal((*example.turns, ("assistant", example.reference))):
        raise DataError("--rouge", f"line {example.line} {refusal}; correct it, or name another --template")
    return chat.prompt_ids(example.turns)


def fit(example: Example, encode: Callable[[Example], list[int]], room: int) -> tuple[Example, list[int]]:
    """The example and the ids of its prompt, at most `room` of them: a longer document is cut at its end.

    Raises DataError when the prompt has no room without its document.
    """
    while len(ids := encode(example)) > room:
        if not example.document:
            what = f"line {example.line} has a prompt of {len(ids)} tokens without its document"
            raise DataError("--rouge", f"{what}, and only {room} fit; use fewer --max-new-tokens")
        characters = min(len(example.document) * room // len(ids), len(example.document) - 1)
        example = example._replace(turns=(*example.turns[:-1], (example.turns[-1][0], example.document[:characters])))
    return example, ids


def answer(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    rows: int,
    rank: int = 0,
    world_size: int = 1,
    watch: Watch = lambda items, *_: items,
) -> dict[int, Answer]:
    """{index of a prompt: the likeliest continuation}, of the prompts of this rank, `rows` prompts of similar length at a time.

    An answer ends with the tokenizer's EOS, or after max_new_tokens. The model is not sharded: ranks do not wait for each other.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = [order[start : start + rows] for start in range(0, len(order), rows)][rank::world_size]
    answers = {}
    for batch in watch(batches, "answers", len(batches)):
        new = generate(model, [prompts[i] for i in batch], max_new_tokens, eos_id=tokenizer.eos_id)
        for i, tokens in zip(batch, new, strict=True):
            ended = tokens[-1:] == [tokenizer.eos_id]
            answers[i] = Answer(tokenizer.decode(tokens[:-1] if ended else tokens), len(tokens), ended)
    return answers


def lead_1(document: str) -> str:
    """The first sentence of a text: up to the end of a sentence, or the first empty line."""
    first = re.split(r"\n\s*\n", document.strip(), maxsplit=1)[0]
    end = SENTENCE_END.search(first)
    return first[: end.end()] if end else first


def score(references: Sequence[str], texts: Sequence[str]) -> list[dict[str, Any]]:
    """rouge_score's Score (precision, recall, fmeasure) of each text, by name. Sentences for ROUGE-Lsum are lines."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(SCORES), use_stemmer=True)
    return [scorer.score(reference, text) for reference, text in zip(references, texts, strict=True)]


def aggregate(scores: Sequence[dict[str, Any]]) -> dict[str, Interval]:
    """The mean F1 of each score, with rouge_score's bootstrap interval from 1000 resamplings, the same at each call."""
    from rouge_score.scoring import BootstrapAggregator

    aggregator = BootstrapAggregator(confidence_interval=0.95, n_samples=1000)
    for each in scores:
        aggregator.add_scores(each)
    state = np.random.get_state()  # the aggregator draws from NumPy's global generator
    np.random.seed(SEED)
    try:
        drawn = aggregator.aggregate()
    finally:
        np.random.set_state(state)
    means = {name: float(np.mean([each[name].fmeasure for each in scores])) for name in SCORES}
    return {name: Interval(means[name], float(drawn[name].low.fmeasure), float(drawn[name].high.fmeasure)) for name in SCORES}


def summarize(examples: Sequence[Example], answers: Sequence[Answer], cut_prompts: int) -> tuple[Summaries, list[dict[str, Any]]]:
    """The results, and a record of each example for a file of predictions. `examples` are uncut: lead-1 reads the document."""
    references, texts = [example.reference for example in examples], [answer.text for answer in answers]
    leads = [lead_1(example.document) for example in examples]
    scores = score(references, texts)
    columns = {"prediction": texts, "reference": references, "lead_1": leads, "document": [e.document for e in examples]}
    words = {name: float(np.mean([len(text.split()) for text in column])) for name, column in columns.items()}
    ended = float(np.mean([answer.ended for answer in answers]))
    results = Summaries(len(examples), aggregate(scores), aggregate(score(references, leads)), words, ended, cut_prompts)
    predictions = [
        {"line": example.line, "prompt": example.document, "reference": example.reference, "prediction": answer.text}
        | {"lead_1": lead, "tokens": answer.tokens, "ended": answer.ended}
        | {name: each[name].fmeasure for name in SCORES}
        for example, answer, lead, each in zip(examples, answers, leads, scores, strict=True)
    ]
    return results, predictions
