"""Clips: read back frame by frame, written whole; and one scale over the maps of a clip."""

import struct
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.transforms import BadSample
from extras import video
from extras.video import Steady, about, read_frames, write_clip

av = pytest.importorskip("av")

RATE = Fraction(30000, 1001)


def stripes(count, height=48, width=64):
    """Pictures with a red left half; a bar of light goes down by 4 rows a frame."""
    for index in range(count):
        picture = np.zeros((height, width, 3), np.uint8)
        picture[:, : width // 2, 0] = 220
        picture[4 * index : 4 * index + 4] = 255
        yield picture


def test_clip_comes_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = list(stripes(9))
    path = Path("a:b.mp4")  # FFmpeg would take the name for an address
    write_clip(path, RATE, ((i / RATE, x) for i, x in enumerate(pictures)), "depth, 1 = near")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    count, rate, size = about(path)
    assert count == 9 and size == (48, 64) and abs(rate / RATE - 1) < 1e-3
    frames = list(read_frames(path))
    assert len(frames) == 9
    for index, ((seconds, picture), given) in enumerate(zip(frames, pictures)):
        assert abs(seconds - index / RATE) < 1e-4
        assert picture.dtype == np.uint8 and picture.shape == given.shape
        assert np.abs(picture.astype(int) - given).mean() < 8  # 4:2:0 blurs the colours' edge
    later = list(read_frames(path, 5))
    assert [seconds for seconds, _ in later] == [seconds for seconds, _ in frames[5:]]
    assert all((a == b).all() for (_, a), (_, b) in zip(later, frames[5:]))
    assert list(read_frames(path, 9)) == []
    with av.open(str(tmp_path / path)) as container:
        assert container.metadata["comment"] == "depth, 1 = near"
        stream = container.streams.video[0]
        assert stream.codec_context.pix_fmt == "yuv420p" and stream.codec_context.name == "h264"


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_colours_times_and_odd_sizes(tmp_path, monkeypatch, codec):
    monkeypatch.setattr(video, "CODECS", {codec: video.CODECS[codec]})
    colours = np.array([[200, 40, 40], [30, 180, 60], [20, 40, 220], [128, 128, 128]], np.uint8)
    picture = np.repeat(np.repeat(colours[None], 37, 0), 17, 1)[:, :67]  # 37x67
    seconds = [0, 0.04, 0.08, 0.2, 0.21, 0.5, 0.54]
    write_clip(tmp_path / "a.mp4", Fraction(25), ((s, picture) for s in seconds))
    assert about(tmp_path / "a.mp4")[2] == (38, 68)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.duration / 1e6 == pytest.approx(0.58, abs=2e-3)
    frames = list(read_frames(tmp_path / "a.mp4"))
    assert [s for s, _ in frames] == pytest.approx(seconds, abs=1e-4)
    for _, back in frames:
        assert np.abs(back[20, 8::17].astype(int) - colours).max() <= 6
        assert np.abs(back[37].astype(int) - back[36]).mean() < 3  # the last row, repeated
        assert np.abs(back[:, 67].astype(int) - back[:, 66]).mean() < 3


def test_times_that_stand_still_are_moved(tmp_path):
    write_clip(tmp_path / "a.mp4", 25, zip([0, 0.04, 0.04, 0.03, 0.2], stripes(5)))
    seconds = [s for s, _ in read_frames(tmp_path / "a.mp4")]
    assert len(seconds) == 5 and all(a < b for a, b in pairwise(seconds))
    assert seconds == pytest.approx([0, 0.04, 0.04, 0.04, 0.2], abs=1e-3)


def test_times_count_from_the_first_frame(tmp_path):
    write_clip(tmp_path / "a.mp4", 25, zip([5, 5.04, 5.2], stripes(3)))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert next(container.decode(video=0)).time == 5
    assert [s for s, _ in read_frames(tmp_path / "a.mp4")] == pytest.approx([0, 0.04, 0.2])


@pytest.mark.parametrize("matrix, degrees", [
    ((0, 1, -1, 0), 90), ((-1, 0, 0, -1), 180), ((0, -1, 1, 0), 270)])
def test_clip_is_turned_upright(tmp_path, matrix, degrees):
    """The matrix of the MP4 track header: x' = a x + c y, y' = b x + d y, y down."""
    path = tmp_path / "a.mp4"
    write_clip(path, 25, ((i / 25, x) for i, x in enumerate(stripes(3))))
    straight = [x for _, x in read_frames(path)]
    a, b, c, d = (value * 65536 for value in matrix)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2, version 0
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    turned = [x for _, x in read_frames(path)]
    assert about(path)[2] == turned[0].shape[:2] == ((48, 64) if degrees == 180 else (64, 48))
    for before, after in zip(straight, turned):
        clockwise = {90: before[::-1].transpose(1, 0, 2), 180: before[::-1, ::-1],
                     270: before[:, ::-1].transpose(1, 0, 2)}[degrees]
        assert (after == clockwise).all()


def encode(path, kind, codec, frames):
    """A clip written with PyAV alone, at 25 frames a second; codec "aac": a second of silence."""
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=8000 if codec == "aac" else 25)
        if codec != "aac":
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def as_frames(pictures):
    return (av.VideoFrame.from_ndarray(x, format="rgb24") for x in pictures)


