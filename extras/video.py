"""Video clips, frame by frame (with PyAV), and one scale over the depth maps of a clip."""

import logging
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain

import numpy as np
from PIL import Image

from data.transforms import BadSample
from extras.libraries import need
from storage import check_file, whole

log = logging.getLogger(__name__)

FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,h264,hevc,gif"  # not those that are lists
TICKS = 60_000  # a second, in clips that are written; MPEG-4 allows at most 65535
# The first that FFmpeg has, with options for good quality and little memory. Without frames that
# are stored out of order (bf 0) the file's duration is right for uneven times, too.
CODECS = {
    "libx264": {"crf": "18", "preset": "veryfast", "rc-lookahead": "5", "bf": "0"},
    "mpeg4": {"flags": "+qscale", "global_quality": "354"},
}
BT601 = 6  # FFmpeg's number of the colour matrix that `reformat` uses; players ask for it

CELL, CELLS = 3, 20_000  # pixels: least side of a cell. A map is fitted on so many cells at most.
INSIDE = 0.005, 0.995  # a map ends at 0 and 1: cells beyond these values may be cut off
STILL = 2.0  # grey levels of 255: a cell of the picture that changes by less stands still
ENOUGH = 0.05  # of the cells; if fewer stand still, all take part in the fit
SPREAD, RELATED = 0.03, 0.5  # least standard deviation of a map, least correlation of two in a fit
SCALES = 0.2, 5.0
FORGET = 0.02  # of the way to scale 1 and shift 0 in each frame: half of an error lasts 34 frames
CUT_CHANGE, CUT_RELATED = 15.0, 0.5  # mean change in grey levels above, correlation below: a cut


# ------------------------------------------------------------- reading and writing clips


