"""What the engine is measured against: the same model through torch eager, autocast, torch.compile, on a CPU ONNX
Runtime and OpenVINO, on a GPU TensorRT (written for version 10, not yet run): channels-last where the library lets one
choose, both noise scales in one batch, the noise drawn beforehand; torch.compile with freezing or CUDA graphs, OpenVINO
in its own bfloat16, or quantized by NNCF. torch eager computes the time embedding in every call; autocast casts the
weights, as it does for its users. Beside an engine of eight bits a rival that has none without another tool and its
model runs in half precision.

A rival is a function of a tensor; those of `WholeDetection` take uint8 images (B, S, S, C) and give (anomaly map,
score), those of `OneEvaluation` a float32 x_t (B, C, S, S) and give the predicted noise.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from dfengine.diffusion import Schedule
from dfengine.engine.modules import PRECISIONS, ModuleRunner, top_k_count
from dfengine.models import Model

RIVALS = ("eager", "autocast", "compile", "onnxruntime", "openvino", "openvino-int8", "tensorrt")
HALF_BESIDE = {"int8": "bfloat16", "fp8": "float16"}
"""The half precision of the rivals beside one of eight bits."""


class WholeDetection(nn.Module):
    """Norm-guided detection of a model as one module: images to anomaly map (B, S, S) and score (B,).

    The guidance is its lerp identity, the cheapest form. autocast: the dtype of the networks, or None.
    """

    def __init__(self, model: Model, batch: int, device: str, autocast: torch.dtype | None = None, seed: int = 0):
        super().__init__()
        config = model.config
        if config.mode != "norm-guided":
            raise ValueError(f"mode {config.mode} has no rival here")
        self.reconstruction, self.segmentation = model.reconstruction, model.segmentation
        self.autocast, self.kind = autocast, torch.device(device).type
        self.k = top_k_count(config.image_size, config.image_size, config.top_k)
        self.signed = config.pixel_range == "signed"
        bar = [float(Schedule.of(config).alpha_bar[t]) for t in (config.t_s, config.t_b)]
        self.signal = [value**0.5 for value in bar]
        self.spread = [(1 - value) ** 0.5 for value in bar]
        self.weight = config.guidance * (1 - bar[0])
        drawn = ModuleRunner(model, device, seed=seed)
        for scale in (0, 1):
            self.register_buffer(f"noise{scale}", drawn._draw(0, 0, scale))
        steps = torch.tensor([config.t_s, config.t_b]).repeat_interleave(batch)
        self.register_buffer("steps", steps.to(device))

    def _networks(self):
        return nullcontext() if self.autocast is None else torch.autocast(self.kind, self.autocast)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        unit = images.permute(0, 3, 1, 2).float() / 255
        x_0 = unit * 2 - 1 if self.signed else unit
        noised = [self.signal[i] * x_0 + self.spread[i] * noise for i, noise in enumerate((self.noise0, self.noise1))]
        x_t = torch.cat(noised).contiguous(memory_format=torch.channels_last)
        with self._networks():
            eps = self.reconstruction(x_t, self.steps)
        hats = [
            (x - self.spread[i] * e) / self.signal[i]
            for i, (x, e) in enumerate(zip(noised, eps.float().chunk(2), strict=True))
        ]
        guided = torch.lerp(hats[0], hats[1].clamp(-1, 1), self.weight).clamp(-1, 1)
        pair = torch.cat((x_0, guided), dim=1).contiguous(memory_format=torch.channels_last)
        with self._networks():
            logits = self.segmentation(pair)
        anomaly_map = logits.float().sigmoid()[:, 0]
        return anomaly_map, anomaly_map.flatten(1).topk(self.k, dim=1).values.mean(dim=1)


class OneEvaluation(nn.Module):
    """The reconstruction network alone, at the big scale's t."""

    def __init__(self, model: Model, batch: int, device: str, autocast: torch.dtype | None = None):
        super().__init__()
        self.reconstruction = model.reconstruction.to(device=device, memory_format=torch.channels_last)
        self.autocast, self.kind = autocast, torch.device(device).type
        self.register_buffer("steps", torch.full((batch,), model.config.t_b, device=device))

    def forward(self, x_t: Tensor) -> Tensor:
        x = x_t.contiguous(memory_format=torch.channels_last)
        with nullcontext() if self.autocast is None else torch.autocast(self.kind, self.autocast):
            return self.reconstruction(x, self.steps).float()


