"""What an op is: a name, several implementations, and the rule that picks one.

The rule (``Op.choose``): a backend forced by the ``backend`` argument, else by the environment variable
``DFENGINE_BACKEND``, runs or raises with the reason, never falling back. Otherwise the first of
``PRIORITY[device type]`` that can run these arguments is taken. ``reference`` stands last in every list and accepts
everything the op accepts.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dfengine import native
from dfengine.errors import DfengineError, UsageError

BACKENDS = ("triton", "cuda", "cpu", "library", "reference")
PRIORITY = {
    "cuda": ("triton", "cuda", "library", "reference"),
    "cpu": ("cpu", "library", "reference"),
}
ENVIRONMENT = "DFENGINE_BACKEND"
FAMILIES = {
    "triton": ("triton", "cuda"),
    "cuda": ("triton", "cuda"),
    "cpu": ("cpu",),
    "library": ("library",),
    "reference": ("reference",),
}
"""The backends whose absence leaves an op to torch in a program that forces one: those for the same hardware."""


class CannotRunError(DfengineError):
    """An implementation does not serve these arguments on this device; the message is the reason."""


class ForcedBackendError(CannotRunError, UsageError):
    """What `DFENGINE_BACKEND` names does not serve these arguments on this device: wrong usage, as a device is that the
    machine does not have."""


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    run: called with the op's arguments; writes into the given outputs.
    available: called with a device type ("cpu", "cuda"); raises CannotRunError where the backend is absent there.
    can_run: called with the op's arguments; raises CannotRunError where these shapes, strides or dtypes are not served.
    configurations: called with the op's arguments; the keyword arguments of `run` and `bind` that are worth trying for
        them, {} being what is taken without them.
    bind: called with the op's arguments; gives a function that runs it on these very tensors, again and again, with
        less work a call than `run`; or None.
    """

    run: Callable[..., None]
    available: Callable[[str], None]
    can_run: Callable[..., None]
    bind: Callable[..., Callable[[], None]] | None = None
    configurations: Callable[..., Sequence[dict]] = lambda *_args: ({},)

    def bound(self, *args, **options) -> Callable[[], None]:
        """A function that runs it on these very tensors with these options, a configuration."""
        return (self.bind or partial(partial, self.run))(*args, **options)


@dataclass
class Op:
    """A named op with its implementations by backend; the device is that of the first argument, a tensor."""

    name: str
    implementations: dict[str, Implementation] = field(default_factory=dict)

    def register(self, backend: str, run, available, can_run, bind=None, configurations=None) -> None:
        """configurations: a function as in `Implementation`, or the launch configurations of a Triton kernel."""
        if backend not in BACKENDS:
            raise ValueError(f"{self.name}: unknown backend {backend!r}")
        if configurations is None:
            self.implementations[backend] = Implementation(run, available, can_run, bind)
            return
        if not callable(configurations):
            options = tuple({"configuration": configuration} for configuration in configurations)
            configurations = lambda *_args: options  # noqa: E731
        self.implementations[backend] = Implementation(run, available, can_run, bind, configurations)

    def choose(self, first: torch.Tensor, *args, backend: str | None = None, **kwargs) -> str:
        """Return the name of the backend that runs these arguments.

        Raises UsageError for an unknown forced backend, CannotRunError with the reasons where none can run
        (ForcedBackendError where the environment forces one).
        """
        forced = forced_backend(backend)
        device = first.device.type
        reasons = []
        for name in (forced,) if forced else PRIORITY.get(device, ("reference",)):
            implementation = self.implementations.get(name)
            if implementation is None:
                reasons.append(f"{name}: not written for this op")
                continue
            try:
                implementation.available(device)
                implementation.can_run(first, *args, **kwargs)
            except CannotRunError as error:
                reasons.append(f"{name}: {error}")
                continue
            return name
        trouble = f"op {self.name} on {device}: " + "; ".join(reasons)
        if forced and forced == os.environ.get(ENVIRONMENT):  # a program hands on what it read there
            raise ForcedBackendError(f"{ENVIRONMENT}={forced}: {trouble}")
        raise CannotRunError(trouble)

    def run_unforced(self, first: torch.Tensor, *args) -> None:
        """Run by the first of the device's backends that serves, whatever is forced: as a part of another op."""
        names = [name for name in PRIORITY.get(first.device.type, ("reference",)) if name in self.implementations]
        for name in names:
            try:
                self.implementations[name].available(first.device.type)
                self.implementations[name].can_run(first, *args)
            except CannotRunError:
                continue
            return self.implementations[name].run(first, *args)
        raise CannotRunError(f"op {self.name} on {first.device.type}: none of {', '.join(names)} serves")

    def substitute(self, backend: str | None = None) -> str | None:
        """The backend to force on this op in a program that forces `backend`, as in `choose`.

        It is another one, torch's, only for an op that has no kernel for that hardware, as `copy` has none: not where
        one kernel is written and the forced one is not.
        """
        forced = forced_backend(backend)
        if forced is None or any(name in self.implementations for name in FAMILIES[forced]):
            return forced
        return "library" if "library" in self.implementations else "reference"

    def __call__(self, first: torch.Tensor, *args, backend: str | None = None, **kwargs) -> None:
        self.implementations[self.choose(first, *args, backend=backend, **kwargs)].run(first, *args, **kwargs)

    def status(self, device: str) -> dict[str, str]:
        """Map every backend to "" where it is available on `device` ("cpu" or "cuda"), else to the reason why not."""
        result = {}
        for name in BACKENDS:
            if name not in self.implementations:
                result[name] = "not written"
                continue
            try:
                self.implementations[name].available(device)
                result[name] = ""
            except CannotRunError as error:
                result[name] = str(error)
        return result

    def default(self, device: str) -> str:
        """The backend taken on `device` when nothing about the arguments rules it out (a forced backend included)."""
        forced = forced_backend(None)
        status = self.status(device)
        for name in (forced,) if forced else PRIORITY[device]:
            if not status[name]:
                return name
        return f"none ({status[forced]})" if forced else "none"


