"""Stage 0: contexts from plans, and text from contexts."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
from dense import view_of
from serving import (
    cache_of,
    cancel,
    context_of,
    finish,
    logits_of,
    poison,
    prefilled,
    serve,
    step,
    submit,
    tokens_a_call,
    turn,
    with_segments,
)
from small import CONFIG, model, new_stage, random_image

from bagel_jax.engine.context import stage as stage_module
from bagel_jax.engine.context import steps
from bagel_jax.engine.context.batch import prefill_batch
from bagel_jax.engine.ticket import Done
from bagel_jax.errors import InputError
from bagel_jax.layout import Text, VaeImage, VitImage
from bagel_jax.request import Request

IDS = (701, 64, 381, 541, 411, 256, 336, 647, 702)
VIT, VAE = VitImage(0, 4, 4), VaeImage(0, 8, 8)


@pytest.fixture(scope="module")
def edit():
    """A prepared edit."""
    return model().prepare(Request.create("img2img", "a red bench", random_image(), request_id="edit"))


@pytest.fixture(scope="module")
def stage():
    """A stage that keeps nothing."""
    return new_stage(prefix_cache=False)


def question(prompt="a red bench", **settings):
    """A prepared question."""
    request_id = str(settings.pop("request_id", "question"))
    return model().prepare(Request.create("text2text", prompt, request_id=request_id, **settings))


def answer(stage, **settings):
    """The tokens decoded."""
    (finished,) = serve(stage, question(**settings)).values()
    return finished.ids


def close(a, b, length=None, start=0):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x[:, start:length], y[:, start:length], rtol=1e-4, atol=1e-5)


@contextmanager
def at_most(in_flight: int):
    """So many calls may be in flight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "IN_FLIGHT", in_flight)
        yield


@pytest.mark.parametrize("block", [VIT, VAE], ids=["vit", "vae"])
def test_regression_22_blocks_are_wrapped_in_markers(stage, edit, block):
    """The markers around an image are missing, swapped, or computed by the wrong expert."""
    cache = context_of(stage, edit, [Text(IDS[:3]), block])
    tokenizer = model().tokenizer
    for marker, at in ((tokenizer.vision_start, 3), (tokenizer.vision_end, 3 + block.num_tokens - 1)):
        alone = context_of(stage, edit, [Text((*IDS[:3], marker))])
        # Keys and values of the first layer come from the token's own embedding alone.
        for ours, theirs in zip(cache, alone, strict=True):
            np.testing.assert_allclose(ours[0, at], theirs[0, 3], rtol=1e-5, atol=1e-6)
    assert not np.allclose(cache.k[0, 3], cache.k[0, 3 + block.num_tokens - 1], atol=1e-3)


def test_regression_21_a_vit_block_has_one_position(stage, edit, monkeypatch):
    """Patches of an image lie at increasing RoPE positions."""
    alike = np.broadcast_to(edit.images[0].vit_patches[:1], (16, 588))
    made = dataclasses.replace(edit, images=(dataclasses.replace(edit.images[0], vit_patches=alike),))
    monkeypatch.setattr(stage_module, "vit_positions", lambda *_: np.zeros(16, np.int32))
    caches = [context_of(stage, made, [Text(IDS[:n]), VIT]) for n in (7, 8)]
    for x in caches[0]:  # alike in content and position: alike in every layer, whatever their place in the block
        np.testing.assert_allclose(x[:, 8:24], np.broadcast_to(x[:, 8:9], x[:, 8:24].shape), rtol=1e-4, atol=1e-5)
    assert np.abs(caches[0].k[0, 7:] - caches[1].k[0, 8:]).max() > 1e-2


def test_regression_21_a_latent_block_has_one_position(stage, edit):
    """Latent tokens of an input image lie at increasing RoPE positions."""
    first = context_of(stage, edit, [Text(IDS[:7]), VAE])
    moved = context_of(stage, edit, [Text(IDS[:8]), VAE])
    # One position more turns all keys of the first layer by one step, and leaves the values.
    np.testing.assert_allclose(first.v[0, 7:], moved.v[0, 8:], rtol=1e-5, atol=1e-6)
    half = CONFIG.trunk.head_dim // 2
    angle = 1.0 / CONFIG.trunk.rope_theta ** (np.arange(half) / half)
    keys = np.asarray(first.k[0, 7:])
    left, right = keys[..., :half], keys[..., half:]
    np.testing.assert_allclose(moved.k[0, 8:, :, :half], left * np.cos(angle) - right * np.sin(angle), atol=1e-4)


