"""Makes the small foundation models that stand in for Stable Diffusion 2 and DINOv2.

    make miniature      # renders the scenes and calls this file's parts and train_stage1.py

They are pre-trained as the big ones were, in the same classes: an autoencoder of pictures and depth
maps; a U-Net that denoises the latents of pictures (so that depth training starts from a generative
prior, as in the paper); a ViT that names the objects in each patch (so that its features are
semantic). Depth is then trained on top by train_stage1.py and train_stage2.py.
"""

import argparse
import math
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from data.hypersim import Hypersim
from data.transforms import BadSample, normalise_target
from data.vkitti import VirtualKITTI
from engine import job
from engine.step import set_learning_rate
from losses.alignment import teacher_image
from miniature.render import CLASSES
from nets import model_file
from nets.depthmaster import DepthMaster
from nets.dinov2 import DINOv2
from nets.unet import UNet
from nets.vae import AutoencoderKL

VAE = dict(channels=(16, 32, 48, 64), layers=1, groups=8)
UNET = dict(channels=(64, 96, 104), layers=1, attention=(False, True, True), heads=(2, 3, 4),
            text_width=32, groups=8)
TEACHER = dict(width=96, depth=6, heads=3, swiglu=False, grid=16)
TRAIN_SIZE, PROCESSING_RES = (192, 256), 256
SOURCES = ["python -m miniature.pretrain"]
LICENCE = "as the code: trained on procedural scenes only"


# ---------------------------------------------------------------------------- scenes in memory


class Scenes(torch.utils.data.Dataset):
    """Training scenes as (image uint8 3,H,W; target 1,H,W; class ids H,W), rooms before streets."""

    def __init__(self, root):
        rooms = Hypersim(root / "hypersim", split="train", filter=False)
        streets = VirtualKITTI(root / "vkitti", split="train", crop=(96, 336))
        self.readers = [rooms, streets]

    def __len__(self):
        return sum(len(reader) for reader in self.readers)

    def __getitem__(self, index):
        rooms, streets = self.readers
        reader, index = (rooms, index) if index < len(rooms) else (streets, index - len(rooms))
        try:
            sample = reader[index]
            target = normalise_target(sample["depth"], sample["valid"])
        except BadSample:
            return None
        classes = semantic_classes(reader, index) if reader is rooms else None
        return sample["image"], target.half(), classes


def semantic_classes(rooms, index):
    """Class ids H,W (uint8) of a room, from the file beside the depth."""
    path = rooms.depth_path(index)
    with h5py.File(path.with_name(path.name.replace("depth_meters", "semantic"))) as file:
        return torch.from_numpy(file["dataset"][:].clip(0).astype(np.uint8))


def load(root, workers=2):
    """All scenes, stacked by size: [(images, targets, classes or None)]."""
    loader = torch.utils.data.DataLoader(Scenes(root), batch_size=None, num_workers=workers)
    samples = [s for s in tqdm(loader, desc="reading scenes") if s is not None]
    stacked = []
    for size in sorted({s[0].shape for s in samples}):
        chosen = [s for s in samples if s[0].shape == size]
        images, targets, classes = zip(*chosen)
        classes = torch.stack(classes) if classes[0] is not None else None
        stacked.append((torch.stack(images), torch.stack(targets), classes))
    return stacked


def to_unit(image):
    return image.float() / 127.5 - 1


# ---------------------------------------------------------------------------- training helpers


class Average:
    """Exponential moving average of a module's weights, which is what gets saved."""

    def __init__(self, module, decay=0.999):
        self.module, self.decay, self.count = module, decay, 0
        self.weights = {k: v.detach().clone() for k, v in module.state_dict().items()}

    def update(self):
        self.count += 1
        decay = min(self.decay, self.count / (self.count + 10))
        for name, value in self.module.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)


def train(name, module, loss, steps, lr, log_every=200):
    """Adam with a cosine schedule; loss(step) -> scalar. Returns the averaged weights."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01,
                                  fused=True)
    average, total = Average(module), 0.0
    progress = tqdm(range(steps), desc=name, mininterval=10)
    for step in progress:
        rate = lr * min((step + 1) / 200, 0.5 * (1 + math.cos(math.pi * step / steps)))
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.update()
        total += value.item()
        if (step + 1) % log_every == 0:
            print(f"{name} step {step + 1} loss {total / log_every:.5f}", flush=True)
            total = 0.0
    module.load_state_dict(average.weights)


def random_crops(images, targets, count, size, generator):
    """`count` crops in [-1,1], three pictures to five depth maps: count,3,h,w."""
    crops = []
    for place in range(count):
        index = int(torch.randint(len(images), (), generator=generator))
        top = int(torch.randint(images.shape[2] - size[0] + 1, (), generator=generator))
        left = int(torch.randint(images.shape[3] - size[1] + 1, (), generator=generator))
        window = (slice(None), slice(top, top + size[0]), slice(left, left + size[1]))
        if place % 8 < 5:
            crops.append(targets[index][window].float().expand(3, -1, -1))
        else:
            crops.append(to_unit(images[index][window]))
    crops = torch.stack(crops)
    return crops.flip(3) if int(torch.randint(2, (), generator=generator)) else crops


# ---------------------------------------------------------------------------- the three models


def edges(x):
    """Differences to the right and to the bottom neighbour."""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def train_vae(scenes, steps, seed):
    """The autoencoder on crops of pictures and depth maps: L1, L1 of the edges, a little KL."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = AutoencoderKL(**VAE, scaling_factor=1.0)
    shares = torch.tensor([len(images) for images, _, _ in scenes], dtype=torch.float)

    def loss(step):
        images, targets, _ = scenes[int(torch.multinomial(shares, 1, generator=generator))]
        x = random_crops(images, targets, 8, (96, 160), generator)
        with torch.autocast("cpu", torch.bfloat16):
            mean, log_variance = vae.moments(x)
            mean, log_variance = mean.float(), log_variance.float()
            noise = torch.randn(mean.shape, generator=generator)
            y = vae.decode(mean + noise * torch.exp(0.5 * log_variance)).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        sharp = sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y)))
        return (x - y).abs().mean() + sharp + 3e-5 * kl

    train("vae", vae, loss, steps, lr=2e-3)
    with torch.no_grad():
        spread = encode_all(vae, scenes[-1][0][:512]).float().std()
    vae.scaling_factor = round(1 / float(spread), 5)
    return vae


