"""DepthMaster: an image in, one pass through Stable Diffusion 2, a depth map out.

arXiv 2501.02576, section III. By default the output is square-root disparity up to
scale and shift: 1 = near, 0 = far.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nets import model_file, selftest
from nets.fourier import FourierEnhancement
from nets.inference import strips
from nets.inference.folds import fold
from nets.inference.precision import choose
from nets.tiny import TinyDecoder, TinyEncoder
from nets.unet import UNet
from nets.vae import AutoencoderKL

KINDS = ("sd2", "stage1", "stage2")
MANY_PIXELS = 4 << 20  # in a batch; above this, GPUs too compute in strips, to save memory


class DepthMaster(nn.Module):
    """The networks with the settings of a model file; the defaults are the paper's, at SD2's size.

    vae, unet: keywords of `AutoencoderKL` and `UNet`, where they differ from SD2's.
    tiny_encoder, tiny_decoder: keywords of the networks in nets/tiny.py, which then stand in for
    the autoencoder's halves; vae may be False beside both of them.
    target: the quantity in the decoded map, `sqrt_disparity`, `disparity` or `depth`, in [-1,1].
    train_size: (height, width) of training; processing_res: longest side in prediction.
    """

    kinds = KINDS  # of the files that `from_file` opens

    def __init__(self, *, vae=None, unet=None, target="sqrt_disparity", train_size=(480, 640),
                 processing_res=768, tiny_encoder=None, tiny_decoder=None):
        super().__init__()
        self.config = dict(vae=vae is not False and dict(vae or {}), unet=dict(unet or {}),
                           target=target, train_size=list(train_size),
                           processing_res=processing_res)
        self.kind, self.sources, self.licence, self.folded = "sd2", [], "", False
        self.target, self.train_size = target, tuple(train_size)
        self.processing_res = processing_res
        self.vae = None if vae is False else AutoencoderKL(**self.config["vae"])
        self.unet = UNet(**self.config["unet"])
        self.tiny_encoder, self.tiny_decoder = None, None
        if tiny_encoder is not None:
            self.add_tiny("tiny_encoder", TinyEncoder(**tiny_encoder), tiny_encoder)
        if tiny_decoder is not None:
            self.add_tiny("tiny_decoder", TinyDecoder(**tiny_decoder), tiny_decoder)
        if not (self.vae or self.tiny_encoder and self.tiny_decoder):
            raise ValueError("an autoencoder is missing")

    @classmethod
    def from_file(cls, path, device="cpu", dtype=None, autoencoder=None):
        """Opens a model file of kind sd2 (untrained for depth), stage1 or stage2.

        autoencoder: `full` or `tiny`, which must be there; None: the tiny one's halves that are
        there, else the full one's. ValueError if it can't be opened so.
        """
        header = model_file.read_header(path, kinds=cls.kinds)
        model = model_file.build(cls, header["config"], path, device, dtype)
        model.kind, model.sources = header["kind"], header["sources"]
        model.licence = header["licence"]
        if autoencoder == "tiny" and not model.approximate:
            raise ValueError(f"{path} has no tiny autoencoder: leave out --autoencoder, or attach "
                             "one (convert_sd2.py --autoencoder, distill.py).")
        if autoencoder == "full":
            if model.vae is None:
                raise ValueError(f"{path} has only the tiny autoencoder: give the file that it was "
                                 "made from.")
            for name in ("tiny_encoder", "tiny_decoder"):
                setattr(model, name, None)
                model.config.pop(name, None)
        return model

    @property
    def approximate(self):
        """Whether a tiny network stands in for a half of the autoencoder."""
        return bool(self.tiny_encoder or self.tiny_decoder)

    def add_tiny(self, name, network, config):
        """Sets the `tiny_encoder` or `tiny_decoder`; config: its keywords."""
        setattr(self, name, network)
        self.config[name] = dict(config)

    def become(self, kind, target=None, train_size=None):
        """Sets the trained model's kind, target and train_size (height, width); None: unchanged."""
        self.kind = kind
        self.target = target or self.target
        self.train_size = tuple(train_size or self.train_size)
        self.config.update(target=self.target, train_size=list(self.train_size))

    def add_fourier(self, init="default"):
        """Gives the U-Net the Fourier Enhancement block of stage 2, newly initialised."""
        self.unet.fourier = FourierEnhancement(self.unet.channels[-1], init)
        self.config["unet"]["fourier"] = True

    def save(self, path, dtype=torch.float32):
        """Writes a self-contained model file. ValueError after `for_inference`."""
        if self.folded:
            raise ValueError("a model that was folded for inference can't be saved: save the one "
                             "that it was made from.")
        tensors = {name: tensor.to(dtype) for name, tensor in self.state_dict().items()}
        header = dict(kind=self.kind, config=self.config, sources=self.sources,
                      licence=self.licence, selftest=selftest.describe(self, tensors))
        model_file.save(path, tensors, header)

    def is_saved(self, path):
        """Whether a file can be read and has the weights of this model."""
        expected = self.state_dict()
        try:
            with model_file.open_weights(path) as file:
                return set(file.keys()) == expected.keys() and all(
                    torch.equal(file.get_tensor(name), tensor.cpu())
                    for name, tensor in expected.items())
        except (OSError, ValueError):
            return False

    def for_inference(self, device="cpu", precision="auto", timesteps=(1,)):
        """Makes the model fast and returns it; afterwards it can't be trained or saved.

        Brings it to a device and a precision (nets/inference/precision.py), channels last, and
        folds constants into weights (nets/inference/folds.py). timesteps: as for `forward`.
        """
        if not self.folded:
            self.leave_out_unused()
            fold(self, timestep=tuple(timesteps) == (1,))
            self.folded = True
        dtype = getattr(torch, choose(precision, device)[0])
        return self.to(device=device, dtype=dtype, memory_format=torch.channels_last).eval()

    def leave_out_unused(self):
        """Removes the halves of the autoencoder for which tiny networks stand in."""
        if self.tiny_encoder and self.vae:
            self.vae.encoder = self.vae.quant_conv = None
        if self.tiny_decoder and self.vae:
            self.vae.decoder = self.vae.post_quant_conv = None

    def forward(self, image, timesteps=(1,)):
        """image B,3,H,W in [-1,1] -> depth map B,1,8h,8w, clipped to [-1,1] (Eq. 1-2).

        h, w are H/8, W/8 rounded down. Input and output are float32 at any precision of the
        weights; infinite values become NaN.
        timesteps: one per pass; each pass takes the output of the pass before. The method has one
        pass, at t = 1 (no noise, no scheduler: the output is the latent); Table II compares more.
        """
        latent = self.encode(image.to(self.dtype))
        for timestep in timesteps:
            latent, _ = self.unet(latent, timestep=timestep)
        return clipped(self.decode_depth(latent))

    def decode_depth(self, latent):
        """latent B,4,h,w -> depth map B,1,8h,8w: mean of the decoder's channels, not clipped."""
        if self.tiny_decoder:
            return self.tiny_decoder(latent).mean(dim=1, keepdim=True)
        pixels = 64 * latent[:, 0].numel()
        way = strips.decode if self.in_strips(pixels) else AutoencoderKL.decode
        return way(self.vae, latent).mean(dim=1, keepdim=True)

    def encode(self, image):
        """image B,3,H,W in [-1,1] -> latent B,4,h,w."""
        if self.tiny_encoder:
            return self.tiny_encoder(image)
        way = strips.encode if self.in_strips(image[:, 0].numel()) else AutoencoderKL.encode
        return way(self.vae, image)

    def in_strips(self, pixels):
        """Whether the autoencoder works in strips: no gradients, and a CPU or many pixels."""
        much = self.device.type == "cpu" or pixels > MANY_PIXELS
        return much and not torch.is_grad_enabled()

    def predict(self, image, processing_res=None):
        """image uint8 H,W,3 -> float32 H,W in [0,1], `target` up to scale and shift.

        processing_res: longest side while processing; None: the model's own, 0: the image's.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image must be uint8 of shape H,W,3, not {image.dtype} of shape "
                             f"{image.shape}.")
        x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))  # for negative strides
        return self.predict_batch(x[None], processing_res)[0].cpu().numpy()

    @torch.inference_mode()
    def predict_batch(self, images, processing_res=None, timesteps=(1,)):
        """images uint8 B,3,H,W -> float32 B,H,W in [0,1] on the model's device, as `predict`.

        timesteps: as in `forward`. If half precision overflows, the model goes on in float32 and
        warns (UserWarning). ValueError if the result is not finite in float32.
        """
        x = images.to(self.device).contiguous().float()  # also for a view of H,W,3
        x = resize(x, self.processing_size(images.shape[2:], processing_res))
        x = x.round().clamp(0, 255)  # to 8 bits, as a saved picture would be
        depth = to_unit_map(self(x / 127.5 - 1, timesteps), images.shape[2:])
        if torch.isfinite(depth).all():
            return depth
        if self.dtype.itemsize >= 4:
            raise ValueError("the model's result is not finite: its weights are damaged.")
        warnings.warn(f"{self.dtype} overflowed: going on in float32.", stacklevel=2)
        return self.to(torch.float32).predict_batch(images, processing_res, timesteps)

    @torch.inference_mode()
    def round_trip(self, targets, processing_res=None):
        """Normalised targets B,1,H,W in [-1,1], encoded and decoded -> float32 B,H,W in [0,1].

        This shows the error of the autoencoder alone: the I2L row of Table II.
        """
        size = self.processing_size(targets.shape[2:], processing_res)
        x = F.interpolate(targets.to(self.device), size=size, mode="nearest-exact")
        latent = self.encode(x.expand(-1, 3, -1, -1).to(self.dtype))
        return to_unit_map(clipped(self.decode_depth(latent)), targets.shape[2:])

    def processing_size(self, size, processing_res=None):
        """(height, width) at which a picture of another size is processed, as in `predict`."""
        longest = self.processing_res if processing_res is None else processing_res
        # Deviation: integer arithmetic, because a floating-point ratio can lose a pixel.
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


def clipped(depth):
    """Clips to [-1,1] in float32; infinities become NaN, as clipping would make them look valid."""
    return depth.float().nan_to_num(torch.nan, torch.nan, torch.nan).clamp(-1, 1)


def to_unit_map(depth, size):
    """Depth maps B,1,h,w in [-1,1] -> B,H,W in [0,1] of another size (H, W)."""
    return resize((depth + 1) / 2, size)[:, 0].clamp(0, 1)


def resize(x, size):
    """B,C,H,W to another (height, width), bilinear with antialias."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", antialias=True)
