"""K-FAC-expand and K-FAC-reduce for ASDL: second-order training of networks with linear
weight-sharing layers.

Importing this package is enough; every natural-gradient maker of ASDL then accepts ``shared_dim``::

    import asdl, asdl_ws_plugin
    gm = asdl.KfacGradientMaker(model, config, shared_dim='reduce')

The same as a class of its own is :class:`asdl_ws_plugin.KfacGradientMaker`. With the environment
variable ``ASDL_WS_PLUGIN_REGISTER=0`` the import changes nothing in ASDL.
"""

from .upstream import adopt_native_modules, is_native, require_asdl

require_asdl()
if is_native():
    adopt_native_modules()

from . import kronecker  # noqa: E402
from .conversion.attention import MultiheadAttention  # noqa: E402
from .conversion.convert import convert, register_converter, revert  # noqa: E402
from .conversion.transformers import register_all as _register_converters  # noqa: E402
from .diagnostics.exactness import ApproximationError, approximation_error  # noqa: E402
from .diagnostics.report import Report, inspect  # noqa: E402
from .makers import (  # noqa: E402
    DiagNaturalGradientMaker,
    EkfacGradientMaker,
    EmpNaturalGradientMaker,
    FisherConfig,
    FullNaturalGradientMaker,
    KfacGradientMaker,
    LayerWiseNaturalGradientMaker,
    NaturalGradientMaker,
    UnitWiseNaturalGradientMaker,
    get_fisher_maker,
)
from .upstream import register, unregister, wants_registration  # noqa: E402
from .weight_sharing._version import __version__  # noqa: E402
from .weight_sharing.attach import attach_padding, attach_segments  # noqa: E402
from .weight_sharing.fisher_maker import FISHER_FORWARD_ONLY  # noqa: E402
from .weight_sharing.likelihoods import LOSS_BINARY_CROSS_ENTROPY  # noqa: E402
from .weight_sharing.operations import register_all as _register_operations  # noqa: E402
from .weight_sharing.positions import (  # noqa: E402
    WeightSharingLinear,
    padding,
    segments,
)
from .weight_sharing.ragged import Segments, set_backend  # noqa: E402
from .weight_sharing.registry import register_operation  # noqa: E402

__all__ = [
    "FISHER_FORWARD_ONLY",
    "LOSS_BINARY_CROSS_ENTROPY",
    "ApproximationError",
    "DiagNaturalGradientMaker",
    "EkfacGradientMaker",
    "EmpNaturalGradientMaker",
    "FisherConfig",
    "FullNaturalGradientMaker",
    "KfacGradientMaker",
    "LayerWiseNaturalGradientMaker",
    "MultiheadAttention",
    "NaturalGradientMaker",
    "Report",
    "Segments",
    "UnitWiseNaturalGradientMaker",
    "WeightSharingLinear",
    "__version__",
    "approximation_error",
    "attach_padding",
    "attach_segments",
    "convert",
    "get_fisher_maker",
    "inspect",
    "kronecker",
    "padding",
    "register",
    "register_converter",
    "register_operation",
    "revert",
    "segments",
    "set_backend",
    "unregister",
]


if not is_native():
    _register_operations()
_register_converters()
if wants_registration():
    register()
