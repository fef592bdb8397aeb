"""``convert`` and ``revert``: make every linear layer of a model a module that is called, in place.

No module is replaced and no Parameter is made: modules keep their identity, names, hooks and
Parameters, so an optimizer, a data-parallel wrapper and a checkpoint of the model stay valid. What
is done with a module of some type is a :class:`Converter`'s business; :func:`register_converter`
adds one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..weight_sharing.names import qualified_name
from ..weight_sharing.rules import matches_any
from ..weight_sharing.torch_private import has_own_hooks, unwrapped

__all__ = ["Converter", "Site", "convert", "register_converter", "revert"]

logger = logging.getLogger("asdl_ws_plugin")

_MARK = "_asdl_ws_converted"
_converters: dict[str, list[Converter]] = {}  # by the qualified name of a module class


@dataclass(frozen=True)
class Site:
    """A module in its place: what a converter may want to know before it says yes.

    ``options`` are those of :func:`convert`.
    """

    name: str
    module: nn.Module
    parent: nn.Module | None
    options: dict[str, Any]

    @property
    def attribute(self) -> str:
        """The module's name within its parent."""
        return self.name.rpartition(".")[2]

    def refuse(self, reason: str) -> ValueError:
        """The error that says why this module cannot be converted."""
        return ValueError(
            f"Module '{self.name}' ({type(self.module).__name__}): {reason} The model is "
            f"unchanged. To leave this module as it is, pass ignore_modules=['{self.name}']."
        )


class Converter:
    """What makes modules of one type visible to hooks. Stateless; changes a module in place and
    back.
    """

    #: The options of :func:`convert` that it reads.
    options: tuple[str, ...] = ()
    #: Whether the module's own Parameters become those of blocks, which another holder of them
    #: would not know.
    takes_parameters = False

    def wants(self, site: Site) -> bool:
        """Whether there is anything to do. Raises what :meth:`Site.refuse` returns if it cannot be
        done.
        """
        return True

    def convert(self, site: Site) -> None:
        """Change the module. Leaves it as it was if it raises."""
        raise NotImplementedError

    def revert(self, module: nn.Module) -> None:
        """Undo :meth:`convert`."""
        raise NotImplementedError

    def is_result(self, module: nn.Module) -> bool:
        """Whether a module that was never converted can be reverted all the same."""
        return False

    def check(self, sites: Sequence[Site]) -> None:
        """Look at the options and all modules of the model before any is changed. Raises if they do
        not go together.
        """

    def again(self, site: Site) -> None:
        """Take over the options of another call of :func:`convert` for a module that is converted
        already.
        """

    def made(self, module: nn.Module) -> list[nn.Module]:
        """The modules that :meth:`revert` will drop."""
        return []


def register_converter(module_class: type[nn.Module] | str, converter: Converter) -> None:
    """Let :func:`convert` handle modules of ``module_class`` and its subclasses.

    Of several converters for a module the first that wants it is used: those of the nearest class
    come first, then those registered first. A converter replaces one of its own type for the same
    class.

    Args:
        module_class: a subclass of ``torch.nn.Module``, or its qualified name
            (``'package.module.Class'``), which does not import the package.
        converter: what to do.

    Raises:
        TypeError: an argument is not of that type.
    """
    if isinstance(module_class, type) and issubclass(module_class, nn.Module):
        module_class = qualified_name(module_class)
    if not isinstance(module_class, str):
        raise TypeError(
            "module_class has to be a subclass of torch.nn.Module or its name, got "
            f"{module_class!r}."
        )
    if not isinstance(converter, Converter):
        raise TypeError(f"converter has to be a Converter, got {converter!r}.")
    others = [c for c in _converters.get(module_class, []) if type(c) is not type(converter)]
    _converters[module_class] = [*others, converter]


