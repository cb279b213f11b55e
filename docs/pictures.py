"""Draws the pictures of README.md with the embedded miniature: python -m docs.pictures.

docs/miniature.png: image, truth, prediction, error. docs/metres.png: metres from ten known
distances. docs/points.png: a point cloud from the side. docs/clip.png: frames of a clip.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.hypersim import Hypersim, tone_map
from evaluation.pictures import colourise, labelled
from extras.metric import fit
from extras.points import from_fov, to_points
from extras.video import Steady
from miniature.demo_table import draw
from miniature.embedded import TRAINED, held_out
from miniature.render import ROOM_SIZE
from miniature.rooms import room_camera, room_scene
from miniature.shading import render
from nets.depthmaster import DepthMaster

HERE = Path(__file__).parent
FOV = 60  # degrees, of the miniature's rooms
ROOM = 29  # number of the held-out picture with known distances
KNOWN = 10  # distances
FRAMES, TURN = 48, 0.7  # of the clip; degrees that the camera turns between two


def large(picture, times=2):
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def write_at(picture, points, texts):
    """A picture, doubled, with a dot and a text at each point (x, y)."""
    canvas = Image.fromarray(large(picture))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for (x, y), text in zip(2 * points, texts):
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill="white", outline="black")
        pen.text((x + 5, y), text, "white", font, anchor="lm", stroke_width=2, stroke_fill="black")
    return np.array(canvas)


def draw_metres(model, image, depth_m, valid):
    """Writes metres.png; returns the metric map."""
    rng = np.random.default_rng(2)
    inside = np.zeros_like(valid)
    inside[8:-8, 8:-40] = valid[8:-8, 8:-40]  # room for the numbers
    rows, columns = (x[rng.choice(len(x), KNOWN, replace=False)] for x in inside.nonzero())
    points = np.stack([columns + 0.5, rows + 0.5, depth_m[rows, columns]], axis=1)
    near = model.predict(image)
    found = fit(near, points)
    metres = found.metres(near)
    low, high = 1 / metres.max(), 1 / metres.min()
    colours = colourise((1 / metres - low) / (high - low))
    pictures = {
        "known distances": write_at(image, points[:, :2], [f"{z:.2f} m" for z in points[:, 2]]),
        "metres": write_at(colours, points[:, :2], [f"{z:.2f} m" for z in metres[rows, columns]]),
        "residuals": write_at(colours // 2, points[:, :2],
                              [f"{r:+.1%}" for r in found.residuals])}
    Image.fromarray(labelled(pictures)).save(HERE / "metres.png")
    return metres


def draw_points(image, metres):
    """Writes points.png: the image, and its points from the upper left."""
    focal = from_fov(metres.shape, FOV)
    xyz, rgb = to_points(metres, focal, image)
    centre = np.array([0, 0, np.median(metres)])
    yaw, pitch = np.radians(24), np.radians(-16)
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    tilt = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)],
                     [0, np.sin(pitch), np.cos(pitch)]])
    seen = (xyz - centre) @ (tilt @ turn).T + centre * [1, 1, 1.25]
    seen, rgb = seen[order := np.argsort(-seen[:, 2])], rgb[order]  # nearer points come later
    height, width = 2 * metres.shape[0], 2 * metres.shape[1]
    canvas = np.full((height + 2, width + 2, 3), 24, np.uint8)
    x, y = (2 * focal * seen[:, axis] / seen[:, 2] for axis in (0, 1))
    x, y = (x + width / 2).astype(int), (y + height / 2).astype(int)
    there = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    for row, column in np.ndindex(3, 3):  # a point is 3x3 pixels
        canvas[y[there] + row, x[there] + column] = rgb[there]
    Image.fromarray(labelled({"image": large(image), "its points from the side":
                              canvas[:height, :width]})).save(HERE / "points.png")


def draw_clip(model):
    """Writes clip.png: five frames of a camera that turns, above their maps on one scale."""
    room, scene = room_scene(np.random.default_rng(5))
    camera = room_camera(room, scene, np.random.default_rng(8), *ROOM_SIZE[::-1])
    steady, frames, maps = Steady(), [], []
    for index in range(FRAMES):
        turned = replace(camera, yaw=camera.yaw + np.radians(TURN) * index)
        drawn = render(scene, turned)
        frames.append(tone_map(drawn["color"], drawn["entity"] >= 0))
        maps.append(steady(model.predict(frames[-1]), frames[-1]))
    low, high = np.quantile(maps, (0.005, 0.995))
    shown = np.linspace(0, FRAMES - 1, 5).astype(int)
    strip = [np.concatenate([frames[index], colourise((maps[index] - low) / (high - low))])
             for index in shown]
    pictures = {f"frame {index}": picture for index, picture in zip(shown + 1, strip)}
    Image.fromarray(labelled(pictures)).save(HERE / "clip.png")


def main():
    model = DepthMaster.from_file(TRAINED).for_inference(precision="float32")
    sample = Hypersim(held_out() / "hypersim", "val")[ROOM]
    image = sample["image"].permute(1, 2, 0).numpy()
    draw(model, HERE / "miniature.png")
    metres = draw_metres(model, image, sample["depth"][0].numpy(), sample["valid"][0].numpy())
    draw_points(image, metres)
    draw_clip(model)


if __name__ == "__main__":
    main()
