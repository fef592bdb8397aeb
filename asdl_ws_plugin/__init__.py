"""K-FAC-expand and K-FAC-reduce for ASDL: second-order training of networks with linear weight-sharing layers.

Importing this package is enough; every natural-gradient maker of ASDL then accepts ``shared_dim``::

    import asdl, asdl_ws_plugin
    gm = asdl.KfacGradientMaker(model, config, shared_dim='reduce')
"""

from .registration import require_asdl

require_asdl()

from . import operations  # noqa: E402
from ._version import __version__  # noqa: E402
from .fisher_maker import FISHER_FORWARD_ONLY  # noqa: E402
from .loss import LOSS_BINARY_CROSS_ENTROPY  # noqa: E402
from .positions import (  # noqa: E402
    WeightSharingLinear,
    attach_padding,
    attach_segments,
    padding,
    segments,
)
from .ragged import Segments, set_backend  # noqa: E402
from .registration import register, unregister  # noqa: E402
from .registry import register_operation  # noqa: E402

__all__ = [
    "FISHER_FORWARD_ONLY",
    "LOSS_BINARY_CROSS_ENTROPY",
    "Segments",
    "WeightSharingLinear",
    "__version__",
    "attach_padding",
    "attach_segments",
    "padding",
    "register",
    "register_operation",
    "segments",
    "set_backend",
    "unregister",
]


operations.register_all()
register()