def convert(
    model: nn.Module,
    *,
    split_qkv: bool | Sequence[Any] = False,
    roles: Sequence[Any] | None = None,
    ignore_modules: Sequence[Any] = (),
    **options: Any,
) -> nn.Module:
    """Make the linear layers of ``model`` visible to hooks, in place. Outputs, gradients and
    ``state_dict`` stay.

    Handled are ``nn.MultiheadAttention`` (alone and inside PyTorch's Transformer modules), Hugging
    Face's transposed ``Conv1D``, attention modules of torchvision and timm that use a layer's
    weight without calling the layer, and whatever :func:`register_converter` added. Modules that
    are called as they are, such as plain ``nn.Linear``, need nothing. Of PyTorch Geometric,
    ``Linear`` becomes an ``nn.Linear`` as well, and ``GCNConv`` aggregates before it multiplies.
    All modules are converted or, if one cannot be, none. Converting a converted model again changes
    only what was not converted before.

    Args:
        model: the model.
        split_qkv: treat the blocks of a fused query-key-value layer as layers of their own, which
            share one A. ``True``: the layers called ``qkv``, ``c_attn``, ``Wqkv`` and ``to_qkv``
            whose outputs are query, key and value one after the other, as far as their sizes and
            the module around them tell; a warning names those that stay one layer. Or a list of
            modules, classes or (parts of) names that are to be cut in three.
        roles: of the rows that layers of a graph network see, as rules: ``[('edge', 'edge'),
            (nn.LayerNorm, 'node')]``. The ``nn.Linear`` layers among them become
            :class:`~asdl_ws_plugin.WeightSharingLinear`.
        ignore_modules: leave these alone: modules, classes or parts of names, as ASDL has it.
        options: for converters that were registered.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, or a part of it is compiled by ``torch.jit``.
        ValueError: a module cannot be converted. The message has its name and the reason; the model
            is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be a torch.nn.Module, got {type(model).__name__}.")
    options["split_qkv"] = split_qkv
    if roles is not None:
        options["roles"] = roles
    _check_options(options, ignore_modules)
    sites = [
        Site(name, module, parent, options)
        for name, module, parent in _sites(model)
        if not matches_any(name, module, ignore_modules)
    ]
    _check_sites(sites, split_qkv)
    todo, marked = _what_to_do(sites)
    _check_shared(model, todo)
    _convert_all(todo)
    for site, converter in marked:
        converter.again(site)
    if todo:
        logger.info(
            "converted %d modules: %s",
            len(todo),
            ", ".join(f"'{site.name}'" for site, _, _ in todo),
        )
    return model


def _check_options(options: dict[str, Any], ignore_modules: Any) -> None:
    split_qkv = options["split_qkv"]
    if isinstance(split_qkv, str) or not isinstance(split_qkv, (bool, Sequence)):
        raise TypeError(
            "split_qkv has to be True, False or a list of modules, classes or names, got "
            f"{split_qkv!r}."
        )
    if isinstance(ignore_modules, str):
        raise TypeError(f"ignore_modules has to be a list, got {ignore_modules!r}.")
    known = {name for converter in _all_converters() for name in converter.options}
    if unknown := sorted(set(options) - known):
        raise TypeError(
            f"convert got unknown options {unknown}; it knows {sorted(known)} and ignore_modules."
        )


def _check_sites(sites: list[Site], split_qkv: bool | Sequence[Any]) -> None:
    for site in sites:
        if isinstance(site.module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
            raise TypeError(
                f"Module '{site.name}' is compiled by torch.jit, so its layers cannot be seen. "
                "Convert the model before it is scripted. The model is unchanged. To leave this "
                f"module as it is, pass ignore_modules=['{site.name}']."
            )
    for key in [] if isinstance(split_qkv, bool) else split_qkv:
        if not any(matches_any(site.name, site.module, [key]) for site in sites):
            raise ValueError(f"split_qkv: {key!r} matches no module of the model.")
    for converter in _all_converters():
        converter.check(sites)


def _all_converters() -> list[Converter]:
    return [converter for converters in _converters.values() for converter in converters]


def _what_to_do(
    sites: list[Site],
) -> tuple[list[tuple[Site, tuple[str, str], Converter]], list[tuple[Site, Converter]]]:
    """What is to be converted, by which converter; and what has been before."""
    todo: list[tuple[Site, tuple[str, str], Converter]] = []
    marked: list[tuple[Site, Converter]] = []
    for site in sites:
        mark = site.module.__dict__.get(_MARK)
        if mark is not None:
            marked += [(site, converter) for key, converter in _find(site.module) if key == mark]
            continue
        for key, converter in _find(site.module):
            if converter.wants(site):
                _check(site)
                todo.append((site, key, converter))
                break
    return todo, marked


def _convert_all(todo: list[tuple[Site, tuple[str, str], Converter]]) -> None:
    """All or, if one cannot be converted, none."""
    done: list[tuple[Site, Converter]] = []
    try:
        for site, key, converter in todo:
            converter.convert(site)
            site.module.__dict__[_MARK] = key
            done.append((site, converter))
    except BaseException:
        for site, converter in reversed(done):
            del site.module.__dict__[_MARK]
            converter.revert(site.module)
        raise


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert`, in place: every module has its original class, children and forward
    again.

    Works on copies and on unpickled models, too, and makes ``nn.MultiheadAttention`` of every
    :class:`~asdl_ws_plugin.MultiheadAttention`.

    Returns:
        ``model``.

    Raises:
        ValueError: a layer that has to go has hooks or was replaced; the model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be a torch.nn.Module, got {type(model).__name__}.")
    todo: list[tuple[nn.Module, Converter]] = []
    for name, module, _ in _sites(model):
        key, found = module.__dict__.get(_MARK), dict(_find(module))
        converter = found.get(key) if key is not None else None
        if key is not None and converter is None:
            raise ValueError(
                f"Module '{name}' was converted by {key[1]}, which is not registered any more."
            )
        if converter is None:
            converter = next((c for c in found.values() if c.is_result(module)), None)
        if converter is None:
            continue
        for made in converter.made(module):
            if has_own_hooks(made):
                raise ValueError(
                    f"Module '{name}': a layer that convert made, {made}, has hooks. Remove them "
                    "first. The model is unchanged."
                )
        todo.append((module, converter))
    for module, converter in reversed(todo):
        converter.revert(module)
        module.__dict__.pop(_MARK, None)
    return model


def convertible(model: nn.Module) -> dict[str, Converter]:
    """The modules that :func:`convert` would change now, by name. Those that it refuses are left
    out.
    """
    found = {}
    for name, module, parent in _sites(model):
        if _MARK in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
            continue
        site = Site(name, module, parent, {"split_qkv": False})
        for _, converter in _find(module):
            with contextlib.suppress(ValueError):
                if converter.wants(site):
                    _check(site)
                    found[name] = converter
                    break
    return found


# ---------------------------------------------------------------------------------------- internals


def _find(module: nn.Module) -> Iterator[tuple[tuple[str, str], Converter]]:
    """The converters for a module, the nearest class first, and what to remember them by."""
    for cls in type(module).__mro__:
        name = qualified_name(cls)
        for converter in _converters.get(name, ()):
            yield (name, qualified_name(type(converter))), converter


def _sites(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Every module once, with its first name and the parent it has there."""
    model = unwrapped(model)
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0]) if name else None
        yield name, module, parent


