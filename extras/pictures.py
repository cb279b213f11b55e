"""Reads any photograph as 8-bit RGB, and puts a legend under a coloured depth map."""

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from data.files import FORMATS, beside
from data.pictures import colourise, font_size, text_width, write

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MEANING = "square-root disparity up to scale and shift: 1 = near, 0 = far"


def read_photograph(path):
    """A picture file -> uint8 H,W,3, upright: turned as its EXIF orientation says.

    Grey is repeated, transparency is dropped, 16 bits become 8, of several frames the first is
    taken. Raises ValueError with the file's name and the reason.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):  # 16-bit grey
                grey = (np.asarray(picture).clip(0, 65535) / 257).round()
                picture = Image.fromarray(grey.astype(np.uint8))
            elif picture.mode == "F":
                raise ValueError("it holds floating-point numbers: save it as 8-bit RGB")
            return np.array(picture.convert("RGB"))
    except Exception as error:  # decoders raise anything: SyntaxError, struct.error, ...
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be used as a picture ({reason}).") from error


def with_legend(near):
    """near H,W in [0,1], 1 = near -> uint8 h,w,3: in colours, with a bar that says near and far.

    The picture keeps its pixels at the top left; a narrow one is widened with white, so that the
    legend stays readable.
    """
    picture = colourise(near)
    size = font_size(picture.shape[1])
    margin = size // 2
    words = round(text_width("near", size)) + 2 * margin
    width = max(picture.shape[1], 4 * words)
    picture = np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)),
                     constant_values=255)

    bar = np.full((2 * size, width, 3), 255, np.uint8)
    steps = np.linspace(0, 1, width - 2 * words)
    bar[size // 2 : -size // 2, words:-words] = colourise(steps[None])
    bar = write(write(bar, "far", words / 2, size), "near", width - words / 2, size)

    fitting = [text for text in (MEANING, "square-root disparity", "sqrt disparity")
               if text_width(text, size) <= width - margin]
    caption = np.full((int(1.5 * size), width, 3), 255, np.uint8)
    return np.concatenate([picture, bar, write(caption, fitting[0], width / 2, size)])


def write_described_png(path, array, description):
    """Writes uint8 H,W,3 or uint16 H,W as PNG with a text Description, whole or not at all."""
    info = PngInfo()
    info.add_text("Description", description)
    with beside(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG", pnginfo=info)
