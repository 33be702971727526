"""Code shared by the modalities of atoms: storage, data sets, tokens and losses of free and periodic systems.

A system is free (Cartesian positions, no lattice) or periodic (fractional coordinates and a lattice). The folders of
the modalities hold what depends on the kind: file formats, chemistry, metrics and rendering.
"""