def _check(site: Site) -> None:
    """What no converter can deal with."""
    module = site.module
    if "forward" in module.__dict__ and not type(module.__dict__["forward"]).__module__.startswith(
        __package__
    ):
        raise site.refuse("its forward was replaced on the instance, by you or another library.")
    if parametrize.is_parametrized(module):
        raise site.refuse(
            "it has parametrizations. Register them after convert, on its layers, or remove them."
        )
    devices = {str(p.device) for p in module.parameters(recurse=False)}
    if len(devices) > 1:
        raise site.refuse(
            f"its own parameters are on several devices ({', '.join(sorted(devices))})."
        )


def _check_shared(model: nn.Module, todo: list[tuple[Site, tuple[str, str], Converter]]) -> None:
    """A Parameter that is cut into blocks must not be somebody else's whole weight."""
    taking = {
        site.module: (site, converter) for site, _, converter in todo if converter.takes_parameters
    }
    if not taking:
        return
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            holders.setdefault(id(p), []).append((name, module))
    for module, (site, converter) in taking.items():
        for p in module.parameters(recurse=False):
            for name, other in holders[id(p)]:
                same = other in taking and taking[other][1] is converter
                mark = other.__dict__.get(_MARK)
                same = same or (mark is not None and mark[1] == qualified_name(type(converter)))
                if other is not module and not same:
                    raise site.refuse(
                        f"it shares a Parameter with '{name}', which would not be converted with "
                        "it."
                    )
