"""What the contexts of a request hold, where everything lies, and what is shared."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bagel_jax.engine.handoff import Lease, Views
from bagel_jax.layout import (
    Contexts,
    ImageGrids,
    KVPrefix,
    PlacedSegment,
    Text,
    VaeImage,
    VitImage,
    contexts,
    place,
    plan,
)

A, B, SYSTEM, NEGATIVE = (
    Text((1, 10, 11, 2)),
    Text((1, 20, 21, 22, 2)),
    Text((1, 30, 2)),
    Text((1, 40, 41, 42, 43, 2)),
)
FIRST, SECOND = ImageGrids(0, (2, 3), (4, 5)), ImageGrids(1, (3, 3), (2, 2))
VAE0, VIT0 = VaeImage(0, 4, 5), VitImage(0, 2, 3)  # 22 and 8 tokens
VAE1, VIT1 = VaeImage(1, 2, 2), VitImage(1, 3, 3)  # 6 and 11 tokens


def planned(*inputs, **kwargs):
    return plan(contexts(inputs, **kwargs))


def test_regression_12_text_free_context_is_empty():
    """Guidance pushes away from an empty prompt in markers instead of from no prompt: other images."""
    assert contexts([A]) == Contexts(cond=(A,), drop_text=(), drop_image=(A,))
    made = planned(A)
    assert made.drop_text == KVPrefix(0, 0, 0)
    assert made.cond == made.drop_image == KVPrefix(0, 4, 4)
    assert [build.compute for build in made.sequences] == [(PlacedSegment(A, 0, 0),)]


def test_edit():
    """An edit's guidance contexts hold the wrong things, or the image is computed twice."""
    assert contexts([FIRST, A]) == Contexts(cond=(VAE0, VIT0, A), drop_text=(VAE0, VIT0), drop_image=(A,))
    made = planned(FIRST, A)
    assert made.sequences[0].compute == (PlacedSegment(VAE0, 0, 0), PlacedSegment(VIT0, 22, 1), PlacedSegment(A, 30, 2))
    assert (made.sequences[1].copy_from, made.sequences[1].shared) == (None, 0)
    assert made.sequences[1].compute == (PlacedSegment(A, 0, 0),)
    assert (made.cond, made.drop_text, made.drop_image) == (KVPrefix(0, 34, 6), KVPrefix(0, 30, 2), KVPrefix(1, 4, 4))
    assert len(made.sequences) == 2


def test_edit_of_two_images():
    """The second image is put where the first is, or is missing from the context without text."""
    assert contexts([FIRST, SECOND, A]).drop_text == (VAE0, VIT0, VAE1, VIT1)
    made = planned(FIRST, SECOND, A)
    starts = [(p.segment, p.kv_start, p.kv_end, p.rope) for p in made.sequences[0].compute]
    assert starts == [(VAE0, 0, 22, 0), (VIT0, 22, 30, 1), (VAE1, 30, 36, 2), (VIT1, 36, 47, 3), (A, 47, 51, 4)]
    assert (made.cond, made.drop_text, made.drop_image) == (KVPrefix(0, 51, 8), KVPrefix(0, 47, 4), KVPrefix(1, 4, 4))


def test_regression_23_order_of_the_prompt_is_kept():
    """ "First text, image, second text" is read with the image first."""
    wanted = contexts([A, FIRST, B])
    assert wanted == Contexts(cond=(A, VAE0, VIT0, B), drop_text=(A, VAE0, VIT0), drop_image=(A, B))
    made = planned(A, FIRST, B)
    assert (made.sequences[1].copy_from, made.sequences[1].shared) == (0, 4)
    assert made.sequences[1].compute == (PlacedSegment(B, 4, 4),)
    assert (made.cond, made.drop_text, made.drop_image) == (KVPrefix(0, 39, 11), KVPrefix(0, 34, 6), KVPrefix(1, 9, 9))


def test_image_last():
    """A prompt that ends in an image: the official context without the last text is then the full one."""
    assert contexts([A, FIRST]) == Contexts(cond=(A, VAE0, VIT0), drop_text=(A, VAE0, VIT0), drop_image=(A,))
    made = planned(A, FIRST)
    assert len(made.sequences) == 1
    assert (made.cond, made.drop_text, made.drop_image) == (KVPrefix(0, 34, 6), KVPrefix(0, 34, 6), KVPrefix(0, 4, 4))


