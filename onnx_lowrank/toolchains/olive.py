"""Olive: a pass for workflows, whose package file `onnx-lowrank olive-package-config` writes."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from onnx_lowrank import budgets
from onnx_lowrank.api import compress
from onnx_lowrank.errors import InputError, LowRankError
from onnx_lowrank.files.external import whole
from onnx_lowrank.options import DEFAULTS
from onnx_lowrank.request import DEFAULT_BUDGET

try:
    from olive.common.config_utils import validate_config
    from olive.data.config import DataConfig
    from olive.exception import OlivePassError
    from olive.hardware.accelerator import AcceleratorSpec
    from olive.model import ONNXModelHandler
    from olive.model.utils import resolve_onnx_path
    from olive.passes import Pass
    from olive.passes.onnx.common import get_external_data_config, model_proto_to_olive_model
    from olive.passes.pass_config import BasePassConfig, PassConfigParam
    from olive.search.search_parameter import Categorical, Conditional, SpecialParamValue
except ImportError as error:
    raise InputError("Olive, whose pass this is, is not installed: install onnx-lowrank[olive].") from error

_RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
"""The ratios that a search tries unless the workflow names others."""

_OPTIONS: dict[str, tuple[type, str]] = {
    "ratio": (float, "How much to keep, in the budget: 0.5 keeps half. Instead of a target."),
    "budget": (str, f"The quantity that the ratio bounds: {', '.join(budgets.names())}."),
    "recipe": (str, "Name of a recipe; `onnx-lowrank --list-passes` lists all."),
    "align": (int, "Choose only ranks that are multiples of this number."),
    "target_error": (float, "Instead of a ratio: the largest output error on held-out calibration inputs."),
    "target_agreement": (float, "Instead of a ratio: the least agreement on held-out calibration inputs."),
    "calibration_samples": (int, "Use at most this number of calibration samples."),
    "include": (list, "Globs of layers or nodes: decompose only these."),
    "exclude": (list, "Globs of layers or nodes: keep these."),
    "input_shape": (dict, "Shapes by input name, for dimensions that the model leaves open."),
    "max_error": (float, "The largest accepted relative error of an output."),
}
"""The options of `compress` that a workflow can set: type and description."""

_TARGETS = ("target_error", "target_agreement")
"""The options that replace a ratio."""

_CPU = "CPUExecutionProvider"


class OnnxLowRank(Pass):  # type: ignore[misc]
    """Make an ONNX model smaller by low-rank decomposition."""

    def is_accelerator_agnostic(self, accelerator_spec: AcceleratorSpec) -> bool:
        """Whether all accelerators can share the result: not if it was planned with times of one."""
        return bool(self.config.budget != "latency")

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        options = {
            name: PassConfigParam(type_=kind, description=text) for name, (kind, text) in _OPTIONS.items()
        }
        options["budget"].default_value = DEFAULT_BUDGET
        options["ratio"].search_defaults = Conditional(
            parents=_TARGETS,
            support={(None,) * len(_TARGETS): Categorical(list(_RATIOS))},
            default=Conditional.get_ignored_choice(),
        )
        data = "Data to fit to; without it, weights alone are decomposed."
        return {
            **options,
            "data_config": PassConfigParam(type_=DataConfig | dict, description=data),
            # Olive's cache knows a result by the pass's configuration alone.
            "onnx_lowrank_version": PassConfigParam(
                type_=str,
                default_value=version("onnx-lowrank"),
                description="The version of onnx-lowrank that the workflow needs; by default the installed.",
            ),
            **get_external_data_config(),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        if not isinstance(model, ONNXModelHandler):
            raise OlivePassError(
                f"OnnxLowRank takes ONNX models, and this is a {type(model).__name__}: "
                "put OnnxConversion before it."
            )
        path = resolve_onnx_path(output_model_path)
        try:
            _check_version(config.onnx_lowrank_version)
            ratio = None if config.ratio == SpecialParamValue.IGNORED else config.ratio
            with compress(model.model_path, ratio, **self._options(model, config)) as result:
                made = result.model
                proto = whole(made.proto, made.files, made.name)
        except LowRankError as error:
            raise OlivePassError(str(error)) from error
        return model_proto_to_olive_model(proto, path, config)

    def _options(self, model: ONNXModelHandler, config: type[BasePassConfig]) -> dict[str, Any]:
        """The options of `compress` that the workflow sets."""
        given = {name: getattr(config, name) for name in _OPTIONS.keys() & DEFAULTS.keys()}
        options = {name: value for name, value in given.items() if value is not None}
        options["provider"] = _CPU
        if config.budget == "latency":
            options["provider"] = str(self.accelerator_spec.execution_provider or _CPU)
        if config.data_config is not None:
            data = validate_config(config.data_config, DataConfig).to_data_container()
            options["calibration"] = data.create_calibration_dataloader(
                model_path=model.model_path, io_config=model.io_config
            )
        return options


def _check_version(wanted: str) -> None:
    installed = version("onnx-lowrank")
    if wanted != installed:
        raise InputError(
            f"The workflow needs onnx-lowrank {wanted}, and {installed} is installed: install that version, "
            "or leave onnx_lowrank_version out."
        )
