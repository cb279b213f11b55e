"""--compile for real, with inductor: the same numbers, and where the graph breaks.

(The other tests of the trainers replace torch.compile: each compilation takes a minute.)
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from nets.unet import UNet
from tests.worlds import SHORT, UNET, files  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
ODD = 13, 17


def unet(fourier):
    torch.manual_seed(0)
    made = UNet(**UNET, fourier=fourier)
    torch.nn.init.normal_(made.text_embedding)
    return made


def step(network, call, size=ODD):
    """(latent, feature, gradients of all weights) of a call of the network."""
    torch.manual_seed(1)
    network.zero_grad()
    latent, feature = call(torch.randn(2, 4, *size))
    (latent.square().mean() + feature.square().mean()).backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return latent.detach(), feature.detach(), torch.cat(gradients).clone()


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    counters.clear()
    torch.set_grad_enabled(True)  # other files here switch it off
    yield
    torch.set_grad_enabled(False)
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fourier", [False, True])
def test_the_graph_breaks_at_complex_numbers_only(fourier, recompute):
    network = unet(fourier)
    network.checkpoint_activations = recompute
    compiled = torch.compile(network, dynamic=False, backend="eager")
    for size in (ODD, ODD, (8, 10), ODD):
        step(network, compiled, size)
    breaks = counters["graph_break"]
    assert all("FourierEnhancement.frequency_pass" in reason for reason in breaks)
    assert bool(breaks) == fourier
    assert counters["stats"]["unique_graphs"] <= (8 if fourier else 2)  # of two sizes


def test_inductor_gives_the_same_numbers():
    network = unet(fourier=True)
    expected = step(network, network)
    found = step(network, torch.compile(network, dynamic=False))
    for one, other in zip(found, expected):
        assert ((one - other).norm() / other.norm()).item() < 1e-5


def losses(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_two_ranks_train_compiled_as_they_do_without(files, tmp_path):  # noqa: F811
    for name, options in (("plain", ()), ("compiled", ("--compile",))):
        words = ["train_stage2.py", "--ckpt", files / "stage1.safetensors", "--data",
                 files / "pairs", "--size", 104, 136, "--out", tmp_path / name, *SHORT, "--steps",
                 3, "--micro-batch", 1, "--validate-every", 99, *options]
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc_per_node", "2", *map(str, words)], cwd=ROOT, check=True,
                       timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1",
                                                      "TORCHINDUCTOR_COMPILE_THREADS": "1"})
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    names = [set(torch.load(tmp_path / name / "state.pt")["trained"])
             for name in ("plain", "compiled")]
    assert names[0] == names[1]
