"""Procedural streets: road, pavements, rows of houses, cars, poles, trees and sky."""

import numpy as np

from miniature.builder import OUTSIDE, Builder, darker, facade_material, grey, metal, tree, vivid
from miniature.raycast import Camera, Material
from miniature.shading import Light, Scene

FOCAL_PER_WIDTH = 725.0087 / 1242  # Virtual KITTI 2's camera
FARTHEST_M = 150


def street_scene(rng):
    """A Scene of a street along +y, its middle at x = 0, and half of the road's width in metres."""
    street = Builder(rng)
    half_road = street.uniform(3, 5.5)
    pavement = half_road + street.uniform(1.5, 4)
    _surfaces(street, half_road, pavement)
    for side in (-1, 1):
        _houses(street, side, pavement)
        _parked_cars(street, side, half_road)
        _along_pavement(street, side, half_road, pavement)
    for _ in range(rng.integers(0, 4)):
        lane = street.pick((-1, 1))
        _car(street, lane * half_road * 0.45, street.uniform(9, 80), lane < 0)
    if street.chance(0.5):  # the street ends at a house
        street.new_object()
        y = street.uniform(70, FARTHEST_M)
        low, high = (-60, y, 0), (60, y + 8, street.uniform(6, 15))
        street.box(low, high, "facade", facade_material(street), OUTSIDE)
    return _lit_by_day(street), half_road


def street_camera(half_road, rng, width, height):
    """A camera in the right lane that looks down the street."""
    position = half_road * rng.uniform(0.2, 0.6), 0.0, rng.uniform(1.45, 1.75)
    yaw, pitch, roll = np.pi / 2 + rng.normal(0, 0.06), rng.normal(0, 0.012), rng.normal(0, 0.006)
    return Camera(position, yaw, pitch, roll, width, height, FOCAL_PER_WIDTH * width)


def _lit_by_day(street):
    """The finished Scene, with a sun, ambient light and a sky."""
    sun = np.array([street.uniform(-100, 100), street.uniform(-120, 30), street.uniform(70, 150)])
    power = street.uniform(0.7, 1.6) * float(sun @ sun) * np.array([1, 0.95, 0.85])
    ambient = np.array([(0, 0, 0), street.uniform(0.35, 0.7) * np.array([0.85, 0.95, 1.15])])
    sky = tuple(street.uniform(0.9, 2.0) * np.array([0.75, 0.9, 1.15]))
    light = Light(tuple(sun), tuple(power), OUTSIDE)
    return Scene(street.shapes, [light], ambient, sky)


def _surfaces(street, half_road, pavement):
    asphalt = grey(street, 0.1, 0.25)
    street.new_object()
    road = Material(asphalt, (0.75, 0.75, 0.7), "road", 2 * half_road, 0.25)
    # Patterns follow a box's own x axis: the quarter turn makes the markings follow the street.
    low, high = (-170, -half_road, -0.2), (170, half_road, 0)
    street.part((0, 150, 0), np.pi / 2, low, high, "road", road, OUTSIDE)
    for side in (-1, 1):
        street.new_object()
        colour = grey(street, 0.25, 0.5)
        slabs = Material(colour, darker(colour, 0.6), "tiles", street.uniform(0.5, 1.0), 0.2)
        low, high = (side * half_road, -20, -0.2), (side * pavement, 320, 0.13)
        street.box(low, high, "ground", slabs, OUTSIDE)
    street.new_object()
    grass = Material((0.12, 0.2, 0.06), (0.05, 0.1, 0.03), "noise", 0.8, 0.3)
    street.box((-300, -20, -0.4), (300, 320, -0.05), "ground", grass, OUTSIDE, casts=False)


def _houses(street, side, pavement):
    """A row of houses with gaps in which trees stand."""
    y = street.uniform(-15, 5)
    gaps = street.uniform(0.1, 0.5)
    while y < FARTHEST_M:
        length = street.uniform(8, 22)
        if street.chance(gaps):
            for _ in range(2):
                x = side * (pavement + street.uniform(1.5, 8))
                tree(street, x, y + street.uniform(0, 1) * length, -0.05, OUTSIDE)
        else:
            near = pavement + street.pick((0.0, 0.0, 1.0, 4.0))
            street.new_object()
            low = side * near, y, -0.1
            high = side * (near + 12), y + length, street.uniform(4, 16)
            street.box(low, high, "facade", facade_material(street), OUTSIDE)
        y += length + street.pick((0.0, 0.0, 3.0))


def _parked_cars(street, side, half_road):
    y = street.uniform(6, 18)
    while y < 90 and street.chance(0.85):
        _car(street, side * (half_road - 1.0), y, side < 0)
        y += float(street.rng.exponential(9)) + 5.5


def _car(street, x, y, oncoming):
    """A body, a cabin of glass, a roof and four wheels; 3.6 to 4.8 m long."""
    street.new_object()
    origin, yaw = (x, y, 0.0), (1.5 if oncoming else 0.5) * np.pi + street.rng.normal(0, 0.02)
    long, wide = street.uniform(1.8, 2.4), street.uniform(0.8, 0.95)  # half of each
    top = street.uniform(1.35, 1.9)
    colour = vivid(street) if street.chance(0.5) else grey(street, 0.03, 0.8)
    body = Material(colour, grain=0.03)
    glass, rubber = Material((0.04, 0.05, 0.06), grain=0.0), Material((0.03, 0.03, 0.03))
    back, front = -long * 0.9, long * street.uniform(0.2, 0.5)
    boxes = [
        ((-long, -wide, 0.25), (long, wide, 0.85), body),
        ((back, -wide + 0.1, 0.85), (front, wide - 0.1, top - 0.06), glass),
        ((back - 0.02, -wide + 0.08, top - 0.06), (front + 0.02, wide - 0.08, top), body),
    ]
    for u in (-0.62 * long, 0.62 * long):
        for v in (-wide - 0.01, wide - 0.19):
            boxes.append(((u - 0.3, v, 0), (u + 0.3, v + 0.2, 0.6), rubber))
    for low, high, material in boxes:
        street.part(origin, yaw, low, high, "car", material, OUTSIDE)


def _along_pavement(street, side, half_road, pavement):
    """Poles at the kerb, and in some streets trees at the houses, every few metres."""
    y = street.uniform(3, 15)
    trees = street.chance(0.4)
    while y < 110:
        if trees and street.chance(0.6):
            tree(street, side * (pavement - 0.6), y, 0.13, OUTSIDE)
        elif street.chance(0.7):
            _pole(street, side * (half_road + 0.5), y, side)
        y += street.uniform(6, 20)


def _pole(street, x, y, side):
    """A street lamp with an arm over the road, or a lower pole with a sign."""
    street.new_object()
    material, height = metal(street), street.uniform(2.5, 7)
    street.cylinder(x, y, 0.13, height, street.uniform(0.04, 0.1), "post", material, OUTSIDE)
    if height > 4:
        low, high = (x - side * 1.5, y - 0.06, height - 0.1), (x, y + 0.06, height)
        street.box(low, high, "post", material, OUTSIDE)
        return
    colour, pattern = vivid(street, 0.3, 0.8), street.pick(("plain", "stripes"))
    sign = Material(colour, (0.9, 0.9, 0.9), pattern, 0.3, 0.03)
    low, high = (x - 0.35, y - 0.1, height - 0.7), (x + 0.35, y - 0.07, height)
    street.box(low, high, "post", sign, OUTSIDE)
