"""Generation: the cache changes nothing, rows do not see each other, and every way to end a row works."""

import json

import pytest
import torch
from runs import first_model, trained

from olmo_train.errors import ConfigError
from olmo_train.model.config import ModelConfig
from olmo_train.model.generate import Sampling, choose, generate
from olmo_train.model.transformer import Transformer

PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3], [1, 2, 3], [40, 41, 42]]


def tiny_model(**changes) -> Transformer:
    shape = dict(d_model=32, n_layers=2, n_heads=4, mlp_hidden=48, vocab_size=50, padded_vocab_size=64, seq_len=24)
    return first_model(ModelConfig(**(shape | changes))).eval()


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1, "norm": "rms_norm", "block": "parallel", "tie_embeddings": True}])
def test_greedy_equals_the_uncached_path_token_for_token(changes):
    model = tiny_model(**changes)
    assert generate(model, PROMPTS, 15) == generate(model, PROMPTS, 15, cached=False)


def test_greedy_is_the_argmax_of_the_whole_sequence_so_far():
    model, row = tiny_model(), list(PROMPTS[1])
    for _ in range(10):
        row.append(model(torch.tensor([row]))[0, -1, :50].argmax().item())
    assert generate(model, PROMPTS, 10)[1] == row[7:]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5), Sampling(1.0, top_k=5), Sampling(1.0, top_p=0.7)])
def test_a_row_in_a_batch_is_what_it_is_alone(sampling):
    model = tiny_model()
    alone = [generate(model, [prompt], 12, sampling, seeds=[i])[0] for i, prompt in enumerate(PROMPTS)]
    assert generate(model, PROMPTS, 12, sampling) == alone


def test_the_same_seed_makes_the_same_text_and_another_seed_another():
    model, sampling = tiny_model(), Sampling(temperature=2.0)
    first, again, other = (generate(model, [[1, 2]], 20, sampling, seeds=[seed])[0] for seed in (7, 7, 8))
    assert first == again != other


def test_a_row_ends_with_its_eos_and_the_others_continue():
    model = tiny_model()
    free = generate(model, PROMPTS, 12)
    eos_id = free[0][2]
    for row, whole in zip(generate(model, PROMPTS, 12, eos_id=eos_id), free, strict=True):
        assert row == (whole[: whole.index(eos_id) + 1] if eos_id in whole else whole)


def test_a_row_ends_when_the_caller_says_so():
    model = tiny_model()
    assert [len(row) for row in generate(model, PROMPTS, 12, finished=lambda new: len(new) == 3)] == [3, 3, 3, 3]


def test_the_model_reads_at_most_seq_len_tokens():
    prompts = [[3] * 24, [3] * 20, [3]]
    assert [len(row) for row in generate(tiny_model(), prompts, 10)] == [1, 5, 10]


@pytest.mark.parametrize("prompt, word", [([], "empty"), ([3] * 25, "25 tokens")])
def test_a_prompt_that_cannot_be_read_is_refused(prompt, word):
    with pytest.raises(ConfigError, match=word):
        generate(tiny_model(), [[1], prompt], 5)


def test_padding_rows_of_the_vocabulary_are_never_chosen():
    model = tiny_model()
    with torch.no_grad():
        model.head.weight[50:] = 100 * model.head.weight[:14]
    new = generate(model, PROMPTS, 15, Sampling(temperature=5.0))
    assert max(map(max, new)) < 50


def frequencies(sampling: Sampling, probabilities: list[float], n: int = 20_000) -> list[float]:
    """How often each token is chosen over evenly spread draws."""
    logits = torch.tensor(probabilities).log().repeat(n, 1)
    draws = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return (torch.bincount(choose(logits, sampling, draws), minlength=len(probabilities)) / n).tolist()


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(1.0), [0.1, 0.5, 0.15, 0.25]),
        (Sampling(0.5), [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),  # squares
        (Sampling(1.0, top_k=2), [0, 2 / 3, 0, 1 / 3]),
        (Sampling(1.0, top_k=9), [0.1, 0.5, 0.15, 0.25]),
        (Sampling(1.0, top_p=0.5), [0, 1, 0, 0]),
        (Sampling(1.0, top_p=0.51), [0, 2 / 3, 0, 1 / 3]),
        (Sampling(1.0, top_k=2, top_p=0.66), [0, 1, 0, 0]),  # of what top-k left, the first has 2/3
        (Sampling(0.0), [0, 1, 0, 0]),
    ],
)
def test_tokens_are_chosen_as_often_as_the_options_say(sampling, expected):
    assert frequencies(sampling, [0.1, 0.5, 0.15, 0.25]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_options_without_a_meaning_are_refused(options):
    with pytest.raises(ConfigError):
        Sampling(**options)


def test_the_command_continues_prompts_of_a_run(tiny_args, tmp_path, capsys):
    from olmo_train.__main__ import main
    from olmo_train.data.tokenizer import save_tokenizer, train_tokenizer

    trained(tiny_args("run", total_steps=2))
    save_tokenizer(train_tokenizer(["a tale of two cities, and of one more"] * 3, 300), tmp_path / "tokenizer.json")
    words = ["generate", str(tmp_path / "run"), "--prompt", "a tale", "--prompt", "of", "--max-new-tokens", "9", "--json"]
    assert main(words) == 2 and "--tokenizer" in capsys.readouterr().err
    words += ["--tokenizer", str(tmp_path / "tokenizer.json")]
    texts = []
    for size in ("1", "2"):
        assert main([*words, "--batch-size", size]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0] == texts[1] and [t["prompt"] for t in texts[0]] == ["a tale", "of"]
    assert all(1 <= len(t["tokens"]) <= 9 for t in texts[0])
    whole = texts[0][0]["text"]
    assert main([*words, "--stop", whole[3:5]]) == 0
    assert json.loads(capsys.readouterr().out)[0]["text"] == whole[: whole.index(whole[3:5])]