def test_text_is_causal_and_images_are_not(stage, edit):
    """Text sees its own future, or the patches of an image see only those before them."""
    changed = context_of(stage, edit, [Text((*IDS[:-1], 5))])
    whole = context_of(stage, edit, [Text(IDS)])
    close(changed, whole, len(IDS) - 1)
    assert np.abs(changed.k[1, len(IDS) - 1] - whole.k[1, len(IDS) - 1]).max() > 1e-3
    patches = edit.images[0].vit_patches
    caches = []
    for last in (patches[-1:], -patches[-1:]):
        other = dataclasses.replace(edit.images[0], vit_patches=np.concatenate([patches[:-1], last]))
        caches.append(context_of(stage, dataclasses.replace(edit, images=(other,)), [VIT]))
    assert np.abs(caches[0].k[1, 0] - caches[1].k[1, 0]).max() > 1e-4


def test_regression_29_padded_prompt_tokens_are_not_attended():
    """An answer depends on how far its prompt was padded, and with what."""
    stage = new_stage()
    submit(stage, question())
    plan = stage.scheduler.plan(steps.MAX_CALL, 0.0)
    (text,) = plan.texts
    count, arrays, store = text.count, stage.weights.arrays, stage.store
    chunk = prefill_batch(plan, None, store.page_size, stage.table_width)
    assert len(chunk.ids) > count
    caches = []
    for more, rubbish in ((0, 0), (0, 9), (16, 5)):

        def padded(x, value, more=more):
            return np.concatenate([x[:count], np.full(len(x) - count + more, value, np.int32)])

        wider = chunk._replace(
            ids=padded(chunk.ids, rubbish),
            rope=padded(chunk.rope, rubbish),
            page=padded(chunk.page, 0),
            slot=padded(chunk.slot, rubbish),
            kv_end=padded(chunk.kv_end, 0),
            offsets=np.where(chunk.offsets == len(chunk.ids), len(chunk.ids) + more, chunk.offsets),
        )
        _, store.pages = steps.prefill(stage.program, arrays, store.pages, wider)
        caches.append(cache_of(stage, text.job, count))
    for other in caches[1:]:
        close(caches[0], other, count)


def test_regression_29_padded_patches_are_not_attended(stage, edit, monkeypatch):
    """An image is understood otherwise when it is padded further."""
    usual = context_of(stage, edit, [VIT])
    monkeypatch.setattr(stage_module, "bucket", lambda length, least=16: 2 * max(length, least))
    close(context_of(stage, edit, [VIT]), usual)
    close(context_of(stage, edit, [VAE]), context_of(new_stage(), edit, [VAE]))


def test_regression_29_nothing_behind_the_context_is_seen(edit):
    """What is left in pages (padding, a discarded thought, another request) changes what comes next."""
    for segments in ([Text(IDS)], [Text(IDS), VIT], [Text(IDS), VAE, Text(IDS[:4])]):
        clean, dirty = new_stage(), new_stage()
        poison(dirty)
        close(context_of(clean, edit, segments), context_of(dirty, edit, segments))
    clean, dirty = new_stage(), new_stage()
    poison(dirty)
    assert answer(clean, max_tokens=70) == answer(dirty, max_tokens=70)


def test_a_text_is_the_same_in_one_piece_or_several(edit):
    """A prompt that does not fit one step gives another context."""
    long = IDS * 12
    whole = context_of(new_stage(), edit, [Text(long)])
    for budget in (16, 37, 107):
        pieces = new_stage(max_num_batched_tokens=budget, ar_max_num_seqs=8)
        close(context_of(pieces, edit, [Text(long)]), whole)


@pytest.mark.parametrize("page_size", [16, 128])
def test_shared_prefix_equals_a_cache_of_its_own(page_size):
    """A guidance context that shares pages sees something else, or spoils the one it shares them with."""
    made = model().prepare(Request.create("img2img", inputs=["a red", random_image(), "a blue clock"]))
    assert made.plan.sequences[1].copy_from == 0
    (finished,) = serve(new_stage(page_size=page_size), made).values()
    main, img = (view_of(finished.context, view) for view in (0, finished.context.drop_image))
    texts = [p.segment for p in made.plan.sequences[0].compute if isinstance(p.segment, Text)]
    close(img, context_of(new_stage(), made, texts), made.plan.drop_image.length)
    close(
        main, context_of(new_stage(), made, [p.segment for p in made.plan.sequences[0].compute]), made.plan.cond.length
    )


