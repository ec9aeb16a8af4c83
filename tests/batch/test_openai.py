"""Lines of OpenAI's batch files: what they ask of the model, and answers that OpenAI's own client reads."""

from __future__ import annotations

import base64
import io
import json
import tarfile

import numpy as np
import pytest
from batch.stub import work
from openai.types import ErrorObject, ImagesResponse
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.image_generate_params import ImageGenerateParamsNonStreaming
from PIL import Image
from pydantic import TypeAdapter

from bagel_jax.batch.job import Defaults, Line, read_line
from bagel_jax.batch.openai_answers import answer
from bagel_jax.batch.records import failed
from bagel_jax.errors import InputError

CHAT, GENERATIONS, EDITS = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"
TYPES = {CHAT: CompletionCreateParamsNonStreaming, GENERATIONS: ImageGenerateParamsNonStreaming}


def data_url(size=(3, 2)) -> str:
    """An image as JSON has it."""
    file = io.BytesIO()
    Image.new("RGB", size, (9, 8, 7)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


URL = data_url()


def asked(url: str, body: dict, custom_id: str = "a") -> dict:
    """A line, its body checked by OpenAI's own types where there is one for JSON."""
    if url in TYPES:
        TypeAdapter(TYPES[url]).validate_python(body)
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def user(*content) -> dict:
    """A user's message."""
    return {"role": "user", "content": content[0] if len(content) == 1 else list(content)}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def image(url: str = URL) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def read(line: dict, base, usual: Defaults | None = None, number: int = 0):
    """What a line says and asks for."""
    return read_line(Line(number, json.dumps(line).encode()), base, usual or Defaults())


def records(folder) -> list[dict]:
    return list(map(json.loads, (folder / "part-00000.jsonl").read_text().splitlines()))


def pixels(seed: int) -> np.ndarray:
    """The stub's image of a seed."""
    return np.random.RandomState(seed).randint(0, 256, (8, 8, 3))


@pytest.fixture
def job(tmp_path):
    """A batch of each kind, and what is wrong in two ways."""
    lines = [
        asked(CHAT, {"model": "b", "messages": [user("say hi")]}, "talk"),
        asked(CHAT, {"model": "b", "messages": [user(text("look"), image())], "n": 2}, "look"),
        asked(GENERATIONS, {"prompt": "a", "n": 2, "seed": 5}, "draw"),
        asked(GENERATIONS, {"prompt": "a", "response_format": "url", "seed": 7}, "draw-url"),
        asked(EDITS, {"prompt": "a", "images": [{"image_url": URL}, {"image_url": URL}], "seed": 8}, "edit"),
        asked(GENERATIONS, {"prompt": "a", "stream": False, "size": "large"}, "bad"),
        asked(CHAT, {"model": "b", "messages": [user("fail")]}, "fail"),
        {"modality": "text2text", "prompt": "ours"},
    ]
    path = tmp_path / "job.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_answers_are_openais(job, tmp_path):
    """Nothing that reads OpenAI's batches can read ours, or the summary takes errors for answers."""
    work(job, tmp_path / "out", 100)
    *theirs, ours = records(tmp_path / "out")
    assert ours["text"] == "OURS"
    assert [record["custom_id"] for record in theirs] == ["talk", "look", "draw", "draw-url", "edit", "bad", "fail"]
    assert {tuple(record) for record in theirs} == {("id", "custom_id", "response", "error")}
    assert [record["response"]["status_code"] for record in theirs] == [200, 200, 200, 200, 200, 400, 500]
    assert [failed(record) for record in theirs] == [False] * 5 + [True] * 2
    bodies = [record["response"]["body"] for record in theirs]
    talk, look = (ChatCompletion.model_validate(body, strict=True) for body in bodies[:2])
    assert (talk.model, talk.usage, talk.choices[0].message.content) == ("b", None, "SAY HI")
    assert [(choice.index, choice.message.content) for choice in look.choices] == [(0, "LOOK"), (1, "LOOK")]
    draw, draw_url, edit = (ImagesResponse.model_validate(body, strict=True) for body in bodies[2:5])
    for image, seed in zip([*draw.data, *edit.data], (5, 6, 8), strict=True):
        np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(image.b64_json))), pixels(seed))
    assert draw_url.data[0].url == "part-00000/draw-url.png"
    np.testing.assert_array_equal(Image.open(tmp_path / "out" / draw_url.data[0].url), pixels(7))
    assert [file.name for file in (tmp_path / "out" / "part-00000").iterdir()] == ["draw-url.png"]
    bad, fail = (ErrorObject.model_validate(body["error"], strict=True) for body in bodies[5:])
    assert bad.message == "size is 'large'; it must be WIDTHxHEIGHT in pixels, as 1024x768, or auto"
    assert (bad.type, fail.type) == ("invalid_request_error", "server_error")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["ok"], summary["errors"]) == (6, {"InputError": 1, "FloatingPointError": 1})


