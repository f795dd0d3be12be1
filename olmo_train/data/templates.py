"""Chat templates: how the messages of a conversation become one sequence of tokens. A template is a row of TEMPLATES.

Special tokens stand in a template's markers only: a message that spells `<|im_end|>` is encoded as ordinary characters. The ids
are those of transformers' `apply_chat_template` up to the end of the last turn, where a document ends; as there, text between two
markers is encoded in one piece. The assistant's text and the end of each of its turns are scored.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from olmo_train.data.tokenizer import CONFIG_FILE, Tokenizer, load_tokenizer
from olmo_train.errors import ConfigError, DataError, check_choice

log = logging.getLogger(__name__)
Turn: TypeAlias = tuple[str, str]  # (role, text) of a message
SCORED = "the assistant's text and the end of each of its turns"
SEPARATOR = "\n\n"  # between the instruction and the prompt
NO_ANSWER, LAST_ASKS, EMPTY_ANSWER = (
    "has no assistant message",
    "ends with a message that is not the assistant's",
    "has an empty response",
)
UNKNOWN_ROLE, NO_TURNS = "has a role that the template does not know", "has no response and no assistant message to train on"
NOT_IN_TURN = "has messages that do not alternate between user and assistant, as the template demands"
PROBE: tuple[Turn, ...] = (
    ("user", "Is 1 + 1 = 2?"),
    ("assistant", "Yes, it is."),
    ("user", " Why?\n"),
    ("assistant", "By counting."),
)


class Marker(str):
    """A special token of a template."""


EOS = Marker("{eos}")  # the tokenizer's EOS, or that of --eos


@dataclass(frozen=True)
class Template:
    """What stands around the messages. A piece that is a Marker is one token, any other is text; {role} is the message's role."""

    head: tuple[str, ...]  # before a message
    tail: tuple[str, ...]  # after a message
    end: tuple[str, ...] = ()  # after an assistant's message, if not `tail`; its first piece is the turn's end
    begin: Marker | None = None  # before the first message
    roles: tuple[tuple[str, str], ...] = (("system", "system"), ("user", "user"), ("assistant", "assistant"))  # (role, its name)
    strips: bool = False  # blanks at both ends of a message are removed
    alternates: bool = False  # user and assistant in turn, the user first
    system: str | None = None  # the system message of conversations without one

    @property
    def turn_end(self) -> str:
        """The marker that ends an assistant's turn, at which generation stops."""
        return (self.end or self.tail)[0]

    @property
    def markers(self) -> tuple[str, ...]:
        """The special tokens that a tokenizer must have, besides an EOS."""
        pieces = (self.begin, *self.head, *self.tail, *self.end)
        return tuple(dict.fromkeys(str(piece) for piece in pieces if isinstance(piece, Marker) and piece != EOS))

    def jinja(self, eos: str, instruction: str | None = None) -> str:
        """The template in the language of transformers' `apply_chat_template`, with the text of the EOS and the instruction."""
        names = dict(self.roles)

        def text(pieces: Sequence[str], role: str) -> str:
            return "".join(eos if piece == EOS else piece.replace("{role}", names[role]) for piece in pieces)

        def put(role: str, what: str) -> str:
            tail = self.end or self.tail if role == "assistant" else self.tail
            return f"{{{{ {_quoted(text(self.head, role))} + {what} + {_quoted(text(tail, role))} }}}}"

        made = f"{{{{ {_quoted(text((self.begin,), 'user'))} }}}}" if self.begin else ""
        if self.system is not None:
            made += f"{{% if messages[0]['role'] != 'system' %}}{put('system', _quoted(self.system))}{{% endif %}}"
        if instruction is not None:  # in a namespace, as a loop cannot set a variable that is outside it
            made += f"{{% set first = namespace(text={_quoted(instruction + SEPARATOR)}) %}}"
        made += "{% for message in messages %}{% set text = message['content'] %}"
        if self.alternates:
            expected = "'user' if loop.index0 % 2 == 0 else 'assistant'"
            refused = _quoted("user and assistant messages must alternate, the user's first")
            made += f"{{% if message['role'] != ({expected}) %}}{{{{ raise_exception({refused}) }}}}{{% endif %}}"
        if instruction is not None:
            made += "{% if message['role'] == 'user' %}{% set text = first.text + text %}{% set first.text = '' %}{% endif %}"
        said = "text | trim" if self.strips else "text"
        turns = [f"if message['role'] == {_quoted(role)} %}}{put(role, f'({said})')}{{% " for role in names]
        unknown = _quoted("this template knows the roles " + ", ".join(names))
        made += f"{{% {'el'.join(turns)}else %}}{{{{ raise_exception({unknown}) }}}}{{% endif %}}{{% endfor %}}"
        asks = f"{{{{ {_quoted(text(self.head, 'assistant'))} }}}}"
        return f"{made}{{% if add_generation_prompt %}}{asks}{{% endif %}}"


