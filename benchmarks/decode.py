"""Stage 0 on this machine: tokens a second at several batch sizes, and what the prefix cache saves.

    python benchmarks/decode.py [--width 1024] [--layers 4] [--tokens 65] [--prompt 256] [--attention auto]

The weights are random, so that the model can have any size; a batch is as many requests at once, greedy, of equal
length. Batch sizes take turns, and numbers are medians over the turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from statistics import median

import jax
import msgspec
import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from small import CONFIG, TOKENIZER, drawn  # noqa: E402

from bagel_jax.bagel import keep_compiled_programs, resolve_dtype  # noqa: E402
from bagel_jax.engine.context.stage import ContextStage  # noqa: E402
from bagel_jax.engine.kv.store import make_stores  # noqa: E402
from bagel_jax.engine.ticket import Done, Ticket  # noqa: E402
from bagel_jax.inputs.prepare import prepare  # noqa: E402
from bagel_jax.inputs.tokenizer import Tokenizer  # noqa: E402
from bagel_jax.models.weights import Weights, abstract_weights  # noqa: E402
from bagel_jax.placement.placement import Placement  # noqa: E402
from bagel_jax.request import Request, Result  # noqa: E402
from bagel_jax.settings import ATTENTION, EngineConfig  # noqa: E402

BATCHES = 1, 4, 8, 16
IMAGE = 512  # pixels a side, so 37 x 37 patches


def make_stage(args, tokenizer: Tokenizer, **settings) -> ContextStage:
    """Stage 0 of a model with random weights that never says the end token."""
    width, dtype = args.width, resolve_dtype("auto")
    trunk = dataclasses.replace(
        CONFIG.trunk,
        hidden_size=width,
        num_layers=args.layers,
        num_heads=width // 64,
        num_kv_heads=max(1, width // 512),
        head_dim=64,
        mlp_width=width * 5,
    )
    vit = dataclasses.replace(
        CONFIG.vit, hidden_size=256, num_layers=6, num_heads=4, mlp_width=1024, num_positions=4900
    )
    config = dataclasses.replace(CONFIG, trunk=trunk, vit=vit, max_vit_patches=70, max_latent_size=128)
    abstract = abstract_weights(config, dtype)
    params = jax.tree.map(lambda x: jax.device_put(x.astype(dtype)), drawn(abstract.params))
    head = params["trunk"]["lm_head"]["kernel"]
    head.set_value(head.get_value().at[:, tokenizer.im_end].set(0))
    serving = EngineConfig(attention=args.attention, **settings)
    weights = Weights(abstract.graph, params).for_serving(config, dtype)
    place = Placement.on(jax.devices()[0])
    store, _ = make_stores((place, place), config, serving, dtype)
    return ContextStage(weights, config, tokenizer, serving, store)


def serve(stage: ContextStage, requests) -> tuple[float, dict[str, Ticket]]:
    """Seconds until all are answered, and what came of them."""
    ready = [prepare(request, stage.config, stage.tokenizer) for request in requests]
    started = time.perf_counter()
    tickets = {}
    for number, one in enumerate(ready):
        request = one.request
        result = Result(request.request_id, request.modality)
        tickets[request.request_id] = Ticket(number, one, None, False, time.perf_counter(), result)
        stage.submit(tickets[request.request_id])
    while stage.busy:
        while stage.run(time.perf_counter()):
            pass
        stage.calls[0].ready.block_until_ready()
        for event in stage.collect(time.perf_counter()):
            if isinstance(event, Done) and isinstance(event.outcome, Exception):
                raise event.outcome
    return time.perf_counter() - started, tickets


def texts(generator, count: int, words: int, tokens: int) -> list[Request]:
    """Questions of about three tokens a word, no two alike."""
    return [
        Request.create(
            "text2text", " ".join(map(str, generator.integers(100, 1000, words))), max_tokens=tokens, request_id=f"{i}"
        )
        for i in range(count)
    ]


def throughput(args, tokenizer: Tokenizer) -> None:
    """Prefill and decode tokens a second at several batch sizes."""
    stage = make_stage(args, tokenizer, prefix_cache=False, ar_max_num_seqs=max(BATCHES))
    generator = np.random.default_rng(0)
    speeds = {batch: ([], []) for batch in BATCHES}
    for turn in range(args.turns + 1):
        for batch, (prefill, decode) in speeds.items():
            requests = texts(generator, batch, args.prompt // 3, args.tokens)
            taken, _ = serve(
                stage,
                [dataclasses.replace(r, settings=msgspec.structs.replace(r.settings, max_tokens=1)) for r in requests],
            )
            whole, answers = serve(stage, requests)
            if turn:  # the first one compiles
                stats = [ticket.result for ticket in answers.values()]
                prefill.append(sum(s.prefilled_tokens for s in stats) / taken)
                decode.append(sum(s.decoded_tokens - 1 for s in stats) / (whole - taken))
    one = median(speeds[1][1])
    print("| batch | prefill tokens/s | decode tokens/s | of batch 1 |\n|---|---|---|---|")
    for batch, (prefill, decode) in speeds.items():
        print(f"| {batch} | {median(prefill):,.0f} | {median(decode):,.0f} | {median(decode) / one:.1f} |")


def second_question(args, tokenizer: Tokenizer) -> None:
    """Time to first token of another question about the same image, with and without the prefix cache."""
    with_cache, without = make_stage(args, tokenizer), make_stage(args, tokenizer, prefix_cache=False)
    generator = np.random.default_rng(1)
    rows = {"first question": [], "second, no prefix cache": [], "second, prefix cache": []}
    counts = {}
    for turn in range(args.turns + 1):
        pixels = generator.integers(0, 256, (IMAGE, IMAGE, 3)).astype(np.uint8)
        image = Image.fromarray(pixels)
        asked = [Request.create("img2text", q, image, max_tokens=8) for q in ("What is this?", "Which colour has it?")]
        answers = []
        for name, stage, request in zip(
            rows, (with_cache, without, with_cache), (asked[0], asked[1], asked[1]), strict=True
        ):
            (answer,) = serve(stage, [request])[1].values()
            if turn:
                rows[name].append(answer.result.time_to_first_token)
            counts[name] = answer.result.prefilled_tokens
            answers.append(answer.context.ids)
        if answers[1] != answers[2]:
            raise RuntimeError(f"the prefix cache changed an answer: {answers[1]} became {answers[2]}")
    print("\n| | prefilled tokens | time to first token, ms |\n|---|---|---|")
    for name, seconds in rows.items():
        print(f"| {name} | {counts[name]:,} | {1000 * median(seconds):.0f} |")
    _, slow, fast = map(median, rows.values())
    print(f"\nthe same answer, {slow / fast:.1f} times sooner")


def main() -> None:
    """Runs both."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--width", type=int, default=1024, help="D (default: %(default)s)")
    p.add_argument("--layers", type=int, default=4, help="L (default: %(default)s)")
    p.add_argument("--prompt", type=int, default=256, help="tokens, about (default: %(default)s)")
    p.add_argument("--tokens", type=int, default=65, help="to decode (default: %(default)s)")
    p.add_argument("--turns", type=int, default=5, help="(default: %(default)s)")
    p.add_argument("--attention", default="auto", choices=ATTENTION)
    args = p.parse_args()
    keep_compiled_programs()
    tokenizer = Tokenizer(TOKENIZER)
    print(f"{jax.devices()[0].device_kind}, D {args.width}, L {args.layers}, {resolve_dtype('auto').__name__}\n")
    throughput(args, tokenizer)
    second_question(args, tokenizer)


if __name__ == "__main__":
    main()
