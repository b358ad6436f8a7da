"""QAT twins of Conv2d, ConvTranspose2d and Linear."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from hqod_ops.quant.nn.saved import saving_codes
from hqod_ops.quant.quantizers.base import Quantizer

if TYPE_CHECKING:
    from hqod_ops.quant.nn.shared_weight import SharedWeight
    from hqod_ops.quant.nn.upstream import UpstreamQuantizer

_Self = TypeVar("_Self", bound="QATLayer")


class QATLayer(nn.Module):
    """What the twins have in common: a quantizer of the weight and one of the input.

    A twin is its float class with two submodules more, ``weight_quantizer`` and ``input_quantizer``
    (each may be None: not quantized). Its parameters keep their names, so that a float state_dict
    loads with ``strict=False`` (only the quantizers' keys are missing; see
    :func:`hqod_ops.quant.load_float_state_dict`). The bias is never quantized.

    Every twin quantizes its input with a scale of its own; where several read one tensor, each
    learns a scale for it. The tensor itself stays as it is for other readers, such as residual
    additions. A twin called several times in one forward pass has one input scale per call
    (:class:`Quantizer`) and one weight scale.
    """

    float_type: ClassVar[type[nn.Module]]
    weight_ch_axis: ClassVar[int]
    """Axis of the weight that counts output channels."""

    weight: Tensor

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    shared_weight: SharedWeight | None = None
    """Where a model that quantizes all its weights together puts that of this layer."""
    upstream: UpstreamQuantizer | None = None
    """In place of the input's quantizer where that works at the producers of the input."""
    saved_as: str = "float"
    """How the quantized tensors are kept for the backward pass: see
    :class:`hqod_ops.quant.QATConfig`."""

    @classmethod
    def from_float(
        cls: type[_Self],
        module: nn.Module,
        *,
        weight_quantizer: Quantizer | None = None,
        input_quantizer: Quantizer | None = None,
    ) -> _Self:
        """Turn a float layer into its twin, in place.

        The module object stays the same, so that its parameters, hooks and every reference to it
        (tied modules, an optimizer's parameters) stay valid.

        Args:
            module (nn.Module): of exactly the twin's float class.
            weight_quantizer (Quantizer, optional), input_quantizer (Quantizer, optional): None
                leaves weight or input unquantized.

        Returns:
            QATLayer: the same object.

        Raises:
            TypeError: module is of another class.
        """
        if float_class(module) is not cls.float_type:
            raise TypeError(
                f"module: expected a {cls.float_type.__name__}, got {type(module).__name__}"
            )
        become(module, cls)
        assert isinstance(module, cls)
        module._attach(weight_quantizer, input_quantizer)
        return module

    def _attach(
        self, weight_quantizer: Quantizer | None, input_quantizer: Quantizer | None
    ) -> None:
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take a bias too that the layer lacks: bias correction may have made one."""
        bias = state_dict.get(f"{prefix}bias")
        if isinstance(bias, Tensor) and self._parameters.get("bias", bias) is None:
            made = nn.Parameter(torch.empty_like(bias, device=self.weight.device))
            made.requires_grad_(self.weight.requires_grad)
            self.register_parameter("bias", made)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def quantized_weight(self) -> Tensor:
        """The weight on its quantizer's grid."""
        if self.shared_weight is not None:
            shared = self.shared_weight.take()
            if shared is not None:
                return shared
        return _apply(self.weight_quantizer, self.weight)

    def quantized_input(self, x: Tensor) -> Tensor:
        """x on the grid of the input quantizer; one call of the layer."""
        if self.upstream is not None:
            return self.upstream(x)
        return _apply(self.input_quantizer, x)

    def saving(self, x: Tensor, weight: Tensor) -> AbstractContextManager[Any]:
        """Where the layer computes with its quantized tensors, and saves them."""
        if self.saved_as == "float" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return nullcontext()
        return saving_codes(x, weight)