_CHATML = Template((Marker("<|im_start|>"), "{role}\n"), (Marker("<|im_end|>"), "\n"))
TEMPLATES = {
    "plain": Template((), (), end=(EOS,)),  # prompt and response joined as they are
    "olmo": Template(("<|{role}|>\n",), ("\n",), end=(EOS, "\n"), begin=EOS),  # OLMo 2's; its role markers are text
    "chatml": _CHATML,  # Qwen's, and of many others
    "smollm2": replace(_CHATML, system="You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "llama3": Template(
        (Marker("<|start_header_id|>"), "{role}", Marker("<|end_header_id|>"), "\n\n"), (Marker("<|eot_id|>"),),
        begin=Marker("<|begin_of_text|>"), strips=True,
    ),
    "gemma": Template(
        (Marker("<start_of_turn>"), "{role}\n"), (Marker("<end_of_turn>"), "\n"),
        begin=Marker("<bos>"), roles=(("user", "user"), ("assistant", "model")), strips=True, alternates=True,
    ),
}  # fmt: skip


def _quoted(text: str) -> str:
    """A text as Jinja writes it; its escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


class Piece(NamedTuple):
    """A marker, or the text between two markers, whose last part may be scored."""

    marker: str = ""
    read: str = ""
    scored: str = ""
    ends_answer: bool = False  # a marker that ends an assistant's turn, and is scored


@dataclass(frozen=True)
class ChatFormat:
    """A template with the tokenizer that encodes it."""

    name: str
    tokenizer: Tokenizer
    instruction: str | None = None  # text before the first message of the user

    @property
    def template(self) -> Template:
        return TEMPLATES[self.name]

    def id_of(self, marker: str) -> int:
        """The id of a marker."""
        return self.tokenizer.eos_id if marker == EOS else self.tokenizer.inner.token_to_id(marker)

    @property
    def marker_ids(self) -> list[int]:
        """The ids that no text may become."""
        return sorted({self.tokenizer.eos_id, *map(self.id_of, self.template.markers)})

    def record(self) -> dict[str, Any]:
        """What meta.json and the checkpoints of a run store."""
        markers = {marker: self.id_of(marker) for marker in self.template.markers}
        end = {"turn_end": self.tokenizer.eos_text, "turn_end_id": self.tokenizer.eos_id}
        return {"name": self.name, "instruction": self.instruction, "markers": markers, **end, "scored": SCORED}

    def refusal(self, turns: Sequence[Turn]) -> str | None:
        """Why these messages cannot be trained on; None if they can."""
        roles = [role for role, _ in turns]
        if not turns:
            return NO_TURNS
        if set(roles) - dict(self.template.roles).keys():
            return UNKNOWN_ROLE
        if "assistant" not in roles:
            return NO_ANSWER
        if roles[-1] != "assistant":
            return LAST_ASKS
        if not all(text.strip() for role, text in turns if role == "assistant"):
            return EMPTY_ANSWER
        if self.template.alternates and roles != ["user", "assistant"] * (len(roles) // 2):
            return NOT_IN_TURN
        return None

    def render(self, turns: Sequence[Turn], ask: bool = False) -> list[Piece]:
        """The pieces of a document, which ends with the assistant's last turn; with `ask`, of a prompt for the next one."""
        template, names, pieces, read = self.template, dict(self.template.roles), [], ""

        def add(parts: Sequence[str], role: str, answered: bool = False) -> None:
            nonlocal read
            for part in parts:
                if not isinstance(part, Marker):
                    read += part.replace("{role}", names[role])
                    continue
                if read:
                    pieces.append(Piece(read=read))
                pieces.append(Piece(marker=part, ends_answer=answered))
                read = ""

        if template.begin:
            pieces.append(Piece(marker=template.begin))
        for role, text in self._complete(turns):
            add(template.head, role)
            if role != "assistant":
                read += text
                add(template.tail, role)
                continue
            if read and not template.head:  # nothing separates them: the prompt is encoded as when it is asked alone
                pieces.append(Piece(read=read))
                read = ""
            pieces.append(Piece(read=read, scored=text))
            read = ""
            add(template.end or template.tail, role, answered=True)
        if ask:
            add(template.head, "assistant")
            pieces += [Piece(read=read)] if read else []
        return pieces

    def _complete(self, turns: Sequence[Turn]) -> Iterator[Turn]:
        """The messages as they are encoded, with the instruction and the template's system message."""
        instruction = self.instruction
        if self.template.system is not None and turns[0][0] != "system":
            yield "system", self.template.system
        for role, text in turns:
            if role == "user" and instruction is not None:
                text, instruction = instruction + SEPARATOR + text, None
            yield role, text.strip() if self.template.strips else text

    def assemble(self, pieces: list[Piece], encoded: Iterator[np.ndarray]) -> tuple[list[np.ndarray], list[bool]]:
        """(ids in parts, whether each part is scored). `encoded`: the ids of `texts_of(pieces)`.

        What is read of a piece ends where its ids with and without the scored part begin to differ, so that a token that spans
        both is scored.
        """
        arrays, scored = [], []
        for piece in pieces:
            if piece.marker:
                arrays.append(np.array([self.id_of(piece.marker)], self.tokenizer.dtype))
                scored.append(piece.ends_answer)
                continue
            ids = next(encoded)
            read = 0 if piece.scored else len(ids)
            if piece.read and piece.scored:
                alone = next(encoded)[: len(ids)]
                differ = np.flatnonzero(alone != ids[: len(alone)])
                read = int(differ[0]) if len(differ) else len(alone)
            arrays += [ids[:read], ids[read:]]
            scored += [False, True]
        return arrays, scored

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """The ids that ask the model to answer these messages; none for an empty prompt in a template without markers."""
        return self.encode(self.render(turns, ask=True))

    def encode(self, pieces: list[Piece]) -> list[int]:
        """The ids of pieces."""
        arrays, _ = self.assemble(pieces, iter(self.tokenizer.encode_batch(texts_of(pieces))))
        return [id for array in arrays for id in array.tolist()]


