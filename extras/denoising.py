"""Depth by denoising, the paper's Table II: the way of Marigold (arXiv 2312.02145).

The U-Net takes the photo's latent beside a noisy depth latent, 8 channels, and predicts v
(arXiv 2202.00512). DDIM (arXiv 2010.02502) leads from noise to a depth latent in several passes.
The maps of several draws of noise are combined to one. extras/train_denoising.py trains it,
evaluate.py --paradigm denoise scores it, convert_sd2.py reads and writes Marigold's folders.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.sampler import random_stream
from nets.depthmaster import DepthMaster, clipped

NOISE_STREAM = 3  # first word of the random streams' keys, see data/sampler.py
FITS = 10  # rounds in which the maps of an ensemble are aligned to their median
# Schedule's keywords -> names in diffusers' scheduler_config.json; what must be as here; and what
# a file means that does not say it.
SETTINGS = {"steps": "num_train_timesteps", "start": "beta_start", "end": "beta_end",
            "spacing": "timestep_spacing", "offset": "steps_offset",
            "zero_snr": "rescale_betas_zero_snr", "end_at_one": "set_alpha_to_one"}
FIXED = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction",
         "beta_schedule": "scaled_linear", "clip_sample": False, "thresholding": False,
         "trained_betas": None}
UNSAID = {"_class_name": None, "prediction_type": "epsilon", "beta_schedule": "linear",
          "clip_sample": True, "num_train_timesteps": 1000, "beta_start": 0.0001,
          "beta_end": 0.02, "timestep_spacing": "leading", "steps_offset": 0,
          "rescale_betas_zero_snr": False, "set_alpha_to_one": True}


class Schedule:
    """How much noise there is at each time step, and the steps of DDIM.

    steps: of training. start, end: the noise's variances, of which the roots are evenly spaced.
    zero_snr: shifts them so that the last step is noise alone (arXiv 2305.08891).
    spacing: which steps a prediction takes: `trailing` begins at the last, `leading` at `offset`
    above a multiple of their distance. end_at_one: no noise at all is left after the last.
    """

    def __init__(self, *, steps=1000, start=0.00085, end=0.012, spacing="trailing", offset=1,
                 zero_snr=False, end_at_one=False):
        if spacing not in ("trailing", "leading"):
            raise ValueError(f"the spacing of the steps is {spacing}, not trailing or leading")
        self.steps, self.spacing, self.offset = steps, spacing, offset
        signal = np.sqrt(np.cumprod(1 - np.linspace(start**0.5, end**0.5, steps) ** 2))
        if zero_snr:
            signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
        self.alphas = (signal**2).tolist()  # shares of the signal in the variance
        self.last = 1.0 if end_at_one else self.alphas[0]

    def timesteps(self, count):
        """The `count` time steps of a prediction, from noise to picture. ValueError: too many."""
        if count > self.steps:
            raise ValueError(f"{count} passes are asked for, but there are {self.steps} time "
                             "steps: choose a smaller --denoise-steps.")
        if self.spacing == "trailing":
            return (np.round(np.arange(self.steps, 0, -self.steps / count)) - 1).astype(int)
        return np.arange(count)[::-1] * (self.steps // count) + self.offset

    def noisy(self, z, noise, t):
        """z, noise B,4,h,w at time steps t B -> the noisy latent, and v, the target."""
        alpha = torch.tensor([self.alphas[i] for i in t.tolist()], device=z.device)
        alpha = alpha[:, None, None, None]
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        return signal * z + spread * noise, signal * noise - spread * z

    def step(self, x, v, t, count):
        """DDIM from time step t to the one before, of `count` in all, for a predicted v."""
        before = t - self.steps // count
        alpha = self.alphas[t]
        alpha_before = self.alphas[before] if before >= 0 else self.last
        z = alpha**0.5 * x - (1 - alpha) ** 0.5 * v
        noise = alpha**0.5 * v + (1 - alpha) ** 0.5 * x
        return alpha_before**0.5 * z + (1 - alpha_before) ** 0.5 * noise


class Denoiser(DepthMaster):
    """A DepthMaster whose U-Net denoises; `steps` passes for each of `ensemble` draws of noise."""

    kinds = ("denoise",)

    def __init__(self, *, vae=None, unet=None, target="depth", train_size=(480, 640),
                 processing_res=768, schedule=None):
        super().__init__(vae=vae, unet={"in_channels": 8, **(unet or {})}, target=target,
                         train_size=train_size, processing_res=processing_res)
        self.kind = "denoise"
        self.config["schedule"] = dict(schedule or {})
        self.schedule = Schedule(**self.config["schedule"])
        self.steps, self.ensemble, self.seed = 1, 1, 0

    def schedule_keywords(self):
        return Schedule.__init__.__kwdefaults__ | self.config["schedule"]

    @classmethod
    def from_sd2(cls, path, target, train_size=None):
        """Stable Diffusion 2's weights; conv_in's serve both latents, halved."""
        model = DepthMaster.from_file(path, autoencoder="full")
        weights = model.state_dict()
        conv = weights["unet.conv_in.weight"]  # C0,4,3,3
        weights["unet.conv_in.weight"] = torch.cat([conv, conv], dim=1) / 2  # C0,8,3,3
        config = model.config | {"unet": model.config["unet"] | {"in_channels": 2 * conv.shape[1]}}
        with torch.device("meta"):
            new = cls(**config)
        new.load_state_dict(weights, assign=True)
        new.sources, new.licence = model.sources, model.licence
        new.become("denoise", target, train_size)
        return new

    def forward(self, image, timesteps=()):
        """image B,3,H,W in [-1,1] -> depth map B,1,8h,8w in [-1,1]. timesteps: not used here."""
        latent = self.encode(image.to(self.dtype))
        maps = [clipped(self.decode_depth(self.denoise(latent, member)))
                for member in range(self.ensemble)]
        return maps[0] if len(maps) == 1 else combine(torch.cat(maps, dim=1))

    def denoise(self, latent, member):
        """The photo's latent B,4,h,w -> a depth latent. Each picture gets the same noise."""
        draw = torch.Generator().manual_seed(self.seed + member)
        x = torch.randn(latent.shape[1:], generator=draw).to(latent.device).expand(latent.shape)
        for t in self.schedule.timesteps(self.steps).tolist():
            v, _ = self.unet(torch.cat([latent, x.to(latent.dtype)], dim=1), timestep=t)
            x = self.schedule.step(x, v.float(), t, self.steps)
        return x.to(latent.dtype)


