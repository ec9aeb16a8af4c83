"""The command line: `python -m bagel_jax.run --model DIR --modality text2img --prompts "a red bench"`.

With `--modality` alone it runs an example with the bundled demo model.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bagel_jax import __version__, hosts
from bagel_jax.command import BAD_INPUT, DONE, FAILED, INTERRUPTED, Parser, add_flags, from_flags
from bagel_jax.demo.example import EXAMPLES, MODEL
from bagel_jax.errors import InputError
from bagel_jax.options import MODALITIES, Settings, defaults_table, settings_of
from bagel_jax.request import ImageFile, Request
from bagel_jax.results import Results, output_folder
from bagel_jax.settings import EngineConfig
from bagel_jax.turns import read_turns

if TYPE_CHECKING:
    from bagel_jax.bagel import Bagel

_DEMO_NOTE = (
    "no --model given, so the bundled demo model (coloured shapes, 64x64) is used; for BAGEL-7B-MoT: "
    "hf download ByteDance-Seed/BAGEL-7B-MoT --local-dir models/BAGEL-7B-MoT, then --model models/BAGEL-7B-MoT"
)


def parser() -> argparse.ArgumentParser:
    """The options. Those of a request default to None here: their defaults stand in `options.DEFAULTS`."""
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

    groups = {name: p.add_argument_group(name) for name in ("images", "text", "serving")}
    add_flags(groups, Settings, defaults=False)
    g = groups["images"]
    g.add_argument("--negative-prompt", metavar="P", help="what guidance leads away from")
    g.add_argument("--init-noise", metavar="FILE.npz", help="noise of another run: latent, vae_0, vae_1, …")
    g.add_argument("--save-latents", action="store_true", help="write output_I.latent.npy too")
    groups["text"].add_argument("--think", action="store_true", help="let the model plan in words first")
    add_flags(groups, EngineConfig, defaults=True)
    hosts.add_flags(groups["serving"])

    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, metavar="S", help="request i uses S + i (default: %(default)s)")
    g.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: float32 on a CPU")
    g.add_argument("--quiet", action="store_true", help="no progress bars, no notes")
    g.add_argument("--version", action="version", version=f"bagel_jax {__version__}")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    p = parser()
    args = p.parse_args(argv)
    if (args.modality is None) == (args.turns is None):
        p.error(f"{'neither' if args.turns is None else 'both'} of --modality and --turns was given; give one of them")
    try:
        config = from_flags(args, EngineConfig)
        team = hosts.join(args.coordinator, args.num_processes, args.process_id)
        if not team.first:
            return team.follow(lambda: _open(args, config))
        with contextlib.closing(team):
            if args.turns is not None:
                return _run_turns(args, config, team)
            return _run(args, config, team, _fill_in(args, argv))
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


def _open(args: argparse.Namespace, config: EngineConfig) -> Bagel:
    from bagel_jax.bagel import Bagel  # late: brings jax, and bad arguments are found without it

    return Bagel.open(args.model, args.dtype, config)


def _run(args: argparse.Namespace, config: EngineConfig, team: hosts.Team, notes: Sequence[str]) -> int:
    prompts = _prompts(args)
    requests = _requests(args, prompts)
    output = output_folder(args.output)
    if all(isinstance(request, InputError) for request in requests):
        return _report_all_bad(requests)
    for note in () if args.quiet else notes:  # before what the model may refuse, which they explain
        print(f"note: {note}", file=sys.stderr, flush=True)

    model = _open(args, config)
    for i, request in enumerate(requests):
        try:
            if isinstance(request, Request):
                model.check(request)
        except InputError as error:
            requests[i] = error
    if all(isinstance(request, InputError) for request in requests):
        return _report_all_bad(requests)

    code = DONE
    for i, request in enumerate(requests):
        if isinstance(request, InputError):
            print(f"error: request {i}: {request}", file=sys.stderr)
            code = BAD_INPUT
    _tell(model, args)
    team.begin()
    with contextlib.closing(model), Results(output, len(requests), quiet=args.quiet) as results:
        model.load_weights(results.bars)
        records = [
            {"id": f"output_{i}", "modality": args.modality, "prompt": prompt, "seed": args.seed + i}
            for i, prompt in enumerate(prompts)
        ]
        for i, request in enumerate(requests):
            if isinstance(request, InputError):
                results.add(i, records[i] | {"error": str(request)})
        good = {request.request_id: i for i, request in enumerate(requests) if isinstance(request, Request)}
        # A request is prepared, its image decoded, when there is room for it.
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
            results.add(i, records[i] | record)
    return code


def _run_turns(args: argparse.Namespace, config: EngineConfig, team: hosts.Team) -> int:
    """A conversation; it ends at a turn that fails, since those behind it build on it."""
    for name in ("prompts", "txt_prompts", "image_path", "init_noise"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} was given beside --turns; put it into the turns instead")
    usual = settings_of(args) | {"think": args.think}
    if args.negative_prompt is not None:
        usual["negative_prompt"] = args.negative_prompt
    turns = read_turns(args.turns, usual)
    output = output_folder(args.output)

    if args.model is None and not args.quiet:
        print(f"note: {_DEMO_NOTE}", file=sys.stderr, flush=True)

    model = _open(args, config)
    _tell(model, args)
    team.begin()
    with contextlib.closing(model), Results(output, len(turns), quiet=args.quiet) as results:
        model.load_weights(results.bars)
        session = model.session(seed=args.seed, progress=results.bars)
        for i, turn in enumerate(turns):
            said = {"id": f"output_{i}", "prompt": turn.prompt}
            try:
                result = turn.take(session)
                request = session.requests[-1]
                record = results.save(i, request, result, latents=args.save_latents)
            except Exception as error:  # what was finished is kept
                results.say(f"error: turn {i} failed: {error}")
                results.add(i, said | {"error": f"{type(error).__name__}: {error}"})
                return BAD_INPUT if isinstance(error, InputError) else FAILED
            results.add(i, said | {"modality": request.modality, "seed": request.seed} | record)
    return DONE


def _tell(model: Bagel, args: argparse.Namespace) -> None:
    """Says what the model will have on its devices, but for a CPU alone, which has no memory of its own."""
    outlook = model.outlook
    if not args.quiet and (outlook.free is not None or outlook.devices > 1):
        print(f"note: {outlook}", file=sys.stderr, flush=True)


def _requests(args: argparse.Namespace, prompts: list[str]) -> list[Request | InputError]:
    """One request a prompt, or what is wrong with it."""
    paths = args.image_path or []
    if len(paths) not in (0, 1, len(prompts)):
        raise InputError(
            f"--image-path names {len(paths)} images for {len(prompts)} prompts; give one, or one for each prompt"
        )
    noise = None if args.init_noise is None else _read_noise(Path(args.init_noise))
    found = {path: _find(path) for path in dict.fromkeys(paths)}
    requests: list[Request | InputError] = []
    for i, prompt in enumerate(prompts):
        image = found[paths[i if len(paths) > 1 else 0]] if paths else None
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
                **settings_of(args),
            )
        )
    return requests


def _find(path: str) -> ImageFile | InputError:
    try:
        return ImageFile.find(path)
    except InputError as error:
        return error


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
