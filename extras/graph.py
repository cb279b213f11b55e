"""A model as one graph of a fixed size, for programs without this code: ONNX or torch.export.

The graph takes `image`, float32 B,3,H,W, RGB from 0 to 255, and gives `depth`, float32 B,H,W in
[0,1], the model's map. H and W are fixed multiples of 8, B is free. The graph does not resize.
"""

import logging
import math
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine.terminal import say
from extras.libraries import need
from nets.depthmaster import DepthMaster
from nets.vae import AutoencoderKL
from storage import cant_write, whole

OPSET = 18
LARGE = 1 << 30  # bytes of weights above which ONNX keeps them in a file of their own
CLOSE = {torch.float32: 1e-3, torch.float16: 2e-2}  # largest difference from PyTorch in float32

class Graph(nn.Module):
    """A DepthMaster after `for_inference`, with its Fourier transform as products of matrices."""

    def __init__(self, model, size):
        super().__init__()
        self.vae, self.unet = model.vae, model.unet
        self.encode = model.tiny_encoder or partial(AutoencoderKL.encode, self.vae)
        self.decode = model.tiny_decoder or partial(AutoencoderKL.decode, self.vae)
        if self.unet.fourier is not None:
            h, w = (side // 8 for side in size)
            for _ in self.unet.channels[1:]:
                h, w = (h + 1) // 2, (w + 1) // 2
            self.unet.fourier = RealFourier(self.unet.fourier, h, w)

    def forward(self, image):
        x = (image / 127.5 - 1).to(self.unet.conv_in.weight.dtype)
        latent, _ = self.unet(self.encode(x))
        depth = self.decode(latent).float()
        return (depth[:, 0].clamp(-1, 1) + 1) / 2


class RealFourier(nn.Module):
    """A FourierEnhancement in real numbers, for maps of one size h,w."""

    def __init__(self, block, h, w):
        super().__init__()
        self.block, half = block, w // 2 + 1
        counts = torch.full((half,), 2.0)  # a column stands for itself and for its mirror image
        counts[:: w // 2 if w % 2 == 0 else half] = 1  # but these are their own
        tables = *waves(h, h), *waves(w, half), counts
        for name, table in zip(("cos_h", "sin_h", "cos_w", "sin_w", "counts"), tables):
            self.register_buffer(name, table.float())

    def forward(self, x):
        n = self.block.norm(x)
        return self.block.fuse(torch.cat([self.block.spatial_pass(n), self.frequency_pass(n)], 1))

    def frequency_pass(self, n):
        f = F.silu(self.block.conv_f1(n))
        real, imaginary = self.spectrum(f.float())
        amplitude, phase = (real**2 + imaginary**2).sqrt(), angle(real, imaginary)
        amplitude = F.silu(self.block.conv_f2(amplitude.to(f.dtype))).float()
        phase = F.silu(self.block.conv_f4(phase.to(f.dtype))).float()
        maps = self.maps(amplitude * phase.cos(), amplitude * phase.sin())
        return self.block.conv_f3(maps.to(f.dtype) + f)

    def spectrum(self, x):
        """Real maps B,C,h,w -> the real and the imaginary part of rfft2, B,C,h,w//2+1."""
        real, imaginary = x @ self.cos_w, -(x @ self.sin_w)
        return (self.cos_h @ real + self.sin_h @ imaginary,
                self.cos_h @ imaginary - self.sin_h @ real)

    def maps(self, real, imaginary):
        """The inverse, irfft2; the parts that no real map has fall out."""
        down = (self.cos_h @ real - self.sin_h @ imaginary,
                self.cos_h @ imaginary + self.sin_h @ real)
        real, imaginary = (part * self.counts for part in down)
        return real @ self.cos_w.T - imaginary @ self.sin_w.T


def waves(length, count):
    """cos and sin of 2 pi n k / length, / sqrt(length), float64 (length, count), 0 exactly 0."""
    steps = torch.outer(torch.arange(length), torch.arange(count)) % length
    turn = 2 * math.pi * steps.double() / length
    table = torch.stack([turn.cos(), turn.sin()]) / math.sqrt(length)
    return torch.where(table.abs() < 1e-12, 0, table)


def angle(real, imaginary):
    """atan2(imaginary, real) by arctan alone: ONNX has no atan2. 0 where both are 0."""
    there = real != 0
    turn = torch.atan(imaginary / torch.where(there, real, 1))
    beyond = torch.where(imaginary >= 0, math.pi, -math.pi)
    upright = torch.where(imaginary == 0, 0.0, beyond / 2)
    return torch.where(there, torch.where(real < 0, turn + beyond, turn), upright)


# ------------------------------------------------------------- files


def export_graph(path, kind, size, out, dtype=torch.float32):
    """Writes the model at a path as a graph of kind `onnx` or `torch`; returns `out`.

    size: (H, W). The file is run and compared with the model before it gets its name; ValueError if
    they differ.
    """
    if kind == "onnx":
        for library in ("ONNX", "ONNX Script", "ONNX Runtime"):
            need(library)
    if min(size) < 8 or any(side % 8 for side in size):
        raise ValueError(f"--size {size[0]} {size[1]}: both must be multiples of 8.")
    if dtype not in CLOSE:
        raise ValueError("a graph has weights in float32 or float16: choose one (--dtype).")
    model = DepthMaster.from_file(path).for_inference(precision="float32")
    noise = np.random.default_rng(0).integers(0, 256, (1, 3, *(side // 8 for side in size)))
    picture = np.kron(noise, np.ones((8, 8))).astype(np.float32)
    expected = model.predict_batch(torch.from_numpy(picture).byte(), 0).numpy()
    graph = Graph(model.to(dtype), size).eval().requires_grad_(False)  # float32: its tables
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".graph-") as folder:
            file = Path(folder, out.name)
            write, run = (write_onnx, run_onnx) if kind == "onnx" else (write_torch, run_torch)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, about its own code
                write(graph, torch.from_numpy(picture), file, f"{model.target} of {path.name}")
            del graph, model
            difference = float(np.abs(run(file, picture) - expected).max())
            if not difference <= CLOSE[dtype]:
                raise ValueError(f"{out} is not written: its result differs from the model's by "
                                 f"{difference:.2g}.")
            for part in sorted(Path(folder).iterdir(), key=lambda part: part == file):
                with whole(out.with_name(part.name)) as temporary:
                    part.rename(temporary)
    except OSError as error:
        raise cant_write(out, error) from error
    say(f"Its result differs from the model's by {difference:.1g} at most, on [0,1]."
        + (f" Opset {OPSET}." if kind == "onnx" else ""))
    return out


def write_onnx(graph, picture, file, description):
    several = torch.cat([picture, picture])  # a batch of 1 would become a constant
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(
        graph, (several,), input_names=["image"], output_names=["depth"], opset_version=OPSET,
        dynamo=True, verbose=False, dynamic_shapes={"image": {0: torch.export.Dim("batch")}})
    program.model.metadata_props["description"] = description
    weights = sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values())
    program.save(file, external_data=weights > LARGE)


def run_onnx(file, picture):
    runtime = need("ONNX Runtime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return session.run(["depth"], {"image": picture})[0]


def write_torch(graph, picture, file, description):
    several = torch.cat([picture, picture])
    program = torch.export.export(graph, (several,),
                                  dynamic_shapes={"image": {0: torch.export.Dim("batch")}})
    torch.export.save(program, file, extra_files={"description": description})


def run_torch(file, picture):
    return torch.export.load(file).module()(torch.from_numpy(picture)).numpy()
