"""Procedural rooms: sizes, free places, lights and a camera at eye height."""

from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from miniature import raycast
from miniature.builder import ROOM, Builder
from miniature.furniture import furnish
from miniature.raycast import Camera
from miniature.shading import Light, Scene
from miniature.shell import build_shell

HALF_FIELD_OF_VIEW = np.pi / 6  # Hypersim's pinhole


@dataclass(frozen=True)
class Wall:
    """One wall's axes: s runs along it, o points out of the room, z up."""

    axis: int  # the world axis that s follows
    high: bool  # at the high or the low end of the other axis
    length: float
    at: float  # position on the other axis

    def point(self, s, o, z):
        """World coordinates of a point given in the wall's axes."""
        across = self.at + (o if self.high else -o)
        return np.array([s, across, z] if self.axis == 0 else [across, s, z])


class Room(Builder):
    """A room of `size` (x, y, z) metres with its low corner at the origin."""

    def __init__(self, rng):
        super().__init__(rng)
        self.size = width, depth, _ = self._choose_size()
        self.walls = [
            Wall(0, False, width, 0),
            Wall(0, True, width, depth),
            Wall(1, False, depth, 0),
            Wall(1, True, depth, width),
        ]
        self.taken = []  # circles x, y, radius on the floor that are in use
        self.lights = []
        self.ambient = {}  # zone -> RGB

    def _choose_size(self):
        kind = self.rng.random()
        if kind < 0.1:  # a corridor
            return self.uniform(1.8, 2.8), self.uniform(7, 16), self.uniform(2.3, 3.0)
        if kind < 0.3:  # a hall
            return self.uniform(7, 14), self.uniform(9, 20), self.uniform(3, 5)
        return self.uniform(3.2, 7), self.uniform(3.5, 9), self.uniform(2.3, 3.2)

    def slab(self, wall, s, o, z, label, material, zone=ROOM):
        """A box in a wall's axes; s, o and z are (low, high) pairs."""
        low, high = wall.point(s[0], o[0], z[0]), wall.point(s[1], o[1], z[1])
        self.box(low, high, label, material, zone)

    def free(self, x, y, radius, margin=0.1):
        """Whether a circle lies inside the room and clear of everything placed so far."""
        inside = radius < x < self.size[0] - radius and radius < y < self.size[1] - radius
        return inside and all(
            np.hypot(x - a, y - b) > radius + r + margin for a, b, r in self.taken
        )

    def free_spot(self, radius):
        """A random free x, y for something of that radius (then taken), or None."""
        for _ in range(12):
            x, y = (self.uniform(radius, max(side - radius, radius)) for side in self.size[:2])
            if self.free(x, y, radius):
                self.taken.append((x, y, radius))
                return x, y
        return None


def room_scene(rng):
    """A furnished and lit Room, and its Scene."""
    room = Room(rng)
    build_shell(room)
    furnish(room)
    _lights(room)
    zones = max(room.ambient) + 1
    ambient = np.array([room.ambient.get(zone, (0, 0, 0)) for zone in range(zones)])
    return room, Scene(room.shapes, room.lights, ambient, room=((0, 0, 0), room.size))


def room_camera(room, scene, rng, width, height):
    """A camera at 1.2-1.7 m, clear of objects: of 12 tries, one that sees depth and objects."""
    focal = width / 2 / np.tan(HALF_FIELD_OF_VIEW)
    # Where a room is too full to stand in: a corner, above most of the furniture.
    yaw = np.arctan2(room.size[1] - 0.8, room.size[0] - 0.8)
    best, best_score = Camera((0.4, 0.4, 1.7), yaw, -0.15, 0.0, width, height, focal), -np.inf
    spots = 0.4 + rng.random((400, 2)) * (np.array(room.size[:2]) - 0.8)
    standing = (spot for spot in spots.tolist() if room.free(*spot, 0.3, margin=0.05))
    for x, y in islice(standing, 12):
        yaw, pitch, roll = rng.uniform(0, 2 * np.pi), rng.normal(-0.1, 0.09), rng.normal(0, 0.02)
        position = x, y, rng.uniform(1.2, 1.7)
        coarse = Camera(position, yaw, pitch, roll, 16, 12, focal * 16 / width)
        score = _interest(scene, coarse) + rng.uniform(0, 2)
        if score > best_score:
            best, best_score = replace(coarse, width=width, height=height, focal=focal), score
    return best


def _interest(scene, camera):
    """A score of a view: far away on the whole, nothing right before the lens, many objects."""
    t, index = raycast.trace(scene.geometry, camera.position, camera.centre_rays())
    objects = len({scene.shapes[k].entity for k in index if k >= 0})
    return min(np.median(t), 4) + 2 * min(np.quantile(t, 0.05), 1.2) + 0.3 * min(objects, 12)


def _lights(room):
    """One to three lamps under the ceiling and the ambient light of the room."""
    width, depth, height = room.size
    count = 1 + room.chance(0.5) + (depth > 10)
    size = max(width * depth / 16, 1.0)
    for _ in range(count):
        tint = np.array([1, room.uniform(0.8, 1), room.uniform(0.6, 1)])
        x, y = room.uniform(0.2, 0.8) * width, room.uniform(0.2, 0.8) * depth
        z = height - room.uniform(0.15, 0.5)
        power = room.uniform(1.5, 4.5) * size**0.7 / count**0.5
        room.lights.append(Light((x, y, z), tuple(power * tint), ROOM))
    room.ambient[ROOM] = room.uniform(0.25, 0.5) * np.array([1, 0.97, 0.93])
