"""Depth from photos, once by this project and once by diffusers' and transformers' modules.

    python -m tests.reference.sides ours MODEL.safetensors RES OUT PHOTO...
    python -m tests.reference.sides diffusers FOLDER RES OUT PHOTO...

writes OUT/NAME.npy for each photo. Two programs, so that each can be timed and weighed alone.
"""

import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F


def predict_with_diffusers(folder, change=lambda unet: unet):
    """image uint8 H,W,3, processing_res -> float32 H,W in [0,1], as a function of the folder.

    change: what is done to the U-Net, where a model has more than diffusers knows of.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    text = text(torch.tensor([[49406, 49407]])).last_hidden_state
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    unet = change(UNet2DConditionModel.from_pretrained(folder / "unet").eval())

    def predict(image, processing_res):
        height, width = image.shape[:2]
        scale = processing_res / max(height, width)
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        x = F.interpolate(x, (int(height * scale), int(width * scale)), mode="bilinear",
                          antialias=True).round().clamp(0, 255)
        latent = vae.encode(x / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor
        latent = unet(latent, 1, encoder_hidden_states=text).sample
        depth = vae.decode(latent / vae.config.scaling_factor).sample
        depth = (depth.mean(1, keepdim=True).clip(-1, 1) + 1) / 2
        depth = F.interpolate(depth, (height, width), mode="bilinear", antialias=True)
        return depth[0, 0].clamp(0, 1).numpy()

    return predict


def predict_with_ours(file):
    from nets.depthmaster import DepthMaster

    return DepthMaster.from_file(file).predict


@torch.no_grad()
def main(side, model, processing_res, out, *photos):
    load = {"ours": predict_with_ours, "diffusers": predict_with_diffusers}[side]
    predict = load(Path(model))
    Path(out).mkdir(parents=True, exist_ok=True)
    for photo in photos:
        depth = predict(iio.imread(photo)[..., :3], int(processing_res))
        np.save(Path(out, Path(photo).stem + ".npy"), depth)


if __name__ == "__main__":
    main(*sys.argv[1:])
