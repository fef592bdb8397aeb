"""Ground truth that does not use the package.

``layers``         what a layer saw and gave, example by example; the others are built on it
``autograd``       exact blocks and Kronecker factors from Jacobians and loss Hessians, in float64
``by_example``     the empirical factors of any model from a loop over single examples
``graphs``         ragged factors, from graphs on their own
``graph_network``  a model to try them on

The functions that run the package and compare with these, :func:`~.autograd.assert_factors` above
all, stand beside them.
"""