def test_regression_9_length_advances_once_a_token(stage, edit):
    """Decoding moves on by as many positions a token as there are layers."""
    assert CONFIG.trunk.num_layers == 2
    job = prefilled(stage, question(max_tokens=4 * steps.MAX_CALL))
    length = job.sequences[0].length
    lengths = []
    for _ in range(3):
        step(stage)
        sequence = job.sequences[0]
        lengths.append(sequence.computed)
        assert sequence.computed == length + len(sequence.tail) - 1
    assert lengths == sorted(set(lengths))
    fed = [Text((*job.ticket.prepared.plan.sequences[0].compute[0].segment.ids, *sequence.tail[:-1]))]
    own = cache_of(stage, job, sequence.computed)
    cancel(stage, job.ticket)
    close(own, context_of(stage, edit, fed))


def test_decoding_is_greedy(stage):
    """Without sampling, another token than the most likely one is chosen."""
    ids = answer(stage, max_tokens=9)
    job = prefilled(stage, question(max_tokens=9))
    logits = logits_of(stage, job, ids)
    cancel(stage, job.ticket)
    assert logits.argmax(-1)[:-1].tolist() == ids[1:]


def test_decoding_begins_with_its_marker_and_stops_before_the_end():
    """An answer runs on past its end, holds the end token, or comes one token short."""
    ids = answer(new_stage(), max_tokens=12)
    assert len(ids) == 12
    assert ids[0] == model().tokenizer.im_start
    at = next(i for i in range(2, 12) if ids[i] not in ids[:i])
    stage = new_stage()
    stage.end_token = ids[at]
    assert answer(stage, max_tokens=12) == ids[:at]


def test_limits_hold_for_any_number_of_tokens():
    """An answer depends on how many tokens are decoded in one call, or passes its limit."""
    whole = answer(new_stage(), max_tokens=19)
    assert len(whole) == 19
    for call in (1, 3, steps.MAX_CALL):
        for limit in (19, 7, 1):
            stage = new_stage()
            tokens_a_call(stage, call)
            assert answer(stage, max_tokens=limit) == whole[:limit]


def test_the_first_token_does_not_wait_for_others():
    """A stream starts with many tokens at once."""
    stage = new_stage()
    prefilled(stage, question(max_tokens=19))
    assert [event.tokens for event in turn(stage)] == [1]
    assert [event.tokens for event in turn(stage)] == [steps.MAX_CALL]


def test_sampling_depends_on_the_seed_alone():
    """A sampled answer cannot be repeated, or all seeds give the same one, or those of batch mates get in."""
    stage, hot = new_stage(), {"do_sample": True, "text_temperature": 5.0, "max_tokens": 12}
    one, two, again = (answer(stage, seed=seed, **hot) for seed in (1, 2, 1))
    assert one == again != two
    together = serve(stage, *(question(request_id=i, seed=i, **hot) for i in (1, 2, 3)))
    assert [together["1"].ids, together["2"].ids] == [one, two]
    few = new_stage()
    tokens_a_call(few, 5)
    assert answer(few, seed=1, **hot) == one
    greedy = answer(stage, max_tokens=12)
    assert answer(stage, max_tokens=12, seed=9, text_temperature=5.0) == greedy != one
    assert answer(stage, **hot | {"text_temperature": 1e-4}, seed=9) == greedy
    assert answer(stage, **hot, top_k=1, seed=9) == greedy
    assert answer(stage, **hot, top_p=1e-6, seed=9) == greedy


