"""One full-size step of stage 1 against the same step built from diffusers and transformers.

    python tests/reference/full_step.py FOLDER

in the reference environment; 24 GiB of memory, 15 GB of disk, a quarter of an hour on 2 cores.
It writes random Stable Diffusion 2 and DINOv2 ViT-g in their official layouts into FOLDER, converts
them, and does the step (480x640, one sample, float32) twice, each in a process of its own. What is
compared: every loss, and the norm of the gradient of every parameter.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

EMPTY_PROMPT = [[49406, 49407]]
SD2_UNET = dict(
    sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20],
    block_out_channels=[320, 640, 1280, 1280], use_linear_projection=True)
SD2_VAE = dict(
    block_out_channels=[128, 256, 512, 512], latent_channels=4, layers_per_block=2,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
SD2_TEXT = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16,
    hidden_act="gelu", vocab_size=49408, projection_dim=512)
VIT_G = dict(
    hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, use_swiglu_ffn=True,
    mlp_ratio=4, image_size=518, patch_size=14)


@torch.no_grad()
def perturb(module):
    """Makes every bias and affine parameter count."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)


def make(folder):
    """Random networks in the official layouts, and the sample."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    for name, build in {
        "sd2/unet": lambda: UNet2DConditionModel(**SD2_UNET),
        "sd2/vae": lambda: AutoencoderKL(**SD2_VAE),
        "sd2/text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**SD2_TEXT)),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**VIT_G)),
    }.items():
        if (folder / name).exists():
            continue
        module = build()
        perturb(module)
        module.save_pretrained(folder / name)
        del module
    smooth = F.interpolate(torch.rand(2, 3, 12, 16), size=(480, 640), mode="bicubic")
    valid = torch.ones(1, 1, 480, 640, dtype=torch.bool)
    valid[:, :, 100:131, 200:301] = False
    valid[:, :, 7, 9] = False
    torch.save({"image": (255 * smooth[:1].clamp(0, 1)).to(torch.uint8),
                "target": (2 * smooth[1:, :1] - 1).clamp(-1, 1), "valid": valid,
                "adapter": [torch.randn(shape) * 0.03 for shape in
                            ((1536, 1280), (1536,), (1536, 1536), (1536,), (1536, 1536), (1536,))]},
               folder / "sample.pt")


def report(folder, name, losses, gradients, started):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = dict(losses={key: value.item() for key, value in losses.items()}, peak_gib=peak,
                  seconds=time.perf_counter() - started, gradients=gradients)
    (folder / f"{name}.json").write_text(json.dumps(result))


def ours(folder):
    """The step as train_stage1.py does it, Adam included; names are diffusers'."""
    from nets.official import layouts
    from nets.depthmaster import DepthMaster
    from nets.dinov2 import DINOv2
    from train_stage1 import Stage1
    started = time.perf_counter()
    sample = torch.load(folder / "sample.pt")
    model = DepthMaster.from_file(folder / "sd2.safetensors")
    teacher = DINOv2.from_file(folder / "dinov2.safetensors")
    objective = Stage1(model, teacher, "mid", "kl")
    objective.unet.checkpoint_activations = True
    for parameter, value in zip(objective.adapter.parameters(), sample.pop("adapter")):
        parameter.data.copy_(value)
    trained = [*objective.unet.parameters(), *objective.adapter.parameters()]
    optimizer = torch.optim.Adam(trained, lr=3e-5, fused=True)
    losses = {name: loss.mean() for name, loss in objective(sample).items()}
    sum(losses.values()).backward()
    layout = layouts.choose("unet", diffusers_names(folder))
    gradients = {layouts.their_names(name, layout)[0]: parameter.grad.norm().item()
                 for name, parameter in objective.unet.named_parameters()}
    gradients |= {f"adapter.{name}": parameter.grad.norm().item()
                  for name, parameter in objective.adapter.named_parameters()}
    optimizer.step()
    report(folder, "ours", losses, gradients, started)


def diffusers_names(folder):
    from safetensors import safe_open
    with safe_open(folder / "sd2/unet/diffusion_pytorch_model.safetensors", "pt") as file:
        return list(file.keys())


