"""Text to token ids and back."""

from __future__ import annotations

import os
from pathlib import Path

from bagel_jax.errors import InputError

# Transformers says on import that PyTorch is missing, and of a "bagel" config that it knows no such model. Neither
# is news here: only its tokenizers are used.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


class Tokenizer:
    """The checkpoint's tokenizer with the four marker tokens.

    Args:
        directory: a folder with the tokenizer's files.

    Raises:
        InputError: no tokenizer can be loaded from there.
    """

    def __init__(self, directory: Path):
        from transformers import AutoTokenizer

        if not ((directory / "tokenizer.json").exists() or (directory / "vocab.json").exists()):
            raise InputError(f"{directory} holds neither tokenizer.json nor vocab.json; a tokenizer needs one of them")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # transformers raises whatever its parsers raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"the tokenizer in {directory} cannot be loaded ({reason}); fetch its files again"
            ) from None
        known = self._tokenizer.get_vocab()
        self._tokenizer.add_tokens([token for token in _MARKERS if token not in known])
        ids = self._tokenizer.convert_tokens_to_ids(list(_MARKERS))
        self.im_start, self.im_end, self.vision_start, self.vision_end = ids

    def prompt(self, text: str) -> tuple[int, ...]:
        """Ids of `<|im_start|> text <|im_end|>`, the form in which the model sees every text."""
        return self.im_start, *self._tokenizer.encode(text, add_special_tokens=False), self.im_end

    def answer(self, ids: list[int]) -> str:
        """The text of decoded `ids`, whose first is `<|im_start|>`: up to the next marker of a turn.

        Source: `gen_text` in the official `inferencer.py`.
        """
        text = self._tokenizer.decode(ids)
        return text.split("<|im_end|>")[0].split("<|im_start|>")[1]

    def piece(self, ids: list[int]) -> str:
        """The text of some tokens in the middle of an answer; bytes that are no whole letter become U+FFFD."""
        return self._tokenizer.decode(ids)