def test_several_texts_in_a_row():
    """All prompts are dropped from the guidance context, where only the last one must be."""
    made = planned(A, B)
    assert (made.cond, made.drop_text, made.drop_image) == (KVPrefix(0, 9, 9), KVPrefix(0, 4, 4), KVPrefix(0, 9, 9))
    assert len(made.sequences) == 1


def test_understanding_has_no_latent_block():
    """A question about an image pays for the autoencoder, and the model sees tokens it was not trained to see."""
    made = planned(ImageGrids(0, (2, 3), None), A)
    assert made.sequences[0].compute == (PlacedSegment(VIT0, 0, 0), PlacedSegment(A, 8, 1))
    assert made.cond == KVPrefix(0, 12, 5)


def test_regression_33_system_prompt_comes_first():
    """Think mode without thinking: the system prompt is missing, or missing from a guidance context."""
    assert contexts([A], system=SYSTEM) == Contexts(cond=(SYSTEM, A), drop_text=(SYSTEM,), drop_image=(SYSTEM, A))
    made = planned(A, system=SYSTEM)
    assert (made.cond, made.drop_text, made.drop_image) == (KVPrefix(0, 7, 7), KVPrefix(0, 3, 3), KVPrefix(0, 7, 7))
    assert contexts([FIRST, A], system=SYSTEM) == Contexts(
        cond=(SYSTEM, VAE0, VIT0, A), drop_text=(SYSTEM, VAE0, VIT0), drop_image=(SYSTEM, A)
    )
    edit = planned(FIRST, A, system=SYSTEM)
    assert (edit.sequences[1].copy_from, edit.sequences[1].shared, edit.sequences[1].compute) == (
        0,
        3,
        (PlacedSegment(A, 3, 3),),
    )


def test_negative_prompt():
    """A negative prompt has no effect, or it takes the place of more than the last text."""
    made = planned(A, negative=NEGATIVE)
    assert made.sequences[1].compute == (PlacedSegment(NEGATIVE, 0, 0),)
    assert (made.cond, made.drop_text, made.drop_image) == (KVPrefix(0, 4, 4), KVPrefix(1, 6, 6), KVPrefix(0, 4, 4))
    assert contexts([FIRST, A], negative=NEGATIVE).drop_text == (VAE0, VIT0, NEGATIVE)
    edit = planned(FIRST, A, negative=NEGATIVE)
    assert (edit.sequences[1].copy_from, edit.sequences[1].shared) == (0, 30)
    assert edit.sequences[1].compute == (PlacedSegment(NEGATIVE, 30, 2),)
    assert (edit.cond, edit.drop_text, edit.drop_image) == (KVPrefix(0, 34, 6), KVPrefix(1, 36, 8), KVPrefix(2, 4, 4))


def test_negative_prompt_equal_to_the_prompt():
    """The prompt itself as the negative prompt costs a cache of its own."""
    made = planned(A, negative=A)
    assert len(made.sequences) == 1
    assert made.cond == made.drop_text


def test_regression_21_a_block_has_one_position():
    """Everything behind an image lies at positions that the model has never seen so far out."""
    big = ImageGrids(0, (70, 70), (64, 64))
    assert [p.rope for p in place(contexts([big, A, B]).cond)] == [0, 1, 2, 6]
    assert VitImage(0, 70, 70).num_tokens == 4902
    assert VaeImage(0, 64, 64).num_tokens == 4098


def branches(*prefixes: KVPrefix):
    """The views of three branches, and which the second and the third have."""
    views, found = Views.of("a request", (16, 16), prefixes)
    assert views.length.tolist() == [one.length for one in found]
    assert views.rope.tolist() == [one.rope for one in found]
    return found, views.drop_text, views.drop_image


def test_vit_and_latent_blocks_are_not_mixed_up():
    """Two kinds of block of one image with equal grids pass for the same: one gets the other's cache."""
    assert VitImage(0, 2, 2) != VaeImage(0, 2, 2)
    assert VitImage(0, 2, 2) != VitImage(1, 2, 2)


def test_equal_contexts_are_one_view():
    """Guidance of text2img costs three evaluations instead of two."""
    made = planned(A)
    assert branches(made.cond, made.drop_text, made.drop_image) == ([KVPrefix(0, 4, 4), KVPrefix(0, 0, 0)], 1, 0)


