"""ONNX Runtime with one execution provider."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import proxy

import onnx

from onnx_lowrank.engines.engine import (
    Feed,
    Profiled,
    RejectedError,
    Run,
    Source,
    UnsupportedError,
    materialized,
    one_line,
)
from onnx_lowrank.engines.interrupting import Call, interruptible
from onnx_lowrank.engines.node_times import KERNEL, runs_of
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model
from onnx_lowrank.files.scratch import scratch
from onnx_lowrank.graph.scopes import scopes

_ON_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


_INLINED = "_inlfunc_"


_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
"""The session option for the folder of the data files, for a model that is loaded from its bytes."""


_OPTIMIZED_DATA = "session.optimized_model_external_initializers_file_name"
"""The session option for the file of the weights of the optimized model."""


OWN = "com.microsoft"
"""The domain of the operators that the runtime's optimizer puts in place of several."""


_NOT_IN_NUMPY = ("bfloat16", "float8", "float4", "int4", "int2")


def _directly(call: Call) -> list[Any]:
    """Make a call in this thread, at once: whoever measures times waits for no other thread."""
    return call(None)


@dataclass(frozen=True, slots=True)
class Executed:
    """How often the nodes of a model ran.

    Attributes:
        runs: The number of runs, by the name under which the runtime ran the node.
    """

    runs: Mapping[str, int]

    def count(self, node: str) -> int:
        """How often the nodes with this name ran.

        The runtime inlines functions. It gives their nodes names that begin with a prefix and end with the
        original name.
        """
        inlined = (
            n for name, n in self.runs.items() if name.startswith(_INLINED) and name.endswith(f"_{node}")
        )
        return self.runs.get(node, 0) + sum(inlined)


