"""The Fourier Enhancement block of stage 2: DepthMaster, arXiv 2501.02576, section III-C, Eq. 6-7.

The middle feature goes two ways: a frequency pass that modulates amplitude and phase of its
spectrum (structure of the whole picture at once) and a spatial pass (local detail). The paper gives
the outline; layers and names are those of the released weights.
"""

import torch
import torch.nn.functional as F
from torch import nn

TINY = 1e-6  # amplitudes below this are rounding errors (in maps of about unit magnitude)


class FourierEnhancement(nn.Module):
    """B,C,h,w -> B,C,h,w; C is a multiple of 8. There is no skip around it.

    init: `default`: PyTorch's; when stage 2 begins, the block's output is unrelated to its input.
    `identity`: when stage 2 begins, the output is the normalised input.
    """

    def __init__(self, channels=1280, init="default"):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels, eps=1e-5)
        self.conv_f1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_f2 = nn.Conv2d(channels, channels, 3, padding=1)  # modulates the amplitude
        self.conv_f4 = nn.Conv2d(channels, channels, 3, padding=1)  # modulates the phase
        self.conv_f3 = nn.Conv2d(channels, channels, 1)
        self.conv_s1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_s2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.fuse = nn.Conv2d(2 * channels, channels, 1)
        if init not in ("default", "identity"):
            raise ValueError(f"init is {init!r}, but must be default or identity.")
        if init == "identity":
            self.start_as_identity()

    def start_as_identity(self):
        """Makes the spatial pass return its input, and the fusion return the spatial pass."""
        for layer in (self.conv_s2, self.fuse):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.dirac_(self.fuse.weight)

    def forward(self, x):
        n = self.norm(x)
        return self.fuse(torch.cat([self.spatial_pass(n), self.frequency_pass(n)], dim=1))

    def spatial_pass(self, n):
        return self.conv_s2(F.silu(self.conv_s1(n))) + n

    @torch.compiler.disable  # the compiler can't handle complex numbers
    def frequency_pass(self, n):
        # f = SiLU(F1(n)); A, P = |FFT(f)|, angle(FFT(f)); A' = SiLU(F2(A)); P' = SiLU(F4(P));
        # result: F3(IFFT(A' exp(iP')) + f)
        f = F.silu(self.conv_f1(n))
        amplitude, phase = to_polar(f)  # B,C,h,w//2+1
        amplitude = F.silu(self.conv_f2(amplitude.to(f.dtype)))
        phase = F.silu(self.conv_f4(phase.to(f.dtype)))
        return self.conv_f3(from_polar(amplitude, phase, f.shape[2:]).to(f.dtype) + f)


def to_polar(x):
    """Real maps B,C,h,w -> amplitude and phase of their spectra, B,C,h,w//2+1, at least float32.

    In float32, or float64 for float64: PyTorch has no FFT in bfloat16, and in half precision only
    for some sizes. Where the amplitude is below TINY, the phase has a value but no gradient: the
    true gradient, 1/amplitude, is huge or NaN.
    """
    spectrum = torch.fft.rfft2(at_least_float32(x), norm="ortho")
    spectrum = real_where_it_must_be(spectrum, x.shape[2:])
    amplitude = spectrum.abs()
    tiny = amplitude < TINY  # Deviation: in the released code their gradient is huge or NaN
    phase = torch.where(tiny, 1, spectrum).angle()
    return amplitude, torch.where(tiny, spectrum.detach().angle(), phase)


def real_where_it_must_be(spectrum, size):
    """Clears the imaginary part of the frequencies that are their own mirror image.

    This part is 0 apart from rounding; its random sign would choose between phases pi and -pi.
    """
    # Deviation: the released code keeps the random sign.
    # Indices 0 and side / 2 (side even) along each axis.
    rows, columns = (slice(0, None, side // 2) if side % 2 == 0 else 0 for side in size)
    imaginary = spectrum.imag.clone()
    imaginary[:, :, rows, columns] = 0
    return torch.complex(spectrum.real, imaginary)


def from_polar(amplitude, phase, size):
    """Amplitude and phase B,C,h,w/2+1 -> real maps B,C,h,w; size: (h, w), which may be odd."""
    amplitude, phase = at_least_float32(amplitude), at_least_float32(phase)
    # torch.polar's gradient is wrong where the amplitude is negative, as SiLU's output can be.
    spectrum = torch.complex(amplitude * phase.cos(), amplitude * phase.sin())
    return torch.fft.irfft2(symmetric(spectrum, size[1]), s=tuple(size), norm="ortho")


def symmetric(spectrum, width):
    """Projects a half spectrum B,C,h,w/2+1 onto the spectra of real maps of a width.

    In the spectrum of a real map, row -k is the conjugate of row k in columns 0 and w/2 (w even).
    The convolutions break this symmetry. FFT libraries treat the asymmetric part differently: on a
    CPU the library drops it (so nothing changes there), on a GPU it enters the result.
    """
    # Deviation: the released code leaves the asymmetric part to the library.
    columns = [0, width // 2] if width % 2 == 0 else [0]
    own = spectrum[..., columns]  # B,C,h,1-2
    mirrored = own.flip(2).roll(1, dims=2).conj()  # row -k in place of row k
    result = spectrum.clone()
    result[..., columns] = (own + mirrored) / 2
    return result


def at_least_float32(x):
    return x if x.dtype == torch.float64 else x.float()