def forced_backend(backend: str | None) -> str | None:
    """The backend forced by the argument or the environment, or None. Raises UsageError for an unknown name."""
    name = backend or os.environ.get(ENVIRONMENT) or None
    if name is not None and name not in BACKENDS:
        where = "backend" if backend else ENVIRONMENT
        raise UsageError(f"{where}={name}: no such backend; there are {', '.join(BACKENDS)}")
    return name


def always(*_args, **_kwargs) -> None:
    """The `available` and `can_run` of an implementation that runs everywhere."""


def recorded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether torch must see an op on these tensors: it compiles, traces or transforms, a mode is on (that of
    `torch.set_default_device` too), or one of them is of another class, wants the gradient that no op has, or is
    negated by a bit beside its memory.

    Raises RuntimeError where one carries a tangent, which a custom op would drop without a word, or has no memory.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_in_torch_dispatch_mode()
        or torch._C._is_torch_function_mode_enabled()
    ):
        return True
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors if t is not None
    ):
        raise RuntimeError("the ops of dfengine have no forward-mode derivative")
    if torch._C._functorch.maybe_current_level() is not None:
        return True
    plain, differentiates = (Tensor, torch.nn.Parameter), torch.is_grad_enabled()
    given = [t for t in tensors if t is not None]
    if any(t._is_zerotensor() for t in given):
        raise RuntimeError("a zero tensor without memory: clone() it for the ops of dfengine")
    return any(type(t) not in plain or (differentiates and t.requires_grad) or t.is_neg() for t in given)


def refuse_gradient(name: str, tensors: Sequence[Tensor | None]) -> None:
    """Raises RuntimeError where autograd is on and one of them wants a gradient: what is written into carries none."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"dfengine::{name} has no gradient: call it under torch.no_grad()")


def written(tensors: Sequence[Tensor | None]) -> None:
    """Tell autograd of tensors that a kernel wrote into: a backward pass that kept one of them then refuses it."""
    increment_version([tensor for tensor in tensors if tensor is not None])


def custom_op(name: str, mutates: Sequence[str] = (), fake: Callable = always) -> Callable[[Callable], Callable]:
    """A decorator that registers a function as ``torch.ops.dfengine.<name>`` and gives what calls it: through torch
    where a call is `recorded`, else directly: the dispatch of a custom op takes tens of microseconds.

    mutates: the parameters it writes into; a call that would lose a gradient in them raises RuntimeError. fake: its
    shapes alone, as of `register_fake`; the function allocates no result where it is not given. The result takes
    positional arguments.
    """

    def decorate(function: Callable) -> Callable:
        op = torch.library.custom_op(f"dfengine::{name}", function, mutates_args=mutates)
        op.register_fake(fake)
        parameters = inspect.signature(function).parameters.values()
        tensors = [place for place, parameter in enumerate(parameters) if "Tensor" in parameter.annotation]
        outputs = [place for place, parameter in enumerate(parameters) if parameter.name in mutates]

        @wraps(function)
        def call(*arguments):
            given = [arguments[place] for place in tensors]
            if recorded(given):
                if outputs and not torch.compiler.is_compiling():
                    refuse_gradient(name, given)
                return op(*arguments)
            result = function(*arguments)
            written([arguments[place] for place in outputs])
            return result

        return call

    return decorate


def cpu_available(function: str) -> Callable[[str], None]:
    """The `available` of a compiled CPU kernel: the function of this name in the extension, which has not
    all of them from every compiler (CMakeLists.txt)."""

    def available(device: str) -> None:
        if device != "cpu":
            raise CannotRunError(f"the cpu backend does not run on {device}")
        if not native.available():
            raise CannotRunError(native.status())
        if not hasattr(native.module, function):
            raise CannotRunError(f"the compiled extension was built without {function}")

    return available
