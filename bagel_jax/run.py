"""The command line: `python -m bagel_jax.run --model DIR --modality text2img --prompts "a red bench"`.

With `--modality` alone it runs an example with the bundled demo model.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bagel_jax.command import BAD_INPUT, DONE, FAILED, INTERRUPTED, Parser
from bagel_jax.demo.example import EXAMPLES, MODEL
from bagel_jax.errors import InputError
from bagel_jax.request import MODALITIES, RENORM_TYPES, Request, Settings, defaults_table, open_image
from bagel_jax.results import Results, output_folder
from bagel_jax.settings import ATTENTION, ATTENTION_VARIABLE, PAGE_SIZES, TOPOLOGIES, ServingSettings
from bagel_jax.turns import read_turns

_DEMO_NOTE = (
    "no --model given, so the bundled demo model (coloured shapes, 64x64) is used; for BAGEL-7B-MoT: "
    "hf download ByteDance-Seed/BAGEL-7B-MoT --local-dir models/BAGEL-7B-MoT, then --model models/BAGEL-7B-MoT"
)


def parser() -> argparse.ArgumentParser:
    """The options. Those of a request default to None here: their defaults stand in `request.DEFAULTS`."""
    p = Parser(
        prog="python -m bagel_jax.run",
        description="Text and images in, text and images out, with a BAGEL model.",
        epilog="Defaults by modality:\n\n" + defaults_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--model",
        metavar="DIR",
        help="a published or a converted BAGEL checkpoint (default: the bundled demo model of coloured shapes, "
        "with an example for what is not given of prompts and image)",
    )
    p.add_argument("--modality", choices=MODALITIES, help="what goes in and what comes out; alone: an example")
    p.add_argument(
        "--turns",
        metavar="FILE",
        help='instead: a conversation, a turn a line, as {"draw": "a red circle"} or {"ask": "What is this?"}',
    )
    p.add_argument("--prompts", nargs="+", action="extend", metavar="P", help="one result a prompt")
    p.add_argument("--txt-prompts", metavar="FILE", help="prompts from a file, one a line")
    p.add_argument(
        "--image-path", nargs="+", action="extend", metavar="IMG", help="one image for all prompts, or one each"
    )
    p.add_argument("--output", default="output", metavar="DIR", help="where results go (default: %(default)s)")

    g = p.add_argument_group("images")
    g.add_argument("--height", type=int, metavar="H", help="pixels; text2img")
    g.add_argument("--width", type=int, metavar="W", help="pixels; text2img")
    g.add_argument("--steps", type=int, metavar="N", help="schedule points; N - 1 evaluations of the model")
    g.add_argument("--cfg-text-scale", type=float, metavar="X", help="guidance towards the text; 1 is off")
    g.add_argument("--cfg-img-scale", type=float, metavar="X", help="guidance towards the images; 1 is off")
    g.add_argument("--cfg-interval", type=float, nargs=2, metavar=("LO", "HI"), help="timesteps with guidance")
    g.add_argument("--cfg-renorm-type", metavar="{" + ",".join(RENORM_TYPES) + "}")
    g.add_argument("--cfg-renorm-min", type=float, metavar="X", help="least factor of the renormalisation")
    g.add_argument("--timestep-shift", type=float, metavar="X", help="above 1: more steps near the noise")
    g.add_argument("--negative-prompt", metavar="P", help="what guidance leads away from")
    g.add_argument(
        "--taylorseer",
        action="store_true",
        default=None,
        help="forecast most steps instead of computing them: faster, other images",
    )
    g.add_argument("--taylorseer-interval", type=int, metavar="N", help="every N steps one is computed")
    g.add_argument("--taylorseer-order", type=int, metavar="M", help="of the forecast")
    g.add_argument("--taylorseer-first", type=int, metavar="N", help="steps at the beginning that are all computed")
    g.add_argument("--vae-tiling", action="store_true", help="decode large images in tiles: less memory")
    g.add_argument("--init-noise", metavar="FILE.npz", help="noise of another run: latent, vae_0, vae_1, …")
    g.add_argument("--save-latents", action="store_true", help="write output_I.latent.npy too")

    g = p.add_argument_group("text")
    g.add_argument("--think", action="store_true", help="let the model plan in words first")
    g.add_argument("--max-think-tokens", type=int, metavar="N", help="limit of the plan before an image")
    g.add_argument("--max-tokens", type=int, metavar="N", help="limit of an answer, its thinking included")
    g.add_argument(
        "--do-sample", action="store_true", default=None, help="sample, instead of the likeliest token each time"
    )
    g.add_argument("--text-temperature", type=float, metavar="X", help="of sampling")
    g.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens only; 0: all")
    g.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest that make up P of the chances")

    g = p.add_argument_group("serving")
    usual = ServingSettings  # the class: an instance would read the environment, where anything may be wrong
    g.add_argument(
        "--ar-max-num-seqs",
        "--max-num-seqs",
        type=int,
        default=usual.ar_max_num_seqs,
        metavar="N",
        help="requests at once in stage 0, which makes contexts and texts (%(default)s)",
    )
    g.add_argument(
        "--dit-max-num-seqs",
        type=int,
        default=usual.dit_max_num_seqs,
        metavar="N",
        help="images at once in stage 1, which denoises (%(default)s)",
    )
    g.add_argument("--ar-device", type=int, default=usual.ar_device, metavar="I", help="of stage 0 (%(default)s)")
    g.add_argument("--dit-device", type=int, default=usual.dit_device, metavar="I", help="of stage 1 (%(default)s)")
    g.add_argument(
        "--topology",
        default=usual.topology,
        choices=TOPOLOGIES,
        help="two-stage: both stages at the same time; single-stage: by turns (%(default)s)",
    )
    g.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=usual.max_num_batched_tokens,
        metavar="N",
        help="tokens a step; a block of an image is never cut (%(default)s)",
    )
    g.add_argument(
        "--page-size",
        type=int,
        default=usual.page_size,
        choices=PAGE_SIZES,
        help="tokens a page of the KV cache (%(default)s)",
    )
    g.add_argument("--num-pages", type=int, metavar="N", help="of the KV cache (default: from the device's memory)")
    g.add_argument("--no-prefix-cache", action="store_true", help="forget contexts as soon as they are used")
    g.add_argument(
        "--attention",
        default=usual.attention,
        choices=ATTENTION,
        help=f"auto: ${ATTENTION_VARIABLE}, or pallas on TPU and GPU, xla on a CPU; pallas on a CPU is interpreted",
    )

    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, metavar="S", help="request i uses S + i (default: %(default)s)")
    g.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: float32 on a CPU")
    g.add_argument("--quiet", action="store_true", help="no progress bars, no notes")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    p = parser()
    args = p.parse_args(argv)
    if (args.modality is None) == (args.turns is None):
        p.error(f"{'neither' if args.turns is None else 'both'} of --modality and --turns was given; give one of them")
    try:
        return _run_turns(args) if args.turns is not None else _run(args, _fill_in(args, argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is in the output folder", file=sys.stderr)
        return INTERRUPTED


def _fill_in(args: argparse.Namespace, argv: list[str]) -> list[str]:
    """Without --model fills in the demo model, and its example for what is missing; returns what to tell of it."""
    if args.model is not None:
        return []
    prompt, image = EXAMPLES[args.modality]
    args.model = _from_here(MODEL)
    added, missing = ["--model", args.model], []
    if image is not None and args.image_path is None:
        args.image_path = [_from_here(image)]
        added += ["--image-path", *args.image_path]
        missing.append("image")
    if args.prompts is None and args.txt_prompts is None:
        args.prompts = [prompt] * len(args.image_path or [None])
        added += ["--prompts", *args.prompts]
        missing.append("prompt")
    if not missing:
        return [_DEMO_NOTE]
    command = shlex.join([_from_here(Path(sys.executable)), "-m", "bagel_jax.run", *added, *argv])
    return [_DEMO_NOTE, f"no {' and no '.join(missing)} given, so the bundled example stands in; in full:\n{command}"]


def _from_here(path: Path) -> str:
    """A path as short as can be typed: relative if it is below the working directory."""
    here = Path.cwd()
    # Not for what lies right in it: a shell looks up a command without a slash elsewhere.
    return str(path.relative_to(here) if here in path.parents[1:] else path)


def _run(args: argparse.Namespace, notes: Sequence[str]) -> int:
    prompts = _prompts(args)
    settings = _serving(args)
    requests = _requests(args, prompts)
    output = output_folder(args.output)
    if all(isinstance(request, InputError) for request in requests):
        return _report_all_bad(requests)
    for note in () if args.quiet else notes:  # before what the model may refuse, which they explain
        print(f"note: {note}", file=sys.stderr, flush=True)

    from bagel_jax.bagel import Bagel  # late: brings jax, and bad arguments are found without it

    model = Bagel.open(args.model, args.dtype, settings)
    for i, request in enumerate(requests):
        try:
            if isinstance(request, Request):
                model.prepare(request)  # only to find what is wrong; pixels of a thousand requests would fill memory
        except InputError as error:
            requests[i] = error
    if all(isinstance(request, InputError) for request in requests):
        return _report_all_bad(requests)

    code = DONE
    for i, request in enumerate(requests):
        if isinstance(request, InputError):
            print(f"error: request {i}: {request}", file=sys.stderr)
            code = BAD_INPUT
    with Results(output, len(requests), quiet=args.quiet) as results:
        model.load_weights(results.bars)
        about = [
            {"id": f"output_{i}", "modality": args.modality, "prompt": prompt, "seed": args.seed + i}
            for i, prompt in enumerate(prompts)
        ]
        for i, request in enumerate(requests):
            if isinstance(request, InputError):
                results.add(i, about[i] | {"error": str(request)})
        good = {request.request_id: i for i, request in enumerate(requests) if isinstance(request, Request)}
        for request, outcome in model.run_many((r for r in requests if isinstance(r, Request)), results.bars):
            i = good[request.request_id]
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                record = results.save(i, request, outcome, latents=args.save_latents)
            # Whatever happens to one request, the others go on and what is finished is kept.
            except Exception as error:
                results.say(f"error: request {i} failed: {error}")
                record = {"error": f"{type(error).__name__}: {error}"}
                code = max(code, BAD_INPUT if isinstance(error, InputError) else FAILED)
            results.add(i, about[i] | record)
    return code


def _run_turns(args: argparse.Namespace) -> int:
    """A conversation; it ends at a turn that fails, since those behind it build on it."""
    for name in ("prompts", "txt_prompts", "image_path", "init_noise"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} was given beside --turns; put it into the turns instead")
    usual = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)} | {"think": args.think}
    if args.negative_prompt is not None:
        usual["negative_prompt"] = args.negative_prompt
    turns = read_turns(args.turns, usual)
    settings, output = _serving(args), output_folder(args.output)

    if args.model is None and not args.quiet:
        print(f"note: {_DEMO_NOTE}", file=sys.stderr, flush=True)

    from bagel_jax.bagel import Bagel

    model = Bagel.open(args.model, args.dtype, settings)
    with Results(output, len(turns), quiet=args.quiet) as results:
        model.load_weights(results.bars)
        session = model.session(seed=args.seed, progress=results.bars)
        for i, turn in enumerate(turns):
            about = {"id": f"output_{i}", "prompt": turn.prompt}
            try:
                result = turn.take(session)
                request = session.requests[-1]
                record = results.save(i, request, result, latents=args.save_latents)
            except Exception as error:  # what was finished is kept
                results.say(f"error: turn {i} failed: {error}")
                results.add(i, about | {"error": f"{type(error).__name__}: {error}"})
                return BAD_INPUT if isinstance(error, InputError) else FAILED
            results.add(i, about | {"modality": request.modality, "seed": request.seed} | record)
    return DONE


def _serving(args: argparse.Namespace) -> ServingSettings:
    return ServingSettings(
        ar_max_num_seqs=args.ar_max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        page_size=args.page_size,
        num_pages=args.num_pages,
        prefix_cache=not args.no_prefix_cache,
        attention=args.attention,
        dit_max_num_seqs=args.dit_max_num_seqs,
        ar_device=args.ar_device,
        dit_device=args.dit_device,
        topology=args.topology,
        vae_tiling=args.vae_tiling,
    )


def _requests(args: argparse.Namespace, prompts: list[str]) -> list[Request | InputError]:
    """One request a prompt, or what is wrong with it."""
    paths = args.image_path or []
    if len(paths) not in (0, 1, len(prompts)):
        raise InputError(
            f"--image-path names {len(paths)} images for {len(prompts)} prompts; give one, or one for each prompt"
        )
    noise = None if args.init_noise is None else _read_noise(Path(args.init_noise))
    opened: dict[str, Image.Image | InputError] = {}
    for path in paths:
        try:
            opened.setdefault(path, open_image(path))
        except InputError as error:
            opened[path] = error
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    requests: list[Request | InputError] = []
    for i, prompt in enumerate(prompts):
        image = opened[paths[i if len(paths) > 1 else 0]] if paths else None
        if isinstance(image, InputError):
            requests.append(image)
            continue
        # An error here is one of the options, the same for every request, so it ends the run.
        requests.append(
            Request.create(
                args.modality,
                prompt,
                image,
                seed=args.seed + i,
                think=args.think,
                negative_prompt=args.negative_prompt,
                init_noise=noise,
                request_id=f"output_{i}",
                **settings,
            )
        )
    return requests


def _prompts(args: argparse.Namespace) -> list[str]:
    if (args.prompts is None) == (args.txt_prompts is None):
        given = "neither" if args.prompts is None else "both"
        raise InputError(f"{given} of --prompts and --txt-prompts was given; give one of them")
    if args.prompts is not None:
        return args.prompts
    try:
        lines = Path(args.txt_prompts).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--txt-prompts {args.txt_prompts} cannot be read as text ({error}); give a file in UTF-8"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"--txt-prompts {args.txt_prompts} holds no prompt; it must hold one a line")
    return prompts


def _read_noise(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:  # NumPy would take other files for pickles, and say so
            damaged = archive.testzip()
        if damaged is None:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        reason = f"{damaged} in it is damaged"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error)
    raise InputError(f"--init-noise {path} cannot be read as an npz file ({reason}); numpy.savez writes one")


def _report_all_bad(items: list) -> int:
    for message in dict.fromkeys(str(item) for item in items):
        print(f"error: {message}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
