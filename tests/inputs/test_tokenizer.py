"""Text to ids and back."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from golden import Case
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bagel_jax.demo.example import MODEL
from bagel_jax.errors import InputError
from bagel_jax.inputs.tokenizer import Tokenizer

SMALL_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "config.json")


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


def copied(source: Path, destination: Path, *names: str) -> Path:
    """A folder with some of a tokenizer's files."""
    destination.mkdir()
    for name in names:
        shutil.copyfile(source / name, destination / name)
    return destination


def write(folder: Path, name: str, **fields) -> Path:
    """Lays fields over those of a json file; None takes one out."""
    file = folder / name
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in (old | fields).items() if v is not None}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(tiny_dir, tmp_path_factory) -> dict[str, Path]:
    """Tokenizers as checkpoints have them, and with each of the places where tokens can be added."""
    root = tmp_path_factory.mktemp("tokenizers")
    pieces = ("vocab.json", "merges.txt", "tokenizer_config.json")
    found = {"tiny": tiny_dir, "demo": MODEL}
    for name, source in (("tiny", tiny_dir), ("demo", MODEL)):
        found[f"{name}, vocab and merges"] = copied(source, root / f"{name} pieces", *pieces)
    write(
        copied(tiny_dir, root / "additional", *SMALL_FILES[:2]),
        "tokenizer_config.json",
        additional_special_tokens=["<|new|>", "<|im_end|>", "bench"],
        mask_token="<mask>",
    )
    flags = {"lstrip": True, "rstrip": True, "normalized": True, "single_word": False, "special": False}
    decoder = {"701": "<|im_start|>", "700": "<|endoftext|>", "702": "<|im_end|>", "703": "<tool>", "704": "é"}
    decoder = {i: flags | {"content": content} for i, content in decoder.items()}
    for name, files in (("decoder", SMALL_FILES[:2]), ("decoder, vocab and merges", pieces)):
        write(copied(tiny_dir, root / name, *files), "tokenizer_config.json", added_tokens_decoder=decoder)
    for name, files in (("older", SMALL_FILES[:2]), ("older, vocab and merges", pieces)):
        folder = copied(tiny_dir, root / name, *files)
        write(folder, "tokenizer_config.json", added_tokens_decoder=None, additional_special_tokens=None)
        write(folder, "added_tokens.json", **{"<|im_start|>": 701, "<|endoftext|>": 700, "<|new|>": 702, "red": 703})
        end = {"content": "<|end|>", "lstrip": True, "normalized": False, "rstrip": False, "single_word": False}
        write(folder, "special_tokens_map.json", eos_token=end, additional_special_tokens=["<|im_start|>", "<|two|>"])
    fast = copied(tiny_dir, root / "no class", *SMALL_FILES[:2])
    write(fast, "tokenizer_config.json", tokenizer_class=None, added_tokens_decoder=decoder)
    write(copied(tiny_dir, root / "bare", "tokenizer.json"), "added_tokens.json", **{"<|new|>": 708})
    split = copied(tiny_dir, root / "split", *SMALL_FILES[:2])
    write(split, "tokenizer_config.json", split_special_tokens=True)
    space = copied(tiny_dir, root / "space, vocab and merges", *pieces)
    write(space, "tokenizer_config.json", add_prefix_space=True, clean_up_tokenization_spaces=True)
    cut = copied(tiny_dir, root / "cut", *SMALL_FILES[:2])
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    write(cut, "tokenizer.json", truncation=truncation)
    return found | {folder.name: folder for folder in root.iterdir() if "pieces" not in folder.name}


@pytest.fixture(scope="module")
def pairs(folders):
    """Our tokenizer and transformers' of each folder."""
    from transformers import AutoTokenizer

    markers = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    found = {}
    for name, folder in folders.items():
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        theirs.add_tokens([token for token in markers if token not in theirs.get_vocab()])
        found[name] = Tokenizer(folder), theirs
    return lambda: found  # hypothesis writes out what it is given


# Special tokens of one folder or another, and what is cut in a way of its own.
_WORDS = (
    *("<|im_start|>", "<|im_end|>", "<|vision_pad|>", "<|endoftext|>", "<|new|>", "<|two|>", "<|end|>", "<mask>"),
    *("<tool>", "é", "e\u0301", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "'s", " it's.", " , 12"),
    *("a red bench", "bench", "red"),
)
TEXTS = st.lists(st.sampled_from(_WORDS) | st.text(max_size=8), max_size=10).map("".join)


