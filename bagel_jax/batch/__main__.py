"""The command line of batch jobs: `python -m bagel_jax.batch JOB --output DIR`.

Start it as often as you like, on as many machines, with the same JOB and DIR: each is one more worker.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bagel_jax import __version__, hosts
from bagel_jax.batch.job import Defaults, Job, identity
from bagel_jax.batch.output import JobFolder
from bagel_jax.batch.places import place
from bagel_jax.batch.presets import PRESETS, open_preset, preset_flags
from bagel_jax.batch.progress import Progress, device_memory
from bagel_jax.batch.sheet import write_sheet
from bagel_jax.batch.sources import open_source
from bagel_jax.batch.stats import table
from bagel_jax.batch.worker import Worker
from bagel_jax.command import BAD_INPUT, DONE, FAILED, INTERRUPTED, Parser, add_flags, from_flags
from bagel_jax.demo.example import MODEL
from bagel_jax.errors import InputError
from bagel_jax.options import MODALITIES, Settings, settings_of
from bagel_jax.request import Request, Result
from bagel_jax.results import output_folder
from bagel_jax.settings import EngineConfig

if TYPE_CHECKING:
    from bagel_jax.bagel import Bagel

STRICT = 3  # exit code of a job that is done, with errors in it


def parser() -> argparse.ArgumentParser:
    """The options; those of a request are for lines that do not say otherwise."""
    p = Parser(
        prog="python -m bagel_jax.batch",
        description="Answers a file of requests, a JSON object a line; goes on where an earlier run of it ended. "
        "A .parquet file has a request a row, a folder of images one for each image and prompt. "
        "Run it several times at once, on any machines that see the same folder, to have more workers.",
        allow_abbrev=False,
    )
    p.add_argument(
        "job", metavar="JOB", help='a line a request: {"modality": "text2img", "prompt": "a red bench", "height": 512}'
    )
    p.add_argument(
        "--output", required=True, metavar="DIR", help="where results go, also gs://… or s3://…; the same for all"
    )
    p.add_argument("--model", metavar="DIR", help="a BAGEL checkpoint (default: the bundled demo model)")
    p.add_argument("--modality", choices=MODALITIES, help="of lines that do not say theirs")
    p.add_argument(
        "--prompts",
        nargs="+",
        action="extend",
        metavar="P",
        help="for each image, where JOB is a folder of them",
    )
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="line i uses S + i, or with several images S + i N (default: %(default)s)",
    )
    groups = {name: p.add_argument_group(name) for name in ("images", "text", "serving")}
    add_flags(groups, Settings, defaults=False)
    groups["images"].add_argument("--negative-prompt", metavar="P", help="what guidance leads away from")
    groups["text"].add_argument("--think", action="store_true", help="let the model plan in words first")
    add_flags(groups, EngineConfig, defaults=True)
    hosts.add_flags(groups["serving"])
    g = p.add_argument_group("job")
    g.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="JOB is this benchmark's own file of prompts; defaults and folders are its official evaluation's",
    )
    g.add_argument("--shard-size", type=int, default=1000, metavar="N", help="lines a part of the output (%(default)s)")
    g.add_argument("--num-images", type=int, default=1, metavar="N", help="images a line, of N seeds (%(default)s)")
    g.add_argument(
        "--format",
        default="files",
        choices=("files", "webdataset"),
        help="images as files, or with the records in a tar file a part (%(default)s)",
    )
    g.add_argument(
        "--retry-errors", action="store_true", help="compute lines anew that are errors so far, and only them"
    )
    g.add_argument("--strict", action="store_true", help=f"exit with {STRICT} if the job is done but lines failed")
    g.add_argument(
        "--grace", type=float, default=20, metavar="S", help="seconds from SIGTERM or SIGINT to the end (%(default)s)"
    )
    g.add_argument(
        "--dead-after",
        type=float,
        default=30,
        metavar="S",
        help="seconds without a sign of life after which another worker is taken for dead (%(default)s)",
    )
    g.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: float32 on a CPU")
    g.add_argument(
        "--progress", default="auto", choices=("auto", "bar", "log", "none"), help="auto: a bar in a terminal"
    )
    g.add_argument("--version", action="version", version=f"bagel_jax {__version__}")
    return p


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the defaults of its preset, if it has one."""
    p = parser()
    args = p.parse_args(argv)
    if args.preset:
        p.set_defaults(**preset_flags(args.preset, args.think))
        args = p.parse_args(argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parsed(argv)
    try:
        config = from_flags(args, EngineConfig)
        team = hosts.join(args.coordinator, args.num_processes, args.process_id)
        if not team.first:
            return team.follow(lambda: _open(args, config))
        with contextlib.closing(team):
            return _run(args, config, team)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:  # while the model is loaded
        return INTERRUPTED
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"error: {what}; what was finished is in {args.output}, run the same command again", file=sys.stderr)
        return FAILED


