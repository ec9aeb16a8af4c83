"""From records to rows: what is read, left out, mixed and packed, and going on in the middle."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path

import grain
import numpy as np
import pytest
from small import TOKENIZER, lying, random_image
from training import TINY, draw_images, write_data, write_records

from bagel_jax.errors import InputError
from bagel_jax.inputs.tokenizer import Tokenizer
from bagel_jax.train.config import DataTable, ObjectiveTable, SourceTable
from bagel_jax.train.data import Cropper, Records, Sampler, mixture, packed_rows, prefetched, read_image


class Latents:
    """Stands in for `LatentStore`: the moments of an image are told by its name."""

    def read(self, path):
        mean = np.full((8, 8, TINY.autoencoder.latent_channels), float(Path(path).name[0]), np.float32)
        return mean, np.full_like(mean, 1e-3)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER)


def sampler(**objective) -> Sampler:
    never = {"text_dropout": 0.0, "vit_dropout": 0.0, "vae_dropout": 0.0}
    return Sampler(TINY, tokenizer(), ObjectiveTable(**never | objective), Latents())


def drawn(sampler, record, count=200):
    """Many samples of one record."""
    return [sampler(record, np.random.default_rng(i)) for i in range(count)]


def texts(sample) -> list[str]:
    """The texts in a sample, without markers of images."""
    ids = [i for i in sample["text"][:, 0].tolist() if i not in (tokenizer().vision_start, tokenizer().vision_end)]
    joined = tokenizer().piece(ids)
    return [part.removeprefix("<|im_start|>") for part in joined.split("<|im_end|>") if part]


@pytest.fixture
def names(tmp_path):
    """Paths of four images."""
    return [str(tmp_path / name) for name in draw_images(tmp_path)]


BAD = {
    "no json": "{",
    "no object": "3",
    "no segments": '{"text": "a"}',
    "a segment without text or image": '{"segments": [{"target": true}]}',
    "a text that is none": '{"segments": [{"text": 3}]}',
    "an image without a role": '{"segments": [{"image": "a.png"}]}',
    "an image with another role": '{"segments": [{"image": "a.png", "as": "gan"}]}',
    "segments that are no objects": '{"segments": ["a"]}',
    "segments that are no list": '{"segments": {}}',
    "no segment": '{"segments": []}',
    "a target that is not true or false": '{"segments": [{"text": "a", "target": "yes"}]}',
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD.keys())
def test_a_bad_record_is_named(tmp_path, line):
    """A run fails after hours, in a worker, at a line that nobody can find among a million."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"segments": [{"text": "fine"}]}\n' * 2 + line + "\n")
    with pytest.raises(InputError, match=r"record 3 of .*a\.jsonl"):
        Records(path)


def test_files_without_records_are_named(tmp_path):
    """A file that is not there, or is empty, ends in a traceback."""
    with pytest.raises(InputError, match=r"nothing\.jsonl cannot be read"):
        Records(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"empty\.jsonl holds no record"):
        Records(tmp_path / "empty.jsonl")


def test_records(tmp_path):
    """Images are looked for elsewhere than beside the file; those that must be encoded are not known."""
    segments = [
        {"image": "v.png", "as": "vit"},
        {"image": "e.png", "as": "both"},
        {"image": "c.png", "as": "vae"},
        {"text": "ünd"},
        {"image": "t.png", "target": True},
    ]
    path = write_records(tmp_path / "a.jsonl", [segments, [{"image": "e.png", "as": "vit"}]])
    records = Records(tmp_path / "a.jsonl")
    assert len(records) == 2
    assert records[0][0] == {"image": str(tmp_path / "v.png"), "as": "vit"}
    assert records[0][3] == {"text": "ünd"}
    roles = {"v": "vit", "e": "vae", "c": "vae", "t": "vae"}
    assert records.images() == {str(tmp_path / f"{name}.png"): role for name, role in roles.items()}
    assert path in repr(records)