def test_contexts_hold_what_pages_do(edit):
    """A context is handed over shorter than it is, or with all the room that decoding needed, or it changes later."""
    stage = new_stage(prefix_cache=False)
    ids = tuple(np.random.RandomState(0).randint(0, 700, 300).tolist())
    for length in (1, 64, 65, 300):
        (finished,) = serve(stage, with_segments(edit, [Text(ids[:length])])).values()
        context = finished.context
        assert context.num_pages == -(-length // 64)
        # A power of two, so that few programs take pages out.
        assert context.pages.shape[1] == 1 << (context.num_pages - 1).bit_length()
        poison(stage)  # whoever comes next
        close(view_of(context), context_of(new_stage(), edit, [Text(ids[:length])]))
    made = model().prepare(Request.create("text2img", "a red bench", think=True, max_think_tokens=300))
    (finished,) = serve(new_stage(), made).values()
    assert finished.context.num_pages == -(-int(finished.context.length.max()) // 64)


def test_pallas_that_takes_no_such_model():
    """Who asks for kernels is served by XLA, and never told."""
    with pytest.raises(
        InputError, match=r"attention is 'pallas', whose cpu kernel takes no heads of width 8 in float32"
    ):
        new_stage(attention="pallas")


def ended_in_flight(stage, made):
    """Serves requests; returns their answers, and how many calls held a row that had ended in the call before."""
    tickets = [submit(stage, one) for one in made]
    count, now = 0, 0.0
    while stage.busy:
        while stage.run(now):
            pass
        before = [job for call in list(stage.calls)[1:] for job in call.plan.rows if job.decoding is not None]
        stage.collect(now)
        count += sum(job.decoding is None for job in before)
    return [ticket.context.ids for ticket in tickets], count


def test_a_row_ends_in_the_call_in_flight():
    """An answer that ends while the next call is on its way grows a tail, or its neighbours' answers change."""
    made = [question("a red bench" * (i + 1), request_id=i, max_tokens=limit) for i, limit in enumerate((60, 60, 33))]
    gone = serve(new_stage(), *made)
    usual = [gone[one.request.request_id].ids for one in made]
    assert [len(ids) for ids in usual] == [60, 60, 33]
    # One of them ends where it would say some word for the first time, as all do then.
    at = next(i for i in range(4, 60) if usual[0][i] not in usual[0][:i])
    end = usual[0][at]
    wanted = [ids[: ids.index(end)] if end in ids else ids for ids in usual]
    stage = new_stage()
    stage.end_token = end
    answers, in_flight = ended_in_flight(stage, made)
    assert answers == wanted
    assert in_flight > 0
    stage.store.check()


def test_the_plan_of_an_image_ends_in_the_call_in_flight():
    """What a call wrote behind the end of a plan in words gets into the context of the image."""
    think = {"think": True, "max_think_tokens": 40}
    made = model().prepare(Request.create("text2img", "a red bench", request_id="think", **think))
    other = question(max_tokens=90)
    (alone,) = serve(new_stage(), made).values()
    at = next(i for i in range(4, 40) if alone.ids[i] not in alone.ids[:i])
    wanted, together = new_stage(), new_stage()
    wanted.end_token = together.end_token = alone.ids[at]
    with at_most(1):
        (wanted,) = serve(wanted, made).values()
    together = serve(together, made, other)["think"]
    assert together.ids == wanted.ids == alone.ids[:at]
    close(view_of(together.context), view_of(wanted.context))
    assert together.context.length.tolist() == wanted.context.length.tolist()


@pytest.mark.parametrize("settings", [{}, {"num_pages": 16, "page_size": 16, "prefix_cache": False}])
def test_calls_in_flight_change_nothing(settings):
    """An answer depends on whether the next call was on its way before it was read."""
    image = random_image()
    made = [question("a red bench", request_id="short", max_tokens=3), question("why", request_id="one", max_tokens=1)]
    made += [question("two zebras", request_id="long", max_tokens=70, do_sample=True, text_temperature=3.0)]
    made += [model().prepare(Request.create("img2text", "what", image, request_id="image", max_tokens=20))]
    think = {"think": True, "max_think_tokens": 18, "request_id": "think"}
    if not settings:
        made += [model().prepare(Request.create("text2img", "a red bench", **think))]
    outcomes = []
    for in_flight in (1, 2):
        with at_most(in_flight):
            stage = new_stage(**settings)
            poison(stage)
            outcomes.append(serve(stage, *made))
            stage.store.check()
    one, two = outcomes
    assert {key: served.ids for key, served in one.items()} == {key: served.ids for key, served in two.items()}
    assert {key: served.result.text for key, served in one.items()} == {
        key: served.result.text for key, served in two.items()
    }
    if "think" in one:
        for view in range(len(one["think"].context.length)):
            close(view_of(one["think"].context, view), view_of(two["think"].context, view))


def test_pages_of_a_cancelled_row_are_used_at_once():
    """A row cancelled while its call is on its way writes into pages that are somebody else's by then."""
    made = [question("a red bench", request_id=0, max_tokens=140), question("why", request_id=1, max_tokens=140)]
    wanted = serve(new_stage(), made[0])["0"].ids
    stage = new_stage(page_size=16, num_pages=14, prefix_cache=False)
    poison(stage)
    stays, goes = (submit(stage, one) for one in made)
    while len(goes.context.sequences[0].pages) < 5:
        turn(stage)
    (in_flight,) = stage.calls
    assert in_flight.plan.rows == [stays.context, goes.context]
    freed = set(goes.context.sequences[0].pages)
    cancel(stage, goes)
    assert stage.run(0.0)  # goes on with the rows in flight, of which one is nobody's now
    assert set(stays.context.sequences[0].pages) & freed
    while stage.busy:
        turn(stage)
    assert stays.context.ids == wanted
    stage.store.check()


def test_a_newcomer_gets_the_pages_of_a_cancelled_row():
    """The next request's prompt is overwritten by a row that was cancelled before."""
    first, second = question("a red bench", max_tokens=60), question("two zebras " * 8, request_id="new", max_tokens=9)
    wanted = serve(new_stage(), second)["new"].ids
    for turns in (0, 1, 2):
        stage = new_stage(page_size=16, num_pages=8, prefix_cache=False)
        poison(stage)
        job = prefilled(stage, first)
        for _ in range(turns):
            turn(stage)
        while stage.run(0.0):
            pass
        assert stage.calls
        freed = set(job.sequences[0].pages)
        cancel(stage, job.ticket)
        ticket = submit(stage, second)
        while not ticket.context.sequences[0].pages:
            turn(stage)
        assert set(ticket.context.sequences[0].pages) & freed
        assert finish(stage, ticket)["new"].ids == wanted
        stage.store.check()


def test_no_call_goes_beyond_all_limits():
    """The device decodes tokens that nobody asked for, and the next request waits for them."""
    stage = new_stage()
    job = prefilled(stage, question(max_tokens=1 + 2 * steps.MAX_CALL))
    assert stage.run(0.0)
    assert not stage.run(0.0)  # nothing comes between a first token and whoever waits for it
    stage.collect(0.0)
    assert stage.run(0.0)
    assert stage.run(0.0)
    assert [call.plan.tokens for call in stage.calls] == [steps.MAX_CALL, steps.MAX_CALL]
    assert not stage.run(0.0)  # two in flight are all
    stage.collect(0.0)
    assert not stage.run(0.0)  # what is in flight ends it
    (done,) = [event for event in stage.collect(0.0) if isinstance(event, Done)]
    assert done.outcome.decoded_tokens == 1 + 2 * steps.MAX_CALL
    assert len(job.ids) == 1 + 2 * steps.MAX_CALL
    assert not stage.busy


def test_nobody_waits_for_calls_that_go_on():
    """A new request is let in only when those in work have ended, though there is room for it."""
    stage = new_stage(ar_max_num_seqs=2)
    prefilled(stage, question(max_tokens=200))
    turn(stage)
    new = submit(stage, question("why", request_id="new", max_tokens=2))
    while stage.run(0.0):
        pass
    turns = 0
    while not new.result.decoded_tokens:
        turn(stage)
        turns += 1
    assert turns <= 4  # those in flight, its prompt, its first token


@pytest.mark.parametrize("modality", ["text2img", "img2img"])
def test_a_context_found_whole_is_finished(modality):
    """A request whose contexts are all kept from another one waits for ever: no call has anything to compute."""
    image = [random_image()] if modality == "img2img" else []
    made = model().prepare(Request.create(modality, "a red bench", *image, request_id="again"))
    stage = new_stage()
    first = serve(stage, made)["again"]
    assert first.result.prefilled_tokens > 0
    again = serve(stage, made)["again"]
    assert (again.result.prefilled_tokens, again.result.cached_prefix_tokens) == (0, first.result.prefilled_tokens)
    for view in range(len(first.context.length)):
        close(view_of(again.context, view), view_of(first.context, view))
    # Beside one that decodes, and twice at once.
    twin = dataclasses.replace(made, request=dataclasses.replace(made.request, request_id="twin"))
    together = serve(stage, question(max_tokens=40), made, twin)
    assert set(together) == {"question", "again", "twin"}
    assert together["twin"].result.prefilled_tokens == 0
    stage.store.check()


def test_a_prompt_found_whole_takes_time_to_answer():
    """A question asked again is answered at a thousand million tokens a second."""
    stage, made = new_stage(), question(max_tokens=40)
    first, again = (serve(stage, made)["question"] for _ in range(2))
    assert [span.phase for span in first.ticket.spans] == ["prefill", "decode"]
    assert again.result.prefilled_tokens == 0
    assert [span.phase for span in again.ticket.spans] == ["decode"]
    assert again.ids == first.ids
