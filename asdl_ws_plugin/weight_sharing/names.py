"""Names that more than one place goes by: of classes that are never imported, and of marks."""

from __future__ import annotations

__all__ = ["OURS", "PYG_LINEAR", "SKIP_REASON", "qualified_name"]

# Where this package's own classes are defined. The modules of this folder may be those of a patched
# ASDL; the rest of the plugin has them beside its own then.
OURS = (f"{__package__}.", "asdl_ws_plugin.")

# PyTorch Geometric's own linear layer, which is no nn.Linear until convert makes it one.
PYG_LINEAR = "torch_geometric.nn.dense.linear.Linear"

# The attribute in which convert leaves the reason why a layer has no curvature.
SKIP_REASON = "_asdl_ws_skip"


def qualified_name(cls: type) -> str:
    """``'package.module.Class'``."""
    return f"{cls.__module__}.{cls.__qualname__}"