def float_class(module: nn.Module) -> type[nn.Module]:
    """The class of a layer, without torch's subclass for parametrizations."""
    kind: type[nn.Module] = parametrize.type_before_parametrizations(module)
    return kind


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a module; its parametrizations stay."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        # Torch's subclass for this one module has the tensors as properties.
        extras = {k: v for k, v in vars(kind).items() if k not in ("__module__", "__doc__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), extras)
    module.__class__ = cls


def as_leaf(module: nn.Module, proxy: Any, *args: Any, **kwargs: Any) -> Any:
    """The call of a module as one node of a ``torch.fx`` trace: its forward is not traced."""
    tracer = proxy.tracer
    path = tracer.path_of_module(module)
    return tracer.create_proxy("call_module", path, (proxy, *args), kwargs)


def _apply(quantizer: Quantizer | None, x: Tensor) -> Tensor:
    if quantizer is None:
        return x
    quantized: Tensor = quantizer(x)
    return quantized


class QATConv2d(QATLayer, nn.Conv2d):
    """A 2d convolution of fake-quantized input and weight.

    Args:
        args, kwargs: those of ``nn.Conv2d``.
        weight_quantizer (Quantizer, optional), input_quantizer (Quantizer, optional): see
            :class:`QATLayer`.

    Example:
        >>> import torch
        >>> from hqod_ops.quant import LSQ, QATConv2d
        >>> conv = QATConv2d(3, 8, 3, weight_quantizer=LSQ(4, signed=True, observer="minmax"))
        >>> conv.weight_quantizer.set_scale(torch.tensor([0.02]), signed=True)
        >>> conv(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 8, 6, 6])
    """

    float_type = nn.Conv2d
    weight_ch_axis = 0

    def __init__(
        self,
        *args: Any,
        weight_quantizer: Quantizer | None = None,
        input_quantizer: Quantizer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._attach(weight_quantizer, input_quantizer)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return cast(Tensor, as_leaf(self, input))
        x, weight = self.quantized_input(input), self.quantized_weight()
        with self.saving(x, weight):
            output: Tensor = self._conv_forward(x, weight, self.bias)
        return output


class QATConvTranspose2d(QATLayer, nn.ConvTranspose2d):
    """A transposed 2d convolution of fake-quantized input and weight.

    Args:
        args, kwargs: those of ``nn.ConvTranspose2d``.
        weight_quantizer (Quantizer, optional), input_quantizer (Quantizer, optional): see
            :class:`QATLayer`.
    """

    float_type = nn.ConvTranspose2d
    weight_ch_axis = 1

    def __init__(
        self,
        *args: Any,
        weight_quantizer: Quantizer | None = None,
        input_quantizer: Quantizer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._attach(weight_quantizer, input_quantizer)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if isinstance(input, fx.Proxy):
            return cast(Tensor, as_leaf(self, input, output_size))
        shape: dict[str, Any] = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
        }
        output_padding: Any = self._output_padding(
            input, output_size, kernel_size=list(self.kernel_size), num_spatial_dims=2, **shape
        )
        x, weight = self.quantized_input(input), self.quantized_weight()
        with self.saving(x, weight):
            return F.conv_transpose2d(
                x, weight, self.bias, output_padding=output_padding, groups=self.groups, **shape
            )


class QATLinear(QATLayer, nn.Linear):
    """A linear layer of fake-quantized input and weight.

    Args:
        args, kwargs: those of ``nn.Linear``.
        weight_quantizer (Quantizer, optional), input_quantizer (Quantizer, optional): see
            :class:`QATLayer`.
    """

    float_type = nn.Linear
    weight_ch_axis = 0

    def __init__(
        self,
        *args: Any,
        weight_quantizer: Quantizer | None = None,
        input_quantizer: Quantizer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._attach(weight_quantizer, input_quantizer)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return cast(Tensor, as_leaf(self, input))
        x, weight = self.quantized_input(input), self.quantized_weight()
        with self.saving(x, weight):
            return F.linear(x, weight, self.bias)
