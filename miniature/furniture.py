"""The furniture of a room, in typical sizes. Every function adds to the Room it is given."""

from dataclasses import replace

import numpy as np

from miniature.builder import darker, grey, metal, paint, vivid, wood
from miniature.raycast import Material


def furnish(room):
    """Fills a room in proportion to its floor; what finds no free place is left out."""
    area = room.size[0] * room.size[1]
    count = int(np.clip(area / 3, 4, 16) * room.uniform(0.6, 1.2))
    pieces = (
        *(_cabinet,) * 3, *(_table,) * 3, _sofa, _ball, _ball, _pillar, _lamp, _lamp, _stand,
        _crates, _crates, _shelf,
    )  # fmt: skip
    for _ in range(count):
        room.pick(pieces)(room)
    if room.chance(0.5):
        _rug(room)
    for _ in range(room.rng.integers(0, 3)):
        _pendant(room)


def _against_wall(room, width, depth):
    """A free stretch (wall, s) for something `width` wide and `depth` deep, or None."""
    for _ in range(8):
        wall = room.pick(room.walls)
        if wall.length < width + 0.2:
            continue
        s = room.uniform(0.05, wall.length - width - 0.05)
        x, y, _ = wall.point(s + width / 2, -depth / 2, 0)
        if all(np.hypot(x - a, y - b) > width / 2 + r for a, b, r in room.taken):
            room.taken.append((x, y, max(width, depth) / 2))
            return wall, s
    return None


def _cabinet(room):
    width, depth = room.uniform(0.5, 1.6), room.uniform(0.35, 0.6)
    height = room.uniform(0.7, 1.1) if room.chance(0.5) else room.uniform(1.6, 2.2)
    height = min(height, room.size[2] - 0.1)
    place = _against_wall(room, width, depth)
    if place is None:
        return
    wall, s = place
    material = paint(room)
    room.new_object()
    room.slab(wall, (s, s + width), (-depth, 0), (0, height), "cabinet", material)
    for left in (s, s + width / 2):  # two doors stand out by 2 cm, with a slit between them
        door = (left + 0.02, left + width / 2 - 0.02), (-depth - 0.02, 0), (0.08, height - 0.03)
        room.slab(wall, *door, "cabinet", replace(material, grain=0.15))
    if height < 1.2:
        middle = wall.point(s + width / 2, -depth / 2, height)
        _clutter(room, middle, width / 2 - 0.12, depth / 2 - 0.1, _yaw_of(wall))


def _shelf(room):
    width, depth, height = room.uniform(0.6, 1.2), 0.3, room.uniform(1.2, 2.1)
    place = _against_wall(room, width, depth)
    if place is None:
        return
    wall, s = place
    material = wood(room)
    room.new_object()
    for side in (s, s + width - 0.03):
        room.slab(wall, (side, side + 0.03), (-depth, 0), (0, height), "cabinet", material)
    boards = np.linspace(0.08, height - 0.03, 5)
    for z in boards:
        inside = s + 0.03, s + width - 0.03
        room.slab(wall, inside, (-depth, 0), (z, z + 0.03), "cabinet", material)
    for z in boards[:-1]:
        middle = wall.point(s + width / 2, -depth / 2, z + 0.03)
        _clutter(room, middle, width / 2 - 0.12, 0.05, _yaw_of(wall), tallest=0.22, most=2)


def _yaw_of(wall):
    return 0 if wall.axis == 0 else np.pi / 2


def _clutter(room, middle, half_u, half_v, yaw, tallest=0.35, most=4):
    """Small things on a surface around `middle`: boxes, balls and bottles."""
    c, s = np.cos(yaw), np.sin(yaw)
    for _ in range(room.rng.integers(0, most + 1)):
        u, v = room.uniform(-half_u, half_u), room.uniform(-half_v, half_v)
        x, y, z = middle[0] + c * u - s * v, middle[1] + s * u + c * v, middle[2]
        room.new_object()
        kind = room.rng.random()
        if kind < 0.4:
            w, d = room.uniform(0.03, 0.13), room.uniform(0.03, 0.09)
            h, turn = room.uniform(0.05, tallest), room.uniform(0, np.pi)
            room.part((x, y, z), turn, (-w, -d, 0), (w, d, h), "cabinet", paint(room))
        elif kind < 0.7:
            radius = room.uniform(0.04, 0.1)
            room.sphere((x, y, z + radius), radius, "ball", Material(vivid(room)))
        else:
            top, radius = z + room.uniform(0.1, tallest), room.uniform(0.025, 0.06)
            room.cylinder(x, y, z, top, radius, "post", Material(vivid(room)))


def _table(room):
    a, b, height = room.uniform(0.4, 0.95), room.uniform(0.3, 0.5), room.uniform(0.7, 0.77)
    if room.chance(0.25):  # a coffee table
        a, b, height = room.uniform(0.35, 0.6), room.uniform(0.25, 0.35), room.uniform(0.4, 0.48)
    spot = room.free_spot(float(np.hypot(a, b)))
    if spot is None:
        return
    origin, yaw, material = (*spot, 0.0), room.uniform(0, np.pi), paint(room)
    legs, leg = (material if room.chance(0.5) else metal(room)), room.uniform(0.018, 0.04)
    room.new_object()
    room.part(origin, yaw, (-a, -b, height - 0.04), (a, b, height), "table", material)
    for x in (-a + 0.05 + leg, a - 0.05 - leg):
        for y in (-b + 0.05 + leg, b - 0.05 - leg):
            low, high = (x - leg, y - leg, 0), (x + leg, y + leg, height - 0.04)
            room.part(origin, yaw, low, high, "table", legs)
    _clutter(room, (*spot, height), a - 0.12, b - 0.12, yaw)
    if height < 0.6:
        return
    seat = paint(room)
    for side in (-1, 1):
        if room.chance(0.65):
            gap = side * (b + 0.2)
            x, y = spot[0] - np.sin(yaw) * gap, spot[1] + np.cos(yaw) * gap
            _chair(room, x, y, yaw + (0 if side > 0 else np.pi), seat)


