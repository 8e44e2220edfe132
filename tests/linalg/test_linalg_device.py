"""What devices get and give back, and who computes there."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from devices import fake
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.linalg.device import LEAST, Room, packed
from onnx_lowrank.linalg.factorize import factorize
from onnx_lowrank.linalg.spectra import spectra

CPU = resolve("cpu")


# --- transfers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "sent"),
    [
        (np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float32),
        (np.int8, np.float32),
        (np.float32, np.float32),
        (np.int32, np.float64),
        (np.float64, np.float64),
    ],
)
def test_numbers_travel_exactly(dtype, sent):
    values = np.array([[1.5, -2.0, 3.0], [0.0, 7.0, -120.0]]).astype(dtype)
    array, axes = packed(values)
    assert array.dtype == sent
    assert (array.transpose(axes) == values.astype(np.float64)).all()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_permuted_weights_travel_without_a_copy(order):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(order)
    array, axes = packed(values)
    assert np.shares_memory(array, values)
    assert array.flags.c_contiguous
    assert (array.transpose(axes) == values).all()


def test_a_view_with_gaps_is_copied():
    values = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
    array, axes = packed(values)
    assert array.flags.c_contiguous
    assert (array.transpose(axes) == values).all()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [0, 1, 5, (1 << 21) + 1, 5 << 20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_gpu_gives_back_what_it_got(size, dtype, cuda):
    values = np.random.default_rng(0).standard_normal(size).astype(dtype)
    with cuda.lane(size) as place:
        found = place.to_numpy(place.held(values))
    assert found.dtype == dtype
    assert (found == values).all()


# --- room ---------------------------------------------------------------------------------------------


def test_computations_wait_until_there_is_room():
    room, lock, taken, most = Room(25), threading.Lock(), [0], [0]

    def compute(nbytes):
        with room.take(nbytes):
            with lock:
                taken[0] += nbytes
                most[0] = max(most[0], taken[0])
            time.sleep(0.01)
            with lock:
                taken[0] -= nbytes

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(compute, [10] * 12))
    assert most[0] == 20


def test_the_largest_computation_runs_alone_and_one_within_another_waits_for_nothing():
    room = Room(5)
    with room.take(100), room.take(100):
        pass
    with room.take(5):
        pass


def test_an_error_leaves_its_room():
    room = Room(5)
    with pytest.raises(ValueError, match="no"), room.take(5):
        raise ValueError("no")
    with room.take(5):
        pass


# --- the place of a computation -----------------------------------------------------------------------

WEIGHT = np.random.default_rng(3).standard_normal((1, 40, 64)).astype(np.float32)
WANTED = {Fold.ENCODE: (1, 2, 4, 8)}


def test_a_device_gets_a_weight_once_and_gives_back_values_and_small_gram_matrices():
    """Slices of 64, 32 and 16 columns: 40 values; from two halves 2 · 32; Gram matrices of 16 and 8."""
    backend = fake(least=32)
    found = spectra(WEIGHT, WANTED, backend)
    for key, sigma in spectra(WEIGHT, WANTED, CPU).items():
        np.testing.assert_allclose(found[key], sigma, rtol=1e-12)
    assert backend.device.up == [WEIGHT.nbytes]
    assert sorted(backend.device.down) == sorted([8 * 40, 8 * 64, 8 * 4 * 16**2, 8 * 8 * 8**2])


def test_small_matrices_stay_on_the_host_and_give_its_bits():
    backend = fake(least=41)
    found = spectra(WEIGHT, WANTED, backend)
    factors = factorize(WEIGHT, Option(Fold.ENCODE, 2, 9), backend)
    assert not backend.device.up + backend.device.down + backend.device.lanes
    for key, sigma in spectra(WEIGHT, WANTED, CPU).items():
        assert (found[key] == sigma).all()
    expected = factorize(WEIGHT, Option(Fold.ENCODE, 2, 9), CPU)
    assert (factors.encoder == expected.encoder).all()
    assert (factors.decoder == expected.decoder).all()


def test_large_factors_come_from_the_device():
    backend = fake(least=32)
    option = Option(Fold.ENCODE, 1, 9)
    factors, expected = factorize(WEIGHT, option, backend), factorize(WEIGHT, option, CPU)
    np.testing.assert_allclose(factors.encoder, expected.encoder, atol=1e-12)
    np.testing.assert_allclose(factors.decoder, expected.decoder, atol=1e-12)
    assert backend.device.up == [WEIGHT.nbytes]
    assert sum(backend.device.down) == factors.encoder.nbytes + factors.decoder.nbytes


@pytest.mark.gpu
def test_a_gpu_and_its_host_share_the_sizes(cuda):
    """Sizes on both sides of the threshold, as the program has them."""
    from onnx_lowrank.linalg.cuda import Cuda

    weight = np.random.default_rng(4).standard_normal((1, 640, 2560)).astype(np.float32)
    wanted = {Fold.ENCODE: (1, 2, 4, 8, 16)}
    backend = type(cuda)("cuda", cuda.xp, device=Cuda())
    assert backend.device.least == LEAST
    found, again = (spectra(weight, wanted, backend) for _ in range(2))
    for key, sigma in spectra(weight, wanted, CPU).items():
        np.testing.assert_allclose(found[key], sigma, rtol=1e-10)
        assert (found[key] == again[key]).all()


@pytest.mark.gpu
def test_several_layers_at_once_get_the_bits_that_they_get_alone(cuda):
    weights = [
        np.random.default_rng(n).standard_normal((1, 96 + 32 * n, 256)).astype(np.float32) for n in range(8)
    ]
    wanted = {Fold.ENCODE: (1, 2, 4)}
    alone = [spectra(weight, wanted, cuda) for weight in weights]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda weight: spectra(weight, wanted, cuda), weights))
    for one, other in zip(alone, together, strict=True):
        assert all((one[key] == other[key]).all() for key in one)


@pytest.mark.gpu
def test_a_gpu_that_is_full_leaves_a_computation_to_the_cpu(cuda, caplog):
    def needs_everything(place):
        if place.device is not None:
            place.xp.empty(place.device.capacity * 4, dtype=place.xp.uint8)
        return place.name

    assert cuda.attempt(needs_everything, 1) == "cpu"
    assert "failed on the GPU (Out of memory" in caplog.text
