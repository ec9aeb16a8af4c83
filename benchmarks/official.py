"""Runs the official PyTorch code on jobs from standard input, on a CPU in float32, to compare and time it with ours.

    python -m venv refenv
    refenv/bin/pip install torch==2.13.0 transformers==4.49.0 safetensors accelerate einops pillow numpy
    git clone https://github.com/ByteDance-Seed/Bagel official
    refenv/bin/python benchmarks/official.py --official official --model models/BAGEL-7B-MoT < jobs.jsonl

A job is a json object on a line, its answer another one; a line `{"ready": true, ...}` comes first. A job has

    modality         text2img, img2img, img2text or text2text
    prompt, image    text, and the path of an image
    height, width    of a text2img
    seed             of the noise (0)
    noise            official: PyTorch's own after torch.manual_seed(seed), as in the official app, which has the
                     autoencoder on the CPU too (the default; with do_sample, tokens are drawn from it here, and not
                     there); numpy: RandomState(seed).standard_normal in the order in which it is needed
    init_noise       or instead what --init-noise of bagel_jax.run takes
    output, latents  where to write the image, and the last latents (npy)

and any of `SETTINGS` for the official inferencer; what is not given is as in the official app. An answer has `seconds`
(the inferencer's call), `denoise_seconds` (of those, the denoising steps), `output` and `text`; or `error`, a sentence.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

FILES = "ema.safetensors ae.safetensors config.json llm_config.json vit_config.json vocab.json merges.txt"
FIELDS = ("modality", "prompt", "image", "height", "width", "seed", "noise", "init_noise", "output", "latents")
SETTINGS = (  # max_think_token_n is also the most tokens of an answer
    *("num_timesteps", "timestep_shift", "cfg_text_scale", "cfg_img_scale", "cfg_interval", "cfg_renorm_type"),
    *("cfg_renorm_min", "enable_taylorseer", "think", "max_think_token_n", "do_sample", "text_temperature"),
)
# Source: official `app.py`, where it differs from the inferencer's own.
_IMAGE = {"cfg_text_scale": 4.0, "max_think_token_n": 1024}
_EDIT = {"cfg_img_scale": 2.0, "cfg_interval": [0.0, 1.0], "cfg_renorm_type": "text_channel"}
_ANSWER = {"understanding_output": True, "max_think_token_n": 512}
DEFAULTS = {"text2img": _IMAGE, "img2img": _IMAGE | _EDIT, "img2text": _ANSWER, "text2text": _ANSWER}


class BadInput(ValueError):
    """What whoever gave it can put right, in a sentence."""


class Noise:
    """Takes the place of PyTorch's random numbers, or hands them on."""

    def __init__(self):
        self.reset(0, "official", None)

    def reset(self, seed: int, source: str, path: str | None) -> None:
        """Before a job."""
        if source not in ("official", "numpy"):
            raise BadInput(f"noise is {source!r}; it must be official or numpy")
        torch.manual_seed(seed)
        self.given, self.generator = None, np.random.RandomState(seed) if source == "numpy" else None
        if path is not None:
            arrays = read(lambda: dict(np.load(path)), f"init_noise {path}")
            images = [arrays[f"vae_{i}"] for i in range(len(arrays)) if f"vae_{i}" in arrays]
            self.given = [*images, *(arrays[name] for name in arrays if name == "latent")]

    def randn(self, *shape: int) -> torch.Tensor:
        """The next draw."""
        if self.own:
            return torch.randn(*shape)
        if self.given is None:
            return torch.from_numpy(self.generator.standard_normal(shape).astype(np.float32))
        there = self.given.pop(0) if self.given else np.zeros(0)
        if there.shape != shape:
            raise BadInput(f"init_noise has an array of shape {list(there.shape)} where {list(shape)} is needed")
        return torch.from_numpy(there.astype(np.float32))

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """The next draw."""
        return torch.randn_like(x) if self.own else self.randn(*x.shape)

    @property
    def own(self) -> bool:
        """Whether PyTorch draws."""
        return self.given is None and self.generator is None


def torch_with(**changes: Any) -> ModuleType:
    """A copy of the module `torch` with other values under some names, for one module of the official code to see."""
    copy = ModuleType("torch")
    vars(copy).update(vars(torch) | changes)
    return copy


