"""Layers that apply one weight at many positions: tokens, patches, nodes and edges of graphs.

The modules depend on each other in one direction: what only needs tensors (``factors``,
``ragged``), what reads a model and a loss (``registry``, ``rules``, ``layout``, ``capture``,
``loss``, ``plan``), and what computes curvature with them.
"""
