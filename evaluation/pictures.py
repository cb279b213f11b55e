"""Depth maps as pictures that people look at: near is red, far is blue, no depth is grey."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INVALID_COLOUR = 128, 128, 128
ERROR_MAX = 0.3  # |p-d|/d at which the error picture is brightest


def colourise(x, colour_map="Spectral_r"):
    """x H,W in [0,1] -> uint8 H,W,3; NaN becomes grey. The default shows 1 (near) in red."""
    from matplotlib import colormaps  # here, as importing it takes a second
    known = np.isfinite(x)
    colours = colormaps[colour_map](np.where(known, x, 0).clip(0, 1), bytes=True)[..., :3]
    colours[~known] = INVALID_COLOUR
    return np.ascontiguousarray(colours)


def panel(image, truth, prediction, error):
    """image | truth | prediction | error, with a line of captions -> uint8 h,4W,3.

    image: uint8 H,W,3. truth, prediction: H,W in [0,1], 1 = near. error: H,W, |p-d|/d. NaN where
    there is nothing to show.
    """
    pictures = {
        "image": image, "truth (red = near)": colourise(truth),
        "prediction": colourise(prediction),
        f"error, 0 to {ERROR_MAX:.0%}": colourise(error / ERROR_MAX, "inferno"),
    }
    return labelled(pictures)


def labelled(pictures):
    """{caption: uint8 h,W,3} -> the pictures side by side, captions above: uint8 H,n*W,3."""
    width = next(iter(pictures.values())).shape[1]
    size = font_size(width)
    captions = np.full((2 * size, width * len(pictures), 3), 255, np.uint8)
    for index, caption in enumerate(pictures):
        captions = write(captions, caption, (index + 0.5) * width, size)
    return np.concatenate([captions, np.concatenate(list(pictures.values()), axis=1)])


def comparison(image, depth_m, pred_m, valid):
    """The panel of an aligned prediction: image uint8 H,W,3; depth_m, pred_m H,W metres; valid H,W.

    Depths are shown as square-root disparity, from the truth's 2 % quantile (far) to its 98 %
    quantile (near), the prediction in the same colours.
    """
    truth, prediction = nearness(depth_m, valid, [np.where(valid, depth_m, np.nan), pred_m])
    error = np.abs(pred_m - depth_m) / np.where(valid, depth_m, np.nan)
    return panel(image, truth, prediction, error)


def nearness(depth_m, valid, maps_m):
    """Depth maps H,W in metres as square-root disparity in [0,1], all on the scale of one truth.

    0 is the truth's 2 % quantile (far), 1 its 98 % quantile (near); depth_m, valid: the truth.
    """
    near = np.sqrt(1 / depth_m[valid])
    low, high = np.quantile(near, (0.02, 0.98))
    return [((np.sqrt(1 / np.maximum(x, 1e-6)) - low) / max(high - low, 1e-6)).clip(0, 1)
            for x in maps_m]


def font_size(width):
    """Points of text that is readable on a picture of this width."""
    return int(np.clip(width / 40, 11, 48))


def text_width(text, size):
    """Pixels that a line of text takes."""
    return ImageFont.load_default(size).getlength(text)


def write(picture, text, centre, size):
    """A copy of a picture with black text in the vertical middle, centred at column `centre`."""
    picture = Image.fromarray(picture)
    ImageDraw.Draw(picture).text((centre, picture.height / 2), text, fill="black", anchor="mm",
                                 font=ImageFont.load_default(size))
    return np.array(picture)