def test_two_workers_give_an_answer_the_same_id(job, tmp_path):
    """Ids are drawn anew, so that a block that was taken over cannot be told from another's."""
    for name, size in (("a", 100), ("b", 100)):
        work(job, tmp_path / name, size)
    ids = [[record["id"] for record in records(tmp_path / name)] for name in ("a", "b")]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == len(ids[0])


def test_webdataset(job, tmp_path):
    """Each image has the answer with all of a line's images in it, or none."""
    work(job, tmp_path / "out", 100, tar=True)
    with tarfile.open(tmp_path / "out" / "part-00000.tar") as archive:
        names = archive.getnames()
        members = {name: archive.extractfile(name).read() for name in names}
    assert names[:7] == [
        "talk.json",
        "look-0.json",
        "look-1.json",
        *(f"draw-{k}.{e}" for k in (0, 1) for e in ("json", "png")),
    ]
    for k, seed in enumerate((5, 6)):
        record = json.loads(members[f"draw-{k}.json"])
        data = ImagesResponse.model_validate(record["response"]["body"], strict=True).data
        assert [one.url for one in data] == [f"part-00000.tar/draw-{k}.png"]
        np.testing.assert_array_equal(Image.open(io.BytesIO(members[f"draw-{k}.png"])), pixels(seed))
    assert not [name for name in names if name.startswith(("bad", "fail", "line-"))]


def test_usage_and_the_reason_of_an_end():
    """Made-up numbers, or an answer that was cut off passes for a whole one."""
    came = {"text": "a", "settings": {"max_tokens": 4}, "prefilled_tokens": 5, "cached_prefix_tokens": 2}
    heading = {"name": "x", "custom_id": "a", "chat": True, "model": "b", "response_format": None}
    record = {"status": "ok", "openai": heading, "images": [came | {"decoded_tokens": k} for k in (3, 4)]}
    completion = answer(record, bytes, embed=True)["response"]["body"]
    assert completion["usage"] == {"prompt_tokens": 7, "completion_tokens": 7, "total_tokens": 14}
    assert [choice["finish_reason"] for choice in completion["choices"]] == ["stop", "length"]
    ChatCompletion.model_validate(completion, strict=True)


def test_a_conversation_is_what_a_session_sees(tmp_path):
    """Turns are lost, or images come at another place than the person put them."""
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    messages = [
        {"role": "system", "content": "Be short."},
        user(text("first"), text("second"), image(), text("third")),
        {"role": "assistant", "content": [text("An answer.")], "refusal": None},
        user(image("a.png"), text("last")),
    ]
    line = asked(CHAT, {"model": "b", "messages": messages})
    _, (request,) = read(line, tmp_path)
    assert request.modality == "img2text"
    assert [getattr(item, "size", item) for item in request.inputs] == [
        *("Be short.", "first\nsecond", (3, 2), "third", "An answer.", (5, 4), "last"),
    ]


