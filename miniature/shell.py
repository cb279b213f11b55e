"""The shell of a room: floor, ceiling, walls, doors and windows, and what is seen through them.

Every function adds to the Room it is given. A hole in a wall is (s low, s high, z low, z high).
"""

from dataclasses import replace

import numpy as np

from miniature.builder import (
    NEXT,
    OUTSIDE,
    ROOM,
    brown,
    darker,
    facade_material,
    grey,
    metal,
    paint,
    tree,
    vivid,
    wood,
)  # fmt: skip
from miniature.raycast import Material
from miniature.shading import Light

THICK_M = 0.15  # of the walls


def build_shell(room):
    """Floor, ceiling and walls; behind every hole a piece of the outside or another room."""
    width, depth, height = room.size
    low, high = (-THICK_M, -THICK_M, -0.2), (width + THICK_M, depth + THICK_M, 0)
    room.new_object()
    room.box(low, high, "floor", _floor_material(room), casts=False)
    room.new_object()
    plaster = Material(grey(room, 0.6, 0.85, 0.03), grain=0.04)
    room.box((-0.3, -0.3, height), (width + 0.3, depth + 0.3, height + 0.2), "ceiling", plaster)
    material = _wall_material(room)
    ground = False  # one ground serves all windows
    for wall in room.walls:
        accent = _wall_material(room) if room.chance(0.25) else material
        hole = _choose_hole(room, wall)
        _wall(room, wall, hole, accent)
        if hole is not None:
            _hole_frame(room, wall, hole)
            if hole[2] > 0 or room.chance(0.25):
                _outside(room, wall, with_ground=not ground)
                ground = True
            else:
                _next_room(room, wall, hole)
        _pictures(room, wall, hole)
    _skirting(room)


def _choose_hole(room, wall):
    """A door's or window's (s low, s high, z low, z high); None without one."""
    kind = room.rng.random()
    room.new_object()
    if kind < 0.3:
        width = room.uniform(0.85, 1.0) * (2 if room.chance(0.3) else 1)
        bottom, top = 0, room.uniform(2.0, 2.15)
    elif kind < 0.62:
        width = room.uniform(0.9, 3.0)
        bottom, top = room.uniform(0.5, 1.0), room.uniform(1.95, 2.25)
    else:
        return None
    if wall.length < width + 0.6:
        return None
    s = room.uniform(0.3, wall.length - width - 0.3)
    if bottom == 0:
        x, y, _ = wall.point(s + width / 2, 0, 0)
        room.taken.append((x, y, width / 2 + 0.3))
    return s, s + width, bottom, min(top, room.size[2] - 0.1)


def _wall(room, wall, hole, material):
    ends, through, height = (-THICK_M, wall.length + THICK_M), (0, THICK_M), room.size[2]
    if hole is None:
        room.slab(wall, ends, through, (0, height), "wall", material)
        return
    s0, s1, z0, z1 = hole
    room.slab(wall, (ends[0], s0), through, (0, height), "wall", material)
    room.slab(wall, (s1, ends[1]), through, (0, height), "wall", material)
    room.slab(wall, (s0, s1), through, (z1, height), "wall", material)
    if z0 > 0:
        room.slab(wall, (s0, s1), through, (0, z0), "wall", material)


def _hole_frame(room, wall, hole):
    """The frame of a door or window; a window also gets a sill and bars."""
    s0, s1, z0, z1 = hole
    material = wood(room) if room.chance(0.4) else Material(grey(room, 0.1, 0.8), grain=0.03)
    b, o = room.uniform(0.04, 0.09), (-0.03, THICK_M + 0.03)
    room.new_object()
    # The frame covers the edge of the hole by 1 cm: no two surfaces may coincide.
    room.slab(wall, (s0 - b, s0 + 0.01), o, (z0, z1 + b), "frame", material)
    room.slab(wall, (s1 - 0.01, s1 + b), o, (z0, z1 + b), "frame", material)
    room.slab(wall, (s0, s1), o, (z1 - 0.01, z1 + b), "frame", material)
    if z0 == 0:
        return
    sill = (-0.12, THICK_M + 0.05)
    room.slab(wall, (s0 - b, s1 + b), sill, (z0 - 0.04, z0 + 0.01), "frame", material)
    for k in range(1, 1 + round((s1 - s0) / room.uniform(0.6, 1.2))):
        s = s0 + k * (s1 - s0) / (1 + round((s1 - s0) / 0.8))
        if s < s1 - 0.1:
            room.slab(wall, (s - 0.025, s + 0.025), (0.05, 0.1), (z0, z1), "frame", material)
    if room.chance(0.4):
        z = z0 + room.uniform(0.5, 0.75) * (z1 - z0)
        room.slab(wall, (s0, s1), (0.05, 0.1), (z - 0.025, z + 0.025), "frame", material)


