"""Decode one picture file, or raise a BadSample that names the file and the reason.

`read_rgb` returns a picture as RGB, for predictions and for every data set; `read_picture` returns
the stored numbers, for depth maps. Pictures above Pillow's limit of 179 million pixels are refused.
"""

import io
import logging
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from data.files import blame
from data.transforms import BadSample
from storage import first_bytes, wrong_content

log = logging.getLogger(__name__)

# Only these: for some other formats Pillow starts programs. PPM includes PFM, JPEG includes MPO.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "GIF")
PICTURES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".tif", ".tiff",
            ".ppm", ".pgm", ".avif", ".gif", ".heic", ".heif")  # suffixes of picture files
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
TURNS = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,
                        Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
                        Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                        Image.Transpose.ROTATE_90), start=2))  # by EXIF's orientation
BACK = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
        Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90}  # the others are their own inverse
SIDEWAYS = {TURNS[number] for number in (5, 6, 7, 8)}
BITS, PHOTOMETRIC, PLANES = 258, 262, 284  # tags of TIFF
MAX_SCANS = 100  # of a JPEG; usual programs write about 10
STRETCHED = set()  # numbers of bits for which the warning was logged
# Limit in bytes for a PNG's unpacked texts and colour profile, unused here (Pillow's own: 1 MiB).
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26


def open_picture(path, content=None):
    """Opens a file with Pillow, which reads only the header at first; raises BadSample.

    content: the file's bytes, if already read. The bytes, not the name, determine the format.
    """
    # Pillow warns above half the number of pixels that it refuses.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        picture = Image.open(path if content is None else io.BytesIO(content), formats=FORMATS)
        if "progressive" in picture.info:
            check_scans(path, content)
        return picture
    except Image.DecompressionBombError:
        raise BadSample(f"{path} can't be read: it has more than {2 * Image.MAX_IMAGE_PIXELS:,} "
                        "pixels: make it smaller (predict.py --max-pixels allows more).") from None
    except UnidentifiedImageError:
        head = content[:100] if content is not None else first_bytes(path)
    if head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS:
        return open_heic(path, content)
    what = wrong_content(path, head)
    raise BadSample(f"{path} {what}." if what else f"{path} can't be read: cannot identify what "
                    "kind of picture it is.")


def check_scans(path, content):
    """BadSample if a progressive JPEG has many scans: each scan is decoded in full size."""
    scans = (Path(path).read_bytes() if content is None else content).count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise BadSample(f"{path} is a JPEG of {scans:,} scans, and no more than {MAX_SCANS} are "
                        "read: save it again.")


def open_heic(path, content):
    """Opens a HEIC picture with Pillow; raises BadSample if pillow-heif is not installed."""
    try:
        import pillow_heif
    except ImportError:
        raise BadSample(f"{path} is a HEIC picture: install pillow-heif (extras/requirements.txt), "
                        "or convert it to JPEG or PNG.") from None
    pillow_heif.register_heif_opener()
    return Image.open(path if content is None else io.BytesIO(content), formats=("HEIF",))


def allow_pixels(count):
    """Sets the largest number of pixels that a picture may have, in this process."""
    Image.MAX_IMAGE_PIXELS = (count + 1) // 2  # Pillow refuses above twice this number


def read_picture(path, content=None):
    """A picture -> the array that is stored in it. content: its bytes, if they were read before."""
    with blame(path), open_picture(path, content) as picture:
        values = np.array(picture)
        return values.astype(values.dtype.newbyteorder("="), copy=False)


def read_rgb(path, content=None, exif="apply", size=None):
    """A picture of any kind -> uint8 H,W,3. Raises BadSample.

    Palettes, CMYK and the like become RGB, grey is repeated, transparency is dropped, 16 bits
    become 8; a file with several frames gives its first frame.
    exif: how to treat a picture that is sideways or upside down according to EXIF. `apply` turns it
    upright, `ignore` does not turn it. `auto` chooses the one of both that fits a depth map of
    `size` (height, width), and refuses the picture if both fit.
    """
    with blame(path), open_picture(path, content) as picture:
        check_tiff(path, picture)
        picture, turn = as_stored(picture)
        if turn is not None and exif == "auto":
            exif = fitting_exif(path, picture, turn, size)
        if turn is not None and exif == "apply":
            picture = picture.transpose(turn)
        if picture.mode.startswith("I"):
            return np.repeat(eight_bits(path, np.array(picture))[..., None], 3, axis=2)
        if picture.mode == "F":
            raise BadSample(f"{path} can't be read as a picture: it holds floating-point numbers; "
                            "save it as 8-bit RGB.")
        return np.array(picture.convert("RGB"))


def check_tiff(path, picture):
    """BadSample if a 16-bit TIFF has a layout that Pillow misreads."""
    if picture.format != "TIFF":
        return
    tags = picture.tag_v2
    deep = max(tags.get(BITS, (1,))) > 8
    if deep and (tags.get(PLANES) == 2 or tags.get(PHOTOMETRIC) == 0):
        raise BadSample(f"{path} is a TIFF of 16 bits in separate planes or with white as 0: save "
                        "it as 8-bit RGB.")


def as_stored(picture):
    """The picture as stored, not turned, and the turn that its EXIF asks for (`orientation`)."""
    turned = orientation(picture) if picture.format == "TIFF" else None
    picture.load()
    if turned is not None:  # loading turned it (Pillow does so only for TIFF): undo that
        return picture.transpose(BACK.get(turned, turned)), turned
    return picture, orientation(picture)


def orientation(picture):
    """The turn that EXIF asks for, as argument of Pillow's `transpose`; None: no turn."""
    try:  # EXIF data may be malformed
        return TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        return None


def fitting_exif(path, picture, turn, size):
    """Chooses `apply` or `ignore` so that a picture fits its depth map's size (height, width)."""
    width, height = picture.size
    if turn not in SIDEWAYS or width == height or size[0] == size[1]:
        raise BadSample(f"{path} is turned by its EXIF orientation, and its size does not tell "
                        "whether its depth map is, too: say it with --exif apply or --exif ignore.")
    return "apply" if (size[0] > size[1]) == (width > height) else "ignore"


def eight_bits(path, grey):
    """16-bit grey H,W -> uint8; values of 8, 10, 12 or 14 bits are stretched to full range."""
    if grey.min() < 0 or grey.max() > 65535:
        raise BadSample(f"{path} holds numbers from {grey.min()} to {grey.max()}, not grey of 16 "
                        "bits: save it as 8-bit RGB.")
    bits = next(bits for bits in (8, 10, 12, 14, 16) if grey.max() < 1 << bits)
    if bits < 16 and bits not in STRETCHED:
        STRETCHED.add(bits)
        log.warning("%s is grey of 16 bits, of which %d are in use: such pictures are stretched to "
                    "these.", path, bits)
    return (grey / ((1 << bits) - 1) * 255).round().astype(np.uint8)


def read_png16(path, content=None):
    """A 16-bit picture of one channel -> uint16 H,W."""
    values = read_picture(path, content)
    if values.dtype != np.uint16 or values.ndim != 2:
        raise BadSample(f"{path} is a picture of {values.dtype} with shape {values.shape}, not a "
                        "16-bit picture of one channel.")
    return values