def _chair(room, x, y, yaw, material):
    """A chair whose back lies in the direction of its own +y; none where a wall is too near."""
    if not (0.3 < x < room.size[0] - 0.3 and 0.3 < y < room.size[1] - 0.3):
        return
    room.taken.append((x, y, 0.3))
    room.new_object()
    origin, h = (x, y, 0.0), 0.21
    room.part(origin, yaw, (-h, -h, 0.42), (h, h, 0.46), "seat", material)
    room.part(origin, yaw, (-h, h - 0.03, 0.55), (h, h, 0.9), "seat", material)
    for left in (-h + 0.002, h - 0.038):
        right = left + 0.036
        room.part(origin, yaw, (left, -h, 0), (right, -h + 0.036, 0.42), "seat", material)
        room.part(origin, yaw, (left, h - 0.036, 0), (right, h, 0.9), "seat", material)


def _sofa(room):
    half = room.uniform(0.5, 1.1)
    spot = room.free_spot(half)
    if spot is None:
        return
    origin, yaw = (*spot, 0.0), room.pick((0, 1, 2, 3)) * np.pi / 2 + room.rng.normal(0, 0.15)
    material = paint(room)
    room.new_object()
    room.part(origin, yaw, (-half, -0.4, 0.08), (half, 0.4, 0.42), "seat", material)
    room.part(origin, yaw, (-half, 0.22, 0.42), (half, 0.4, 0.85), "seat", material)
    for side in (-1, 1):
        low, high = (side * half, -0.4, 0.08), (side * (half - 0.16), 0.4, 0.6)
        room.part(origin, yaw, low, high, "seat", material)


def _ball(room):
    radius = room.uniform(0.1, 0.45)
    spot = room.free_spot(radius)
    if spot is None:
        return
    room.new_object()
    colour = vivid(room)
    pattern = room.pick(("plain", "plain", "stripes", "noise"))
    material = Material(colour, darker(colour, 0.4), pattern, 0.1)
    room.sphere((*spot, radius), radius, "ball", material)


def _pillar(room):
    radius = room.uniform(0.1, 0.28)
    spot = room.free_spot(radius)
    if spot is None:
        return
    room.new_object()
    colour, pattern = grey(room, 0.3, 0.8), room.pick(("plain", "noise", "bricks"))
    material = Material(colour, (0.2, 0.2, 0.2), pattern, 0.25)
    room.cylinder(*spot, 0, room.size[2], radius, "pillar", material)


def _lamp(room):
    """A floor lamp: a foot, a thin post and a shade that sometimes glows."""
    spot = room.free_spot(0.25)
    if spot is None:
        return
    height, material = room.uniform(1.2, 1.8), metal(room)
    room.new_object()
    room.cylinder(*spot, 0, 0.03, 0.15, "post", material)
    room.cylinder(*spot, 0, height, room.uniform(0.01, 0.022), "post", material)
    shade = Material((0.8, 0.7, 0.5), grain=0.03, emission=room.pick((0.0, 0.0, 1.0)))
    room.cylinder(*spot, height - 0.25, height, room.uniform(0.1, 0.2), "post", shade)


def _stand(room):
    """One to three thin poles close together."""
    spot = room.free_spot(0.25)
    if spot is None:
        return
    room.new_object()
    material = paint(room)
    for _ in range(room.rng.integers(1, 4)):
        x, y = spot[0] + room.uniform(-0.2, 0.2), spot[1] + room.uniform(-0.2, 0.2)
        top, radius = room.uniform(1.0, 2.0), room.uniform(0.012, 0.035)
        room.cylinder(x, y, 0, top, radius, "post", material)


def _crates(room):
    """A box, or two with the smaller one on top."""
    half, height = room.uniform(0.15, 0.4), room.uniform(0.2, 0.7)
    spot = room.free_spot(half * 1.3)
    if spot is None:
        return
    bottom = 0.0
    for _ in range(room.rng.integers(1, 3)):
        room.new_object()
        low, high = (-half, -half * 0.8, bottom), (half, half * 0.8, bottom + height)
        room.part((*spot, 0.0), room.uniform(0, np.pi), low, high, "cabinet", paint(room))
        bottom += height
        half, height = half * 0.7, height * 0.7


def _rug(room):
    x, y = (room.uniform(0.3, 0.7) * side for side in room.size[:2])
    w, d = (room.uniform(0.15, 0.3) * side for side in room.size[:2])
    room.new_object()
    first, second = vivid(room), vivid(room)
    pattern = room.pick(("stripes", "checker", "noise", "picture"))
    material = Material(first, second, pattern, room.uniform(0.1, 0.4), 0.25)
    yaw = room.rng.normal(0, 0.2)
    room.part((x, y, 0.0), yaw, (-w, -d, 0), (w, d, 0.012), "floor", material)


def _pendant(room):
    """A hanging lamp: a thin cable and a bright ball that cast no shadow."""
    x, y = (room.uniform(0.2, 0.8) * side for side in room.size[:2])
    bottom = room.size[2] - room.uniform(0.3, 0.8)
    room.new_object()
    room.cylinder(x, y, bottom, room.size[2], 0.012, "post", metal(room), casts=False)
    glow = Material((1.0, 0.9, 0.75), grain=0.0, emission=room.uniform(0.5, 3))
    room.sphere((x, y, bottom), room.uniform(0.06, 0.18), "ball", glow, casts=False)