def _outside(room, wall, with_ground):
    """A facade 5-45 m away, trees in front of it, and once per room the ground and the sun."""
    drop = room.pick((-0.15, -0.15, -3.0, -6.0))  # of the ground: also upper floors
    if with_ground:
        room.new_object()
        colour = (0.12, 0.2, 0.06) if room.chance(0.5) else grey(room, 0.15, 0.4)
        pattern = room.pick(("noise", "tiles", "noise"))
        ground = Material(colour, darker(colour, 0.5), pattern, 0.5, 0.25)
        low, high = (-60, -60, drop - 0.5), (60, 60, drop - 0.3)
        room.box(low, high, "ground", ground, OUTSIDE, casts=False)
    distance = float(np.exp(room.uniform(np.log(5), np.log(45))))
    # Mostly so high that it hides the sky, which has no depth.
    tall = room.chance(0.88)
    top = distance * room.uniform(0.9, 1.3) + 5 if tall else distance * 0.15 + 3
    middle = wall.length / 2
    span, thick = (middle - 60, middle + 60), (distance, distance + 3)
    room.new_object()
    room.slab(wall, span, thick, (-7, top), "facade", facade_material(room), OUTSIDE)
    for _ in range(room.rng.integers(1, 5)):
        s, o = middle + room.uniform(-0.5, 0.5) * distance, room.uniform(0.3, 0.85) * distance
        x, y, _ = wall.point(s, o, 0)
        if o > 2.5:
            tree(room, x, y, drop - 0.3, OUTSIDE)
    sun_at = middle + room.uniform(-60, 60), room.uniform(60, 120), room.uniform(60, 140)
    level = room.uniform(0.5, 1.3)
    if with_ground:
        _daylight(room, wall, wall.point(*sun_at), level)


def _daylight(room, wall, sun, level):
    """The sun for the room, through the windows, and light from the other side for the facade.

    The facade's front faces the room: with the one sun behind it, it would always lie in shade.
    """
    power = tuple(level * 1.6 * float(sun @ sun) * np.array([1, 0.93, 0.8]))
    s, z = wall.length / 2 + room.uniform(-40, 40), room.uniform(60, 100)
    room.lights.append(Light(tuple(wall.point(s, -100, z)), power, OUTSIDE))
    room.ambient[OUTSIDE] = level * np.array([0.5, 0.55, 0.65])
    if room.chance(0.5):
        room.lights.append(Light(tuple(sun), power, ROOM))


def _next_room(room, wall, hole):
    """A room or corridor, 1.6 to 14 m deep, behind an open door, with a light of its own."""
    zone = max(NEXT - 1, *room.ambient, 0) + 1
    far = float(np.exp(room.uniform(np.log(1.6), np.log(14))))
    s0, s1 = hole[0] - room.uniform(0.3, 2), hole[1] + room.uniform(0.3, 2)
    height, o = room.uniform(2.3, 3), (THICK_M, far)
    sides, floor = _wall_material(room), _floor_material(room)
    plaster, end = Material(grey(room, 0.5, 0.85), grain=0.04), _wall_material(room)
    for label, s, out, z, material in (
        ("floor", (s0, s1), o, (-0.2, 0.0), floor),
        ("ceiling", (s0, s1), o, (height, height + 0.2), plaster),
        ("wall", (s0 - 0.1, s0), o, (0, height), sides),
        ("wall", (s1, s1 + 0.1), o, (0, height), sides),
        ("wall", (s0, s1), (far, far + 0.1), (0, height), end),
    ):
        room.new_object()
        room.slab(wall, s, out, z, label, material, zone)
    if room.chance(0.6):
        room.new_object()
        s, half = room.uniform(s0 + 0.4, s1 - 0.4), room.uniform(0.25, 0.6)
        tall = room.uniform(0.6, 2)
        span, deep = (s - half, s + half), (far - 0.45, far)
        room.slab(wall, span, deep, (0, tall), "cabinet", paint(room), zone)
    level = room.uniform(0.3, 1.3)
    lamp = wall.point((s0 + s1) / 2, THICK_M + 0.6 * (far - THICK_M), height - 0.3)
    room.lights.append(Light(tuple(lamp), (level * (0.6 + 0.25 * far),) * 3, zone))
    room.ambient[zone] = (0.35 * level,) * 3


