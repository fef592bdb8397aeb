"""``shared_dim`` and Fisher shapes as the user gives them: ASDL's assignment rules, resolved for a
model.

A value is a string or a list of rules. ``'value'`` is for every layer; ``(key, 'value', ...)`` for
the layers that the key stands for, which is a module, (a part of) a name, or a module class. The
most specific rule decides: a module, the full name, the longest part of a name, the nearest class
in the layer's hierarchy, and the default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from .registry import strategies

__all__ = ["AUTO", "LAYOUTS", "Rules", "matches_any"]

AUTO = "auto"
BATCH_FIRST, SEQUENCE_FIRST = LAYOUTS = ("batch_first", "sequence_first")


class Rules:
    """Assignment rules in ASDL's format, checked and ready to be asked for one layer at a time.

    Args:
        rules: a string, or a list of strings and tuples ``(key, value, ...)``.
        option: what the rules are for, as error messages call it.

    Raises:
        TypeError: something in it is not of that form.
        ValueError: two rules have the same key.
    """

    def __init__(self, rules: str | Sequence[Any], option: str) -> None:
        self.option = option
        if isinstance(rules, str):
            rules = [rules]
        if not isinstance(rules, (list, tuple)):
            raise TypeError(f"{option} has to be a string or a list of rules, got {rules!r}.")
        self.default: tuple[str, ...] = tuple(rule for rule in rules if isinstance(rule, str))
        self.keyed: list[tuple[Any, tuple[str, ...]]] = []
        for rule in rules:
            if isinstance(rule, str):
                continue
            if not isinstance(rule, tuple) or len(rule) < 2:
                raise TypeError(
                    f"{option}: every rule has to be a string or a tuple (key, value, ...), got "
                    f"{rule!r}."
                )
            key, *values = rule
            if not isinstance(key, (nn.Module, str)) and not (
                isinstance(key, type) and issubclass(key, nn.Module)
            ):
                raise TypeError(
                    f"{option}: a rule's key has to be a module, a name or a module class, got "
                    f"{key!r}."
                )
            if not all(isinstance(value, str) for value in values):
                raise TypeError(
                    f"{option}: a rule's values have to be strings, got {tuple(values)!r}."
                )
            if any(key is other for other, _ in self.keyed) or (
                isinstance(key, str) and key in self._names
            ):
                raise ValueError(f"{option}: there are two rules for {describe_key(key)}.")
            self.keyed.append((key, tuple(values)))

    @property
    def _names(self) -> list[str]:
        return [key for key, _ in self.keyed if isinstance(key, str)]

    @property
    def values(self) -> list[str]:
        """All values that occur in the rules."""
        return [*self.default, *(value for _, values in self.keyed for value in values)]

    def for_layer(
        self, name: str, module: nn.Module, among: Callable[[str], bool] = lambda value: True
    ) -> tuple[str, ...]:
        """The values of the most specific rule for a layer, or the default's (empty if there is
        none).

        Only the values are looked at, and only rules with such values, that ``among`` is true of.
        """
        mro = type(module).__mro__
        best, best_rank = tuple(filter(among, self.default)), (0, 0)
        for key, all_values in self.keyed:
            values = tuple(filter(among, all_values))
            if not values:
                continue
            if key is module:
                return values
            if isinstance(key, str) and key in name:
                rank = (3, 0) if key == name else (2, len(key))
            elif isinstance(key, type) and key in mro:
                rank = (1, -mro.index(key))
            else:
                continue
            if rank > best_rank:
                best, best_rank = values, rank
        return best

    def check_matches(self, layers: Iterable[tuple[str, nn.Module]]) -> None:
        """Raise a ValueError if there is a rule that is for none of the layers."""
        layers = list(layers)
        for key, _ in self.keyed:
            if not any(matches_any(name, module, [key]) for name, module in layers):
                names = ", ".join(repr(name) for name, _ in layers[:8]) + (
                    ", ..." if len(layers) > 8 else ""
                )
                raise ValueError(
                    f"{self.option}: the rule for {describe_key(key)} matches no supported layer "
                    f"of the model. Its layers are {names or 'none'}."
                )

    def check_values(self, allowed: Sequence[str]) -> None:
        """Raise a ValueError if a value is not one of those."""
        for value in self.values:
            if value not in allowed:
                raise ValueError(
                    f"{self.option}: unknown value {value!r}; it has to be one of "
                    f"{', '.join(map(repr, allowed))}, or None for upstream's behaviour."
                )


def shared_dim_rules(shared_dim: str | Sequence[Any]) -> Rules:
    """Parse ``shared_dim``. Raises TypeError or ValueError for anything but strategies and
    layouts.
    """
    rules = Rules(shared_dim, "shared_dim")
    rules.check_values([*strategies(), AUTO, *LAYOUTS])
    for values in (rules.default, *(values for _, values in rules.keyed)):
        layouts = [value for value in values if value in LAYOUTS]
        if len(layouts) > 1 or len(values) - len(layouts) > 1:
            raise ValueError(
                f"shared_dim: {values!r} gives one layer several strategies or layouts."
            )
    return rules


def strategy_and_layout(
    rules: Rules, name: str, module: nn.Module
) -> tuple[str | None, str | None]:
    """What the rules say of a layer's strategy and, independently, of its layout; ``None`` where
    they say nothing.
    """
    given = rules.for_layer(name, module, lambda value: value not in LAYOUTS)
    layouts = rules.for_layer(name, module, lambda value: value in LAYOUTS)
    return next(iter(given), None), next(iter(layouts), None)


def describe_key(key: Any) -> str:
    if isinstance(key, nn.Module):
        return f"the module {type(key).__name__}"
    return repr(key) if isinstance(key, str) else key.__name__


def matches_any(name: str, module: nn.Module, keys: Iterable[Any]) -> bool:
    """ASDL's meaning of a list of keys: modules, classes (with their subclasses) and parts of
    names.
    """
    return any(
        key is module
        or (isinstance(key, str) and key in name)
        or (isinstance(key, type) and isinstance(module, key))
        for key in keys
    )
