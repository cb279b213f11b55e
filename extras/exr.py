"""Depth maps as OpenEXR, for programs that compose pictures."""

import numpy as np

from extras.libraries import need
from storage import whole


def write_exr(path, values, comments, half=False):
    """Writes an array H,W as the channel Z, float32 or float16 (half), whole or not at all.

    comments: {name: text}, written as attributes of the header.
    """
    OpenEXR = need("EXR")
    with np.errstate(over="ignore"):  # above 65504 float16 is inf
        # OpenEXR writes an array's memory as it lies there, in spite of the strides.
        values = np.ascontiguousarray(values, np.float16 if half else np.float32)
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    header |= {name: text.encode(errors="backslashreplace").decode()  # a file's name may be no text
               for name, text in comments.items()}
    with whole(path) as temporary, open(temporary, "wb") as file:
        OpenEXR.File(header, {"Z": values}).write(file)