def _pictures(room, wall, hole):
    """Framed pictures in a free stretch of the wall."""
    used = hole[:2] if hole else None
    for _ in range(room.rng.integers(0, 4)):
        w, h = room.uniform(0.3, 1.3), room.uniform(0.3, 0.9)
        if wall.length < w + 0.4:
            continue
        s, z = room.uniform(0.2, wall.length - w - 0.2), room.uniform(1.1, 1.5)
        blocked = used is not None and s < used[1] + 0.12 and s + w > used[0] - 0.12
        if blocked or z + h > room.size[2] - 0.1:
            continue
        depth = room.uniform(0.015, 0.05)
        room.new_object()
        room.slab(wall, (s, s + w), (-depth, 0), (z, z + h), "picture", metal(room))
        first, second = vivid(room, 0.2, 0.8), vivid(room, 0.1, 0.8)
        art = Material(first, second, "picture", room.uniform(0.1, 0.4), 0.05)
        inner = (s + 0.03, s + w - 0.03), (-depth - 0.004, 0), (z + 0.03, z + h - 0.03)
        room.slab(wall, *inner, "picture", art)
        used = (min(s, used[0]), max(s + w, used[1])) if used else (s, s + w)


def _skirting(room):
    """In half of the rooms, a board along the foot of the walls that are far from any door."""
    if room.chance(0.5):
        return
    material = Material(grey(room, 0.1, 0.8), grain=0.03)
    for wall in room.walls:
        x, y, _ = wall.point(wall.length / 2, 0, 0)
        if all(np.hypot(x - a, y - b) >= wall.length for a, b, _ in room.taken):
            room.new_object()
            room.slab(wall, (0, wall.length), (-0.015, 0), (0, 0.09), "wall", material)


def _wall_material(room):
    kind = room.rng.random()
    if room.chance(0.65):
        colour = grey(room, 0.45, 0.85)
    else:
        colour = tuple(0.35 + 0.6 * c for c in vivid(room))
    if kind < 0.55:
        return Material(colour, grain=0.08)
    if kind < 0.7:
        return Material(colour, darker(colour, 0.8), "stripes", room.uniform(0.06, 0.3))
    if kind < 0.8:
        return Material(colour, darker(colour, 0.7), "tiles", room.uniform(0.15, 0.4))
    if kind < 0.9:
        return Material(brown(room, 0.25, 0.55), grey(room, 0.4, 0.6), "bricks", 0.24, 0.2)
    return Material(colour, darker(colour, 0.7), "noise", room.uniform(0.1, 0.5))


def _floor_material(room):
    kind = room.rng.random()
    if kind < 0.45:
        return replace(wood(room), scale_m=room.uniform(0.12, 0.22))
    if kind < 0.7:
        slab, joint = grey(room, 0.2, 0.6), grey(room, 0.1, 0.3)
        return Material(slab, joint, "tiles", room.uniform(0.25, 0.6))
    if kind < 0.85:
        light, dark = grey(room, 0.4, 0.7), grey(room, 0.06, 0.25)
        return Material(light, dark, "checker", room.uniform(0.2, 0.5))
    colour = vivid(room, 0.1, 0.4)
    return Material(colour, darker(colour, 0.6), "noise", 0.08, 0.3)
