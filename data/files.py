"""Decode one file into an array, or raise a BadSample that names the file and the reason.

A file may be anything: nothing in it is ever executed, and no more is decoded than fits a picture
(Pillow's limit of 179 million pixels), an array of 1 GiB or a table of 64 MiB and 200 columns.
"""

import csv
import io
import math
import os
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import h5py
import imageio.v3 as iio
import numpy as np
from PIL import Image
from safetensors import SafetensorError

from data.transforms import BadSample

MAX_BYTES = 2**30  # of an array
MAX_TABLE_BYTES, MAX_COLUMNS, MAX_ENTRIES = 2**26, 200, 10_000_000
# Of Pillow's formats: for others it may start programs. PPM stands for PFM, too.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")
# How many times its size a chunk of an HDF5 file can unpack to, by filter.
EXPANSION = {h5py.h5z.FILTER_DEFLATE: 1040, h5py.h5z.FILTER_LZF: 100}
HARMLESS = {h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}


@contextmanager
def blame(path):
    """Whatever goes wrong inside is the fault of the file at `path`, and says so."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe can be waited for forever
            raise BadSample(f"{path} is not a file.")
        yield
    except BadSample:
        raise
    except FileNotFoundError:
        raise BadSample(f"{path} is missing.") from None
    except Exception as error:  # decoders raise anything: SyntaxError, struct.error, ...
        reason = str(error).split("\n")[0] or type(error).__name__
        raise BadSample(f"{path} can't be read: {reason.rstrip('.')}.") from error


def read_picture(path, content=None):
    """A picture -> the array that is stored in it. content: its bytes, if they were read before."""
    with blame(path):
        with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS):
            pass  # only its beginning was read
        return iio.imread(path if content is None else content, plugin="pillow", index=0)


def read_rgb(path, content=None):
    """A picture -> uint8 H,W,3; grey ones are repeated, an alpha channel is dropped."""
    image = read_picture(path, content)
    if image.dtype != np.uint8:
        raise BadSample(f"{path} is a picture of {image.dtype}, not of 8 bits a channel.")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 2, 3, 4):
        raise BadSample(f"{path} is not one picture in grey or colour: its shape is {image.shape}.")
    if image.shape[2] < 3:
        return np.repeat(image[..., :1], 3, axis=2)
    return image[..., :3]


def read_png16(path, content=None):
    """A 16-bit picture of one channel -> uint16 H,W."""
    values = read_picture(path, content)
    if values.dtype != np.uint16 or values.ndim != 2:
        raise BadSample(f"{path} is a picture of {values.dtype} with shape {values.shape}, not a "
                        "16-bit picture of one channel.")
    return values


def read_hdf5(path, key="dataset"):
    """The data set `key` of an HDF5 file -> array; with key=None the file's only data set."""
    # No file locks: data sets are read only and often lie where locking isn't supported.
    with blame(path), h5py.File(path, "r", locking=False) as file:
        if key is None:
            key = single_key(list(file), path)
        link = file.get(key, getlink=True)
        if not isinstance(link, h5py.HardLink) or not isinstance(file[key], h5py.Dataset):
            raise BadSample(f"{path} has no data set {key!r}, or only a link to one.")
        data = file[key]
        if data.external or data.is_virtual:
            raise BadSample(f"{path} keeps its values in other files, which are not read.")
        if data.dtype.hasobject:  # of variable length: a million values can be one and the same
            raise BadSample(f"{path} holds {data.dtype}, not numbers.")
        check_bytes(path, data.nbytes)
        check_chunks(path, data)
        return data[()]


def check_chunks(path, data):
    """BadSample for chunks that unpack to more than they should: HDF5 unpacks without a limit."""
    if data.chunks is None:
        return
    room = math.prod(data.chunks) * data.dtype.itemsize
    check_bytes(path, room)
    filters = data.id.get_create_plist()
    filters = [filters.get_filter(number)[0] for number in range(filters.get_nfilters())]
    packers = [kind for kind in filters if kind not in HARMLESS]
    if len(packers) > 1 or not EXPANSION.keys() >= set(packers):
        raise BadSample(f"{path} is packed in a way that is not read: pack it with gzip.")
    chunks = []
    data.id.chunk_iter(chunks.append)
    for chunk in chunks if packers else []:
        fits = chunk.size < 1.1 * room + 1000  # what can't be packed grows a little
        if fits and chunk.size * EXPANSION[packers[0]] > MAX_BYTES and not chunk.filter_mask:
            fits = packers[0] == h5py.h5z.FILTER_DEFLATE and unpacks_within(
                data.id.read_direct_chunk(chunk.chunk_offset)[1], room)
        if not fits:
            raise BadSample(f"{path} has a chunk that unpacks to more than its {room:,} bytes.")


def unpacks_within(packed, limit):
    return len(zlib.decompressobj().decompress(packed, limit + 1)) <= limit


def read_npy(path, content=None):
    """An .npy file -> its array; content: its bytes, if they were read before."""
    with blame(path):
        if content is None:  # mapped, a header that promises more than there is is found out
            values = np.load(path, mmap_mode="r", allow_pickle=False)
            check_bytes(path, values.nbytes)
            return np.array(values)
        version = np.lib.format.read_magic(file := io.BytesIO(content))
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, _, dtype = read_header(file)
        check_bytes(path, dtype.itemsize * math.prod(shape))
        return np.load(io.BytesIO(content), allow_pickle=False)


def read_npz(path, key=None):
    """One array of an .npz file; key None: the one called depth or dataset, or the only one."""
    with blame(path):
        with zipfile.ZipFile(path) as archive:
            check_bytes(path, sum(entry.file_size for entry in archive.infolist()))
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[key or single_key(arrays.files, path)]


def check_bytes(path, count):
    if count > MAX_BYTES:
        raise BadSample(f"{path} would take {count:,} bytes, and no more than {MAX_BYTES:,} are "
                        "read from one file.")


def read_table(path):
    """The rows of a CSV file as dicts. Raises ValueError if it is none, or beyond the limits."""
    rows = []
    with open(path, newline="") as file:
        try:
            table = csv.DictReader(file)
            columns = len(table.fieldnames or ())
            if columns > MAX_COLUMNS or os.fstat(file.fileno()).st_size > MAX_TABLE_BYTES:
                raise csv.Error(f"up to {MAX_COLUMNS} columns and {MAX_TABLE_BYTES:,} bytes are")
            for row in table:
                rows.append(row)
                if len(rows) * columns > MAX_ENTRIES:  # a row may lack most of its columns
                    raise csv.Error(f"up to {MAX_ENTRIES:,} entries are")
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a table that can be read ({error}): get it again or "
                             "write it anew.") from error
    return rows


def single_key(keys, path):
    """The key called depth or dataset, or the only one there is."""
    for key in ("depth", "dataset"):
        if key in keys:
            return key
    if len(keys) != 1:
        raise BadSample(f"{path} holds {sorted(keys)}; call the depth map 'depth'.")
    return keys[0]


@contextmanager
def beside(path):
    """The name to write a file under first; it takes its own when it is whole.

    OSError that names the file if there is no room; other programs may write the same one.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} can't be written ({error}): make room and give the same command "
                      "again.") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_png(path, array):
    """Write uint8 H,W,3 or uint16 H,W as PNG, whole or not at all."""
    with beside(path) as temporary:
        iio.imwrite(temporary, array, plugin="pillow", extension=".png")


def write_npy(path, array):
    """Write an array as .npy, whole or not at all."""
    with beside(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)
