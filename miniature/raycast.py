"""Ray casting in numpy: shapes, a camera, and which shape each ray meets first.

World axes: x and y lie on the floor, z points up, metres. Camera axes: x right, y down, z forward.
A camera ray is scaled so that its forward component is 1: the ray parameter t IS the planar depth,
and the distance along the ray is t * |d|. Rays are float32 arrays of shape 3,N.
"""

from dataclasses import dataclass

import numpy as np

BOX, SPHERE, CYLINDER = 0, 1, 2


@dataclass(frozen=True)
class Material:
    """What a surface looks like: two linear RGB albedos mixed by a pattern of real-world scale."""

    colour: tuple  # linear RGB albedo in [0,1]
    second: tuple = (0.5, 0.5, 0.5)
    pattern: str = "plain"
    scale_m: float = 0.3
    grain: float = 0.1  # relative strength of a fine noise over everything
    emission: float = 0.0  # radiance that needs no light, times the albedo


@dataclass(frozen=True)
class Shape:
    """A box, sphere or upright cylinder; boxes turn about the vertical axis by `yaw`."""

    form: int
    centre: tuple  # metres, world
    half: tuple  # half extents; (r, r, r) for a sphere, (r, r, height / 2) for a cylinder
    material: Material
    entity: int  # several shapes may make one object
    label: int  # index into CLASSES
    yaw: float = 0.0
    zone: int = 0  # lights reach only shapes of their own zone
    casts: bool = True  # casts shadows


@dataclass(frozen=True)
class Camera:
    """A pinhole with the principal point in the picture's centre; angles in radians."""

    position: tuple
    yaw: float
    pitch: float
    roll: float
    width: int
    height: int
    focal: float  # pixels

    def axes(self):
        """World directions of right, down and forward, as the rows of a 3,3 array."""
        cy, sy, cp, sp = *_cos_sin(self.yaw), *_cos_sin(self.pitch)
        forward = np.array([cy * cp, sy * cp, sp])
        right = np.array([sy, -cy, 0.0])
        down = np.cross(forward, right)
        cr, sr = _cos_sin(self.roll)
        return np.stack([cr * right + sr * down, cr * down - sr * right, forward])

    def rays(self, col, row):
        """Directions 3,N through picture positions in pixels; pixel centres lie at k + 0.5."""
        right, down, forward = self.axes().astype(np.float32)
        x = ((col - self.width / 2) / self.focal).astype(np.float32)
        y = ((row - self.height / 2) / self.focal).astype(np.float32)
        return right[:, None] * x + down[:, None] * y + forward[:, None]

    def centre_rays(self):
        """Directions 3,H*W through all pixel centres, row after row."""
        row, col = np.mgrid[0 : self.height, 0 : self.width]
        return self.rays(col.ravel() + 0.5, row.ravel() + 0.5)


def trace(geometry, origin, d):
    """First hits of the rays origin + t d, d 3,N: t N (inf for none), shape index N (-1: none)."""
    t = np.full(d.shape[1], np.inf, np.float32)
    index = np.full(d.shape[1], -1, np.int32)
    for k, rays, entry in _hits(geometry, origin, d):
        if rays is None:
            closer = entry < t
            np.copyto(t, entry, where=closer)
            np.copyto(index, k, where=closer)
        else:
            closer = entry < t.take(rays)
            rays = rays[closer]
            t[rays] = entry[closer]
            index[rays] = k
    return t, index


def occluded(geometry, light_position, points, bias_m=0.01):
    """N bool: whether a shape that casts shadows stands between the light and the points 3,N."""
    origin = np.asarray(light_position, np.float32)
    d = points - origin[:, None]
    reach = 1 - bias_m / np.sqrt(np.einsum("cn,cn->n", d, d))
    dark = np.zeros(d.shape[1], bool)
    for _, rays, entry in _hits(geometry, origin, d, geometry.casts):
        if rays is None:
            dark |= entry < reach
        else:
            dark[rays] |= entry < reach.take(rays)
    return dark


class Geometry:
    """A list of shapes with their extents as arrays (the last axis counts shapes)."""

    def __init__(self, shapes):
        self.shapes = shapes
        self.centre = np.array([s.centre for s in shapes], np.float32).T
        self.half = np.array([s.half for s in shapes], np.float32).T
        self.cos = np.cos([s.yaw for s in shapes]).astype(np.float32)
        self.sin = np.sin([s.yaw for s in shapes]).astype(np.float32)
        self.form = np.array([s.form for s in shapes])
        self.casts = np.array([s.casts for s in shapes])
        width, _, height = self.half
        corner = np.sqrt((self.half**2).sum(axis=0))  # of the bounding sphere of a box
        self.radius = np.choose(self.form, (corner, width, np.hypot(width, height)))