@torch.no_grad()
def encode_all(vae, images):
    """uint8 images N,3,H,W -> scaled mean latents N,4,h,w, half precision."""
    return torch.cat([vae.encode(to_unit(batch)).half() for batch in images.split(16)])


def train_denoiser(vae, scenes, steps, seed):
    """The U-Net on noisy latents of pictures, v-prediction (as Stable Diffusion 2, 768 px)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    unet = UNet(**UNET)
    unet.text_embedding.normal_(generator=generator)
    latents = [encode_all(vae, images) for images, _, _ in scenes]
    shares = torch.tensor([len(group) for group in latents], dtype=torch.float)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)

    def loss(step):
        group = latents[int(torch.multinomial(shares, 1, generator=generator))]
        z = group[torch.randint(len(group), (8,), generator=generator)].float()
        t = torch.randint(1000, (8,), generator=generator)
        noise = torch.randn(z.shape, generator=generator)
        a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            v, _ = unet(a * z + s * noise, timestep=t)
        return (v.float() - (a * noise - s * z)).square().mean()

    train("denoiser", unet, loss, steps, lr=5e-4)
    return unet


def train_teacher(vit, scenes, steps, seed, dtype=torch.bfloat16):
    """The ViT on rooms: which share of each patch belongs to which class (soft cross-entropy)."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(vit.width, len(CLASSES))
    images, _, classes = next(group for group in scenes if group[2] is not None)

    def loss(step):
        chosen = torch.randint(len(images), (16,), generator=generator)
        image, ids = to_unit(images[chosen]), classes[chosen]
        if int(torch.randint(2, (), generator=generator)):
            image, ids = image.flip(3), ids.flip(2)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            seen = teacher_image(image, vit.patch, vit.mean, vit.std)
            logits = head(vit(seen)).float()  # B,N,classes; a patch is 16 pixels
        ids = rearrange(ids.long(), "b (h p) (w q) -> b (h w) (p q)", p=16, q=16)
        shares = F.one_hot(ids, len(CLASSES)).float().mean(dim=2)
        return F.cross_entropy(logits.flatten(0, 1), shares.flatten(0, 1))

    train("teacher", nn.ModuleList([vit, head]), loss, steps, lr=1e-3)
    return vit


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=["vae", "denoiser", "teacher", "publish"])
    parser.add_argument("--scenes", type=Path, default=Path("miniature/scenes"))
    parser.add_argument("--out", type=Path, default=Path("weights"))
    parser.add_argument("--work", type=Path, default=Path("runs/miniature"),
                        help="where the parts lie until the files are assembled (%(default)s)")
    parser.add_argument("--vae-steps", type=int, default=8000)
    parser.add_argument("--denoiser-steps", type=int, default=4000)
    parser.add_argument("--teacher-steps", type=int, default=2000)
    parser.add_argument("--ckpt", type=Path, help="what `publish` writes in half precision as "
                        "miniature.safetensors")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    if args.parts == ["publish"]:
        if not args.ckpt:
            parser.error("publish needs --ckpt, the model to publish")
        DepthMaster.from_file(args.ckpt).save(args.out / "miniature.safetensors", torch.float16)
        return
    scenes = load(args.scenes)
    args.work.mkdir(parents=True, exist_ok=True)
    vae_file = args.work / "vae.pt"
    if "vae" in args.parts:
        vae = train_vae(scenes, args.vae_steps, args.seed)
        torch.save((vae.scaling_factor, vae.state_dict()), vae_file)
    if "denoiser" in args.parts:
        factor, weights = torch.load(vae_file)
        vae = dict(VAE, scaling_factor=factor)
        model = DepthMaster(vae=vae, unet=UNET, train_size=TRAIN_SIZE,
                            processing_res=PROCESSING_RES)
        model.vae.load_state_dict(weights)
        model.unet = train_denoiser(model.vae, scenes, args.denoiser_steps, args.seed)
        model.sources, model.licence = SOURCES, LICENCE
        model.save(args.out / "miniature_sd2.safetensors", torch.float16)
    if "teacher" in args.parts:
        torch.manual_seed(args.seed)
        teacher = train_teacher(DINOv2(**TEACHER), scenes, args.teacher_steps, args.seed)
        header = dict(kind="dinov2", config=TEACHER, sources=SOURCES, licence=LICENCE)
        tensors = {name: value.half() for name, value in teacher.state_dict().items()}
        model_file.save(args.out / "miniature_dinov2.safetensors", tensors, header)


if __name__ == "__main__":
    job.run(main)
