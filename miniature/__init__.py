"""The miniature: procedural rooms and streets that stand in for Hypersim and Virtual KITTI 2."""
