"""Trains the demo world's tokenizer: byte-level BPE in Qwen2's form, with a token for every common word.

python -m tools.demo.tokenizer DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from bagel_jax.errors import InputError
from bagel_jax.inputs.prepare import THINK_PROMPTS
from bagel_jax.inputs.tokenizer import qwen2
from tools.demo.world import COMBINATIONS, NEW_COLORS, QUESTIONS, SHAPES, Combination, edits, facts, plan, prompts

VOCABULARY = 700  # tokens in all; fewer would cut common words, and only names of cities gain from more
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")

_ALWAYS_WHOLE = 50  # how often a sentence is repeated whose every word must become one token


def sentences() -> Iterator[str]:
    """All that is said in the world, each sentence as often as its words matter."""
    for c in COMBINATIONS:
        yield from (*prompts(c), plan(c))
        for edit in edits(c):
            yield from edit.forms
    for question in QUESTIONS.values():
        yield from question.forms * _ALWAYS_WHOLE
    for answer in sorted({question.answer_for(c) for question in QUESTIONS.values() for c in COMBINATIONS}):
        yield from [answer] * _ALWAYS_WHOLE
    for color in NEW_COLORS:
        for shape in SHAPES:
            yield from prompts(Combination(color, shape, color)) * _ALWAYS_WHOLE
    for fact in facts():
        # Names of cities stay in pieces: whole, they alone would cost another 160 tokens.
        yield from (*fact.forms, fact.answer) * (1 if "capital" in fact.answer else _ALWAYS_WHOLE)
    yield from [THINK_PROMPTS["image"]] * _ALWAYS_WHOLE


def build(directory: Path) -> int:
    """Writes vocab.json, merges.txt, tokenizer.json and tokenizer_config.json; returns the number of tokens.

    Every text survives encoding and decoding, up to Unicode's normal form C.

    Raises:
        InputError: the directory cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory} cannot be made ({error.strerror}); give a directory to write to") from None
    tokenizer = _train()
    tokenizer.model.save(str(directory))  # vocab.json and merges.txt
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = json.dumps(_config(tokenizer), indent=1) + "\n"
    (directory / "tokenizer_config.json").write_text(config, encoding="utf-8")
    return tokenizer.get_vocab_size()


def _train() -> Tokenizer:
    tokenizer = qwen2(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    return tokenizer


def _config(tokenizer: Tokenizer) -> dict:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in SPECIAL},
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "model_max_length": 131072,
        "split_special_tokens": False,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "Qwen2Tokenizer",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for bad input."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("directory", metavar="DIR", type=Path, help="where to write")
    args = p.parse_args(argv)
    try:
        size = build(args.directory)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.directory}: {size} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
