"""From a scene and a camera to a picture: materials, lights, shadows and anti-aliasing.

Depth, entity and class of a pixel come from the ray through its centre; the colour is the mean of
several rays wherever neighbouring pixels differ. Arrays of N rays or points have shape 3,N.
"""

from dataclasses import dataclass, field

import numpy as np

from miniature import raycast, textures

SUB_RAYS = ((0.125, 0.625), (0.375, 0.125), (0.625, 0.875), (0.875, 0.375))  # col, row in a pixel


@dataclass(frozen=True)
class Light:
    """A point light that sends power / r^2 to a surface that faces it at distance r."""

    position: tuple
    power: tuple  # RGB
    zone: int = 0  # it reaches shapes of this zone only


@dataclass
class Scene:
    """Shapes and light. `ambient` has a row of RGB per zone; `room` is (low, high) of zone 0."""

    shapes: list
    lights: list
    ambient: np.ndarray
    sky: tuple = (1.2, 1.5, 2.0)
    room: tuple | None = None
    geometry: raycast.Geometry = field(init=False)

    def __post_init__(self):
        self.geometry = raycast.Geometry(self.shapes)


def render(scene, camera):
    """Draws a scene.

    Returns a dict of `color` H,W,3 float16 (linear HDR RGB), `distance_m` H,W float16 (along the
    ray, NaN where nothing is hit), `entity` H,W int16 (-1 where nothing is hit) and `semantic`
    H,W int16 (0 where nothing is hit).
    """
    size = camera.height, camera.width
    d = camera.centre_rays()
    t, index = raycast.trace(scene.geometry, camera.position, d)
    rgb = _shade(scene, camera, d, t, index)
    uneven = _needs_more_rays(rgb.reshape(3, *size), t.reshape(size), index.reshape(size))
    rows, cols = np.nonzero(uneven)
    if len(rows):
        rgb[:, rows * camera.width + cols] = _supersample(scene, camera, rows, cols)
    distance_m = np.where(index >= 0, t * _length(d), np.nan)
    entity = np.array([s.entity for s in scene.shapes] + [-1], np.int16)[index]
    semantic = np.array([s.label for s in scene.shapes] + [0], np.int16)[index]
    return dict(
        color=np.minimum(rgb, 6e4).T.reshape(*size, 3).astype(np.float16),
        distance_m=distance_m.reshape(size).astype(np.float16),
        entity=entity.reshape(size),
        semantic=semantic.reshape(size),
    )


def _supersample(scene, camera, rows, cols):
    """Mean radiance 3,N over the sub-rays of the N pixels (rows, cols)."""
    right, down = np.array(SUB_RAYS).T
    d = camera.rays((cols[:, None] + right).ravel(), (rows[:, None] + down).ravel())
    rgb = _shade(scene, camera, d, *raycast.trace(scene.geometry, camera.position, d))
    return rgb.reshape(3, len(rows), len(SUB_RAYS)).mean(axis=2)


def _needs_more_rays(rgb, t, index):
    """H,W bool: pixels that differ from a neighbour in shape or brightness, or lie on a crease."""
    bright, inverse = np.sqrt(rgb.mean(axis=0)), 1 / t
    across = _uneven_rows(bright.T, inverse.T, index.T).T
    return _uneven_rows(bright, inverse, index) | across


def _uneven_rows(bright, inverse, index):
    """H,W bool: pixels that differ from the one above or below them."""
    marked = np.zeros(index.shape, bool)
    differs = np.diff(index, axis=0) != 0
    level = np.minimum(bright[1:], bright[:-1])
    differs |= np.abs(np.diff(bright, axis=0)) > 0.12 * level + 0.02
    marked[1:] |= differs
    marked[:-1] |= differs
    # 1 / t is linear over a plane: a bend is an edge between two faces of one shape.
    bend = np.abs(np.diff(inverse, 2, axis=0))
    marked[1:-1] |= bend > 0.004 * inverse[1:-1]
    return marked


def _shade(scene, camera, d, t, index):
    """Radiance 3,N that arrives along the rays d, which hit the shapes `index` at t."""
    steepness = np.clip(d[2] / _length(d), 0, 1)
    rgb = np.array(scene.sky, np.float32)[:, None] * (1 - 0.5 * steepness)
    hits = np.flatnonzero(index >= 0)
    d, t, index = d.take(hits, axis=1), t[hits], index[hits]
    points = np.asarray(camera.position, np.float32)[:, None] + t * d
    normal, local = raycast.normals(scene.geometry, index, points)
    albedo, emission = _albedo(scene, camera, d, t, index, normal, local)
    rgb[:, hits] = albedo * (_irradiance(scene, points, normal, index) + emission)
    return rgb