@pytest.mark.parametrize("kind", ["matroska", "mpegts", "avi"])
def test_other_containers(tmp_path, kind):
    """Some don't say how many frames they have, and store times in other units."""
    encode(tmp_path / "a", kind, "mpeg4", as_frames(stripes(25)))
    count, rate, size = about(tmp_path / "a")
    assert rate == 25 and size == (48, 64) and abs(count - 25) <= 1
    seconds = [s for s, _ in read_frames(tmp_path / "a")]
    assert seconds == pytest.approx([i / 25 for i in range(25)], abs=2e-3)


def test_files_that_are_no_video(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("A film about a lake.\n" * 99)
    playlist = tmp_path / "playlist.mp4"  # would open other files, or addresses
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nb.ts\n#EXT-X-ENDLIST\n")
    encode(tmp_path / "b.ts", "mpegts", "mpeg4", as_frames(stripes(5)))
    picture = tmp_path / "photo.mp4"
    Image.fromarray(next(stripes(1))).save(picture, format="PNG")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    sound = tmp_path / "sound.mp4"
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
    silence.sample_rate = 8000
    encode(sound, "mp4", "aac", [silence])
    for path in (text, playlist, picture, empty, sound):
        for use in (about, lambda path: list(read_frames(path))):
            with pytest.raises(BadSample, match=path.name):
                use(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        about(tmp_path / "nowhere.mp4")
    with pytest.raises(ValueError, match="not a file"):
        about(tmp_path)


def test_clips_cut_short(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8)
    path = tmp_path / "a.mp4"
    write_clip(path, 25, ((i / 25, x) for i, x in enumerate(noise)))
    path.write_bytes(path.read_bytes()[:-200])  # the index stands at the end
    with pytest.raises(BadSample, match="a.mp4"):
        about(path)

    encode(path, "mp4", "mpeg4", [])  # a header alone, if a file at all
    with pytest.raises(BadSample, match="a.mp4"):
        about(path)

    path = tmp_path / "b.avi"  # its header stands at the front
    encode(path, "avi", "mpeg4", as_frames(noise))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert 5 < len(list(read_frames(path))) < 30
    assert "b.avi" in caplog.text and "of 40 could be decoded" in caplog.text
    path.write_bytes(whole[: whole.index(b"movi") + 4])
    with pytest.raises(BadSample, match="b.avi has no video frame"):
        list(read_frames(path))


def test_clip_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_text("an earlier clip")

    def breaks_off():
        yield 0, next(stripes(1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_clip(path, 25, breaks_off())
    with pytest.raises(ValueError, match=r"a\.mp4.*differ in size"):
        write_clip(path, 25, [(0, next(stripes(1))), (1, next(stripes(1, 32)))])
    with pytest.raises(ValueError, match=r"a\.mp4.*no frames"):
        write_clip(path, 25, [])
    assert path.read_text() == "an earlier clip" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="can't be written"):
        write_clip(tmp_path / "no folder" / "a.mp4", 25, [(0, next(stripes(1)))])


def test_one_frame_is_held_at_a_time(tmp_path):
    """The writer takes a frame, encodes it and asks for the next one; the reader decodes ahead."""
    alive = []

    def frames():
        import weakref
        for index, picture in enumerate(stripes(40)):
            alive.append(weakref.ref(picture))
            yield index / 25, picture
            assert sum(reference() is not None for reference in alive) <= 4

    write_clip(tmp_path / "a.mp4", 25, frames())
    assert len(alive) == 40
    assert next(read_frames(tmp_path / "a.mp4"))[0] == 0


def test_without_av(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"needs av: pip install -r extras/requirements\.txt"):
        about(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="needs av"):
        write_clip(tmp_path / "a.mp4", 25, [(0, next(stripes(1)))])


# ------------------------------------------------------------- one scale over a clip


def smooth(rng, shape, cell, low, high):
    """A random field H,W from low to high, smooth over `cell` pixels."""
    coarse = rng.random([side // cell + 2 for side in shape]).astype(np.float32)
    x = np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))
    return low + (high - low) * (x - x.min()) / (x.max() - x.min())


def scene(seed, shape=(120, 280)):
    """True square-root disparity and grey levels, H,W, of a still scene."""
    rng = np.random.default_rng(seed)
    grey = smooth(rng, shape, 6, 0, 120) + smooth(rng, shape, 40, 0, 135)
    return smooth(rng, shape, 40, 0.2, 1), grey.astype(np.uint8)


def predicted(truth, rng):
    """The map of a network that scales each frame by its own quantiles, and not quite right."""
    low, high = np.quantile(truth, (0.02, 0.98))
    scale, shift = 1 + 0.05 * rng.standard_normal(), 0.03 * rng.standard_normal()
    return (scale * (truth - low) / (high - low) + shift).clip(0, 1).astype(np.float32)


def colours(grey):
    return np.repeat(grey[..., None], 3, 2)


def pan(count=60, step=2, seed=0):
    """(truth, map, image) for each frame of a camera that turns by `step` pixels a frame."""
    truth, grey = scene(seed, (120, 160 + step * count))
    rng = np.random.default_rng(seed)
    for left in range(0, step * count, step):
        view = slice(left, left + 160)
        yield truth[:, view], predicted(truth[:, view], rng), colours(grey[:, view])


def flicker(maps, step):
    """The mean change of the same point of the scene from frame to frame."""
    return np.mean([np.abs(b[:, :-step] - a[:, step:]).mean() for a, b in pairwise(maps)])


def error(near, truth):
    near = np.clip(near, -0.5, 1.5).ravel()
    basis = np.stack([near, np.ones_like(near)], 1).astype(np.float64)
    found = np.linalg.lstsq(basis, truth.ravel().astype(np.float64), rcond=None)[0]
    return np.abs(basis @ found - truth.ravel()).mean()


@pytest.mark.parametrize("step", [1, 2, 6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_steady_over_a_camera_move(step, seed):
    truths, maps, images = zip(*pan(step=step, seed=seed))
    steady = Steady()
    aligned = [steady(near, image) for near, image in zip(maps, images)]
    assert aligned[0].dtype == np.float32 and (aligned[0] == maps[0]).all()
    ratio = flicker(aligned, step) / flicker(maps, step)
    before, after = (np.mean([error(x, t) for x, t in zip(y, truths)]) for y in (maps, aligned))
    print(f"step {step} seed {seed}: flicker {ratio:.3f}, error {after / before:.4f}")
    assert ratio <= 0.15 and after <= 1.05 * before


def test_scale_of_a_turn_comes_from_the_points_that_stay():
    """The scale follows the scene, not the range of depth that happens to be in view."""
    steady, found = Steady(), []
    for truth, near, image in pan(step=6, seed=1):
        aligned = steady(near, image)
        inside = (near > 0.01) & (near < 0.99)
        found.append(np.polyfit(truth[inside].astype(float), aligned[inside], 1)[0])
    print(f"scale against truth over a turn: {max(found) / min(found):.2f}")
    assert max(found) / min(found) < 1.2


def test_steady_keeps_the_contrast():
    """Maps that agree in part, with errors of their own: least squares would flatten them."""
    truth, grey = scene(0, (120, 160))
    rng, steady = np.random.default_rng(0), Steady()
    for _ in range(100):
        noisy = 0.2 + 0.5 * truth + smooth(rng, truth.shape, 10, -0.15, 0.15)
        aligned = steady(noisy.astype(np.float32), colours(grey))
    assert 0.9 < aligned.std() / noisy.std() < 1.1


@pytest.mark.parametrize("width, noise", [(60, 30), (100, 0)])
def test_object_that_moves_does_not_move_the_room(width, noise):
    """A small one in a picture in which nothing stands still, and one that hides half."""
    truth, grey = scene(1, (120, 160))
    rng, steady, maps, aligned = np.random.default_rng(0), Steady(), [], []
    for index in range(30):
        near, image = 0.2 + 0.4 * truth, grey.clip(40, 215)
        area = np.s_[30:, index : index + width]
        near[area] = 0.2 + 0.6 * rng.random()  # flat, and near or far in turns
        image[area] = smooth(rng, image[area].shape, 4, 40, 215)
        image = image + smooth(rng, image.shape, 4, -noise, noise)
        near = (1 + 0.1 * rng.standard_normal()) * near + 0.05 * rng.standard_normal()
        maps.append(near.astype(np.float32).clip(0, 1))
        aligned.append(steady(maps[-1], colours(image.astype(np.uint8))))
    before, after = (np.mean([np.abs(b - a)[:25].mean() for a, b in pairwise(x)])
                     for x in (maps, aligned))
    print(f"beside a moving object of {width} columns: flicker {after / before:.3f}")
    assert after < 0.3 * before


def test_scale_goes_back_to_1_slowly():
    """In closed form: of the first map, a part is cut off; the others never change."""
    ramp = np.linspace(0.05, 0.95, 160, dtype=np.float32)[None].repeat(120, 0)
    image, steady = colours(scene(0, (120, 160))[1]), Steady()
    steady((1.6 * ramp).clip(0, 1), image)
    for frame in range(1, 41):
        aligned = steady(ramp, image)
        assert steady.scale == pytest.approx(1 + 0.6 * 0.98**frame, rel=0.01)
        assert abs(steady.shift) < 0.01
    assert aligned == pytest.approx(steady.scale * ramp + steady.shift)


def test_scale_is_bounded():
    ramp = np.linspace(0.01, 0.99, 160, dtype=np.float32)[None].repeat(120, 0)
    image = colours(scene(0, (120, 160))[1])
    for first, second, bound in ((ramp, 0.4 + 0.15 * ramp, 5), (0.4 + 0.15 * ramp, ramp, 0.2)):
        steady = Steady()
        steady(first, image)
        aligned = steady(second, image)
        assert steady.scale == pytest.approx(0.98 * bound + 0.02)
        assert aligned.mean() == pytest.approx(first.mean(), abs=0.02)


def test_cut_starts_again_and_a_flash_does_not():
    """Both scenes have the same maps: only the pictures tell a cut."""
    steady, maps = Steady(), [near for _, near, _ in pan(10, seed=3)]
    for seed in (3, 4):
        for index, (near, (_, _, image)) in enumerate(zip(maps, pan(10, seed=seed))):
            aligned = steady(near, image)
            assert ((steady.scale, steady.shift) == (1, 0)) == (index == 0)
    assert not (aligned == near).all()
    steady(near, (image // 2 + 100).astype(np.uint8))  # lighter, and the same scene
    assert (steady.scale, steady.shift) != (1, 0)
    smaller = near[:100, :100]
    assert (steady(smaller, image[:100, :100]) == smaller).all()  # another size: another clip


def test_zoom_does_not_run_away():
    """The range of depth in the picture falls to 50 %: each map stretches it to [0,1] again."""
    truth, grey = scene(0, (480, 640))
    rng, steady, found = np.random.default_rng(0), Steady(), []
    for index in range(100):
        height, width = (int(side * (1 - 0.008 * index)) for side in truth.shape)
        top, left = (480 - height) // 2, (640 - width) // 2
        small, image = (
            np.asarray(Image.fromarray(x[top : top + height, left : left + width])
                       .resize((160, 120), Image.Resampling.BILINEAR)) for x in (truth, grey))
        aligned = steady(predicted(small, rng), colours(image))
        found.append((steady.scale, aligned.min(), aligned.max()))
    scales, lows, highs = zip(*found)
    print(f"zoom: scale {min(scales):.2f} to {max(scales):.2f}")
    assert min(scales) > 0.4 and max(scales) < 2.5 and min(lows) > -1 and max(highs) < 2


def test_maps_that_tell_no_scale():
    """Flat, black, inverted or unrelated maps come back as they are."""
    truth, grey = scene(0, (120, 160))
    rng, image = np.random.default_rng(0), colours(grey)
    for near in (np.zeros_like(truth), np.full_like(truth, 0.5), 1 - truth, rng.random((120, 160))):
        steady, near = Steady(), near.astype(np.float32)
        steady(truth, image)
        assert (steady(near, image) == near).all()
    tiny = np.full((1, 2), 0.5, np.float32)
    steady = Steady()
    for _ in range(2):
        assert (steady(tiny, np.zeros((1, 2, 3), np.uint8)) == tiny).all()


def test_resumed_clip_is_the_same_to_the_bit(tmp_path):
    frames = [(near, image) for _, near, image in pan(30)]
    straight, again = Steady(), Steady()
    expected = [straight(*frame) for frame in frames]
    for index, (frame, near) in enumerate(zip(frames, expected)):
        np.savez(tmp_path / "state.npz", **again.state())
        with np.load(tmp_path / "state.npz") as file:
            again = Steady(dict(file) if index % 2 else file)
        assert (again(*frame) == near).all()
    assert set(again.state()) == {"last", "look"}
    assert sum(x.size for x in again.state().values()) <= 2 * video.CELLS
