"""Messages about a layer: one form, with a reason and a remedy that can stand by themselves."""

from __future__ import annotations

import pickle

import pytest

from asdl_ws_plugin.weight_sharing.errors import (
    LayerError,
    LayerFault,
    LayerRuntimeError,
    LayerTypeError,
    layer_message,
)


@pytest.mark.parametrize(
    ("arguments", "message", "reason"),
    [
        (
            ("fc", "its input has 3 rows", "Give it two."),
            "Layer 'fc': its input has 3 rows. Give it two.",
            "Its input has 3 rows.",
        ),
        (
            ("fc", "is a subclass of Linear", "", "Other"),
            "Layer 'fc' (Other) is a subclass of Linear.",
            "It is a subclass of Linear.",
        ),
        (
            (("a", "b"), "have one weight, but not one bias"),
            "Layer 'a' and 'b' have one weight, but not one bias.",
            "It and 'b' have one weight, but not one bias.",
        ),
    ],
)
def test_the_message_and_its_parts(arguments, message, reason):
    error = LayerError(*arguments)
    assert str(error) == message == layer_message(*arguments)
    assert error.reason == reason
    assert error.remedy == (arguments[2] if len(arguments) > 2 else "")
    assert error.name in ("fc", "a")


@pytest.mark.parametrize(
    ("kind", "base"),
    [(LayerError, ValueError), (LayerTypeError, TypeError), (LayerRuntimeError, RuntimeError)],
)
def test_a_fault_is_pythons_own_kind_of_error_and_comes_back_from_another_process(kind, base):
    error = kind("fc", "its input has 3 rows", "Give it two.")
    assert isinstance(error, base) and isinstance(error, LayerFault)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error)
    assert (again.name, again.reason, again.remedy) == (error.name, error.reason, error.remedy)