def test_roles_of_images(names):
    """An image goes into the wrong encoder, or in another order than the engine puts it."""
    segments = [
        {"image": names[0], "as": "both"},
        {"image": names[1], "as": "vit"},
        {"image": names[2], "as": "vae"},
        {"image": names[3], "target": True},
    ]
    sample = sampler()(segments, np.random.default_rng(0))
    # order in the sample: VAE of 0 (18 places), ViT of 0 (6), ViT of 1 (6), VAE of 2 (18), noised 3 (18)
    assert sorted({tuple(row) for row in sample["vit"][:, [4, 5]].tolist()}) == [(2, 0), (3, 0)]
    assert [tuple(row) for row in sample["latent"][::16, [4, 5]].tolist()] == [(1, 0), (4, 0), (5, 5)]
    assert sample["latent"][::16, 2].tolist() == [1, 31, 49]
    assert sample["vit"][::4, 2].tolist() == [19, 25]
    clean = sample["latents"][::16].mean(axis=1)
    c = TINY.autoencoder
    np.testing.assert_allclose(clean, c.scale_factor * (np.array([0, 2, 3]) - c.shift_factor), atol=1e-3)
    assert (sample["timestep"][:32] == 0).all()
    assert len(set(sample["timestep"][32:].tolist())) == 1
    assert 0 < sample["timestep"][32] < 1
    assert not sample["noise"][:32].any()
    assert sample["noise"][32:].std() == pytest.approx(1, rel=0.2)
    assert sample["text"][:, 0].tolist() == [tokenizer().vision_start, tokenizer().vision_end] * 5


