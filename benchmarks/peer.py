"""What a user would run otherwise: the modules of diffusers, with random weights of SD2's size.

The one file here that needs diffusers (tests/requirements-reference.txt).
"""

import torch

UNET = dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20],
            block_out_channels=[320, 640, 1280, 1280], use_linear_projection=True)
VAE = dict(block_out_channels=[128, 256, 512, 512], latent_channels=4, layers_per_block=2,
           down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)


def peer(device, dtype, layout):
    """A function image B,3,H,W in [-1,1] -> depth B,1,H,W, as the released code goes about it."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device(device):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
    unet, vae = (module.to(device, dtype, memory_format=layout).eval() for module in (unet, vae))
    text = torch.randn(1, 2, 1024, device=device, dtype=dtype)

    @torch.inference_mode()
    def predict(image):
        latent = vae.encode(image.to(dtype)).latent_dist.mode() * 0.18215
        latent = unet(latent, 1, encoder_hidden_states=text.expand(len(image), -1, -1)).sample
        return vae.decode(latent / 0.18215).sample.float().mean(1, keepdim=True).clamp(-1, 1)

    return predict
