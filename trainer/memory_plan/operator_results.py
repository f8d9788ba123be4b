"""What operators return on meta tensors, remembered: the same operator on the same shapes returns the same shapes.

PyTorch works many of them out in Python, a millisecond for a matrix product, and a plan traces the same layers a dozen
times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

META = torch.device("meta")
# results of many models; a plan of SD 1.5 has 3,000
MAX_RESULTS = 2**16


def meta_tensors(values: Iterable) -> Iterator[Tensor]:
    """Yield the meta tensors among an operator's arguments or outputs, which are tensors, lists of them and numbers."""
    for x in values:
        if isinstance(x, Tensor):
            if x.is_meta:
                yield x
        elif isinstance(x, list | tuple):
            yield from meta_tensors(x)


class _Unknown(Exception):
    """An argument or a result that is not described by its shape."""


def _described(x: Any) -> Any:
    """Return what a result can depend on of an argument, hashable. Raises _Unknown."""
    # subclasses may return anything
    if type(x) is Tensor or type(x) is nn.Parameter:
        if not x.is_meta:
            raise _Unknown
        return x.dtype, x.shape, x.stride()
    if isinstance(x, list | tuple):
        return tuple(map(_described, x))
    # 1, 1.0 and True are equal
    if x is None or isinstance(x, bool | int | float | str):
        return type(x), x
    if isinstance(x, torch.dtype | torch.device | torch.layout | torch.memory_format):
        return x
    raise _Unknown


def _form(x: Any) -> Any:
    """Return how to make an output anew: (dtype, shape, strides), a number or None. Raises _Unknown."""
    if not isinstance(x, Tensor):
        if x is None or isinstance(x, bool | int | float):
            return x
        raise _Unknown
    num_bytes = x.element_size() * (1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)))
    is_whole = x.storage_offset() == 0 and x.untyped_storage().nbytes() == (num_bytes if x.numel() else 0)
    if type(x) is not Tensor or not x.is_meta or not is_whole:
        raise _Unknown
    return x.dtype, x.shape, x.stride()


def _made(form: Any) -> Any:
    if not isinstance(form, tuple):
        return form
    dtype, shape, strides = form
    return torch.empty_strided(shape, strides, dtype=dtype, device=META)


def _makes_new(func) -> bool:
    """Return whether an operator neither writes into its arguments nor returns views of them."""
    schema = func._schema
    return not any(x.alias_info is not None for x in (*schema.arguments, *schema.returns))


class OperatorResults:
    """Calls operators, and makes the outputs itself of a call like an earlier one.

    num_computed: how many calls the operators themselves have answered.
    """

    def __init__(self) -> None:
        self.num_computed = 0
        self._makes_new: dict[Any, bool] = {}
        # operator and arguments -> (type of the outputs, forms)
        self._forms: dict[tuple, tuple[type, tuple]] = {}

    def call(self, func, args: tuple, kwargs: dict, correct) -> Any:
        """Return correct(func, args, func(*args, **kwargs)). correct: depends on nothing but shapes, too."""
        makes_new = self._makes_new.get(func)
        if makes_new is None:
            makes_new = self._makes_new[func] = _makes_new(func)
        key = None
        if makes_new:
            try:
                key = func, _described(args), tuple((name, _described(x)) for name, x in kwargs.items())
            except _Unknown:
                pass
            else:
                if (known := self._forms.get(key)) is not None:
                    kind, forms = known
                    return _made(forms[0]) if kind is Tensor else kind(map(_made, forms))
        self.num_computed += 1
        outputs = correct(func, args, func(*args, **kwargs))
        if key is not None:
            self._remember(key, outputs, meta_tensors((*args, *kwargs.values())))
        return outputs

    def _remember(self, key: tuple, outputs: Any, inputs: Iterable[Tensor]) -> None:
        kind = type(outputs)
        if kind not in (Tensor, tuple, list):
            return
        outputs = (outputs,) if kind is Tensor else outputs
        # _unsafe_view and a few others share an input's storage, though their schemas do not say so
        storages = [x.untyped_storage()._cdata for x in outputs if isinstance(x, Tensor)]
        if len(set(storages)) < len(storages) or {x.untyped_storage()._cdata for x in inputs} & set(storages):
            return
        try:
            forms = tuple(map(_form, outputs))
        except _Unknown:
            return
        if len(self._forms) >= MAX_RESULTS:
            self._forms.clear()
        self._forms[key] = kind, forms
