"""Decode one file into an array, or raise a BadSample that names the file and the reason.

Files are not trusted: nothing in them is executed, and an array above 1 GiB or a table above
64 MiB or 200 columns is refused. (Pictures: data/images.py.)
"""

import csv
import io
import math
import os
import zipfile
import zlib
from contextlib import contextmanager
from itertools import chain

import h5py
import imageio.v3 as iio
import numpy as np

from data.transforms import BadSample
from storage import LARGEST, check_file, wrong_content, whole

MAX_BYTES = 2**30  # of an array
MAX_CHUNKS = 100_000  # of a data set in HDF5
MAX_COLUMNS, MAX_ENTRIES = 200, 10_000_000  # of a table
# Largest ratio of unpacked to packed size of a chunk in an HDF5 file, by filter.
EXPANSION = {h5py.h5z.FILTER_DEFLATE: 1040, h5py.h5z.FILTER_LZF: 100}
HARMLESS = {h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}


@contextmanager
def blame(path):
    """Turns every error inside the block into a BadSample that names the file at `path`."""
    try:
        if os.path.exists(path):
            check_file(path)
        yield
    except BadSample:
        raise
    except FileNotFoundError:
        raise BadSample(f"{path} is missing.") from None
    except Exception as error:  # decoders raise anything: SyntaxError, struct.error, ...
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        reason = reason or type(error).__name__
        if "allow_pickle" in reason:
            reason = "it is no array of numbers"
        what = wrong_content(path) if os.path.isfile(path) else None
        if what:
            raise BadSample(f"{path} {what}.") from error
        if "PngImagePlugin.MAX_TEXT" in reason:
            reason = "its texts or its colour profile take over 64 MiB, so save it without them"
        raise BadSample(f"{path} can't be read: {reason.rstrip('.')}.") from error


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
        if data.shape is None:
            raise BadSample(f"{path} holds an empty data set.")
        if data.external or data.is_virtual:
            raise BadSample(f"{path} keeps its values in other files, which are not read.")
        if data.dtype.hasobject:  # references and strings: nbytes does not count their values
            raise BadSample(f"{path} holds {data.dtype}, not numbers.")
        check_bytes(path, data.nbytes)
        check_chunks(path, data)
        return data[()]


def check_chunks(path, data):
    """BadSample if a chunk unpacks to more than its declared size: HDF5 itself has no limit."""
    if data.chunks is None:
        return
    room = math.prod(data.chunks) * data.dtype.itemsize
    check_bytes(path, room)
    count = math.prod(-(-side // piece) for side, piece in zip(data.shape, data.chunks))
    if count > MAX_CHUNKS:
        raise BadSample(f"{path} is cut into {count:,} chunks, and no more than {MAX_CHUNKS:,} are "
                        "read.")
    filters = data.id.get_create_plist()
    filters = [filters.get_filter(number)[0] for number in range(filters.get_nfilters())]
    packers = [kind for kind in filters if kind not in HARMLESS]
    if len(packers) > 1 or not EXPANSION.keys() >= set(packers):
        raise BadSample(f"{path} is packed in a way that is not read: pack it with gzip.")
    chunks = []
    data.id.chunk_iter(chunks.append)
    for chunk in chunks if packers else []:
        fits = chunk.size < 1.1 * room + 1000  # incompressible data grow a little
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
        if content is None:  # mapping fails if the header claims more bytes than the file has
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


def read_exr(path):
    """An OpenEXR file -> its channel Z, else Y, else its only channel, as stored, H,W."""
    try:
        import OpenEXR
    except ImportError:
        raise BadSample(f"{path} is an OpenEXR file: install OpenEXR (extras/requirements.txt), or "
                        "convert it to .npy.") from None
    with blame(path), open(path, "rb") as file:
        headers = [part.header for part in exr_parts(OpenEXR, file, header_only=True)]
        if any("deep" in header["type"].name for header in headers):
            raise BadSample(f"{path} holds several depths per pixel (deep data): flatten it.")
        check_bytes(path, sum(map(exr_bytes, headers)))
        channels = exr_parts(OpenEXR, file, separate_channels=True)[0].channels
        names = sorted(channels)
        name = next((name for name in ("Z", "Y") if name in names), names[0])
        if name not in ("Z", "Y") and len(names) > 1:
            raise BadSample(f"{path} has the channels {', '.join(names[:5])}"
                            f"{', ...' if names[5:] else ''}: call the depth map's channel Z.")
        return channels[name].pixels


def exr_parts(OpenEXR, file, **options):
    """The parts of an open OpenEXR file; ValueError if it can't be read."""
    file.seek(0)
    try:
        parts = OpenEXR.File(file, **options).parts
    except RuntimeError:
        parts = []
    if not parts:  # for a damaged file OpenEXR prints the reason, but raises nothing
        raise ValueError("it is no OpenEXR file, or a damaged one")
    return parts


def exr_bytes(header):
    """The most bytes that the decoded channels of a part of an OpenEXR file take."""
    first, last = (corner.astype(np.int64) for corner in header["dataWindow"])
    return 4 * len(header["channels"]) * math.prod(int(side) for side in last - first + 1)


def check_bytes(path, count):
    if count > MAX_BYTES:
        raise BadSample(f"{path} would take {count:,} bytes, and no more than {MAX_BYTES:,} are "
                        "read from one file.")


def read_table(path):
    """The rows of a CSV file as dicts. Raises ValueError if it is no CSV or exceeds the limits.

    Accepts the variants that spreadsheets write: UTF-8 with or without a byte order mark; commas,
    semicolons or tabs between entries; spaces around entries. File names need not be valid UTF-8.
    """
    rows = []
    check_file(path, LARGEST)
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            heading = file.readline()
            if "\0" in heading:
                raise csv.Error("it is not text in UTF-8")
            table = csv.DictReader(chain([heading], file), skipinitialspace=True,
                                   delimiter=max(",;\t", key=heading.count))
            table.fieldnames = [name.strip() for name in table.fieldnames or ()]
            columns = len(table.fieldnames)
            if columns > MAX_COLUMNS:
                raise csv.Error(f"it has more than {MAX_COLUMNS} columns")
            for row in table:
                rows.append({name: value.strip() if isinstance(value, str) else value
                             for name, value in row.items()})
                if len(rows) * columns > MAX_ENTRIES:  # short rows are filled up to all columns
                    raise csv.Error(f"it has more than {MAX_ENTRIES:,} entries")
        except csv.Error as error:
            raise ValueError(f"{path} can't be read as a table ({error}): get it again or "
                             "write it anew.") from error
    return rows


def single_key(keys, path):
    """The key called depth or dataset, or the only one there is."""
    for key in ("depth", "dataset"):
        if key in keys:
            return key
    if len(keys) != 1:
        raise BadSample(f"{path} holds {len(keys)} things ({', '.join(sorted(keys)[:3])}"
                        f"{', ...' if keys[3:] else ''}); call the depth map 'depth'.")
    return keys[0]


def write_png(path, array):
    """Write uint8 H,W,3 or uint16 H,W as PNG, whole or not at all."""
    with whole(path) as temporary:
        iio.imwrite(temporary, array, plugin="pillow", extension=".png")


def write_npy(path, array):
    """Write an array as .npy, whole or not at all."""
    with whole(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)
