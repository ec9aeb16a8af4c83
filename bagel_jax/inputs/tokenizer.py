"""Text to token ids and back, by the `tokenizers` library alone.

`transformers` reads the same files into the same ids, but takes seconds to import, and what a checkpoint's json files
name as its classes (`auto_map`) it offers to run. Here a checkpoint's files are data and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from bagel_jax.errors import InputError
from bagel_jax.layout import SpecialTokens

_MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")

# Qwen2's words, from its `tokenizer.json`.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What transformers' Qwen2Tokenizer takes for special where the files are silent.
_QWEN2_SPECIAL = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
# In this order, for that is the order in which those that are nowhere else get their ids.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The checkpoint's tokenizer with the four marker tokens.

    Args:
        directory: a folder with the tokenizer's files.

    Raises:
        InputError: no tokenizer can be loaded from there.
    """

    def __init__(self, directory: Path):
        if not ((directory / "tokenizer.json").exists() or (directory / "vocab.json").exists()):
            raise InputError(f"{directory} holds neither tokenizer.json nor vocab.json; a tokenizer needs one of them")
        try:
            self._tokenizer = _load(directory)
        except InputError:
            raise
        except Exception as error:  # of json, of the library's parsers, or of a field of another type
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"the tokenizer in {directory} cannot be loaded ({reason}); fetch its files again"
            ) from None
        self._tokenizer.add_tokens([token for token in _MARKERS if self._tokenizer.token_to_id(token) is None])
        ids = [self._tokenizer.token_to_id(token) for token in _MARKERS]
        self.special = SpecialTokens(*ids)
        self.im_start, self.im_end, self.vision_start, self.vision_end = self.special

    def prompt(self, text: str) -> tuple[int, ...]:
        """Ids of `<|im_start|> text <|im_end|>`, the form in which the model sees every text."""
        return self.special.text(self._tokenizer.encode(text, add_special_tokens=False).ids).ids

    def answer(self, ids: list[int]) -> str:
        """The text of decoded `ids`, whose first is `<|im_start|>`: up to the next marker of a turn.

        Source: `gen_text` in the official `inferencer.py`.
        """
        text = self.piece(ids)
        return text.split("<|im_end|>")[0].split("<|im_start|>")[1]

    def piece(self, ids: list[int]) -> str:
        """The text of some tokens in the middle of an answer; bytes that are no whole letter become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def qwen2(model: models.BPE, *, add_prefix_space: bool = False) -> Backend:
    """A tokenizer of Qwen2's form around a vocabulary, without added tokens."""
    tokenizer = Backend(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _load(directory: Path) -> Backend:
    """What transformers' AutoTokenizer makes of a folder, for tokenizers of Qwen2's form."""
    file, config = directory / "tokenizer.json", _fields(directory / "tokenizer_config.json")
    is_qwen2 = not file.exists() or str(config.get("tokenizer_class")).startswith("Qwen2Tokenizer")
    if file.exists():
        text = file.read_text(encoding="utf-8")
        tokenizer = Backend.from_str(text)
    else:
        if not (directory / "merges.txt").exists():
            raise InputError(f"{directory} holds vocab.json but no merges.txt; a tokenizer needs both")
        model = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
        tokenizer = qwen2(model, add_prefix_space=bool(config.get("add_prefix_space")))
    in_file = tokenizer.get_added_tokens_decoder()
    if "added_tokens_decoder" in config:
        added = {int(i): AddedToken(**fields) for i, fields in config["added_tokens_decoder"].items()}
        special = _special(config, is_qwen2)
    else:  # as older files say it
        config |= _fields(directory / "special_tokens_map.json")
        special = _special(config, is_qwen2)
        known = {token.content for token in special}
        added = {
            i: AddedToken(content, normalized=content not in known, special=content in known)
            for content, i in _fields(directory / "added_tokens.json").items()
        } | in_file
    listed = {i: token.content for i, token in added.items()}
    if is_qwen2 and in_file and {i: token.content for i, token in in_file.items()} != listed:
        # tokenizer_config.json has the last word there, and no token can be taken out of a tokenizer.
        tokenizer = Backend.from_str(json.dumps(json.loads(text) | {"added_tokens": []}))
    tokenizer.add_tokens([added[i] for i in sorted(added)])  # those that are there get these flags
    if is_qwen2:  # whose special tokens take no spaces around them along, whatever the files say
        special = [AddedToken(token.content, special=True) for token in special]
    else:
        there = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        special = [token for token in special if token.content not in there]
    tokenizer.add_tokens(special)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
    return tokenizer


def _special(config: dict[str, Any], is_qwen2: bool) -> list[AddedToken]:
    """The special tokens that a tokenizer_config.json names."""
    config = (_QWEN2_SPECIAL if is_qwen2 else {}) | config
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = [config.get(name) for name in _SPECIAL]
    # Kinds of special tokens that only one model has.
    named += [x for name, x in config.items() if name.endswith("_token") and name not in _SPECIAL and _is_token(x)]
    return [
        AddedToken(token, special=True)
        if isinstance(token, str)
        else AddedToken(**{key: x for key, x in token.items() if key not in ("__type", "special")}, special=True)
        for token in (*named, *(more.values() if isinstance(more, dict) else more))
        if token is not None
    ]


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and value.get("__type") == "AddedToken")


def _fields(file: Path) -> dict[str, Any]:
    """A json file's object; empty where there is no such file."""
    if not file.exists():
        return {}
    fields = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError(f"{file.name} holds a json {type(fields).__name__} instead of an object")
    return fields
