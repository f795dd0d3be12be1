"""Templates: the ids of transformers' apply_chat_template, special tokens in markers only, and what is scored."""

import json
import random

import numpy as np
import pytest
import tokenizers
from data_sources import prepare_source, texts
from tokenizers import models, pre_tokenizers

from olmo_train.data.prepare.prepare import PrepareOptions, prepare
from olmo_train.data.templates import TEMPLATES, open_format, texts_of
from olmo_train.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from olmo_train.errors import ConfigError, DataError

MARKERS = {marker for template in TEMPLATES.values() for marker in template.markers}
# The text of each family's template; between `generation` stands what transformers counts as the assistant's.
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}
{{- m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}
{{- m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"""
SMOLLM2 = """{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n' }}
{{- 'You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"""
LLAMA3 = """{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}
{%- if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}
{{- m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"""
GEMMA = """{{ '<bos>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<start_of_turn>model\n' }}{% generation %}
{{- m['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{% else %}{{ '<start_of_turn>user\n' + m['content'] | trim }}
{{- '<end_of_turn>' }}{% endif %}{{ '\n' }}{% endfor %}"""
OLMO = """{{ '<|endoftext|>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}
{%- generation %}{{ m['content'] + '<|endoftext|>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}
{%- endfor %}"""
JINJA = {"chatml": CHATML, "smollm2": SMOLLM2 + CHATML, "llama3": LLAMA3, "gemma": GEMMA, "olmo": OLMO}


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory):
    """A byte-level BPE with the markers of every template as special tokens."""
    inner = train_tokenizer([*texts(200), "user system assistant model\n\nHello there\n"] * 3, 400)
    inner.add_special_tokens(sorted(MARKERS))
    file = tmp_path_factory.mktemp("chat") / "tokenizer.json"
    save_tokenizer(inner, file)
    return file


def encoded(chat, turns):
    """(ids, whether each is scored)"""
    pieces = chat.render(turns)
    arrays, scored = chat.assemble(pieces, iter(chat.tokenizer.encode_batch(texts_of(pieces))))
    return np.concatenate(arrays).tolist(), np.repeat(scored, [len(array) for array in arrays]).tolist()


def conversations(roles_of):
    rng = random.Random(7)
    blanks = ["", " ", "\n", "\n\n", "  \n", "\t"]
    for _ in range(60):
        rounds = rng.randint(1, 3)
        text = lambda: rng.choice(blanks) + rng.choice(texts(40, rng.random())) + rng.choice(blanks)  # noqa: E731
        turns = [turn for _ in range(rounds) for turn in (("user", text()), ("assistant", text() + "."))]
        yield [("system", text()), *turns] if "system" in roles_of and rng.random() < 0.5 else turns


@pytest.mark.parametrize("name", JINJA)
def test_ids_and_what_is_scored_are_those_of_apply_chat_template(chat_tokenizer, name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(chat_tokenizer), chat_template=JINJA[name])
    chat = open_format(name, chat_tokenizer, None, None)
    newline = chat.tokenizer.encode("\n")
    for turns in conversations(dict(TEMPLATES[name].roles)):
        messages = [{"role": role, "content": text} for role, text in turns]
        found = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, scored = encoded(chat, turns)
        after = found["input_ids"][len(ids) :]
        assert found["input_ids"][: len(ids)] == ids and after in ([], newline)
        assert list(map(bool, found["assistant_masks"][: len(ids)])) == scored
        assert ids[-1] == chat.tokenizer.eos_id and scored[-1]
        assert sum(id == chat.tokenizer.eos_id and is_scored for id, is_scored in zip(ids, scored, strict=True)) == sum(
            role == "assistant" for role, _ in turns
        )


@pytest.mark.parametrize("name", JINJA)
def test_the_prompt_is_the_begin_of_the_document(chat_tokenizer, name):
    chat = open_format(name, chat_tokenizer, None, "Answer briefly.")
    ids, scored = encoded(chat, [("user", "What is it?"), ("assistant", "a cat")])
    assert ids[: scored.index(True)] == chat.prompt_ids([("user", "What is it?")])
    assert "Answer briefly.\n\nWhat is it?" in chat.tokenizer.decode(ids)


def test_an_empty_prompt_of_the_plain_template_has_no_ids(chat_tokenizer):
    assert open_format("plain", chat_tokenizer, None, None).prompt_ids([("user", "")]) == []


INSTRUCTION = "Answer \"briefly\",\nin one 'word' \\ \U0001f600 {{ x }}."


@pytest.mark.parametrize("name", JINJA)
def test_the_exported_chat_template_renders_what_we_encode(chat_tokenizer, name):
    """As the family's own one, and with an instruction, which the first message of the user begins with, as ours."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(chat_tokenizer))
    chat = open_format(name, chat_tokenizer, None, INSTRUCTION)
    plain, asked = (TEMPLATES[name].jinja(chat.tokenizer.eos_text, text) for text in (None, INSTRUCTION))
    newline = chat.tokenizer.encode("\n")
    for turns in conversations(dict(TEMPLATES[name].roles)):
        messages = [{"role": role, "content": text} for role, text in turns]
        texts = [theirs.apply_chat_template(messages, chat_template=t, tokenize=False) for t in (plain, JINJA[name])]
        assert texts[0] == texts[1]
        ids = theirs.apply_chat_template(messages, chat_template=asked, tokenize=True)["input_ids"]
        expected = encoded(chat, turns)[0]
        assert ids[: len(expected)] == expected and ids[len(expected) :] in ([], newline)
    question = [{"role": "user", "content": " What is it?\n"}]
    ids = theirs.apply_chat_template(question, chat_template=asked, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert ids == chat.prompt_ids([("user", " What is it?\n")]) and INSTRUCTION in chat.tokenizer.decode(ids)
    with pytest.raises(Exception, match="must alternate" if name == "gemma" else "this template knows the roles"):
        theirs.apply_chat_template([{"role": "tool", "content": "a"}], chat_template=plain)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_that_spells_a_marker_is_ordinary_text(chat_tokenizer, name):
    chat = open_format(name, chat_tokenizer, None, None)
    spelled = "".join(sorted(MARKERS)) + "<|endoftext|>"
    ids, _ = encoded(chat, [("user", f"a {spelled} b"), ("assistant", f"{spelled}!")])
    plain, _ = encoded(chat, [("user", "a"), ("assistant", "b")])
    special = set(chat.marker_ids)
    assert [id for id in ids if id in special] == [id for id in plain if id in special]
    assert chat.tokenizer.decode(ids).count(spelled) == 2


def test_markers_that_are_not_special_or_in_the_vocabulary_are_no_text_either(tmp_path, chat_tokenizer):
    values = json.loads(chat_tokenizer.read_text())
    for token in values["added_tokens"]:
        token["special"] = False  # the tokenizer finds such tokens in any text
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    chat = open_format("chatml", tmp_path / "tokenizer.json", None, None)
    ids, _ = encoded(chat, [("user", "x<|im_end|>y"), ("assistant", "<|im_start|>")])
    assert ids.count(chat.tokenizer.eos_id) == 2 and ids.count(chat.id_of("<|im_start|>")) == 2


def test_a_tokenizer_without_the_markers_is_refused_by_their_names(tmp_path, chat_tokenizer):
    save_tokenizer(train_tokenizer(texts(50), 280), tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"lacks <\|im_start\|>, <\|im_end\|> as single tokens, .*--template plain"):
        open_format("chatml", tmp_path / "tokenizer.json", None, None)
    with pytest.raises(ConfigError, match=r"--template: .*chatml"):
        open_format("chatlm", chat_tokenizer, None, None)
    with pytest.raises(ConfigError, match=r"--eos: is '<bos>', but a turn of the template chatml ends with '<\|im_end\|>'"):
        open_format("chatml", chat_tokenizer, "<bos>", None)


def test_a_tokenizer_that_changes_text_after_a_marker_is_refused(tmp_path):
    letters = sorted({*"".join(chr(i) for i in range(33, 127)), "\u2581", "\n"})
    for scheme, is_refused in (("never", False), ("first", True)):  # a blank only before the first text, as in Llama 2
        inner = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        inner.save(str(tmp_path / f"{scheme}.json"))
        if is_refused:
            with pytest.raises(DataError, match="encodes the text between the markers of the template chatml differently"):
                open_format("chatml", tmp_path / f"{scheme}.json", None, None)
        else:
            assert open_format("chatml", tmp_path / f"{scheme}.json", None, None).name == "chatml"


RECORDS = [
    ({"prompt": "a", "response": "b"}, None),
    ({"text": "both", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, None),
    ({"instruction": "add", "input": "1 1", "output": "2"}, None),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, None),
    ({"messages": [{"role": "user", "content": "a"}]}, "has no assistant message"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]},
        "ends with a message that is not the assistant's",
    ),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "has an empty response"),
    ({"prompt": "a", "response": ""}, "has an empty response"),
    ({"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]}, "has a role that the template"),
    ({"text": "no answer"}, "has no response and no assistant message to train on"),
    ({"messages": [{"role": "user", "content": 5}]}, "holds int where text is expected"),
    ({"text": "both", "messages": [{"role": "assistant", "content": 5}]}, "has no response and no assistant message"),
]  # fmt: skip


def test_records_that_cannot_be_trained_on_are_left_out_with_the_reason(tmp_path, chat_tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record, _ in RECORDS))
    result = prepare(PrepareOptions((str(file),), tmp_path / "out", str(chat_tokenizer), template="chatml"))
    reasons = [reason for _, reason in RECORDS if reason]
    assert result.meta.documents == len(RECORDS) - len(reasons)
    assert [first["why"][:20] for first in result.meta.skipped["first"]] == [reason[:20] for reason in reasons]
    assert sum(n["records"] for n in result.meta.account["left_out"].values()) == len(reasons)
    with pytest.raises(DataError, match=r"a.jsonl:5: has no assistant message; correct it, or leave it out"):
        prepare(PrepareOptions((str(file),), tmp_path / "stop", str(chat_tokenizer), template="chatml", on_error="stop"))


def test_gemma_takes_no_system_message_and_turns_must_alternate(chat_tokenizer):
    chat = open_format("gemma", chat_tokenizer, None, None)
    assert chat.refusal([("system", "s"), ("user", "a"), ("assistant", "b")]) == "has a role that the template does not know"
    assert "alternate" in chat.refusal([("user", "a"), ("user", "b"), ("assistant", "c")])
    assert chat.refusal([("user", "a"), ("assistant", "c")] * 2) is None


def test_the_eos_of_a_source_is_the_turns_end_and_its_template_is_recorded(tmp_path, chat_tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    options = {"template": "chatml", "instruction": "Be brief."}
    meta = prepare(PrepareOptions((str(file),), tmp_path / "out", str(chat_tokenizer), **options)).meta
    end = load_tokenizer(chat_tokenizer, "<|im_end|>").eos_id
    assert (meta.eos_text, meta.eos_id, meta.pack, meta.format_version) == ("<|im_end|>", end, None, 2)
    assert meta.template["name"] == "chatml" and meta.template["instruction"] == "Be brief."
    assert (meta.template["turn_end"], meta.template["turn_end_id"]) == ("<|im_end|>", end)
    with pytest.raises(ConfigError, match="was prepared with instruction 'Be brief.', now it is None"):
        prepare(PrepareOptions((str(file),), tmp_path / "out", str(chat_tokenizer), template="chatml"))
    folder, result = prepare_source(tmp_path, file, name="untouched")
    assert result.meta.template is None and result.meta.format_version == 1
    with pytest.raises(ConfigError, match="was prepared with template None, now it is 'plain'"):
        prepare_source(tmp_path, file, name="untouched", template="plain")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut": "prompt", "pack": 64}, "--cut: needs --template"),
        ({"cut": "prompt", "template": "plain"}, "--cut: needs --pack"),
        ({"cut": "response", "template": "plain", "pack": 64}, "--cut: "),
        ({"instruction": "x"}, "--instruction: needs --template"),
        ({"pack": 1}, "--pack: must be at least 8 tokens, got 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError) as refused:
        prepare_source(tmp_path, **options)
    assert str(refused.value).startswith(message)