@pytest.mark.parametrize(
    ("body", "settings"),
    [
        ({}, {"do_sample": False, "max_tokens": 512}),
        ({"temperature": 0, "max_tokens": 3, "top_p": 0.5}, {"do_sample": False, "max_tokens": 3}),
        (
            {"temperature": 0.7, "max_completion_tokens": 3},
            {"do_sample": True, "text_temperature": 0.7, "max_tokens": 3},
        ),
        ({"top_p": 0.5}, {"do_sample": True, "top_p": 0.5}),
        ({"top_p": 1, "top_k": 4, "seed": None}, {"do_sample": False, "top_k": 4}),
    ],
)
def test_settings_of_a_chat(tmp_path, body, settings):
    """A temperature is taken and does nothing."""
    _, (request,) = read(
        {**asked(CHAT, {"messages": [user("a")], "model": "b"}), "body": {"messages": [user("a")], **body}}, tmp_path
    )
    assert {name: getattr(request.settings, name) for name in settings} == settings


def test_harmless_fields(tmp_path):
    """Files that were made for OpenAI have to be made anew for a field that changes nothing."""
    more = {"user": "u", "store": False, "metadata": {"a": "b"}, "n": 1, "stream": False, "service_tier": "flex"}
    chat = {"presence_penalty": 0, "response_format": {"type": "text"}, "logprobs": False, "modalities": ["text"]}
    drawn = {
        "quality": "auto",
        "size": "512x256",
        "background": "auto",
        "output_format": "png",
        "steps": 4,
        "model": "x",
    }
    _, (request,) = read(asked(CHAT, {"model": "b", "messages": [user("a")], **more, **chat}), tmp_path)
    assert request.inputs == ("a",)
    _, (request,) = read({**asked(GENERATIONS, {"prompt": "a"}), "body": {"prompt": "a", **more, **drawn}}, tmp_path)
    assert (request.settings.width, request.settings.height, request.settings.steps) == (512, 256, 4)


def test_seeds(tmp_path):
    """Two lines with one prompt get one image twice, or flags count for nothing."""
    usual = Defaults({"modality": "img2text", "think": True, "steps": 4, "max_tokens": 2}, seed=3, num_images=2)
    lines = [asked(GENERATIONS, {"prompt": "a", **more}) for more in ({"n": 3}, {}, {"seed": 1, "n": 2})]
    found = [read(line, tmp_path, usual, i)[1] for i, line in enumerate(lines)]
    assert [[request.seed for request in requests] for requests in found] == [[3, 4, 5], [131, 132], [1, 2]]
    assert found[0][0].think
    assert found[0][0].settings.steps == 4
    assert len(read(asked(CHAT, {"model": "b", "messages": [user("a")]}), tmp_path, usual)[1]) == 1