def test_latent_tokens_are_the_models():
    """Latents are cut into tokens in another order than the model puts them together."""

    class Counting:
        def read(self, path):
            mean = np.arange(8 * 6 * 4, dtype=np.float32).reshape(8, 6, 4)
            return mean, np.zeros_like(mean)

    sample = Sampler(TINY, tokenizer(), ObjectiveTable(), Counting())(
        [{"image": "x", "as": "vae"}], np.random.default_rng(0)
    )
    c = TINY.autoencoder
    z = c.scale_factor * (np.arange(8 * 6 * 4).reshape(8, 6, 4) - c.shift_factor)
    expected = [z[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(-1) for i in range(4) for j in range(3)]
    np.testing.assert_allclose(sample["latents"], expected, rtol=1e-5)
    assert sample["latent"][:, 0].tolist() == [4 * i + j for i in range(4) for j in range(3)]


@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_timesteps(names, shift):
    """Training sees other noise than the official logit-normal with its shift."""
    record = [{"image": names[0], "target": True}]
    found = np.array([s["timestep"][0] for s in drawn(sampler(timestep_shift=shift), record, 2000)])
    original = found / (shift - (shift - 1) * found)
    logits = np.log(original / (1 - original))
    assert abs(logits.mean()) < 0.1
    assert logits.std() == pytest.approx(1, abs=0.06)


def edit(names):
    """An edit of an image with a plan, and something that is always said."""
    return [
        {"text": "always", "drop": False},
        {"image": names[0], "as": "both"},
        {"text": "ask"},
        {"text": "plan", "target": True},
        {"image": names[1], "target": True},
    ]


def test_dropout_is_of_conditions(names):
    """Guidance compares contexts that the model has never seen, or an image is learned out of nothing."""
    samples = drawn(sampler(text_dropout=0.3, vit_dropout=0.5, vae_dropout=0.2), edit(names), 600)
    seen = Counter()
    for sample in samples:
        said = texts(sample)
        assert said in (["always", "ask", "plan"], ["always"])  # the plan goes with what was asked
        seen["text"] += said == ["always"]
        noised = sample["latent"][:, 5] > 0
        assert noised.sum() == 16  # what is to be produced stays
        seen["vae"] += bool(noised.all())
        seen["vit"] += len(sample["vit"]) == 0
        seen["all"] += said == ["always"] and bool(noised.all()) and len(sample["vit"]) == 0
    assert seen["text"] / 600 == pytest.approx(0.3, abs=0.06)
    assert seen["vit"] / 600 == pytest.approx(0.5, abs=0.06)
    assert seen["vae"] / 600 == pytest.approx(0.2, abs=0.06)
    assert seen["all"] / 600 == pytest.approx(0.03, abs=0.025)  # each on its own


def test_a_image_left_out_keeps_its_position(names):
    """Without its image, an edit stands elsewhere than the engine's guidance branches put it."""

    def rope_of_target(**objective):
        sample = sampler(**objective)(edit(names), np.random.default_rng(0))
        return int(sample["latent"][-1, 1])

    assert rope_of_target() == rope_of_target(vit_dropout=1.0) == rope_of_target(vit_dropout=1.0, vae_dropout=1.0)


def test_a_record_without_a_produced_image_is_whole(names):
    """Questions lose their images, or answers their questions."""
    record = [{"image": names[0], "as": "vit"}, {"text": "ask"}, {"text": "answer", "target": True}]
    always = sampler(text_dropout=1.0, vit_dropout=1.0, vae_dropout=1.0)
    for sample in drawn(always, record, 20):
        assert texts(sample) == ["ask", "answer"]
        assert len(sample["vit"]) == 4
    assert texts(drawn(always, edit(names), 1)[0]) == ["always"]


def test_answers_are_learned_and_questions_not(names):
    """A run teaches the model to ask."""
    record = [{"text": "ask"}, {"text": "answer", "target": True}]
    sample = sampler()(record, np.random.default_rng(0))
    ask, answer = tokenizer().prompt("ask"), tokenizer().prompt("answer")
    assert sample["text"][:, 1].tolist() == [-1] * len(ask) + [*answer[1:], -1]


def same(a, b) -> bool:
    """Whether two samples or batches are the same to the bit."""
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


def rows_of(folder, seed=0, *, workers=0, weights=(1.0, 1.0), rows=2, shard=(0, 1)):
    """Packed rows of `write_data`'s two files."""
    files = write_data(folder)
    data = DataTable(
        sources=tuple(SourceTable(path=file) for file in files),
        rows=rows,
        text_tokens=40,
        vit_tokens=12,
        latent_tokens=48,
        workers=workers,
    )
    sources = [Records(folder / "edits.jsonl"), Records(folder / "texts.jsonl")]
    records = mixture(sources, list(weights), seed, shard)
    return packed_rows(records, sampler(text_dropout=0.3), data, rows, seed)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_a_seed_draws_the_same_and_another_another(tmp_path):
    """A run cannot be repeated, or a second seed repeats the first."""
    runs = [take(iter(rows_of(tmp_path, seed)), 4) for seed in (0, 0, 1)]
    assert all(same(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    noise = [{x for batch in run for x in batch["noise"][batch["timestep"] > 0][:, 0].tolist()} for run in runs]
    assert noise[0]
    assert not noise[0] & noise[2]


def test_noise_is_drawn_anew_each_round(tmp_path):
    """The model sees the same noise, timestep and dropouts on an image each time, and learns them by heart."""
    batches = take(iter(rows_of(tmp_path, weights=(1.0, 1e-6))), 12)
    noise = np.concatenate([batch["noise"][batch["timestep"] > 0][:, 0] for batch in batches])
    assert len(noise) > 16 * 8  # more images than there are
    assert len(set(noise.tolist())) == len(noise)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_batches_go_on_in_the_middle(tmp_path, stop):
    """A resumed run repeats samples or leaves some out."""
    straight = take(iter(rows_of(tmp_path)), 6)
    first = iter(rows_of(tmp_path))
    take(first, stop)
    state = json.loads(json.dumps(first.get_state()))  # as a checkpoint keeps it
    second = iter(rows_of(tmp_path))
    next(second)  # wherever it stood
    second.set_state(state)
    assert all(same(a, b) for a, b in zip(take(second, 6 - stop), straight[stop:], strict=True))


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0)])
def test_sources_are_mixed_by_weight(tmp_path, weights):
    """The larger file drowns the smaller one whatever the weights say."""
    sizes = (10, 40)
    sources = []
    for i, size in enumerate(sizes):
        write_records(tmp_path / f"{i}.jsonl", [[{"text": f"{i} {j}"}] for j in range(size)])
        sources.append(Records(tmp_path / f"{i}.jsonl"))
    records = mixture(sources, list(weights), 0, (0, 1))
    found = Counter(records[i][0]["text"][0] for i in range(400))
    assert found["0"] / 400 == pytest.approx(weights[0] / sum(weights), abs=0.02)
    later = Counter(records[i][0]["text"] for i in range(400))
    assert set(later) == {f"{i} {j}" for i, size in enumerate(sizes) for j in range(size)}


