"""DepthMaster: an image in, one pass through Stable Diffusion 2, a depth map out.

arXiv 2501.02576, section III. What comes out is square-root disparity up to scale and shift:
1 = near, 0 = far.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nets import checkpoint
from nets.fourier import FourierEnhancement
from nets.unet import UNet
from nets.vae import AutoencoderKL

KINDS = ("sd2", "stage1", "stage2")


class DepthMaster(nn.Module):
    """The model with what its file says of it; the defaults are those of the paper, SD2-sized.

    vae, unet: keywords of `AutoencoderKL` and `UNet`, where they differ from SD2's.
    target: what the decoded map is, `sqrt_disparity`, `disparity` or `depth`, in [-1,1].
    train_size: (height, width) of training; processing_res: longest side in prediction.
    """

    def __init__(self, *, vae=None, unet=None, target="sqrt_disparity", train_size=(480, 640),
                 processing_res=768):
        super().__init__()
        self.config = dict(vae=dict(vae or {}), unet=dict(unet or {}), target=target,
                           train_size=list(train_size), processing_res=processing_res)
        self.kind, self.sources, self.licence = "sd2", [], ""
        self.target, self.train_size = target, tuple(train_size)
        self.processing_res = processing_res
        self.vae = AutoencoderKL(**self.config["vae"])
        self.unet = UNet(**self.config["unet"])

    @classmethod
    def from_file(cls, path, device="cpu", dtype=None):
        """Opens a model file of kind sd2 (untrained for depth), stage1 or stage2."""
        header = checkpoint.read_header(path, kinds=KINDS)
        model = checkpoint.build(cls, header["config"], path, device, dtype)
        model.kind, model.sources = header["kind"], header["sources"]
        model.licence = header["licence"]
        return model

    def become(self, kind, target=None, train_size=None):
        """Says what training makes of it: kind, target and (height, width), where they change."""
        self.kind = kind
        self.target = target or self.target
        self.train_size = tuple(train_size or self.train_size)
        self.config.update(target=self.target, train_size=list(self.train_size))

    def add_fourier(self, init="default"):
        """Gives the U-Net the Fourier Enhancement block of stage 2, newly initialised."""
        self.unet.fourier = FourierEnhancement(self.unet.channels[-1], init)
        self.config["unet"]["fourier"] = True

    def save(self, path, dtype=torch.float32):
        """Writes a self-contained model file."""
        tensors = {name: tensor.to(dtype) for name, tensor in self.state_dict().items()}
        header = dict(kind=self.kind, config=self.config, sources=self.sources,
                      licence=self.licence)
        checkpoint.save(path, tensors, header)

    def for_inference(self, device="cpu", precision="auto"):
        """Brings the model to a device and precision (`auto`: bfloat16 on CUDA, else float32).

        channels_last on CUDA only: on the CPU, PyTorch's GroupNorm of a large picture is less
        exact in it (relative error 8e-5 instead of 2e-7 at 128,640,768).
        """
        cuda = torch.device(device).type == "cuda"
        if precision == "auto":
            precision = "bfloat16" if cuda and torch.cuda.is_bf16_supported() else "float32"
        dtype = getattr(torch, precision)
        layout = torch.channels_last if cuda else torch.contiguous_format
        return self.to(device=device, dtype=dtype, memory_format=layout).eval()

    def forward(self, image, timesteps=(1,)):
        """image B,3,H,W in [-1,1] -> depth map B,1,8h,8w, clipped to [-1,1] (Eq. 1-2).

        h, w are H/8, W/8 rounded down. float32 in, float32 out, whatever the weights' precision.
        timesteps: of the passes, each of which starts from the last one's output; the method has
        one, at t = 1 (no noise, no scheduler: the output is the latent).
        """
        latent = self.vae.encode(image.to(self.dtype))
        for timestep in timesteps:
            latent, _ = self.unet(latent, timestep=timestep)
        return self.decode_depth(latent).float().clamp(-1, 1)

    def decode_depth(self, latent):
        """latent B,4,h,w -> depth map B,1,8h,8w: the decoder's channels' mean, not clipped."""
        return self.vae.decode(latent).mean(dim=1, keepdim=True)

    def predict(self, image, processing_res=None):
        """image uint8 H,W,3 -> float32 H,W in [0,1], `target` up to scale and shift.

        processing_res: longest side while processing; None: the model's own, 0: the image's.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image must be uint8 of shape H,W,3, not {image.dtype} of shape "
                             f"{image.shape}.")
        x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))  # a mirrored view, too
        return self.predict_batch(x[None], processing_res)[0].cpu().numpy()

    @torch.inference_mode()
    def predict_batch(self, images, processing_res=None, timesteps=(1,)):
        """images uint8 B,3,H,W -> float32 B,H,W in [0,1] on the model's device, as `predict`.

        timesteps: as in `forward`.
        """
        # Contiguous: a view of H,W,3 would pass for channels-last where no resize follows, and the
        # CPU's GroupNorm is 30 times less exact on that.
        x = images.to(self.device).contiguous().float()
        x = resize(x, self.processing_size(images.shape[2:], processing_res))
        x = x.round().clamp(0, 255)  # to 8 bits, as a saved picture would be
        return to_unit_map(self(x / 127.5 - 1, timesteps), images.shape[2:])

    @torch.inference_mode()
    def round_trip(self, targets, processing_res=None):
        """Normalised targets B,1,H,W in [-1,1], encoded and decoded -> float32 B,H,W in [0,1].

        What the autoencoder alone leaves of the truth: the I2L row of Table II.
        """
        size = self.processing_size(targets.shape[2:], processing_res)
        x = F.interpolate(targets.to(self.device), size=size, mode="nearest-exact")
        latent = self.vae.encode(x.expand(-1, 3, -1, -1).to(self.dtype))
        return to_unit_map(self.decode_depth(latent).float().clamp(-1, 1), targets.shape[2:])

    def processing_size(self, size, processing_res=None):
        """(height, width) at which a picture of another size is processed, as in `predict`."""
        longest = self.processing_res if processing_res is None else processing_res
        # Deviation: whole numbers, where a ratio in floating point can lose a pixel.
        processed = [max(side * longest // max(size), 1) if longest else side for side in size]
        if min(processed) < 8:
            raise ValueError(f"an image of {size[0]} x {size[1]} pixels is too thin: after "
                             "resizing both sides must have at least 8 pixels.")
        return processed

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def dtype(self):
        return self.unet.conv_in.weight.dtype


def to_unit_map(depth, size):
    """Depth maps B,1,h,w in [-1,1] -> B,H,W in [0,1] of another size (H, W)."""
    return resize((depth + 1) / 2, size)[:, 0].clamp(0, 1)


def resize(x, size):
    """B,C,H,W to another (height, width), bilinear with antialias."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", antialias=True)