GOOD_CHAT = {"messages": [user("a")]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"custom_id": "a"}, "method is None; it must be one of POST"),
        (
            asked(CHAT, GOOD_CHAT | {"model": "b"}) | {"custom_id": None},
            "custom_id is None; it must be a text that is not",
        ),
        (
            asked("/v1/embeddings", {}),
            "url is '/v1/embeddings'; it must be one of /v1/chat/completions, /v1/images/gen",
        ),
        (asked(EDITS, None), "body is None; it must be an object"),
        (asked(EDITS, {}) | {"seed": 1}, "the line has seed; it must have custom_id, method, url and body"),
        (asked(EDITS, {"prompt": "a"}), "neither of image and images was given; give one"),
        (
            asked(EDITS, {"prompt": "a", "image": 5}),
            'image is 5; it must be a data: URL, a path, or {"image_url": …} with',
        ),
        (asked(EDITS, {"prompt": "a", "images": []}), "images is []; it must be a data: URL"),
        (
            asked(EDITS, {"prompt": "a", "images": [{"file_id": "f"}]}),
            "images[0] is {'file_id': 'f'}; it must be a data:",
        ),
        (
            asked(EDITS, {"prompt": "a", "image": URL, "size": "8x8"}),
            "size is '8x8'; it must be auto, or left out: an edit",
        ),
        (
            asked(EDITS, {"prompt": "a", "image": URL, "mask": URL}),
            "the body has mask, which has no meaning for this model",
        ),
        (
            asked(EDITS, {"prompt": "a", "image": "https://a/b.png"}),
            "image https://a/b.png is on the web, where nothing",
        ),
        ({"n": 129}, "n is 129; it must be a whole number, from 1 to 128"),
        ({"stream": True}, "stream is True; it must be false, or left out"),
        (
            {"tools": [{}]},
            "the body has tools, which has no meaning for this model at /v1/chat/completions; leave it out",
        ),
        ({"frequency_penalty": 0.5}, "frequency_penalty is 0.5; it must be 0, or left out"),
        (
            {"response_format": {"type": "json_object"}},
            "response_format is {'type': 'json_object'}; it must be of type",
        ),
        ({"modalities": ["audio"]}, "modalities[0] is 'audio'; it must be text"),
        ({"temperature": 3}, "temperature is 3; it must be a number, from 0 to 2"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens and max_completion_tokens were given and differ"),
        ({"messages": []}, "messages is []; it must be a list of at least 1"),
        ({"messages": ["hi"]}, "messages[0] is 'hi'; it must be an object"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role is 'tool'; it must be one of system, dev"),
        ({"messages": [{"role": "user"}]}, "content is missing in messages[0]"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "the last message is of role assistant; it"),
        ({"messages": [user(5)]}, "messages[0].content is 5; it must be a text or parts"),
        (
            {"messages": [user(text("a"), {"type": "input_audio"})]},
            "messages[0].content[1].type is 'input_audio'; it must",
        ),
        (
            {"messages": [user(text("a"), image("http://a/b.png"))]},
            "image http://a/b.png is on the web, where nothing is",
        ),
        (
            {"messages": [user(text("a"), image("data:image/png,abc"))]},
            "image data:image/png,abc is no data: URL with base64",
        ),
    ],
)
def test_what_is_refused(tmp_path, line, message):
    """The model answers something else than was asked, in silence."""
    if "custom_id" not in line:
        line = {"custom_id": "a", "method": "POST", "url": CHAT, "body": GOOD_CHAT | line}
    said, error = read(line, tmp_path)
    assert isinstance(error, InputError)
    assert str(error).startswith(message)
    whole = answer(said | {"status": "error", "kind": "InputError", "error": str(error)}, bytes, embed=True)
    assert whole["custom_id"] == line["custom_id"]
    assert whole["response"]["status_code"] == 400


@pytest.mark.parametrize("tar", [False, True])
def test_errors_are_tried_again(job, tmp_path, tar):
    """Good answers are lost, told twice, or counted as nothing when a bad one is tried again."""
    with job.open("a") as file:
        for name, more in (("edit-later", {"image": "later.png", "n": 2}), ("edit-later-0", {"image": URL})):
            body = {"prompt": "a", "seed": 9, "response_format": "url", **more}
            file.write("\n" + json.dumps(asked(EDITS, body, name)))
    work(job, tmp_path / "out", 100, tar=tar)
    before = records(tmp_path / "out")
    assert [failed(record) for record in before[:7] + before[8:]] == [False] * 5 + [True] * 3 + [False]
    Image.new("RGB", (4, 4)).save(tmp_path / "later.png")
    work(job, tmp_path / "out", 100, tar=tar, retry_errors=True, model={"healed": True})
    after = records(tmp_path / "out")
    assert [a for a, b in zip(after, before, strict=True) if a != b] == [after[6], after[8]]
    assert after[6]["response"]["body"]["choices"][0]["message"]["content"] == "FAIL"
    folder = "part-00000.tar" if tar else "part-00000"
    urls = [[one["url"] for one in record["response"]["body"]["data"]] for record in after[8:]]
    assert urls == [[f"{folder}/edit-later-{k}.png" for k in (0, 1)], [f"{folder}/line-9.png"]]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["ok"], summary["errors"], summary["images"]) == (9, {"InputError": 1}, 7)
    if tar:
        with tarfile.open(tmp_path / "out" / "part-00000.tar") as archive:
            assert sum(name.endswith(".png") for name in archive.getnames()) == 7
