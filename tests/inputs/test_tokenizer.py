"""Text to ids and back."""

from __future__ import annotations

import json

import pytest
from golden import Case

from bagel_jax.errors import InputError
from bagel_jax.inputs.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_dir):
    return Tokenizer(tiny_dir)


@pytest.fixture
def bare_dir(tiny_dir, tmp_path):
    """The small checkpoint's tokenizer as if it had been trained without markers."""
    data = json.loads((tiny_dir / "tokenizer.json").read_text())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] == "<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_markers(tokenizer):
    """The model reads its markers as ordinary words."""
    assert (tokenizer.im_start, tokenizer.im_end) == (701, 702)
    assert (tokenizer.vision_start, tokenizer.vision_end) == (703, 704)


def test_prompt_is_wrapped(tokenizer):
    """A prompt lacks its turn markers, or gets others that the tokenizer adds by itself."""
    assert tokenizer.prompt("a red bench below a blue clock") == (701, 64, 381, 541, 411, 256, 336, 647, 702)
    assert tokenizer.prompt("") == (701, 702)


@pytest.mark.parametrize("name", ["text2img", "img2img_two_images", "img2text", "text2text"])
def test_prompts_are_official(tokenizer, cases_dir, name):
    """Prompts are cut into other tokens than by the official code."""
    for item in Case.read(cases_dir, name).spec["inputs"]:
        if "text" in item:
            assert tokenizer.prompt(item["text"]) == (701, *item["ids"], 702)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([701, 64, 381], "a red"),
        ([701, 64, 381, 702, 64], "a red"),
        ([701, 64, 701, 381], "a"),
        ([701], ""),
        ([701, 702, 64], ""),
    ],
)
def test_answers_are_cut_as_officially(tokenizer, ids, text):
    """An answer shows the markers, runs on into the next turn, or loses its beginning."""
    assert tokenizer.answer(ids) == text


def test_answer_is_cut_by_the_official_expression(tokenizer, tiny_dir):
    """Answers differ from `output.split('<|im_end|>')[0].split('<|im_start|>')[1]` of the official `gen_text`."""
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tiny_dir)
    for ids in ([701, 300, 220, 13, 703, 400], [701, 271, 702, 701, 5], [701, 0, 255, 128]):
        output = plain.decode(ids)
        assert tokenizer.answer(ids) == output.split("<|im_end|>")[0].split("<|im_start|>")[1]


def test_text_survives(tokenizer):
    """Umlauts, emoji, spaces or line breaks are lost between prompt and answer."""
    for text in ("Grüße, 世界 🌍!", "  two  spaces ", "line\nbreak\n\n", "tab\tend"):
        assert tokenizer.answer(list(tokenizer.prompt(text))) == text


def test_regression_22_markers_are_added_where_missing(bare_dir):
    """A checkpoint whose tokenizer lacks the markers fails, or all markers share one id."""
    tokenizer = Tokenizer(bare_dir)
    ids = [tokenizer.im_start, tokenizer.im_end, tokenizer.vision_start, tokenizer.vision_end]
    assert ids == [701, 702, 703, 704]  # behind the vocabulary, in the order of the official add_special_tokens
    assert tokenizer.prompt("a red") == (701, 64, 381, 702)
    assert tokenizer.answer([701, 64, 381, 702]) == "a red"


def test_no_tokenizer(tmp_path):
    """A folder without a tokenizer ends in a stack trace, or fetches one from the network."""
    with pytest.raises(InputError, match=r"holds neither tokenizer\.json nor vocab\.json"):
        Tokenizer(tmp_path)


def test_damaged_tokenizer(tmp_path):
    """A truncated download ends in a stack trace that does not name the folder."""
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(InputError, match="cannot be loaded") as error:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
