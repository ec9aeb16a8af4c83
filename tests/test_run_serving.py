"""Options of serving that cannot be: one sentence, exit code 2."""

from __future__ import annotations

import re

import pytest
from commands import Cli, assert_refused

from bagel_jax.placement.placement import Placement


@pytest.fixture
def cli(tiny_dir, tmp_path, capsys) -> Cli:
    return Cli(tiny_dir, tmp_path, capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--page-size", 48), "--page-size"),
        (("--num-pages", 1), "num_pages is 1; it must be a whole number, at least 2"),
        (("--ar-max-num-seqs", 0), "ar_max_num_seqs is 0"),
        (("--ar-max-num-seqs", 64, "--max-num-batched-tokens", 32), "max_num_batched_tokens is 32"),
        (("--max-num-seqs", 0), "ar_max_num_seqs is 0"),  # its name before stage 1 had one of its own
        (("--dit-max-num-seqs", 0), "dit_max_num_seqs is 0"),
        (("--topology", "three-stage"), "--topology"),
        (("--ar-device", -1), "ar_device is -1"),
        (("--dit-device", 7), "dit_device is 7; it must be a device's number, from 0 to 0"),
        (("--attention", "flash"), "--attention"),
        (("--precompile", "large"), "precompile is 'large'; it must be all, or sizes in pixels as 1024x768,512x512"),
        (("--precompile", "64x64,100x64"), "precompile is '64x64,100x64', where width is 100; it must be a multiple"),
        (("--precompile", "64x4096"), "where height is 4096; it must be a multiple of 16 and at most 1024"),
        (("--top-p", 0), "top_p is 0"),
        (("--top-k", -1), "top_k is -1"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_bad_options_of_serving(cli, options, message):
    """A typing error would be found by an exception in the middle of a run."""
    assert_refused(cli("text2text", "--prompts", "a", *options), message)


@pytest.mark.usefixtures("no_weights")
def test_bad_attention_in_the_environment(cli, monkeypatch):
    """The command line would end in a traceback, even for --help."""
    monkeypatch.setenv("BAGEL_JAX_ATTENTION", "flash")
    assert_refused(cli("text2text", "--prompts", "a"), "BAGEL_JAX_ATTENTION is 'flash'", "reference, xla, pallas")
    assert cli("text2text", "--help").code == 0


def test_a_pool_larger_than_memory(cli):
    """The process would be killed, without a word."""
    ran = cli("text2text", "--quiet", "--prompts", "a", "--num-pages", 10**9)
    assert ran.code == 2
    assert re.fullmatch(r"error: num_pages is 1000000000, of \d+ bytes each; the device has room for \d+ .*\n", ran.err)


def test_request_that_the_pool_has_no_room_for(cli):
    """A request that can never fit would stop those that do, or count as a failure of ours."""
    long = "word " * 300
    ran = cli("text2text", "--quiet", "--num-pages", 4, "--max-tokens", 9, "--prompts", "a", long, "b")
    assert ran.code == 2
    assert re.fullmatch(r"error: request 1 failed: the request may need \d+ pages of 64 tokens and .*\n", ran.err)
    assert ["error" in record for record in ran.records] == [False, True, False]


def test_an_image_larger_than_memory(cli, monkeypatch):
    """Stage 1 would take memory until the process is killed, or wait for ever for pages that there are not."""
    budget = iter([10**9, 10**5])  # of stage 0, then of stage 1
    monkeypatch.setattr(Placement, "free_bytes", lambda self, share: next(budget))
    ran = cli("text2img", "--quiet", "--prompts", "a")
    assert ran.code == 2
    said = r"the request needs \d+ pages of 64 tokens in stage 1, \d+ of them for its image, and there are \d+; .*"
    assert re.fullmatch(f"error: (request 0 failed: )?{said}\n", ran.err)