def texts_of(pieces: list[Piece]) -> list[str]:
    """What `ChatFormat.assemble` needs the ids of, in this order."""
    return [
        text
        for p in pieces
        if not p.marker
        for text in ([p.read + p.scored, p.read] if p.read and p.scored else [p.read + p.scored])
    ]


def open_format(name: str, tokenizer: str | Path, eos: str | None, instruction: str | None) -> ChatFormat:
    """A template with its tokenizer, opened so that no text becomes a marker.

    Raises ConfigError for an unknown template or an EOS that is not its turn's end, and DataError when the tokenizer lacks a
    marker or encodes a conversation differently than the template says.
    """
    check_choice("--template", name, TEMPLATES)
    end = TEMPLATES[name].turn_end
    if end != EOS and eos not in (None, end):
        raise ConfigError("--eos", f"is {eos!r}, but a turn of the template {name} ends with {end!r}; leave --eos out")
    opened = load_tokenizer(tokenizer, eos if end == EOS else str(end), TEMPLATES[name].markers)
    chat = ChatFormat(name, opened, instruction)
    if TEMPLATES[name].markers:
        _probe(replace(chat, instruction=None))
    return chat


def _probe(chat: ChatFormat) -> None:
    """Compare the ids of a conversation with those of the tokenizer itself, which finds the markers in the text."""
    import tokenizers

    pieces = chat.render(PROBE)
    plain = tokenizers.Tokenizer.from_str(chat.tokenizer.json)
    plain.no_truncation()
    plain.no_padding()
    text = "".join(piece.marker + piece.read + piece.scored for piece in pieces)
    if plain.encode(text, add_special_tokens=False).ids != chat.encode(pieces):
        what = f"encodes the text between the markers of the template {chat.name} differently when it stands alone"
        raise DataError(chat.tokenizer.name, f"{what}; use --template plain, or another tokenizer")


def recorded_template(folder: Path) -> dict[str, Any] | None:
    """The template of the data of a checkpoint, or of a folder that was exported from one; None without one."""
    try:
        recorded = json.loads((folder / CONFIG_FILE).read_bytes()).get("template")
    except (OSError, ValueError, AttributeError):
        return None
    return recorded if isinstance(recorded, dict) and recorded.get("name") in TEMPLATES else None


def template_for(folder: Path, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The recorded template of a checkpoint; None without one, and with a warning when the tokenizer has not its markers."""
    recorded = recorded_template(folder)
    if recorded is None:
        return None
    markers = TEMPLATES[recorded["name"]].markers
    if tokenizer.eos_text != recorded["turn_end"] or any(tokenizer.inner.token_to_id(marker) is None for marker in markers):
        what = f"a turn ends with {recorded['turn_end']!r} in the template {recorded['name']} of {folder}"
        log.warning("%s: %s; no chat template is written, as this tokenizer differs", tokenizer.name, what)
        return None
    return recorded


def chat_template(recorded: dict[str, Any], tokenizer: Tokenizer) -> str | None:
    """A recorded template for transformers' `apply_chat_template`, with its instruction. None for `plain`, whose messages have
    nothing around them."""
    template = TEMPLATES[recorded["name"]]
    return template.jinja(tokenizer.eos_text, recorded["instruction"]) if template.head else None
