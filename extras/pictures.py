"""Coloured depth maps with a legend, and PNG files that say what they hold."""

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaluation.pictures import colourise, font_size, labelled, text_width, write
from storage import whole

MEANING = "square-root disparity up to scale and shift: 1 = near, 0 = far"
SPECTRAL = "Spectral_r"  # red = near


def with_legend(near, colour_map=SPECTRAL):
    """near H,W in [0,1], 1 = near -> uint8 h,w,3: in colours, with a bar that says near and far.

    The picture keeps its pixels at the top left; a narrow one is widened with white, so that the
    legend stays readable. The colour map runs from far to near.
    """
    return add_legend(colourise(near, colour_map), colour_map)


def side_by_side(image, near, colour_map=SPECTRAL):
    """An image uint8 H,W,3 and its map H,W in [0,1] beside each other, with names and a legend."""
    return add_legend(labelled({"image": image, "depth": colourise(near, colour_map)}), colour_map)


def add_legend(picture, colour_map):
    """A picture uint8 H,W,3 with a bar of colours under it that says near and far."""
    size = font_size(picture.shape[1])
    margin = size // 2
    words = round(text_width("near", size)) + 2 * margin
    width = max(picture.shape[1], 4 * words)
    picture = np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)),
                     constant_values=255)

    bar = np.full((2 * size, width, 3), 255, np.uint8)
    steps = np.linspace(0, 1, width - 2 * words)
    bar[size // 2 : -size // 2, words:-words] = colourise(steps[None], colour_map)
    bar = write(write(bar, "far", words / 2, size), "near", width - words / 2, size)

    fitting = [text for text in (MEANING, "square-root disparity", "sqrt disparity")
               if text_width(text, size) <= width - margin]
    caption = np.full((int(1.5 * size), width, 3), 255, np.uint8)
    return np.concatenate([picture, bar, write(caption, fitting[0], width / 2, size)])


def write_described_png(path, array, description):
    """Writes uint8 H,W or H,W,3 or uint16 H,W as PNG with a text, whole or not at all."""
    info = PngInfo()
    info.add_text("Description", description)
    with whole(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG", pnginfo=info)
