"""Power, energy and clocks of a card, in the units of the logs: watts, joules, MHz.

NVML (nvidia-ml-py) is asked only where training runs on an NVIDIA card. Without it, or where a card does not tell, the
figure is left out rather than guessed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)


class PowerMeter:
    """Power and energy of one NVIDIA card, the whole card, whoever uses it.

    Args:
        uuid: the card as torch names it, without ``GPU-``; not its number, which CUDA_VISIBLE_DEVICES changes.
        nvml: the module that speaks to the driver.

    Raises:
        Exception: NVML's own, where it is not there or does not know the card.
    """

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        if nvml is None:
            import pynvml

            nvml = pynvml
        self._nvml = nvml
        nvml.nvmlInit()
        self._card = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")

    def energy_joules(self) -> float | None:
        """Energy since the driver was loaded; None where the card does not count it (before Volta)."""
        return self._asked(self._nvml.nvmlDeviceGetTotalEnergyConsumption, 1000)

    def power_watts(self) -> float | None:
        """Power at this moment; None where the card does not tell."""
        return self._asked(self._nvml.nvmlDeviceGetPowerUsage, 1000)

    def clocks_mhz(self) -> dict[str, float]:
        """The clocks at this moment, ``sm`` and ``memory``; without those that the card does not tell."""
        kinds = {"sm": self._nvml.NVML_CLOCK_SM, "memory": self._nvml.NVML_CLOCK_MEM}
        found = {name: self._asked(self._nvml.nvmlDeviceGetClockInfo, 1, kind) for name, kind in kinds.items()}
        return {name: clock for name, clock in found.items() if clock is not None}

    def _asked(self, question: Callable[..., int], unit: int, *arguments: int) -> float | None:
        try:
            return question(self._card, *arguments) / unit
        except self._nvml.NVMLError:
            return None


def power_meter(device: torch.device) -> PowerMeter | None:
    """The meter of a device; None where there is none to be had, which is said once."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    try:
        return PowerMeter(str(torch.cuda.get_device_properties(device).uuid))
    except Exception as error:
        logger.info("No power and energy in the logs: NVML says %s.", " ".join(str(error).split()) or repr(error))
        return None