def test_contexts_handed_over_are_the_right_ones():
    """Views are paired with another branch's cache, length or position."""
    made = planned(FIRST, A, negative=NEGATIVE)
    wanted = [KVPrefix(0, 34, 6), KVPrefix(1, 36, 8), KVPrefix(2, 4, 4)], 1, 2
    assert branches(made.cond, made.drop_text, made.drop_image) == wanted
    last = planned(A, FIRST)
    assert branches(last.cond, last.drop_text, last.drop_image) == ([KVPrefix(0, 34, 6), KVPrefix(0, 4, 4)], 0, 1)


@given(st.lists(st.lists(st.integers(1, 20), unique=True, max_size=5), min_size=1, max_size=3))
def test_pages_of_views(views):
    """A page that two views share is handed over twice, or a view's pages are another's or in another order."""
    store = SimpleNamespace(take=lambda numbers: np.asarray(numbers).reshape(1, -1, 1, 1, 1, 1))
    length = np.asarray([len(pages) for pages in views], np.int32)
    context = Lease(store, Views("a request", (16, 16), 0, 0, length, length), views).export()
    own = context.pages.reshape(-1)
    assert sorted(own.tolist()) == sorted({page for pages in views for page in pages})
    for row, pages in zip(context.page_table, views, strict=True):
        assert [int(own[i]) for i in row[: len(pages)]] == pages
        assert not row[len(pages) :].any()


texts = st.builds(Text, st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple))
grid = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def prompts(draw):
    """Inputs in any order, with or without system and negative prompts; few words, so that prefixes coincide."""
    with_latents = draw(st.booleans())
    inputs = []
    for i, item in enumerate(draw(st.lists(texts | st.none(), max_size=6))):
        inputs.append(item or ImageGrids(i, draw(grid), draw(grid) if with_latents else None))
    return inputs, {"system": draw(st.none() | texts), "negative": draw(st.none() | texts)}


def contents(made) -> list[list[PlacedSegment]]:
    """What each cache holds after all builds."""
    caches = []
    for build in made.sequences:
        held = []
        if build.copy_from is not None:
            held = [p for p in caches[build.copy_from] if p.kv_end <= build.shared]
            assert held[-1].kv_end == build.shared
        else:
            assert build.shared == 0
        caches.append(held + list(build.compute))
    return caches


@settings(deadline=None, max_examples=200)
@given(prompts())
def test_every_view_sees_its_context(prompt):
    """A guidance branch sees tokens of another context, or at other positions."""
    inputs, extra = prompt
    wanted = contexts(inputs, **extra)
    made = plan(wanted)
    caches = contents(made)
    for placed in caches:
        start = rope = 0
        for p in placed:
            assert (p.kv_start, p.rope) == (start, rope)
            start += len(p.segment.ids) if isinstance(p.segment, Text) else p.segment.rows * p.segment.columns + 2
            rope += len(p.segment.ids) if isinstance(p.segment, Text) else 1
            assert p.kv_end == start
    for view, context in (
        (made.cond, wanted.cond),
        (made.drop_text, wanted.drop_text),
        (made.drop_image, wanted.drop_image),
    ):
        seen = [p for p in caches[view.sequence] if p.kv_end <= view.length]
        assert tuple(p.segment for p in seen) == context
        assert view.length == sum(s.num_tokens for s in context)
        assert view.rope == sum(s.rope_advance for s in context)
    assert made.cond.sequence == 0


@settings(deadline=None, max_examples=200)
@given(prompts())
def test_nothing_is_computed_twice(prompt):
    """An edit pays for its images once a guidance branch."""
    inputs, extra = prompt
    wanted = contexts(inputs, **extra)
    made = plan(wanted)
    prefixes = {c[: i + 1] for c in (wanted.cond, wanted.drop_text, wanted.drop_image) for i in range(len(c))}
    computed = sum(p.segment.num_tokens for build in made.sequences for p in build.compute)
    assert computed == sum(prefix[-1].num_tokens for prefix in prefixes)


@settings(deadline=None, max_examples=100)
@given(prompts())
def test_contexts_follow_the_official_loop(prompt):
    """The contexts of a prompt with several images and texts are not the official ones."""
    inputs, extra = prompt
    main = [extra["system"]] if extra["system"] else []
    img, text = list(main), []
    for item in inputs:  # as in `interleave_inference`
        if isinstance(item, Text):
            text = list(main)
            main.append(item)
            img.append(item)
        else:
            if item.vae:
                main.append(VaeImage(item.image, *item.vae))
            main.append(VitImage(item.image, *item.vit))
            text = list(main)
    text += [extra["negative"]] if extra["negative"] else []
    assert contexts(inputs, **extra) == Contexts(tuple(main), tuple(text), tuple(img))
