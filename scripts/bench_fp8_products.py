"""One linear layer of a network in training, forward and backward, by every way to take its
products in FP8: errors against float64 first, then times.

    python -m scripts.bench_fp8_products [--net 1.3B --net 14B] [--tokens 65520] [--compile]
                                         [--recipe tensorwise ...] [--json FILE]

Ways: bf16; fp8 (`rcm.nets.trained_fp8`); torchao's recipes (`pip install
'rcm[lowbit]'`), eager and with --compile under torch.compile. Layers: E -> E, E -> H, H -> E of the
network, all tokens of a packed teacher-forced pass. `parts`: a product alone in bf16, in e4m3 with
a scale per row and with one scale, and the kernel that rounds rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcm.inference.outcome import command
from rcm.kernels.fused import quantise
from rcm.nets.layers import Linear
from rcm.nets.trained_fp8 import TrainedFP8Linear
from rcm.nets.wan.config import WanConfig, preset
from scripts.bench_measure import (
    alone,
    attempted,
    bench_flags,
    forget,
    in_words,
    relative,
    require,
    this_card,
    write,
)

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
"""torchao's; the last one takes the gradient of the weight in bf16, as fp8 does."""
SMALL = (16_384, 512, 768)
"""Tokens, inputs and outputs of the layer that is checked; a gradient of its weight is a long
sum."""


def layer_of(inputs: int, outputs: int) -> Linear:
    """Random weights of fan-in variance, a bias."""
    torch.manual_seed(1)
    layer = Linear(inputs, outputs, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.normal_(std=inputs**-0.5)
        layer.bias.normal_()
    return layer


def drawn(rows: int, width: int, *, seed: int) -> Tensor:
    """Noise whose rows and columns are of different sizes, as activations are."""
    generator = torch.Generator("cuda").manual_seed(seed)
    noise = partial(torch.randn, generator=generator, device="cuda")
    return (noise(rows, width) * noise(rows, 1).exp() * noise(1, width).exp()).bfloat16()


def ways(layer: Linear, options: argparse.Namespace) -> Iterator[tuple[str, nn.Module]]:
    """Every way to compute `layer`, by name; all share its parameters."""
    yield "bf16", layer
    yield "fp8", TrainedFP8Linear(layer)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        print(f"torchao is left out: {error}", flush=True)
        return
    for recipe in options.recipe or RECIPES:
        config = Float8LinearConfig.from_recipe_name(recipe)
        found = convert_to_float8_training(nn.Sequential(layer), config=config)
        yield f"torchao {recipe}", found
        if options.compile:
            yield f"torchao {recipe}, compiled", torch.compile(found)


def both_ways(way: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Value and gradients of input, weight and bias."""
    y = way(x)
    return y.detach(), *torch.autograd.grad(y, (x, *way.parameters()), grad)


def check(options: argparse.Namespace) -> dict[str, float]:
    """Relative errors of a small layer against float64: of the same roundings for fp8, whose result
    is known; of exact products for all.
    """
    rows, inputs, outputs = SMALL
    layer, x = layer_of(inputs, outputs), drawn(rows, inputs, seed=2).requires_grad_()
    grad = drawn(rows, outputs, seed=3)

    def wide(m: Tensor, *, axis: int | None = None) -> Tensor:
        """`m`, or what its roundings along `axis` stand for, in float64."""
        if axis is None:
            return m.detach().double()
        q, scale = quantise.reference(m.detach() if axis else m.detach().t())
        whole = q.double() * scale.double()
        return whole if axis else whole.t()

    weight, exact = layer.weight, {}
    exact["value"] = F.linear(wide(x), wide(weight), wide(layer.bias))
    exact["x"], exact["weight"] = wide(grad) @ wide(weight), wide(grad).t() @ wide(x)
    rounded = {
        "value": F.linear(wide(x, axis=1), wide(weight, axis=1), wide(layer.bias)),
        "x": wide(grad, axis=1) @ wide(weight, axis=0),
        "weight": exact["weight"],
    }
    errors: dict[str, tuple[float, float]] = {}
    for name, way in ways(layer, options):
        # not strict: the bias's gradient, a plain sum in every way, is not compared
        found = dict(zip(exact, both_ways(way, x, grad), strict=False))
        for key, value in found.items():
            budget = 1e-2 if name == "bf16" else 0.2
            errors[f"{name}: {key}"] = (relative(value, exact[key]), budget)
            if name == "fp8":
                error = relative(value, rounded[key])
                errors[f"{name}: {key}, its own roundings"] = (error, 6e-3)
    return require(errors)


def parts(inputs: int, outputs: int, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of what a layer in FP8 is made of."""
    x, weight = drawn(options.tokens, inputs, seed=4), layer_of(inputs, outputs).weight.detach()
    rows, columns = quantise.quantise_rows(x), quantise.quantise_rows(weight)
    one = torch.ones((), device="cuda")
    whole = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    calls: dict[str, Callable[[], object]] = {
        "bf16": lambda: x @ weight.t(),
        "by rows": lambda: quantise.product(rows, columns, None, dtype=torch.bfloat16),
        "one scale": lambda: torch._scaled_mm(rows[0], columns[0].t(), **whole),
        "rounding x": lambda: quantise.quantise_rows(x),
    }
    return {f"{name}_ms": alone(call, repeats=options.repeats) for name, call in calls.items()}


def bench(config: WanConfig, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Milliseconds of forward and backward of every layer by every way."""
    width, hidden = config.dim, config.ffn_dim
    for inputs, outputs in ((width, width), (width, hidden), (hidden, width)):
        told = {"layer": f"{inputs} -> {outputs}"}
        with torch.no_grad():
            yield told | {"way": "parts"} | parts(inputs, outputs, options)
        x = drawn(options.tokens, inputs, seed=4).requires_grad_()
        grad = drawn(options.tokens, outputs, seed=5)
        for name, way in ways(layer_of(inputs, outputs), options):
            call = partial(both_ways, way, x, grad)
            yield (
                told
                | {"way": name}
                | attempted(lambda call=call: {"ms": alone(call, repeats=options.repeats)})
            )
        forget()


@command
def main(arguments: list[str] | None = None) -> int:
    """Check, measure, print, write."""
    parser = bench_flags(__doc__)
    add = parser.add_argument
    add("--net", action="append", choices=("1.3B", "14B"), help="repeatable (both)")
    add("--tokens", type=int, default=65_520, help="rows of the input")
    add("--recipe", action="append", choices=RECIPES, help="torchao's; repeatable (all)")
    add("--compile", action="store_true", help="torchao's recipes under torch.compile, too")
    add("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    found = this_card("bench_fp8_products") | {"options": vars(options)}
    errors = check(options)
    rows = []
    for net in options.net or ("1.3B", "14B"):
        for row in bench(preset(net), options):
            rows.append({"net": net} | row)
            print(in_words(rows[-1]), flush=True)
    if options.json:
        write(options.json, {"machine": found, "errors": errors, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