def combine(maps):
    """Maps of several draws B,E,H,W, each up to scale and shift -> one map B,1,H,W in [-1,1].

    Fits each map to their median by least squares, in FITS rounds; the result spans [-1,1].
    (Marigold minimises the maps' distances with a general solver instead.)
    """
    flat = maps.double().flatten(2)  # B,E,N
    flat = flat - flat.mean(dim=2, keepdim=True)
    spread = flat.square().mean(dim=2, keepdim=True).clamp(min=1e-12)
    fitted = flat / spread.sqrt()
    for _ in range(FITS):
        median = fitted.quantile(0.5, dim=1, keepdim=True)
        median = median - median.mean(dim=2, keepdim=True)
        median = median / median.square().mean(dim=2, keepdim=True).clamp(min=1e-12).sqrt()
        scale = (flat * median).mean(dim=2, keepdim=True) / spread
        fitted = scale.clamp(min=0) * flat
    median = fitted.quantile(0.5, dim=1, keepdim=True)
    low, high = median.amin(dim=2, keepdim=True), median.amax(dim=2, keepdim=True)
    result = 2 * (median - low) / (high - low).clamp(min=1e-12) - 1
    return result.reshape(len(maps), 1, *maps.shape[2:]).to(maps.dtype)


def drawn_noise(seed, place, shape, steps, strength):
    """Noise of a training sample, float32 of shape C,h,w, and its time step: functions of the key.

    Multi-resolution noise: enlarged noise of smaller and smaller sizes is added, `strength` to the
    power of its number; annealed: less of it at small time steps. place: the sample's number k.
    """
    stream = random_stream(seed, NOISE_STREAM, place)
    t = int(stream.integers(steps))
    strength, (channels, *size) = strength * t / steps, shape
    noise, part = torch.from_numpy(stream.standard_normal(shape, np.float32)), list(size)
    for number in range(10):
        shrink = (2 + 2 * stream.random()) ** number
        part = [max(1, int(side / shrink)) for side in part]
        small = torch.from_numpy(stream.standard_normal((1, channels, *part), np.float32))
        noise += strength**number * F.interpolate(small, size, mode="bilinear")[0]
        if 1 in part:
            break
    return noise / noise.std(), t


# ---------------------------------------------------------------------------- Marigold's folder


def schedule_of(settings, file):
    """The keywords of Schedule in a scheduler_config.json. ValueError if it is of another kind."""
    settings = UNSAID | settings
    for name, value in FIXED.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{file} means {name} = {settings[name]}, but what is computed here "
                             f"needs {value}: it is another kind of model.")
    found = {ours: settings[theirs] for ours, theirs in SETTINGS.items()}
    try:
        Schedule(**found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} describes no schedule ({error}): download it again.") from None
    return found


def scheduler_config(model):
    """{relative path: content} of the file that says a Denoiser's schedule to diffusers."""
    content = {SETTINGS[name]: value for name, value in model.schedule_keywords().items()}
    return {Path("scheduler", "scheduler_config.json"):
            FIXED | content}