@dataclass(frozen=True, slots=True)
class Runtime:
    """ONNX Runtime with one execution provider."""

    module: ModuleType
    provider: str
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"ONNX Runtime {self.provider}")

    @property
    def concurrent(self) -> int:
        """The number of runs of an open model that may be in progress; each takes memory for itself."""
        return 2 if self.provider == "CPUExecutionProvider" else 1

    def __reduce__(self) -> tuple[Callable[[str], Runtime], tuple[str]]:
        """Pickle the name of the provider, as a module cannot be pickled."""
        return runtime, (self.provider,)

    @contextmanager
    def open(self, model: Model) -> Iterator[Run]:
        """Load a model.

        Raises:
            UnsupportedError: The runtime does not accept the model.
            InputError: The provider does not start on this machine.
        """
        with (
            materialized(model) as source,
            self._session(source, self._options()) as session,
            interruptible(self.module.RunOptions) as ending,
        ):
            yield self._run(session, source, ending)

    @contextmanager
    def ready(self, model: Model, feed: Feed, threads: int) -> Iterator[Callable[[], object]]:
        """Load a model as it is deployed, to time repeated runs on the same inputs.

        Inputs and outputs stay on the GPU if the provider computes there.

        Args:
            model: The model.
            feed: The inputs.
            threads: How many threads compute one operator; 0 leaves it to the runtime.

        Raises:
            UnsupportedError: The runtime does not accept the model.
            InputError: The provider does not start on this machine.
        """
        options = self._options(is_deployed=True)
        options.intra_op_num_threads = threads
        with (
            materialized(model, is_deployed=True) as source,
            self._session(source, options) as session,
        ):
            if self.provider not in _ON_CUDA:
                run = self._run(session, source)
                yield lambda: run(feed)
                return
            with _translating_errors(source):
                binding = session.io_binding()
                for name, array in feed.items():
                    binding.bind_ortvalue_input(name, self.module.OrtValue.ortvalue_from_numpy(array, "cuda"))
                for output in session.get_outputs():
                    binding.bind_output(output.name, "cuda")

            def run_bound() -> None:
                with _translating_errors(source):
                    session.run_with_iobinding(binding)

            yield run_bound

    @property
    def times_nodes(self) -> bool:
        """Whether profiles have the times that nodes take; other providers note when nodes are queued."""
        return self.provider == "CPUExecutionProvider"

    @contextmanager
    def profiled(self, model: Model, feed: Feed, threads: int) -> Iterator[Profiled]:
        """Load a model as it is deployed, to time its nodes in repeated runs on the same inputs.

        Args:
            model: The model.
            feed: The inputs.
            threads: As for `ready`.

        Raises:
            UnsupportedError: The runtime does not accept the model.
        """
        options = self._options(is_deployed=True)
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        with materialized(model, is_deployed=True) as source, scratch() as folder:
            options.profile_file_prefix = str(folder / "profile")
            with self._session(source, options) as session:
                run = self._run(session, source)
                yield Profiled(lambda: run(feed), lambda: runs_of(_events(session)))

    def executed(self, model: Model, feeds: Iterable[Feed]) -> Executed:
        """Count the runs of all nodes on these inputs, with those in bodies and functions.

        Raises:
            UnsupportedError: The runtime does not accept the model.
            RejectedError: The model fails on the inputs.
        """
        options = self._options()
        # Optimizations fuse nodes and rename them.
        options.graph_optimization_level = self.module.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_profiling = True
        with materialized(model) as source, scratch() as folder:
            options.profile_file_prefix = str(folder / "profile")
            with (
                self._session(source, options) as session,
                interruptible(self.module.RunOptions) as ending,
            ):
                run = self._run(session, source, ending)
                for feed in feeds:
                    run(feed)
                names = [event["name"] for event in _events(session) if event.get("cat") == "Node"]
        return Executed(Counter(name.removesuffix(KERNEL) for name in names if name.endswith(KERNEL)))

    def fused(self, model: Model) -> dict[str, int]:
        """Count the runtime's own operators in a model once it is optimized, by operator type.

        Raises:
            UnsupportedError: The runtime does not accept the model.
            InputError: The provider does not start on this machine.
        """
        options = self._options()
        options.intra_op_num_threads = 1  # Nothing runs, so no threads need to start.
        options.graph_optimization_level = self.module.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        # Reading the nodes need not read the weights.
        options.add_session_config_entry(_OPTIMIZED_DATA, "weights")
        options.add_session_config_entry(f"{_OPTIMIZED_DATA[: -len('file_name')]}min_size_in_bytes", "1024")
        with materialized(model) as source, scratch() as folder:
            path = folder / "optimized.onnx"
            options.optimized_model_filepath = str(path)
            with self._session(source, options):
                pass
            proto = onnx.load(path, load_external_data=False)
        nodes = (node for scope in scopes(proto) for node in scope.nodes)
        return dict(sorted(Counter(node.op_type for node in nodes if node.domain == OWN).items()))

    def _options(self, *, is_deployed: bool = False) -> Any:
        options = self.module.SessionOptions()
        options.log_severity_level = 4  # Failures are raised, so logging them would repeat them.
        # By default, idle threads spin. That makes runs faster, but takes cores from a second session or from
        # BLAS. A timed session spins like a deployed one, but stops between two runs.
        spinning = "session.force_spinning_stop" if is_deployed else "session.intra_op.allow_spinning"
        options.add_session_config_entry(spinning, "1" if is_deployed else "0")
        # Memory patterns save time if a model runs often, but hold all tensors of a run a second time.
        options.enable_mem_pattern = is_deployed
        return options

    @contextmanager
    def _session(self, source: Source, options: Any) -> Iterator[Any]:
        """A session that ends with the block; until then, Windows deletes no file that it has mapped."""
        providers = list(dict.fromkeys((self.provider, "CPUExecutionProvider")))
        if source.folder:
            options.add_session_config_entry(_DATA_FOLDER, source.folder)
        try:
            session = self.module.InferenceSession(source.model, options, providers=providers)
        except Exception as error:
            raise UnsupportedError(one_line(error, source)) from error
        if self.provider not in session.get_providers():
            raise InputError(
                f"The execution provider {self.provider} does not start on this machine: check its driver "
                "and libraries, or pass --provider CPUExecutionProvider."
            )
        for value in (*session.get_inputs(), *session.get_outputs()):
            if any(name in value.type for name in _NOT_IN_NUMPY):
                raise UnsupportedError(
                    f"its Python interface cannot pass {value.type}, the type of {value.name!r}"
                )
        try:
            yield proxy(session)
        finally:
            del session

    @staticmethod
    def _run(session: Any, source: Source, ending: Callable[[Call], list[Any]] = _directly) -> Run:
        names = [output.name for output in session.get_outputs()]

        def run(feed: Feed) -> dict[str, Any]:
            with _translating_errors(source):
                values = ending(lambda options: session.run(names, dict(feed), options))
            return dict(zip(names, values, strict=True))

        return run


def _events(session: Any) -> list[dict[str, Any]]:
    """End the profile of a session and read its events."""
    events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return events


@contextmanager
def _translating_errors(source: Source) -> Iterator[None]:
    """Turn the runtime's exceptions into UnsupportedError or RejectedError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        message = one_line(error, source)
        # Some kernels report an unsupported type only when they run.
        unsupported = re.search(r"not (yet )?support|not implemented", message, re.IGNORECASE)
        raise (UnsupportedError if unsupported else RejectedError)(message) from error


def runtime(provider: str) -> Runtime:
    """ONNX Runtime with an execution provider.

    Raises:
        InputError: ONNX Runtime is not installed, or it has no such provider.
    """
    try:
        # An optional dependency: it comes with an extra.
        import onnxruntime
    except ImportError as error:
        raise InputError(
            "ONNX Runtime, which compares the two models, is not installed: "
            "install onnx-lowrank[cpu] or onnx-lowrank[gpu]."
        ) from error
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise InputError(
            f"There is no execution provider {provider!r} in this ONNX Runtime: "
            f"pass one of {', '.join(available)}."
        )
    return Runtime(onnxruntime, provider)