class Official:
    """The official model, inferencer and transforms, set up as in the official `app.py`."""

    def __init__(self, folder: Path):
        import inferencer
        import modeling.autoencoder
        import modeling.bagel.bagel
        import modeling.bagel.qwen2_navit
        import modeling.bagel.siglip_navit
        from data.data_utils import add_special_tokens
        from data.transforms import ImageTransform
        from modeling.qwen2 import Qwen2Tokenizer

        # All that keeps it from computing in float32 with given noise is looked up in its modules' global `torch`.
        self.noise = Noise()
        modeling.bagel.qwen2_navit.torch = modeling.bagel.siglip_navit.torch = torch_with(bfloat16=torch.float32)
        inferencer.torch = torch_with(autocast=lambda **_: nullcontext())
        modeling.bagel.bagel.torch = torch_with(randn=self.noise.randn)
        modeling.bagel.bagel.tqdm = lambda steps, **_: steps
        modeling.autoencoder.torch = torch_with(randn_like=self.noise.randn_like)

        vae, vae_params = self._autoencoder(folder)
        self.model = self._model(folder, vae_params)
        tokenizer, ids, _ = add_special_tokens(Qwen2Tokenizer.from_pretrained(folder))
        # As in app.py, or what the tables of positions have rows for.
        patch = self.model.vit_patch_size
        vae_most = min(1024, self.model.max_latent_size * self.model.latent_downsample) // 16 * 16
        vit_most = min(980, self.model.vit_max_num_patch_per_side * patch)
        sizes = (vae_most, min(512, vae_most), 16), (vit_most, min(224, vit_most), patch)
        transforms = [ImageTransform(*size) for size in sizes]
        self.inferencer = inferencer.InterleaveInferencer(self.model, vae, tokenizer, *transforms, ids)
        self.generate_image, self.model.generate_image = self.model.generate_image, self._watched

    @staticmethod
    def _autoencoder(folder: Path):
        from modeling.autoencoder import AutoEncoder, AutoEncoderParams

        weights = tensors(path := folder / "ae.safetensors")
        levels = len({name.split(".")[2] for name in weights if name.startswith("decoder.up.")})
        blocks = len({name.split(".")[4] for name in weights if name.startswith("decoder.up.0.block.")})
        widths = [len(weights[f"decoder.up.{i}.block.0.conv1.weight"]) for i in range(levels)]
        base, latents = len(weights["encoder.conv_in.weight"]), weights["decoder.conv_in.weight"].shape[1]
        if any(width % base for width in widths):
            raise BadInput(f"the autoencoder has widths {widths}; the official code needs multiples of {base}")
        stated = json.loads((folder / "config.json").read_text()).get("vae_config", {})
        factors = stated.get("scale_factor", 0.3611), stated.get("shift_factor", 0.1159)
        multipliers = [width // base for width in widths]
        params = AutoEncoderParams(256, 3, 2 ** (levels - 1), base, 3, multipliers, blocks - 1, latents, *factors)
        load(autoencoder := AutoEncoder(params), weights, path)
        return autoencoder.eval(), params

    @staticmethod
    def _model(folder: Path, vae_params):
        from accelerate import init_empty_weights
        from modeling import bagel

        weights = tensors(path := folder / "ema.safetensors")
        llm = bagel.Qwen2Config.from_json_file(folder / "llm_config.json")
        llm.qk_norm, llm.tie_word_embeddings, llm.layer_module = True, False, "Qwen2MoTDecoderLayer"
        llm._attn_implementation = "eager"  # transformers would look for a GPU; the layers are the official code's own
        vit = bagel.SiglipVisionConfig.from_json_file(folder / "vit_config.json")
        vit.rope, vit.num_hidden_layers = False, vit.num_hidden_layers - 1
        config = bagel.BagelConfig(
            llm_config=llm,
            vit_config=vit,
            vae_config=vae_params,
            vit_max_num_patch_per_side=round(len(weights["vit_pos_embed.pos_embed"]) ** 0.5),
            latent_patch_size=round((weights["vae2llm.weight"].shape[1] / vae_params.z_channels) ** 0.5),
            max_latent_size=round(len(weights["latent_pos_embed.pos_embed"]) ** 0.5),
        )
        with init_empty_weights():
            model = bagel.Bagel(bagel.Qwen2ForCausalLM(llm), bagel.SiglipVisionModel(vit), config)
            model.vit_model.vision_model.embeddings.convert_conv2d_to_linear(vit, meta=True)
        load(model, weights, path)
        return model.eval()

    def _watched(self, **kwargs):
        started = time.perf_counter()
        latents = self.generate_image(**kwargs)
        self.latents, self.denoise_seconds = latents[0], time.perf_counter() - started
        return latents

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """What a job gives; raises `BadInput` for one that cannot be done."""
        if unknown := job.keys() - {*FIELDS, *SETTINGS}:
            raise BadInput(f"the job has a field {min(unknown)!r}; it may have {', '.join((*FIELDS, *SETTINGS))}")
        if job.get("modality") not in DEFAULTS or not isinstance(job.get("prompt"), str):
            raise BadInput(f"the job needs a modality, one of {', '.join(DEFAULTS)}, and a prompt")
        modality, path = job["modality"], job.get("image")
        if modality.startswith("img") != (path is not None):
            raise BadInput(f"image is {path!r}; {modality} takes {'one' if path is None else 'none'}")
        settings = DEFAULTS[modality] | {name: job[name] for name in SETTINGS if name in job}
        if modality == "text2img":
            settings["image_shapes"] = job.get("height", 1024), job.get("width", 1024)
        image = None if path is None else read(lambda: Image.open(path).copy(), f"image {path}")
        self.noise.reset(job.get("seed", 0), job.get("noise", "official"), job.get("init_noise"))
        trunk = self.model.language_model.model
        for module in (trunk, *trunk.layers):
            module.enable_taylorseer = False  # left on by a job before, it would guess the next one's context
        self.latents, self.denoise_seconds = None, None
        started = time.perf_counter()
        result = self.inferencer(image=image, text=job["prompt"], **settings)
        seconds = time.perf_counter() - started
        output = None if result["image"] is None else job.get("output")
        if output is not None:
            result["image"].save(output)
        if "latents" in job and self.latents is not None:
            np.save(job["latents"], self.latents.numpy())
        return {"seconds": seconds, "denoise_seconds": self.denoise_seconds, "output": output, "text": result["text"]}


def read(reader, path: str | Path):
    """What `reader` gives; whatever it raises becomes a sentence about `path`."""
    try:
        return reader()
    except Exception as error:
        raise BadInput(f"{path} cannot be read ({str(error).splitlines()[0]})") from None


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file, in float32."""
    return {name: x.float() for name, x in read(lambda: load_file(path), path).items()}


def load(module: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Puts the weights into the module, all of them."""
    missing, unexpected = read(lambda: module.load_state_dict(weights, strict=False, assign=True), path)
    if missing or unexpected:
        name, what = (missing[0], "missing from") if missing else (unexpected[0], "not expected in")
        raise BadInput(f"tensor {name} is {what} {path}")


def main() -> int:
    """Answers jobs until there are no more; returns the exit code: 0 or 2 (bad input)."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--official", type=Path, required=True, metavar="DIR", help="a clone of ByteDance-Seed/Bagel")
    p.add_argument("--model", type=Path, required=True, metavar="DIR", help="a checkpoint in the published layout")
    p.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="of PyTorch (%(default)s)")
    args = p.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # the official code prints
    sys.path[:0] = [str(Path(__file__).parent / "official_stand_ins"), str(args.official)]
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    try:
        for path in (args.official / "inferencer.py", *(args.model / name for name in FILES.split())):
            if not path.exists():
                raise BadInput(f"{path} is not there; see --help for what is needed")
        official = Official(args.model)
    except (BadInput, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ready = {"ready": True, "torch": torch.__version__, "threads": args.threads}
    print(json.dumps(ready | {"load_seconds": time.perf_counter() - started}), file=answers, flush=True)
    for line in filter(str.strip, sys.stdin):
        try:
            answer = official.answer(json.loads(line))
        except Exception as error:  # the other jobs go on
            answer = {"error": str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