def test_each_round_has_another_order(tmp_path):
    """Batches repeat each round."""
    write_records(tmp_path / "a.jsonl", [[{"text": f"{j}"}] for j in range(20)])
    records = mixture([Records(tmp_path / "a.jsonl")], [1.0], 0, (0, 1))
    rounds = [[records[20 * r + i][0]["text"] for i in range(20)] for r in range(3)]
    assert all(sorted(r) == sorted(rounds[0]) for r in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_processes_share_the_records(tmp_path):
    """Two processes of one run learn from the same records."""
    write_records(tmp_path / "a.jsonl", [[{"text": f"{j}"}] for j in range(20)])
    source = Records(tmp_path / "a.jsonl")
    mine, theirs = ([mixture([source], [1.0], 0, (k, 2))[i][0]["text"] for i in range(10)] for k in range(2))
    assert sorted(mine + theirs, key=int) == [str(j) for j in range(20)]


@pytest.mark.slow
def test_workers(tmp_path):
    """With worker processes there are no batches, the same samples from each, or a resumed run starts anew."""
    straight = take(iter(rows_of(tmp_path, workers=2)), 5)
    first = iter(rows_of(tmp_path, workers=2))
    take(first, 2)
    second = iter(rows_of(tmp_path, workers=2))
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert all(same(a, b) for a, b in zip(take(second, 3), straight[2:], strict=True))
    noise = [float(x) for batch in straight for x in batch["noise"][batch["timestep"] > 0][:, 0]]
    assert len(noise) > 0
    assert len(set(noise)) == len(noise)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_image_that_is_gone_is_named(tmp_path, workers):
    """An image that goes missing ends in a traceback of the reader's, without its name."""
    batches = iter(rows_of(tmp_path, workers=workers, weights=(1e-6, 1.0)))
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(InputError, match=r"image .*\.png does not exist") as raised:
        take(batches, 5)
    assert "\n" not in str(raised.value)


def test_photos_are_learned_upright(tmp_path):
    """The model learns from a phone's photos that people stand on walls."""
    image = random_image(width=16, height=8)
    image.save(tmp_path / "upright.png")
    expected = read_image(str(tmp_path / "upright.png"), TINY)
    for path in lying(tmp_path, image):
        got = read_image(str(path), TINY)
        assert np.array_equal(got.vae_pixels, expected.vae_pixels), path
        assert np.array_equal(got.vit_patches, expected.vit_patches), path


def test_crops(tmp_path):
    """The autoencoder learns one corner of each image, or a crop that is larger than its image."""
    [name] = draw_images(tmp_path, 1)
    path = str(tmp_path / name)
    whole = Cropper(TINY, 16)(path, np.random.default_rng(0))
    assert whole.shape == (16, 16, 3)
    assert -1 <= whole.min() < whole.max() <= 1
    places = Counter()
    for seed in range(60):
        crop = Cropper(TINY, 14)(path, np.random.default_rng(seed))
        [place] = [(i, j) for i in range(3) for j in range(3) if np.array_equal(whole[i : i + 14, j : j + 14], crop)]
        places[place] += 1
    assert len(places) == 9
    with pytest.raises(InputError, match=r"16x16 pixels .* data.crop is 17"):
        Cropper(TINY, 17)(path, np.random.default_rng(0))


def test_crops_go_on_in_the_middle(tmp_path):
    """A resumed run of the autoencoder starts its images anew."""
    paths = [str(tmp_path / name) for name in draw_images(tmp_path)]

    def batches():
        crops = grain.MapDataset.source(paths).seed(0).shuffle().repeat().random_map(Cropper(TINY, 8))
        table = DataTable(sources=(SourceTable(path="x"),))
        return iter(prefetched(crops.to_iter_dataset().batch(3, drop_remainder=True), table))

    straight = take(batches(), 5)
    first, second = batches(), batches()
    take(first, 2)
    second.set_state(first.get_state())
    assert all(np.array_equal(a, b) for a, b in zip(take(second, 3), straight[2:], strict=True))
