"""Recurrent layers, one time step after the other.

Formulas and the order of gates: the operators' specification, https://onnx.ai/onnx/operators/onnx__LSTM.html.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from onnx_lowrank.distil.forms.form import Call, form
from onnx_lowrank.distil.forms.picking import reversed_places

_Activation = Callable[[Tensor], Tensor]

_ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], tuple[float, ...]]] = {
    "affine": (lambda x, alpha, beta: alpha * x + beta, (1.0, 0.0)),
    "elu": (functional.elu, (1.0,)),
    "hardsigmoid": (lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1), (0.2, 0.5)),
    "leakyrelu": (functional.leaky_relu, (0.01,)),
    "relu": (torch.relu, ()),
    "scaledtanh": (lambda x, alpha, beta: alpha * torch.tanh(beta * x), (1.0, 1.0)),
    "sigmoid": (torch.sigmoid, ()),
    "softplus": (functional.softplus, ()),
    "softsign": (functional.softsign, ()),
    "tanh": (torch.tanh, ()),
    "thresholdedrelu": (lambda x, alpha: torch.where(x > alpha, x, 0), (1.0,)),
}
"""Every activation with the defaults of alpha and beta, as far as it has them."""


@dataclass(frozen=True, slots=True)
class _Cell:
    """One direction of a layer.

    Attributes:
        recurrent: The weights of the state, gates by state.
        bias: The biases of the state; those of the input are in its products.
        peepholes: The weights of an LSTM's cell in its gates.
        activations: The activations in order.
        clip: The bound of what enters an activation.
        is_reset_late: Whether a GRU resets behind the product (`linear_before_reset`).
        is_coupled: Whether an LSTM forgets what it does not read (`input_forget`).
    """

    recurrent: Tensor
    bias: Tensor
    peepholes: tuple[Tensor, ...] | None
    activations: list[_Activation]
    clip: float | None
    is_reset_late: bool
    is_coupled: bool

    def activated(self, index: int, x: Tensor) -> Tensor:
        """An activation of clipped numbers."""
        return self.activations[index](x if self.clip is None else torch.clamp(x, -self.clip, self.clip))


_State = tuple[Tensor, ...]
_Advance = Callable[[_Cell, Tensor, _State], _State]


def _rnn(cell: _Cell, x: Tensor, state: _State) -> _State:
    (hidden,) = state
    return (cell.activated(0, x + hidden @ cell.recurrent.t() + cell.bias),)


def _gru(cell: _Cell, x: Tensor, state: _State) -> _State:
    (hidden,) = state
    size = hidden.shape[-1]
    gates = x[:, : 2 * size] + hidden @ cell.recurrent[: 2 * size].t() + cell.bias[: 2 * size]
    update, reset = cell.activated(0, gates).chunk(2, dim=-1)
    weights, bias = cell.recurrent[2 * size :].t(), cell.bias[2 * size :]
    inner = reset * (hidden @ weights + bias) if cell.is_reset_late else (reset * hidden) @ weights + bias
    return ((1 - update) * cell.activated(1, x[:, 2 * size :] + inner) + update * hidden,)


def _lstm(cell: _Cell, x: Tensor, state: _State) -> _State:
    hidden, memory = state
    read, out, forget, new = (x + hidden @ cell.recurrent.t() + cell.bias).chunk(4, dim=-1)
    if cell.peepholes is not None:
        read, forget = read + cell.peepholes[0] * memory, forget + cell.peepholes[2] * memory
    read = cell.activated(0, read)
    forget = 1 - read if cell.is_coupled else cell.activated(0, forget)
    memory = forget * memory + read * cell.activated(1, new)
    if cell.peepholes is not None:
        out = out + cell.peepholes[1] * memory
    return cell.activated(0, out) * cell.activations[2](memory), memory


@dataclass(frozen=True, slots=True)
class _Kind:
    """A recurrent operator.

    Attributes:
        gates: The number of its gates.
        states: The number of its states.
        defaults: Its activations.
        advance: One time step.
    """

    gates: int
    states: int
    defaults: tuple[bytes, ...]
    advance: _Advance


_KINDS = {
    "RNN": _Kind(1, 1, (b"Tanh",), _rnn),
    "GRU": _Kind(3, 1, (b"Sigmoid", b"Tanh"), _gru),
    "LSTM": _Kind(4, 2, (b"Sigmoid", b"Tanh", b"Tanh"), _lstm),
}


def _layer(call: Call, kind: _Kind) -> tuple[Tensor, ...]:
    is_first = bool(call.get("layout", 0))  # whether batches come first
    x = call.tensor(0).transpose(0, 1) if is_first else call.tensor(0)
    directions, batch = call.tensor(1).shape[0], x.shape[1]
    lengths = call.tensor(4).long() if call.has(4) else None
    made, ends = [], []
    for direction, cell in enumerate(_cells(call, kind, directions)):
        weights, biases = call.tensor(1)[direction], call.optional(3)
        state = tuple(
            _initial(call, operand, direction, is_first, batch) for operand in (5, 6)[: kind.states]
        )
        is_back = direction == 1 or call.text("direction", "forward") == "reverse"
        inputs = _reversed(x, lengths) if is_back else x
        inputs = inputs @ weights.t()
        inputs = inputs if biases is None else inputs + biases[direction].chunk(2)[0]
        hidden, end = _through(cell, inputs, state, kind.advance, lengths)
        made.append(_reversed(hidden, lengths) if is_back else hidden)
        ends.append(end)
    states = [torch.stack(state, dim=int(is_first)) for state in zip(*ends, strict=True)]
    outputs = torch.stack(made, dim=1)
    return (outputs.permute(2, 0, 1, 3) if is_first else outputs, *states)[: call.outputs]


def _through(
    cell: _Cell, inputs: Tensor, state: _State, advance: _Advance, lengths: Tensor | None
) -> tuple[Tensor, _State]:
    """The hidden states of all times, and the last states."""
    hidden = []
    for time, x in enumerate(inputs):
        new = advance(cell, x, state)
        if lengths is None:
            state = new
            hidden.append(state[0])
        else:
            is_in = (time < lengths)[:, None]
            state = tuple(torch.where(is_in, after, before) for after, before in zip(new, state, strict=True))
            hidden.append(torch.where(is_in, state[0], 0))
    return torch.stack(hidden), state


def _cells(call: Call, kind: _Kind, directions: int) -> list[_Cell]:
    recurrent, biases, peepholes = call.tensor(2), call.optional(3), call.optional(7)
    functions, count = _activations(call, kind.defaults * directions), len(kind.defaults)
    return [
        _Cell(
            recurrent[direction],
            biases[direction].chunk(2)[1] if biases is not None else recurrent.new_zeros(recurrent.shape[1]),
            tuple(peepholes[direction].chunk(3)) if peepholes is not None else None,
            functions[direction * count : (direction + 1) * count],
            call.get("clip"),
            bool(call.get("linear_before_reset", 0)),
            bool(call.get("input_forget", 0)),
        )
        for direction in range(directions)
    ]


def _activations(call: Call, defaults: Sequence[bytes]) -> list[_Activation]:
    """The activations of all directions; each takes its parameters from the front of both lists."""
    alphas, betas = list(call.get("activation_alpha", [])), list(call.get("activation_beta", []))
    found: list[_Activation] = []
    for name in call.get("activations", defaults):
        function, values = _ACTIVATIONS[name.decode().lower()]
        parameters = list(values)
        for place, given in enumerate((alphas, betas)[: len(values)]):
            parameters[place] = given.pop(0) if given else values[place]
        found.append(_with(function, parameters))
    return found


def _with(function: Callable[..., Tensor], parameters: Sequence[float]) -> _Activation:
    return lambda x: function(x, *parameters)


def _initial(call: Call, operand: int, direction: int, is_first: bool, batch: int) -> Tensor:
    given = call.optional(operand)
    if given is None:
        return call.tensor(0).new_zeros(batch, call.tensor(2).shape[-1])
    return given[:, direction] if is_first else given[direction]


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return x.flip(0)
    return x[reversed_places(lengths, x.shape[0]), torch.arange(x.shape[1], device=x.device)]


for _name, _kind in _KINDS.items():
    form(_name)(partial(_layer, kind=_kind))