def _irradiance(scene, points, normal, index):
    """Light 3,N that the points receive: ambient, dimmed in corners, and the lights they see."""
    zones = np.array([s.zone for s in scene.shapes])[index]
    total = scene.ambient.astype(np.float32).T.take(zones, axis=1) * (0.8 + 0.2 * normal[2])
    if scene.room is not None:
        total *= np.where(zones == 0, _corner_dimming(points, *scene.room), 1)
    for light in scene.lights:
        position = np.array(light.position, np.float32)
        to_light = position[:, None] - points
        facing = np.einsum("cn,cn->n", to_light, normal)
        lit = np.flatnonzero((facing > 0) & (zones == light.zone))
        lit = lit[~raycast.occluded(scene.geometry, position, points.take(lit, axis=1))]
        r = _length(to_light.take(lit, axis=1))
        strength = facing[lit] / (r * (r * r + 0.2))  # 0.2 m^2: a lamp is no point
        total[:, lit] += np.array(light.power, np.float32)[:, None] * strength
    return total


def _corner_dimming(points, low, high):
    """A cheap ambient occlusion N: darker where walls, floor and ceiling are near."""
    dim = np.ones(points.shape[1], np.float32)
    for axis in range(3):
        for gap_m in (points[axis] - low[axis], high[axis] - points[axis]):
            dim *= 1 - 0.4 * np.exp(np.minimum(-gap_m, 0) / np.float32(0.25))
    return dim


def _albedo(scene, camera, d, t, index, normal, local):
    """Albedo 3,N and emission N: the materials' two colours, mixed by their patterns, and grain."""
    materials = [shape.material for shape in scene.shapes]

    def at_hits(values):
        return np.array(values, np.float32).T.take(index, axis=-1)

    u, v, du, dv = _surface_coordinates(scene, camera, d, t, index, normal, local)
    shift = at_hits([7.37 * shape.entity for shape in scene.shapes])
    scale = at_hits([m.scale_m for m in materials])
    names = sorted({m.pattern for m in materials})
    pattern = np.array([names.index(m.pattern) for m in materials])[index]
    mix = np.zeros_like(t)
    for k, name in enumerate(names):
        at = np.flatnonzero(pattern == k)
        scaled = (a[at] / scale[at] for a in (u, v, du, dv))
        mix[at] = textures.mixing_weight(name, *scaled, shift[at])
    first, second = at_hits([m.colour for m in materials]), at_hits([m.second for m in materials])
    wide = np.maximum(du, dv)
    speckle = textures.noise(25 * u + shift, 25 * v, 25 * wide)
    speckle += textures.noise(4 * u, 4 * v + shift, 4 * wide)
    grain = 1 + at_hits([m.grain for m in materials]) * speckle
    return (first + (second - first) * mix) * grain, at_hits([m.emission for m in materials])


def _surface_coordinates(scene, camera, d, t, index, normal, local):
    """Metres u, v along the surface (u level, v upwards or across) and a pixel's extents du, dv."""
    c, s = scene.geometry.cos[index], scene.geometry.sin[index]
    level = np.hypot(normal[0], normal[1])
    flat, safe = level < 1e-3, np.maximum(level, 1e-3)
    along_u = np.stack(
        [np.where(flat, c, -normal[1] / safe), np.where(flat, s, normal[0] / safe), 0 * c]
    )
    along_v = np.cross(normal, along_u, axis=0)
    x, y, z = c * local[0] - s * local[1], s * local[0] + c * local[1], local[2]
    u = x * along_u[0] + y * along_u[1]
    v = x * along_v[0] + y * along_v[1] + z * along_v[2]
    curved = np.flatnonzero((scene.geometry.form[index] != raycast.BOX) & ~flat)
    u[curved] = np.arctan2(y[curved], x[curved]) * scene.geometry.half[0, index[curved]]
    v[curved] = z[curved]
    du, dv = _pixel_extents(camera, d, t, normal, along_u, along_v)
    return _turn_upright_wood(scene, index, normal, u, v, du, dv)


def _pixel_extents(camera, d, t, normal, along_u, along_v):
    """How far the hit points move in u and v, metres N, when the ray moves by one pixel."""
    towards = np.einsum("cn,cn->n", d, normal)
    towards = np.where(np.abs(towards) < 0.02, np.float32(-0.02), towards)
    du, dv = np.zeros_like(t), np.zeros_like(t)
    for step in camera.axes()[:2].astype(np.float32) / camera.focal:  # one pixel right, one down
        moved = step[:, None] - d * (np.einsum("c,cn->n", step, normal) / towards)
        du += np.abs(np.einsum("cn,cn->n", moved, along_u))
        dv += np.abs(np.einsum("cn,cn->n", moved, along_v))
    return du * t, dv * t


def _turn_upright_wood(scene, index, normal, u, v, du, dv):
    """Swaps u and v on the sides of upright wooden parts: grain follows a board's long side."""
    half = scene.geometry.half
    wooden = np.array([shape.material.pattern == "wood" for shape in scene.shapes])
    upright = (wooden & (half[2] > np.maximum(half[0], half[1])))[index] & (np.abs(normal[2]) < 0.5)
    u, v = np.where(upright, v, u), np.where(upright, u, v)
    return u, v, np.where(upright, dv, du), np.where(upright, du, dv)


def _length(d):
    return np.sqrt(np.einsum("cn,cn->n", d, d))