@contextmanager
def open_clip(path):
    """Yields (container, video stream) of PyAV. Raises a BadSample for a file that is no video."""
    av = need("video")
    check_file(path)
    try:  # file: as FFmpeg takes a:b.mp4 for an address
        container = av.open(f"file:{path}", options={"format_whitelist": FORMATS})
    except av.FFmpegError as error:
        raise BadSample(f"{path} is no video, or a damaged one ({error.strerror}).") from error
    with container:
        streams = [stream for stream in container.streams.video
                   if not stream.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise BadSample(f"{path} has no video frames: it is cut short, or has only sound.")
        streams[0].thread_type = "AUTO"
        yield container, streams[0]


def decoded(path, container, stream):
    """Yields the frames of a stream; damaged parts are passed over and reported at the end."""
    av, count, damaged = need("video"), 0, 0
    packets = container.demux(stream)
    while True:
        try:
            frames = next(packets).decode()
        except StopIteration:
            break
        except av.FFmpegError:
            damaged += 1
            continue
        count += len(frames)
        yield from frames
    if not count:
        raise BadSample(f"{path} has no video frame that can be decoded: it may be cut short.")
    if damaged or count < stream.frames:
        log.warning("%s: %d frames of %s could be decoded; the file is damaged or cut short.", path,
                    count, stream.frames or "an unknown number")


def read_frames(path, start=0):
    """Yields (seconds since the first frame, uint8 H,W,3 RGB, upright) from frame `start` on.

    All frames have the size of the first one. One frame is held at a time. Raises a BadSample that
    names the file if there is nothing to decode, and a ValueError if av is not installed.
    """
    with open_clip(path) as (container, stream):
        seconds = first = size = None
        for index, frame in enumerate(decoded(path, container, stream)):
            late = 0.0 if seconds is None else seconds + float(1 / rate_of(stream))
            first = (frame.time or 0.0) if first is None else first
            seconds = late if frame.time is None else frame.time - first
            size = size or {"width": frame.width, "height": frame.height}
            if index >= start:
                picture = frame.to_ndarray(format="rgb24", **size)
                turns = round(frame.rotation / 90)  # counterclockwise
                yield seconds, np.ascontiguousarray(np.rot90(picture, turns))


def rate_of(stream):
    """Frames a second as a Fraction: the mean over the stream; 25 if the file does not say."""
    return Fraction(stream.average_rate or stream.guessed_rate or 25)


def about(path):
    """A clip's (number of frames or None, frames a second as a Fraction, (height, width) upright).

    The number is an estimate from the duration if the file does not say. Raises as read_frames.
    """
    with open_clip(path) as (container, stream):
        rate, length = rate_of(stream), (container.duration or 0) / need("video").time_base
        count = stream.frames or round(length * rate)
    _, picture = next(read_frames(path))
    return count or None, rate, picture.shape[:2]


def write_clip(path, rate, frames, comment=""):
    """Writes (seconds, uint8 H,W,3) pairs of one size as an mp4, whole or not at all.

    rate: frames a second, for the last frame's duration; each frame keeps its own time, to
    1/60000 s. A frame not later than the one before is put right after it. Odd sizes are padded to
    even ones with the last row and column, which yuv420p asks for. One frame is held at a time.
    """
    av, frames = need("video"), iter(frames)
    head = next(frames, None)
    if head is None:
        raise ValueError(f"{path} is not written: there are no frames.")
    with whole(path) as file, av.open(f"file:{file}", "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream, last = new_stream(container, rate, head[1].shape), -1
        for seconds, picture in chain([head], frames):
            if picture.shape != head[1].shape:
                raise ValueError(f"{path} is not written: its frames differ in size.")
            even = np.pad(picture, [(0, side % 2) for side in picture.shape[:2]] + [(0, 0)], "edge")
            frame = av.VideoFrame.from_ndarray(even, format="rgb24").reformat(format="yuv420p")
            frame.time_base = Fraction(1, TICKS)
            frame.pts = last = max(round(seconds * TICKS), last + 1)
            frame.duration = round(TICKS / rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def new_stream(container, rate, shape):
    """An H.264 stream (MPEG-4 where FFmpeg lacks libx264) for pictures of a shape, made even."""
    codec = next(name for name in CODECS if name in need("video").codecs_available)
    stream = container.add_stream(codec, rate=rate, options=CODECS[codec])
    stream.height, stream.width = shape[0] + shape[0] % 2, shape[1] + shape[1] % 2
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = Fraction(1, TICKS)
    stream.codec_context.colorspace = BT601
    return stream


# ------------------------------------------------------------- one scale over a clip


class Steady:
    """Brings each depth map of a clip to the scale and shift of the maps before it.

    steady(near, image): near float32 H,W, square-root disparity in [0,1] on a scale of its own;
    image uint8 H,W,3. Returns scale * near + shift, float32 H,W, not clipped. The first map, and
    the first after a cut, come back unchanged. `scale`, `shift`: those of the latest map.

    `state()` is a dict of arrays for np.savez; `Steady(state)` goes on as if never interrupted.
    """

    def __init__(self, state=None):
        state = state or {}
        self.last = state.get("last")  # h,w: the last aligned map's cells; NaN: cut off
        self.look = state.get("look")  # h,w: the last picture's cells, in grey levels
        self.scale, self.shift = 1.0, 0.0

    def state(self):
        """What a later Steady needs: empty before the first map."""
        return {} if self.last is None else {"last": self.last, "look": self.look}

    def __call__(self, near, image):
        look = cells(np.asarray(Image.fromarray(image).convert("L")))
        here = cells(near)
        inside = (here > INSIDE[0]) & (here < INSIDE[1])
        self.scale, self.shift = 1.0, 0.0
        if self.look is not None and not is_cut(self.look, look):
            here = np.where(inside, here, np.float32("nan"))
            scale, shift = fit_still(here, self.last, look, self.look)
            self.scale = float((1 - FORGET) * scale + FORGET)
            self.shift = float((1 - FORGET) * shift)
        aligned = np.float32(self.scale) * near + np.float32(self.shift)
        self.look = look
        self.last = np.where(inside, cells(aligned), np.float32("nan"))
        return aligned


def cells(x):
    """H,W -> float32 h,w: the means over cells that divide it."""
    cell = max(CELL, (x.size / CELLS) ** 0.5)
    height, width = (max(1, int(side / cell)) for side in x.shape)
    picture = Image.fromarray(np.ascontiguousarray(x, np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX))


def is_cut(before, now):
    """Whether two pictures h,w in grey levels show different scenes."""
    if before.shape != now.shape:
        return True
    a, b = (np.asarray(Image.fromarray(x).resize((16, 16), Image.Resampling.BOX), np.float64)
            for x in (before, now))  # coarse: a camera that turns fast is no cut
    change, a, b = np.abs(a - b).mean(), a - a.mean(), b - b.mean()
    related = (a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-6)
    return bool(change > CUT_CHANGE and related < CUT_RELATED)


def turn(now, before):
    """Rows and columns by which a picture h,w must be rolled to lie best over the one before.

    Found by phase correlation: the camera turned. (0, 0) if nothing fits better than that.
    """
    fade = np.outer(*map(np.hanning, now.shape))
    a, b = (np.fft.rfft2((x - x.mean()) * fade) for x in (now, before))
    product = b * a.conj()
    peaks = np.fft.irfft2(product / (np.abs(product) + 1e-6), now.shape)
    best = tuple(map(int, np.unravel_index(peaks.argmax(), peaks.shape)))
    return min([(0, 0), best], key=lambda by: np.abs(np.roll(now, by, (0, 1)) - before).mean())


def fit_still(here, last, look, last_look):
    """Scale and shift from map `here` to `last`, h,w (NaN: unknown), at points that stand still.

    look, last_look h,w: the pictures, in grey levels; a change of the whole picture's brightness
    does not count. If too few points stand still or they don't tell, all known ones are used.
    """
    by = turn(look, last_look)
    here, look = (np.roll(x, by, (0, 1)) for x in (here, look))
    change = look - last_look
    known = np.isfinite(here) & np.isfinite(last)
    for points in (known & (np.abs(change - np.median(change)) < STILL), known):
        if points.sum() >= max(10, ENOUGH * points.size):
            found = fit(here[points].astype(np.float64), last[points].astype(np.float64))
            if found:
                return found
    return 1.0, 0.0


def fit(x, y):
    """The scale and shift of N values x that bring them to y; None if they don't tell.

    The scale is the ratio of standard deviations, in which x and y have equal rights: least
    squares would make the scale too small where the maps don't agree, and a clip ever flatter.
    Points that fit badly weigh less (Cauchy's weights): objects that move.
    """
    def mean(z):
        return np.average(z, weights=weights)

    weights = np.ones_like(x)
    for _ in range(10):
        from_x, from_y = x - mean(x), y - mean(y)
        spread_x, spread_y = mean(from_x**2)**0.5, mean(from_y**2)**0.5
        if spread_x < SPREAD or spread_y < SPREAD * SCALES[0]:
            return None
        scale = np.clip(spread_y / spread_x, *SCALES)
        shift, related = mean(y - scale * x), mean(from_x * from_y) / (spread_x * spread_y)
        error = np.abs(scale * x + shift - y)
        weights = 1 / (1 + (error / (2 * np.median(error) + 1e-6))**2)
    return (scale, shift) if related > RELATED else None