def _open(args: argparse.Namespace, config: EngineConfig) -> Bagel:
    from bagel_jax.bagel import Bagel  # late: brings jax, and bad arguments are found without it

    return Bagel.open(args.model or MODEL, args.dtype, config)


def _run(args: argparse.Namespace, config: EngineConfig, team: hosts.Team) -> int:
    for name, least in (("shard_size", 1), ("num_images", 1), ("grace", 0), ("dead_after", 5)):
        if not getattr(args, name) >= least:
            raise InputError(f"{name} is {getattr(args, name)}; it must be a number, at least {least}")
    Settings(**settings_of(args))  # checked here, once, instead of on every line
    usual = _usual(args)
    preset = open_preset(args) if args.preset else None
    source = preset or open_source(args.job, args.modality, args.prompts)
    job = Job(source)
    if "://" in (args.model or ""):
        raise InputError(f"--model {args.model} is not on this machine; give a folder that is, with a copy of it")
    model_folder = Path(args.model or MODEL)
    output = place(args.output)
    if isinstance(output, Path):
        output = output_folder(args.output)
    if args.prompts is not None and isinstance(output, Path) and output.resolve().is_relative_to(source.base.resolve()):
        raise InputError(f"--output {output} lies in {source.base}, whose images are the job; give another folder")
    model = _open(args, config)
    more = {name: getattr(args, name) for name in ("format", "shard_size", "dtype", "vae_tiling")}
    folder = JobFolder(output, identity(job, model_folder, usual, version=__version__, **more))
    if preset:
        preset.prepare()
    started = time.perf_counter()
    how = {"dead_after": args.dead_after, "retry_errors": args.retry_errors}
    worker = Worker(job, folder, args.shard_size, usual, **how)
    progress = Progress(args.progress, worker.lines, device_memory)

    def run_many(requests: Iterator[Request]) -> Iterator[tuple[Request, Result | Exception]]:
        first = next(requests, None)
        if first is None:  # others have all that is left, and the weights need not be read
            return
        team.begin()
        yield from model.run_many(itertools.chain([first], requests))

    with contextlib.closing(model), contextlib.closing(progress), signals(worker, args.grace):
        worker.run(run_many, progress)
    seconds = time.perf_counter() - started
    summary = folder.summarize()
    if worker.counts.done or not folder.has("sheet.png"):
        write_sheet(folder)
    failed = sum(summary["errors"].values())
    rate = worker.counts.done / max(seconds, 1e-3)
    print(
        f"{summary['lines']:,} lines in {summary['parts']:,} parts, {failed:,} of them errors, see {folder.path}; this "
        f"worker answered {worker.counts.done:,} requests in {seconds:.0f} s, {rate:.2f} a second\n{table(summary)}",
        end="",
        flush=True,
    )
    if preset:
        print(preset.lay_out(folder), flush=True)
    return STRICT if failed and args.strict else DONE


def _usual(args: argparse.Namespace) -> Defaults:
    """What counts for lines that do not say otherwise."""
    given = {"modality": args.modality, "think": args.think or None, "negative_prompt": args.negative_prompt}
    said = settings_of(args) | {name: value for name, value in given.items() if value is not None}
    return Defaults(said, args.seed, args.num_images)


@contextlib.contextmanager
def signals(worker: Worker, grace: float) -> Iterator[None]:
    """SIGTERM and SIGINT end the process within the grace: with what is whole published, and claims released."""
    over, asked = threading.Event(), threading.Event()

    def end(number: int) -> None:
        if worker.stop():  # some block may still be finished
            over.wait(grace)
        with contextlib.suppress(OSError):  # out of reach; others take over what stands still
            worker.let_go()
        os._exit(128 + number)

    def on_signal(number: int, _) -> None:
        if asked.is_set():  # once more: at once
            os._exit(128 + number)
        asked.set()
        # A thread of its own: this one may be in the middle of publishing.
        threading.Thread(target=end, args=(number,), daemon=True).start()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        over.set()
        if asked.is_set():
            threading.Event().wait()  # for `end`
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