@example("a red bench . It is n't, is it ?<|im_end|> e\u0301 <tool>  x")
@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_ids_are_those_of_transformers(pairs, text):
    """A text is cut into other tokens than those that the model was trained on, or comes back otherwise."""
    for name, (ours, theirs) in pairs().items():
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.prompt(text) == (ours.im_start, *ids, ours.im_end), name
        assert ours.piece(ids) == theirs.decode(ids), name


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 720), max_size=20))
def test_texts_are_those_of_transformers(pairs, ids):
    """An answer loses its spaces, its special tokens or its last letter."""
    for name, (ours, theirs) in pairs().items():
        assert ours.piece(ids) == theirs.decode(ids), name


def test_markers_are_those_of_transformers(pairs):
    """A checkpoint without markers gets them at other places than the official code would put them."""
    for name, (ours, theirs) in pairs().items():
        ids = [ours.im_start, ours.im_end, ours.vision_start, ours.vision_end]
        markers = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
        assert ids == theirs.convert_tokens_to_ids(markers), name


def test_pieces_without_settings(tiny_dir, tmp_path):
    """vocab.json and merges.txt alone, which is all that the official code reads, cut texts into other tokens."""
    bare, whole = Tokenizer(copied(tiny_dir, tmp_path / "bare", "vocab.json", "merges.txt")), Tokenizer(tiny_dir)
    assert bare.prompt("Grüße, a red  bench!")[1:-1] == whole.prompt("Grüße, a red  bench!")[1:-1]
    assert (bare.im_start, bare.im_end, bare.vision_start, bare.vision_end) == (701, 702, 703, 704)


def test_workers_get_it(tokenizer):
    """Reading training data in processes of its own fails."""
    assert pickle.loads(pickle.dumps(tokenizer)).prompt("a red") == tokenizer.prompt("a red")


_LOADS = """
import sys
from pathlib import Path
from bagel_jax.inputs.tokenizer import Tokenizer
print(Tokenizer(Path(sys.argv[1])).prompt("a red"))
print("transformers" in sys.modules)
"""


@pytest.mark.parametrize("names", [SMALL_FILES, SMALL_FILES[1:]], ids=["tokenizer.json", "vocab.json"])
def test_regression_45_a_checkpoints_code_is_not_run(tiny_dir, tmp_path, names):
    """A stranger's checkpoint runs its code on this machine, or a library asks on standard output whether it may."""
    folder = copied(tiny_dir, tmp_path / "model", *names)
    left = tmp_path / "code_was_run"
    for module in ("configuration_bagel", "tokenization_bagel"):
        (folder / f"{module}.py").write_text(f"open({str(left)!r}, 'w').close()\nclass Theirs: pass\n")
    write(folder, "config.json", auto_map={"AutoConfig": "configuration_bagel.Theirs"})
    write(
        folder,
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_bagel.Theirs", None]},
        tokenizer_class="Theirs",
    )
    env = os.environ | {"HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", _LOADS, str(folder)]
    ran = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True, env=env, timeout=120)
    assert not left.exists()
    assert ran.stdout == "(701, 64, 381, 702)\nFalse\n", ran.stderr
    assert ran.stderr == ""
    assert not (tmp_path / "home").exists()


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


def test_merges_missing(tiny_dir, tmp_path):
    """Every text comes out in single letters, because half of the vocabulary is not there."""
    with pytest.raises(InputError, match=r"holds vocab\.json but no merges\.txt; a tokenizer needs both"):
        Tokenizer(copied(tiny_dir, tmp_path / "model", "vocab.json"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", '{"a": '),
        ("merges.txt", "nothing of the kind at all\n"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"content": 5}}}'),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("tokenizer_config.json", "\udcff"),
        ("added_tokens.json", "3"),
    ],
)
def test_other_damaged_files(tiny_dir, tmp_path, name, content):
    """Another file's damage ends in a stack trace, or passes unseen."""
    folder = copied(tiny_dir, tmp_path / "model", "vocab.json", "merges.txt")
    (folder / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(
        InputError, match=r"the tokenizer in .*model cannot be loaded \(.+\); fetch its files again"
    ) as e:
        Tokenizer(folder)
    assert "\n" not in str(e.value)