def normals(geometry, index, points):
    """Outward normals 3,N at hit points 3,N of the shapes `index`, and the points in shape axes."""
    half = geometry.half.take(index, axis=1)
    c, s, form = geometry.cos[index], geometry.sin[index], geometry.form[index]
    x, y, z = points - geometry.centre.take(index, axis=1)
    local = np.stack([c * x + s * y, c * y - s * x, z])
    # Boxes: the nearest face. Cylinders: a cap or the mantle. Spheres: the radius.
    gap = half - np.abs(local)
    axis = np.argmin(gap, axis=0)
    n = (np.arange(3)[:, None] == axis) * np.sign(local)
    mantle = np.flatnonzero((form == CYLINDER) & (gap[2] > 1e-3 * half[2]))
    n[:2, mantle] = local[:2, mantle] / half[0, mantle]
    n[2, mantle] = 0
    cap = np.flatnonzero((form == CYLINDER) & (gap[2] <= 1e-3 * half[2]))
    n[:2, cap] = 0
    n[2, cap] = np.sign(z[cap])
    ball = np.flatnonzero(form == SPHERE)
    n[:, ball] = local[:, ball] / half[0, ball]
    return np.stack([c * n[0] - s * n[1], s * n[0] + c * n[1], n[2]]), local


def _hits(geometry, origin, d, wanted=True):
    """Yields (shape index, ray indices or None for all rays, their entry t) where rays may hit.

    Bounding spheres sort out first the shapes that no ray can reach, then rays shape by shape.
    wanted: bool per shape, which ones count.
    """
    if d.shape[1] == 0:
        return
    origin = np.asarray(origin, np.float32)
    d = _without_zeros(d)
    unit = d / np.sqrt(np.einsum("cn,cn->n", d, d))
    towards = geometry.centre - origin[:, None]
    distance = np.sqrt((towards**2).sum(axis=0))
    towards /= distance
    half_angle = np.arcsin(np.minimum(geometry.radius / distance, 1))
    reached = _in_cone(unit, towards, half_angle) | (geometry.radius > distance)
    for k in np.flatnonzero(reached & wanted):
        shape = geometry.shapes[k]
        if geometry.radius[k] > 0.6 * distance[k]:  # so near that its sphere sorts out few rays
            yield k, None, _entry(shape, origin, d)
            continue
        cosine = np.einsum("c,cn->n", towards[:, k], unit)
        rays = np.flatnonzero(cosine > np.cos(half_angle[k]) - 1e-5)
        if len(rays):
            yield k, rays, _entry(shape, origin, d.take(rays, axis=1))


def _in_cone(unit, towards, half_angle):
    """Whether spheres in the directions `towards` touch the cone around all rays `unit` 3,N."""
    axis = unit.mean(axis=1)
    axis /= np.sqrt(axis @ axis)
    opening = np.arccos(np.clip(np.einsum("c,cn->n", axis, unit).min(), -1, 1))
    return np.arccos(np.clip(axis @ towards, -1, 1)) < opening + half_angle + 1e-3


def _entry(shape, origin, d):
    """Where the rays enter the shape (t, float32; inf where they miss it or start inside)."""
    o = origin - np.asarray(shape.centre, np.float32)
    if shape.yaw:
        c, s = (np.float32(v) for v in _cos_sin(shape.yaw))
        o = np.array([c * o[0] + s * o[1], c * o[1] - s * o[0], o[2]])
        d = _without_zeros(np.stack([c * d[0] + s * d[1], c * d[1] - s * d[0], d[2]]))
    if shape.form == BOX:
        near, far = _slab(o[0], d[0], shape.half[0])
        spans = [_slab(o[i], d[i], shape.half[i]) for i in (1, 2)]
    elif shape.form == SPHERE:
        near, far = _round(o, d, shape.half[0])
        spans = []
    else:
        near, far = _round(o[:2], d[:2], shape.half[0])
        spans = [_slab(o[2], d[2], shape.half[2])]
    for a, b in spans:
        near, far = np.maximum(near, a), np.minimum(far, b)
    near[(near > far) | (near < 1e-4)] = np.inf
    return near


def _without_zeros(d):
    """The rays d with components that can be divided by."""
    return np.where(d == 0, np.float32(1e-9), d)


def _slab(o, d, half):
    """The span (near, far) of t between two parallel planes at -half and +half."""
    inverse = 1 / d
    middle = inverse * -np.float32(o)
    reach = np.abs(inverse) * np.float32(half)
    return middle - reach, middle + reach


def _round(o, d, radius):
    """The span (near, far) of t inside a sphere (3 components) or an endless cylinder (2)."""
    a = np.einsum("cn,cn->n", d, d)
    middle = np.einsum("c,cn->n", -o, d) / a
    # b^2 - ac would cancel in float32 for a thin post far away; the nearest point does not.
    nearest = o[:, None] + middle * d
    half_chord_square = (radius**2 - np.einsum("cn,cn->n", nearest, nearest)) / a
    half_chord = np.sqrt(np.maximum(half_chord_square, 0))
    near = middle - half_chord
    near[half_chord_square <= 0] = np.inf
    return near, middle + half_chord


def _cos_sin(angle):
    return np.cos(angle), np.sin(angle)