def teacher_tokens(folder, image):
    """ViT-g's tokens at 420x560, given position embeddings resized by DINOv2's own rule."""
    from transformers import Dinov2Model
    teacher = Dinov2Model.from_pretrained(folder / "dinov2").eval()
    table = teacher.embeddings.position_embeddings.detach()
    patches = table[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, scale_factor=(30.1 / 37, 40.1 / 37), mode="bicubic")
    resized = torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
    teacher.embeddings.interpolate_pos_encoding = lambda *_: resized
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = (image / 255 - mean) / std
    x = F.interpolate(x, scale_factor=0.875, mode="bicubic")
    return teacher(x).last_hidden_state[:, 1:]


def reference(folder):
    """The same step from the other libraries' modules and formulas written again."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel
    started = time.perf_counter()
    sample = torch.load(folder / "sample.pt")
    with torch.no_grad():
        tokens = teacher_tokens(folder, sample["image"])
        maps = tokens.transpose(1, 2).reshape(1, 1536, 30, 40)
        tokens = F.interpolate(maps, size=(8, 10), mode="bicubic").flatten(2).transpose(1, 2)
        text = CLIPTextModel.from_pretrained(folder / "sd2/text_encoder")
        text = text(torch.tensor(EMPTY_PROMPT)).last_hidden_state
        vae = AutoencoderKL.from_pretrained(folder / "sd2/vae")
        z = vae.encode(sample["image"] / 127.5 - 1).latent_dist.mean * 0.18215
        target = vae.encode(sample["target"].repeat(1, 3, 1, 1)).latent_dist.mean * 0.18215
        del vae
    unet = UNet2DConditionModel.from_pretrained(folder / "sd2/unet").train()
    unet.enable_gradient_checkpointing()
    kept = {}
    unet.mid_block.register_forward_hook(lambda *call: kept.update(feature=call[2]))
    z_pred = unet(z, 1, encoder_hidden_states=text).sample
    adapter = [value.requires_grad_() for value in sample["adapter"]]
    x = kept["feature"].flatten(2).transpose(1, 2)
    for layer in range(3):
        x = F.linear(x, *adapter[2 * layer:2 * layer + 2])
        x = F.silu(x) if layer < 2 else x
    alignment = F.kl_div(x.log_softmax(-1), tokens.softmax(-1), reduction="none").mean()
    cells = F.max_pool2d((~sample["valid"]).float(), 8) == 0
    latent = ((z_pred - target) ** 2)[cells.expand(-1, 4, -1, -1)].mean()
    (latent + alignment).backward()
    gradients = {name: parameter.grad.norm().item() for name, parameter in unet.named_parameters()}
    names = [f"adapter.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")]
    gradients |= {name: value.grad.norm().item() for name, value in zip(names, adapter)}
    report(folder, "reference", {"latent": latent, "alignment": alignment}, gradients, started)


def compare(folder):
    """Prints the largest relative differences; exit code 1 if one is over 1e-3."""
    a, b = (json.loads((folder / f"{name}.json").read_text()) for name in ("ours", "reference"))
    assert a["gradients"].keys() == b["gradients"].keys(), "the parameters differ"
    total = sum(value**2 for value in b["gradients"].values()) ** 0.5
    # A gradient of next to nothing (below a millionth of the whole) has no relative error.
    worst = max((abs(a["gradients"][name] - value) / max(value, 1e-6 * total), name)
                for name, value in b["gradients"].items())
    losses = {name: abs(a["losses"][name] / value - 1) for name, value in b["losses"].items()}
    print(f"losses: ours {a['losses']}, reference {b['losses']}, relative difference {losses}")
    print(f"gradients: {len(b['gradients'])} parameters, norm {total:.6g}, largest relative "
          f"difference of a parameter's norm {worst[0]:.2e} ({worst[1]})")
    for name, result in (("ours, with Adam's step", a), ("reference, without", b)):
        print(f"{name}: {result['seconds']:.0f} s, peak {result['peak_gib']:.1f} GiB")
    sys.exit(int(max(worst[0], *losses.values()) > 1e-3))


def main():
    folder = Path(sys.argv[1])
    if len(sys.argv) == 3:
        globals()[sys.argv[2]](folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    again = [sys.executable, __file__, str(folder)]
    convert = [sys.executable, str(ROOT / "convert_sd2.py")]
    subprocess.run([*again, "make"], check=True)
    for name in ("sd2", "dinov2"):
        out = folder / f"{name}.safetensors"
        if not out.exists():
            subprocess.run([*convert, str(folder / name), "--out", str(out)], check=True)
    for side in ("ours", "reference"):
        subprocess.run([*again, side], check=True)
    compare(folder)


if __name__ == "__main__":
    main()
