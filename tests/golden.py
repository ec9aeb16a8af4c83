"""Reading the golden cases, and running one through our stages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bagel_jax.request import Request

DATA = Path(__file__).parent / "data"

GENERATION = (
    "text2img",
    "text2img_nocfg",
    "text2img_channel",
    "text2img_think",
    "img2img",
    "img2img_two_images",
)
UNDERSTANDING = ("img2text", "text2text")


def relative_error(ours, theirs) -> float:
    """‖a - b‖ / ‖b‖ in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@dataclass
class Case:
    """One golden case."""

    folder: Path
    name: str
    spec: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path, name: str) -> Case:
        with np.load(folder / f"{name}.npz") as arrays:
            return cls(folder, name, json.loads((folder / f"{name}.json").read_text()), dict(arrays))

    @property
    def noise(self) -> dict[str, np.ndarray]:
        """The draws of the case under the names of `init_noise`."""
        generator = np.random.RandomState(self.spec["noise"]["seed"])
        draws = [generator.standard_normal(shape).astype(np.float32) for shape in self.spec["noise"]["shapes"]]
        return {f"vae_{i}": draw for i, draw in enumerate(draws[:-1])} | ({"latent": draws[-1]} if draws else {})

    def inputs(self) -> list[str | Image.Image]:
        return [
            Image.open(self.folder / item["image"]) if "image" in item else item["text"] for item in self.spec["inputs"]
        ]

    @property
    def modality(self) -> str:
        source = "img" if any("image" in item for item in self.spec["inputs"]) else "text"
        return f"{source}2{'text' if self.spec['params']['understanding_output'] else 'img'}"

    @property
    def texts(self) -> list[str]:
        return [item["text"] for item in self.spec["outputs"] if "text" in item]

    @property
    def image(self) -> np.ndarray:
        name = next(item["image"] for item in self.spec["outputs"] if "image" in item)
        return np.asarray(Image.open(self.folder / name))

    def request(self, **overrides: Any) -> Request:
        """The case as a request of ours."""
        p = self.spec["params"]
        settings = {name: p[name] for name in ("do_sample", "text_temperature")}
        if p["understanding_output"]:
            settings["max_tokens"] = p["max_think_token_n"]
        else:
            names = ("cfg_text_scale", "cfg_img_scale", "cfg_interval", "timestep_shift", "cfg_renorm_min")
            settings |= {name: p[name] for name in (*names, "cfg_renorm_type")}
            settings |= {"steps": p["num_timesteps"], "max_think_tokens": p["max_think_token_n"]}
            if "image_shapes" in p:
                settings["height"], settings["width"] = p["image_shapes"]
            if p.get("enable_taylorseer"):  # the official constants
                settings |= {"taylorseer": True, "taylorseer_interval": 3, "taylorseer_order": 6, "taylorseer_first": 5}
        settings |= overrides
        noise = None if p["understanding_output"] else self.noise
        return Request.create(self.modality, inputs=self.inputs(), think=p["think"], init_noise=noise, **settings)
