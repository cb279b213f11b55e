"""What rooms and streets are built from: the classes, colours, and a list of shapes that grows."""

import numpy as np

from miniature.raycast import BOX, CYLINDER, SPHERE, Material, Shape

CLASSES = (
    "void", "wall", "floor", "ceiling", "cabinet", "table", "seat", "ball", "pillar",
    "post", "picture", "frame", "ground", "facade", "car", "tree", "road",
)  # fmt: skip
ROOM, OUTSIDE, NEXT = 0, 1, 2  # zones of light; every room next door has its own, from NEXT on


class Builder:
    """Collects shapes, with the random numbers that decide on them.

    `new_object` starts an object: all shapes added until the next call share its entity number.
    """

    def __init__(self, rng):
        self.rng = rng
        self.shapes = []
        self.entity = 0

    def uniform(self, low, high):
        return float(self.rng.uniform(low, high))

    def chance(self, probability):
        return bool(self.rng.random() < probability)

    def pick(self, options):
        return options[int(self.rng.integers(len(options)))]

    def new_object(self):
        self.entity += 1

    def box(self, low, high, label, material, zone=ROOM, casts=True):
        """A box along the world's axes between two corners."""
        low, high = np.minimum(low, high), np.maximum(low, high)
        self._add(BOX, (low + high) / 2, (high - low) / 2, label, material, zone, casts)

    def part(self, origin, yaw, low, high, label, material, zone=ROOM):
        """A box given in the axes of an object that stands at `origin`, turned by `yaw`."""
        low, high = np.array(low), np.array(high)
        x, y, z = (low + high) / 2
        c, s = np.cos(yaw), np.sin(yaw)
        centre = origin[0] + c * x - s * y, origin[1] + s * x + c * y, origin[2] + z
        self._add(BOX, centre, np.abs(high - low) / 2, label, material, zone, True, yaw)

    def sphere(self, centre, radius, label, material, zone=ROOM, casts=True):
        self._add(SPHERE, centre, (radius,) * 3, label, material, zone, casts)

    def cylinder(self, x, y, bottom, top, radius, label, material, zone=ROOM, casts=True):
        """An upright cylinder from height `bottom` to `top`."""
        half = radius, radius, (top - bottom) / 2
        self._add(CYLINDER, (x, y, (bottom + top) / 2), half, label, material, zone, casts)

    def _add(self, form, centre, half, label, material, zone, casts, yaw=0.0):
        centre, half = tuple(float(v) for v in centre), tuple(float(v) for v in half)
        label = CLASSES.index(label)
        self.shapes.append(
            Shape(form, centre, half, material, self.entity, label, yaw, zone, casts)
        )


def grey(builder, low, high, tint=0.06):
    """A slightly tinted grey between two albedos."""
    level = builder.uniform(low, high)
    tinted = level * (1 + builder.rng.uniform(-tint, tint, 3))
    return tuple(np.clip(tinted, 0.01, 0.95).tolist())


def vivid(builder, low=0.08, high=0.6):
    """A saturated colour: one strong, one weak and one middling component, in any order."""
    strong = builder.uniform(0.5 * (low + high), high)
    weak, middling = strong * builder.uniform(0.1, 0.4), strong * builder.uniform(0.3, 0.9)
    levels = builder.rng.permutation(np.array([strong, weak, middling]))
    return tuple(np.clip(levels, 0.01, 0.95).tolist())


def brown(builder, low=0.08, high=0.45):
    """The colour of wood."""
    red = builder.uniform(low, high)
    green = red * builder.uniform(0.5, 0.75)
    return red, green, green * builder.uniform(0.4, 0.75)


def darker(colour, factor):
    return tuple(factor * c for c in colour)


def wood(builder):
    """Planks of 10 to 20 cm."""
    colour = brown(builder)
    second = darker(colour, builder.uniform(0.4, 0.7))
    return Material(colour, second, "wood", builder.uniform(0.1, 0.2))


def metal(builder):
    """Smooth and grey, from nearly black to light."""
    return Material(grey(builder, 0.03, 0.6), grain=0.03)


def paint(builder):
    """The surface of furniture: wood, or grey or vivid with at most a small pattern."""
    kind = builder.rng.random()
    if kind < 0.4:
        return wood(builder)
    colour = grey(builder, 0.08, 0.75) if kind < 0.65 else vivid(builder)
    pattern = builder.pick(("plain", "plain", "noise", "stripes", "checker"))
    return Material(colour, darker(colour, 0.55), pattern, builder.uniform(0.05, 0.2))


def facade_material(builder):
    """A house's front: storeys of windows, or bricks."""
    if builder.chance(0.6):
        colour = grey(builder, 0.25, 0.7, 0.15)
    else:
        colour = brown(builder, 0.2, 0.5)
    if builder.chance(0.8):
        glass = grey(builder, 0.03, 0.2)
        return Material(colour, glass, "windows", builder.uniform(2.2, 3.2), 0.15)
    return Material(colour, grey(builder, 0.4, 0.6), "bricks", 0.4, 0.15)


def tree(builder, x, y, ground, zone):
    """A trunk that carries two balls of leaves."""
    builder.new_object()
    height, girth = builder.uniform(1.6, 3.0), builder.uniform(0.08, 0.25)
    bark = Material(brown(builder, 0.06, 0.2))
    builder.cylinder(x, y, ground, ground + height + 0.5, girth, "tree", bark, zone)
    green = builder.uniform(0.03, 0.15), builder.uniform(0.15, 0.3), builder.uniform(0.02, 0.08)
    leaves = Material(green, darker(green, 0.3), "noise", 0.25, 0.5)
    radius = builder.uniform(0.9, 1.8)
    builder.sphere((x, y, ground + height + 0.8 * radius), radius, "tree", leaves, zone)
    upper = x + 0.5 * radius, y - 0.3 * radius, ground + height + 1.5 * radius
    builder.sphere(upper, 0.7 * radius, "tree", leaves, zone)
