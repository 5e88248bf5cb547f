"""Where a run is to take place and at what price: as a user states it, and as the planner counts it."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_model.errors import ConfigError
from nanochat_model.hardware import require_device

DEVICES_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a run is to take place, and at what price."""

    device: str = "h100"
    num_devices: int = 1
    price_per_device_hour: float | None = None  # dollars
    network_bytes_per_second: float = 1.25e10  # between nodes: 100 Gb/s Ethernet or one InfiniBand port
    devices_per_node: int = DEVICES_PER_NODE
    mfu: float | None = None
    tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise ConfigError(f"num_devices {self.num_devices} must be at least 1")
        if self.devices_per_node < 1:
            raise ConfigError(f"devices_per_node {self.devices_per_node} must be at least 1")
        if not self.network_bytes_per_second > 0:
            raise ConfigError(f"network of {self.network_bytes_per_second * 8 / 1e9:g} Gb/s must be over 0")
        if self.price_per_device_hour is not None and not 0 <= self.price_per_device_hour < float("inf"):
            raise ConfigError(f"price {self.price_per_device_hour} must be 0 or more dollars a device and hour")

    @property
    def num_nodes(self) -> int:
        return -(-self.num_devices // self.devices_per_node)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Devices, their price and their speed."""

    device: str = "h100"
    """h100, h200, mi300x, mi325x, a100-40gb, a100-80gb, b200, or cpu."""
    num_devices: int = 1
    devices_per_node: int = DEVICES_PER_NODE
    price: float | None = None
    """Dollars a device and hour."""
    network_gbits: float = 100.0
    """Between nodes, gigabits a second."""
    mfu: float | None = None
    """Share of the peak to assume, 0 to 1."""
    tokens_per_second: float | None = None
    """Measured speed over all devices."""

    def target(self) -> Target:
        """Raises ConfigError on fewer than one device, a negative price, a network without speed, and a device that is not in the
        table of peaks, unless its speed is given."""
        if self.device != "cpu" and self.tokens_per_second is None:
            require_device(self.device)
        return Target(
            device=self.device,
            num_devices=self.num_devices,
            devices_per_node=self.devices_per_node,
            price_per_device_hour=self.price,
            network_bytes_per_second=self.network_gbits * 1e9 / 8,
            mfu=self.mfu,
            tokens_per_second=self.tokens_per_second,
        )