def rival(
    name: str, make: Callable[[torch.dtype | None], nn.Module], examples: list[Tensor], precision: str
) -> tuple[str, Callable[[Tensor], tuple[Tensor, ...]]]:
    """(label, function) of the rival `name` beside the engine in `precision`.

    make: the module anew, with this autocast dtype; examples: inputs, on which a rival of eight bits is calibrated too.
    Raises ImportError where its library is missing and ValueError where it cannot run this; the label says which
    precision it runs in."""
    example, eight_bits = examples[0], precision in HALF_BESIDE
    precision = HALF_BESIDE.get(precision, precision)
    half = None if precision in ("float32", "tf32") else PRECISIONS[precision]
    if name == "eager":
        rounded = example.is_cuda and torch.backends.cudnn.allow_tf32  # what torch does to convolutions by itself
        return f"eager {'tf32' if rounded else 'float32'}", _ungraded(make(None).eval())
    if name == "autocast":
        if half is None:
            raise ValueError("autocast is for half precision")
        return f"autocast {precision}", _ungraded(make(half).eval())
    if name == "compile":
        return f"torch.compile {precision}", _compiled(make(half).eval(), example.device.type)
    if name == "openvino":
        return f"OpenVINO {precision}", _openvino(make(None).eval(), example, precision)
    if name == "openvino-int8":
        if not eight_bits:
            raise ValueError("it is for eight bits")
        return "OpenVINO int8", _openvino(make(None).eval(), example, precision, examples)
    if name == "onnxruntime":
        return "ONNX Runtime float32", _onnxruntime(make(None).eval(), example)
    if name == "tensorrt":
        return f"TensorRT {precision}", _tensorrt(make(None).eval(), example, precision)
    raise ValueError(f"no rival is called {name}")


def _ungraded(module: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
    module.requires_grad_(False)

    def run(tensor: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return _tuple(module(tensor))

    return run


def _tuple(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _compiled(module: nn.Module, device: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    import torch._inductor.config as inductor

    inductor.freezing = device == "cpu"
    module.requires_grad_(False)
    compiled = torch.compile(module, mode="max-autotune-no-cudagraphs" if device == "cpu" else "max-autotune")

    def run(tensor: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():  # freezing is not done in inference mode
            return tuple(t.clone() for t in _tuple(compiled(tensor)))

    return run


def _openvino(
    module: nn.Module, example: Tensor, precision: str, calibration: list[Tensor] | None = None
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """calibration: inputs to quantize the model for; what stays unquantized runs in `precision`."""
    if example.device.type != "cpu":
        raise ValueError("OpenVINO runs on a CPU")
    import openvino

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(module, example_input=example, input=[tuple(example.shape)])
    if calibration is not None:
        import nncf

        samples = nncf.Dataset([tensor.numpy() for tensor in calibration])
        model = nncf.quantize(model, samples, preset=nncf.QuantizationPreset.MIXED, subset_size=len(calibration))
    hints = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(model, "CPU", hints)

    def run(tensor: Tensor) -> tuple[Tensor, ...]:
        results = compiled([tensor.numpy()], share_inputs=True, share_outputs=False)
        return tuple(torch.from_numpy(results[i]) for i in range(len(results)))

    return run


def _onnx(module: nn.Module, example: Tensor, path: Path) -> None:
    import onnx  # noqa: F401  (the export needs it)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (example,), path, input_names=["x"], opset_version=18, dynamo=False)


def _onnxruntime(module: nn.Module, example: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    if example.device.type != "cpu":
        raise ValueError("ONNX Runtime is timed on a CPU")
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _onnx(module, example, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(tensor: Tensor) -> tuple[Tensor, ...]:
        results = session.run(None, {"x": tensor.numpy()})
        return tuple(torch.from_numpy(result) for result in results)

    return run


def _tensorrt(module: nn.Module, example: Tensor, precision: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """An engine of TensorRT 10, built for these shapes, which runs as one CUDA graph."""
    if example.device.type != "cuda":
        raise ValueError("TensorRT runs on a GPU")
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network, config = builder.create_network(0), builder.create_builder_config()
    flags = {"float16": [trt.BuilderFlag.FP16], "bfloat16": [trt.BuilderFlag.BF16], "tf32": [trt.BuilderFlag.TF32]}
    config.clear_flag(trt.BuilderFlag.TF32)
    for flag in flags.get(precision, []):
        config.set_flag(flag)
    parser = trt.OnnxParser(network, logger)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _onnx(module, example, path)
        if not parser.parse_from_file(str(path)):
            raise ValueError(f"TensorRT: {parser.get_error(0).desc()}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError("TensorRT built no engine")
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    place, outputs = example.clone(), []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            context.set_tensor_address(name, place.data_ptr())
        else:
            outputs.append(torch.empty(tuple(engine.get_tensor_shape(name)), device=example.device))
            context.set_tensor_address(name, outputs[-1].data_ptr())
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        context.execute_async_v3(stream.cuda_stream)  # resources that a capture must not ask for
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        context.execute_async_v3(stream.cuda_stream)

    def run(tensor: Tensor) -> tuple[Tensor, ...]:
        place.copy_(tensor)
        graph.replay()
        return tuple(output.clone() for output in outputs)

    run.keeps = engine, context  # the graph uses them
    return run
